//! Answers to many prompts: each is that of its prompt and seed, whatever is written beside it.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{config, model, spec, tokenizer};
use serde_json::json;
use tercet_model::{
    Ask, Finish, Generator, Model, Result, Sampling, Together, Tokenizer, Written, sample_many,
};
use tercet_tensor::{DType, Tensor};

const END: u32 = 257;

fn tiny() -> Model {
    model(config(json!({ "vocab_size": 258, "nsa": spec("mean"), "max_position_embeddings": 64 })))
}

fn dense() -> Model {
    model(config(json!({ "vocab_size": 258, "max_position_embeddings": 64 })))
}

/// Prompts of several lengths, some of them more than once and not side by side.
fn asks(tokenizer: &Tokenizer, count: usize) -> Vec<Ask> {
    let texts = ["hello", "x", "a longer prompt, over a block or two", "hello", "日本"];
    (0..count)
        .map(|i| Ask {
            prompt: tokenizer.encode(texts[i % texts.len()], true).unwrap(),
            seed: i as u64,
        })
        .collect()
}

/// Hot enough that a random model's texts differ and reach its end token now and then.
fn hot() -> Sampling {
    Sampling { temperature: 2.0, top_p: 1.0, max_tokens: 30, ..Sampling::default() }
}

fn run(
    model: &Model,
    asks: &[Ask],
    sampling: &Sampling,
    ends: &[u32],
    at_once: usize,
) -> Result<BTreeMap<usize, Written>> {
    let stop = AtomicBool::new(false);
    let mut done = BTreeMap::new();
    let together = Together { at_once, stop: &stop };
    let answered = sample_many(
        model,
        &tokenizer(),
        asks,
        sampling,
        Some(ends),
        together,
        &mut |at, written| {
            assert!(done.insert(at, written).is_none(), "ask {at} was answered twice");
        },
    )?;
    assert_eq!(answered, done.len());
    Ok(done)
}

#[test]
fn answers_do_not_depend_on_how_many_are_written_at_once() {
    let tokenizer = tokenizer();
    let asks = asks(&tokenizer, 45);
    for model in [tiny(), dense()] {
        let one = run(&model, &asks, &hot(), &[END, 3, 40], 1).unwrap();
        assert_eq!(one.len(), asks.len());
        let ended = one.values().filter(|w| w.finish == Finish::EndOfText).count();
        assert!(ended > 0 && ended < asks.len(), "{ended} answers ended by themselves");
        for at_once in [2, 7, 32, 33, 100] {
            assert_eq!(run(&model, &asks, &hot(), &[END, 3, 40], at_once).unwrap(), one);
        }
    }
}

#[test]
fn answers_are_those_of_a_generator() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let asks = asks(&tokenizer, 12);
    for sampling in [
        hot(),
        Sampling { stop: vec!["e".into(), "日".into()], ..hot() },
        Sampling { repetition_penalty: 1.5, top_k: 40, top_p: 0.9, ..hot() },
        Sampling::greedy(9),
    ] {
        let many = run(&model, &asks, &sampling, &[END], 5).unwrap();
        for (at, ask) in asks.iter().enumerate() {
            let mut generator = Generator::new(&model, &tokenizer, Some(vec![END])).unwrap();
            let sampling = Sampling { seed: ask.seed, ..sampling.clone() };
            let mut go = |_: &str| ControlFlow::Continue(());
            let one = generator.generate(&ask.prompt, &sampling, &mut go).unwrap();
            let other = &many[&at];
            assert_eq!((&one.tokens, &one.text), (&other.tokens, &other.text), "ask {at}");
            assert_eq!(one.finish, other.finish);
        }
    }
}

#[test]
fn equal_seeds_write_equal_answers_and_others_differ() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let prompt = tokenizer.encode("hello", true).unwrap();
    let asks: Vec<Ask> =
        [5, 6, 5, 7].iter().map(|&seed| Ask { prompt: prompt.clone(), seed }).collect();
    let done = run(&model, &asks, &hot(), &[], 3).unwrap();
    assert_eq!(done[&0], done[&2]);
    assert_ne!(done[&0].tokens, done[&1].tokens);
    assert_ne!(done[&0].tokens, done[&3].tokens);
    assert_ne!(done[&1].tokens, done[&3].tokens);
}

/// The sum over a whole pass of the model, in f64. Logits of the two ways differ by at most 1e-4
/// of the largest (`tests/decoder.rs`), which is below 10 here, and at most 31 tokens count, each
/// with its logit and its normaliser: 31·2·1e-3.
#[test]
fn the_log_probability_is_that_of_the_tokens_under_the_plain_model() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let asks = asks(&tokenizer, 20);
    let sampling = Sampling { top_k: 50, repetition_penalty: 1.2, ..hot() };
    let done = run(&model, &asks, &sampling, &[END, 3, 40], 8).unwrap();
    assert!(done.values().any(|written| written.ended.is_some()));
    for (at, written) in &done {
        let prompt = &asks[*at].prompt;
        let answer: Vec<u32> = written.tokens.iter().copied().chain(written.ended).collect();
        assert_eq!(written.ended.is_some(), written.finish == Finish::EndOfText);
        let all: Vec<i32> = prompt.iter().chain(&answer).map(|&id| id as i32).collect();
        // The last token is never read.
        let read = &all[..all.len() - 1];
        let logits = model.logits(read, &[0, read.len() as i32]).unwrap().to_vec_f32().unwrap();
        let rows: Vec<&[f32]> = logits.chunks(258).collect();
        assert!(logits.iter().all(|l| l.abs() < 10.0));
        let mut sum = 0.0;
        for (i, &token) in answer.iter().enumerate() {
            let row = rows[prompt.len() - 1 + i];
            let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            sum += f64::from(row[token as usize]) - total.ln();
        }
        let error = (sum - written.log_prob).abs();
        assert!(error < 0.062, "ask {at}: {} is not {sum}", written.log_prob);
        assert!(written.log_prob < 0.0);
    }
}

#[test]
fn a_full_context_and_max_tokens_end_an_answer() {
    let model = tiny();
    let long = Ask { prompt: vec![7; 63], seed: 1 };
    let short = Ask { prompt: vec![7; 50], seed: 1 };
    let sampling = Sampling { max_tokens: 8, ..hot() };
    let done = run(&model, &[long, short], &sampling, &[], 2).unwrap();
    // The last token is chosen from a full cache.
    assert_eq!((&done[&0].finish, done[&0].tokens.len()), (&Finish::ContextFull, 2));
    assert_eq!((&done[&1].finish, done[&1].tokens.len()), (&Finish::MaxTokens, 8));
    assert!(done.values().all(|written| written.ended.is_none()));
}

#[test]
fn an_answer_may_end_with_its_first_token() {
    let model = tiny();
    let asks: Vec<Ask> = (0..7).map(|seed| Ask { prompt: vec![7, 8], seed }).collect();
    // Every token ends.
    let ends: Vec<u32> = (0..258).collect();
    let done = run(&model, &asks, &hot(), &ends, 2).unwrap();
    assert_eq!(done.len(), 7);
    for written in done.values() {
        assert_eq!((written.tokens.len(), written.text.as_str()), (0, ""));
        assert!(written.ended.is_some() && written.log_prob < 0.0);
    }
}

#[test]
fn a_raised_stop_keeps_what_is_done_and_drops_the_rest() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let asks = asks(&tokenizer, 20);
    let whole = run(&model, &asks, &hot(), &[END, 3, 40], 4).unwrap();
    let stop = AtomicBool::new(false);
    let mut done = BTreeMap::new();
    let together = Together { at_once: 4, stop: &stop };
    let ends = [END, 3, 40];
    let answered = sample_many(
        &model,
        &tokenizer,
        &asks,
        &hot(),
        Some(&ends),
        together,
        &mut |at, written| {
            done.insert(at, written);
            stop.store(done.len() >= 3, Ordering::Relaxed);
        },
    )
    .unwrap();
    assert_eq!(answered, done.len());
    // Others may end in the same step.
    assert!((3..=3 + 4).contains(&answered), "{answered}");
    assert!(done.iter().all(|(at, written)| whole[at] == *written));
    // Raised before: nothing at all.
    let mut none = |_: usize, _: Written| panic!("nothing was to be written");
    let answered =
        sample_many(&model, &tokenizer, &asks, &hot(), None, together, &mut none).unwrap();
    assert_eq!(answered, 0);
}

#[test]
fn what_cannot_be_answered_is_refused_with_the_ask() {
    let model = tiny();
    let good = Ask { prompt: vec![1], seed: 0 };
    let refuse = |ask: Ask, words: &str| {
        let error = run(&model, &[good.clone(), ask], &hot(), &[], 2).unwrap_err();
        assert!(error.is_users());
        assert!(error.to_string().contains(words), "{error}");
    };
    refuse(Ask { prompt: vec![], seed: 0 }, "ask 1: the prompt has no tokens");
    refuse(Ask { prompt: vec![1; 64], seed: 0 }, "ask 1: the prompt has 64 tokens");
    refuse(Ask { prompt: vec![1, 258], seed: 0 }, "ask 1: token id 258");
    let text = run(&model, std::slice::from_ref(&good), &hot(), &[], 0).unwrap_err().to_string();
    assert!(text.contains("at_once = 0"), "{text}");
    let sampling = Sampling { top_p: 0.0, ..hot() };
    let text = run(&model, &[], &sampling, &[], 1).unwrap_err().to_string();
    assert!(text.contains("top_p"), "{text}");
    assert!(run(&model, &[], &hot(), &[], 1).unwrap().is_empty());
    // A vocabulary smaller than the tokenizer's.
    let small = common::model(config(json!({ "vocab_size": 200 })));
    let text = run(&small, &[good], &hot(), &[], 1).unwrap_err().to_string();
    assert!(text.contains("vocab_size is 200"), "{text}");
}

#[test]
fn a_model_of_nan_is_reported_with_the_ask() {
    for mut model in [tiny(), dense()] {
        let slot = model.params().slot("model.layers.1.self_attn.o_proj.weight").unwrap();
        let shape = model.params().tensor(slot).shape().to_vec();
        let nan = Tensor::from_f32(vec![f32::NAN; shape.iter().product()], &shape).unwrap();
        model.params_mut().set(slot, nan.to_dtype(DType::F32).unwrap()).unwrap();
        let asks = vec![Ask { prompt: vec![1, 2], seed: 0 }; 3];
        let text = run(&model, &asks, &hot(), &[], 2).unwrap_err().to_string();
        assert!(text.contains("ask 0: the model's output is not a number"), "{text}");
    }
}
