//! Writing text: streaming, stopping, sampling, and what is refused.

mod common;

use std::ops::ControlFlow;

use common::{config, model, tokenizer};
use proptest::prelude::*;
use serde_json::json;
use tercet_model::{Finish, Generator, Model, Sampler, Sampling, Tokenizer};

fn tiny() -> Model {
    model(config(json!({ "vocab_size": 258, "nsa": common::spec("mean"),
                         "max_position_embeddings": 64 })))
}

fn write(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &str,
    sampling: &Sampling,
) -> (String, tercet_model::Generation) {
    let mut generator = Generator::new(model, tokenizer, Some(vec![257])).unwrap();
    let ids = tokenizer.encode(prompt, true).unwrap();
    let mut streamed = String::new();
    let done = generator
        .generate(&ids, sampling, &mut |piece| {
            assert!(!piece.is_empty());
            streamed.push_str(piece);
            ControlFlow::Continue(())
        })
        .unwrap();
    (streamed, done)
}

#[test]
fn what_is_streamed_is_the_text_whatever_the_model_writes() {
    let (model, tokenizer) = (tiny(), tokenizer());
    for seed in 0..20 {
        let sampling =
            Sampling { seed, temperature: 3.0, top_p: 1.0, max_tokens: 40, ..Sampling::default() };
        let (streamed, done) = write(&model, &tokenizer, "日本", &sampling);
        assert_eq!(streamed, done.text);
        assert_eq!(done.text, tokenizer.decode(&done.tokens).unwrap());
        assert!(done.tokens.len() <= 40 && done.prompt_tokens == 6);
        let (again, _) = write(&model, &tokenizer, "日本", &sampling);
        assert_eq!(streamed, again, "the same seed wrote another text");
    }
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_shown() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let greedy = Sampling::greedy(30);
    let (whole, _) = write(&model, &tokenizer, "abc", &greedy);
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[3..5].iter().collect();
    let expected = &whole[..whole.find(&stop).unwrap()];
    let (streamed, done) =
        write(&model, &tokenizer, "abc", &Sampling { stop: vec![stop.clone()], ..greedy });
    assert_eq!(streamed, expected);
    assert_eq!(done.text, expected);
    assert_eq!(done.finish, Finish::Stop(stop));
}

#[test]
fn an_end_token_max_tokens_the_context_and_the_caller_each_end_a_text() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let ids = tokenizer.encode("abc", true).unwrap();
    let mut generator = Generator::new(&model, &tokenizer, Some(vec![])).unwrap();
    let mut go = |_: &str| ControlFlow::Continue(());
    let done = generator.generate(&ids, &Sampling::greedy(5), &mut go).unwrap();
    assert_eq!((done.finish, done.tokens.len(), done.decode_steps), (Finish::MaxTokens, 5, 4));
    let first = done.tokens[0];

    let done = generator.generate(&ids, &Sampling::greedy(1000), &mut go).unwrap();
    // The last token is chosen from a full cache.
    assert_eq!((done.finish, done.tokens.len()), (Finish::ContextFull, 64 - 3 + 1));

    let mut stop = |_: &str| ControlFlow::Break(());
    let done = generator.generate(&ids, &Sampling::greedy(50), &mut stop).unwrap();
    assert_eq!(done.finish, Finish::Cancelled);

    let mut generator = Generator::new(&model, &tokenizer, Some(vec![first])).unwrap();
    let done = generator.generate(&ids, &Sampling::greedy(5), &mut go).unwrap();
    assert_eq!((done.finish, done.text.as_str(), done.tokens.len()), (Finish::EndOfText, "", 0));
}

/// The next turn of a conversation reads only what is new, and writes what a fresh cache would.
#[test]
fn a_prompt_that_begins_with_the_cache_is_not_read_again() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let mut go = |_: &str| ControlFlow::Continue(());
    let mut generator = Generator::new(&model, &tokenizer, Some(vec![])).unwrap();
    let ids = tokenizer.encode("hello", true).unwrap();
    let first = generator.generate(&ids, &Sampling::greedy(6), &mut go).unwrap();
    assert_eq!(first.read_tokens, 5);
    let mut next: Vec<u32> = ids.iter().chain(&first.tokens).copied().collect();
    next.extend(tokenizer.encode("more", true).unwrap());
    let second = generator.generate(&next, &Sampling::greedy(6), &mut go).unwrap();
    // Of the six written tokens the last was never read.
    assert_eq!(second.read_tokens, 1 + 4);
    let mut fresh = Generator::new(&model, &tokenizer, Some(vec![])).unwrap();
    let same = fresh.generate(&next, &Sampling::greedy(6), &mut go).unwrap();
    assert_eq!((same.read_tokens, &same.tokens), (next.len(), &second.tokens));
    // Another text, or the same again, starts over.
    let again = generator.generate(&next, &Sampling::greedy(6), &mut go).unwrap();
    assert_eq!((again.read_tokens, &again.tokens), (next.len(), &second.tokens));
}

#[test]
fn prompts_that_cannot_be_continued_are_refused_with_the_numbers() {
    let (model, tokenizer) = (tiny(), tokenizer());
    let mut generator = Generator::new(&model, &tokenizer, None).unwrap();
    let mut go = |_: &str| ControlFlow::Continue(());
    let mut refuse = |ids: &[u32], word: &str| {
        let error = generator.generate(ids, &Sampling::greedy(5), &mut go).unwrap_err();
        assert!(error.is_users());
        assert!(error.to_string().contains(word), "{error}");
    };
    refuse(&[], "no tokens");
    refuse(&[1; 64], "the prompt has 64 tokens, but the model's context of 64");
    refuse(&[1, 999], "token id 999");
    let small = model_with_vocab(200);
    let Err(error) = Generator::new(&small, &tokenizer, None) else { panic!("it does not fit") };
    assert!(
        error.to_string().contains("ids up to 257, but the model's vocab_size is 200"),
        "{error}"
    );
}

fn model_with_vocab(vocab: usize) -> Model {
    model(config(json!({ "vocab_size": vocab })))
}

#[test]
fn settings_outside_their_range_are_refused_by_name() {
    let base = Sampling::default();
    for (sampling, word) in [
        (Sampling { temperature: -1.0, ..base.clone() }, "temperature = -1"),
        (Sampling { temperature: 999_999.0, ..base.clone() }, "temperature = 999999"),
        (Sampling { temperature: f32::NAN, ..base.clone() }, "temperature = NaN"),
        (Sampling { top_p: -1.0, ..base.clone() }, "top_p = -1"),
        (Sampling { top_p: 0.0, ..base.clone() }, "top_p = 0"),
        (Sampling { top_p: 1.1, ..base.clone() }, "top_p"),
        (Sampling { min_p: 1.5, ..base.clone() }, "min_p"),
        (Sampling { min_p: f32::NAN, ..base.clone() }, "min_p"),
        (Sampling { repetition_penalty: 0.0, ..base.clone() }, "repetition_penalty"),
        (Sampling { repetition_penalty: f32::INFINITY, ..base.clone() }, "repetition_penalty"),
        (Sampling { frequency_penalty: 2.01, ..base.clone() }, "frequency_penalty = 2.01"),
        (Sampling { presence_penalty: f32::NAN, ..base.clone() }, "presence_penalty = NaN"),
        (Sampling { logit_bias: vec![(3, -100.5)], ..base.clone() }, "logit_bias of token 3"),
        (Sampling { max_tokens: 0, ..base.clone() }, "max_tokens"),
        (Sampling { stop: vec![String::new()], ..base }, "empty stop"),
    ] {
        let text = sampling.validate().unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    }
}

fn draws(sampling: &Sampling, logits: &[f32], count: usize) -> Vec<f64> {
    let mut counts = vec![0f64; logits.len()];
    for seed in 0..count as u64 {
        let sampling = Sampling { seed, ..sampling.clone() };
        let mut sampler = Sampler::new(&sampling).unwrap();
        counts[sampler.next(logits).unwrap() as usize] += 1.0 / count as f64;
    }
    counts
}

/// Four standard errors of a frequency from 4000 draws: 4·√(¼/4000) = 0.032.
#[test]
fn tokens_come_with_the_probability_of_their_filtered_softmax() {
    let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY, -1.0];
    let softmax = |keep: &[usize], temperature: f64| -> Vec<f64> {
        let e = |i: usize| (f64::from(logits[i]) / temperature).exp();
        let total: f64 = keep.iter().map(|&i| e(i)).sum();
        (0..5).map(|i| if keep.contains(&i) { e(i) / total } else { 0.0 }).collect()
    };
    let base = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
    for (sampling, expected) in [
        (base.clone(), softmax(&[0, 1, 2, 4], 1.0)),
        (Sampling { temperature: 2.0, ..base.clone() }, softmax(&[0, 1, 2, 4], 2.0)),
        (Sampling { top_k: 2, ..base.clone() }, softmax(&[1, 2], 1.0)),
        (Sampling { top_k: 99, ..base.clone() }, softmax(&[0, 1, 2, 4], 1.0)),
        // Probabilities are 0.644, 0.237, 0.087, 0.032.
        (Sampling { top_p: 0.5, ..base.clone() }, softmax(&[2], 1.0)),
        (Sampling { top_p: 0.7, ..base.clone() }, softmax(&[1, 2], 1.0)),
        (Sampling { min_p: 0.1, ..base.clone() }, softmax(&[0, 1, 2], 1.0)),
        (Sampling { temperature: 0.0, ..base }, softmax(&[2], 1.0)),
    ] {
        let got = draws(&sampling, &logits, 4000);
        for (g, e) in got.iter().zip(&expected) {
            assert!((g - e).abs() < 0.032, "{sampling:?}: {got:?} is not {expected:?}");
            assert!(*e > 0.0 || *g == 0.0, "{sampling:?}: a token that was filtered out came");
        }
    }
}

#[test]
fn the_repetition_penalty_lowers_what_was_seen_on_both_sides_of_zero() {
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy(9) };
    let mut sampler = Sampler::new(&sampling).unwrap();
    sampler.see(0);
    sampler.see(1);
    assert_eq!(sampler.next(&[3.0, 2.9, 2.0]).unwrap(), 2, "3 and 2.9 are halved");
    assert_eq!(sampler.next(&[-1.0, -2.0, -2.0]).unwrap(), 0, "−1 is doubled and ties with none");
    assert_eq!(sampler.next(&[-1.0, -2.0, -0.9, -1.9]).unwrap(), 2);
    assert_eq!(sampler.next(&[1.0, 1.0, 1.0, 0.9]).unwrap(), 3, "2 was chosen, so it is seen");
}

#[test]
fn a_diverged_model_is_reported_and_not_sampled() {
    let sampling = Sampling::default();
    let mut sampler = Sampler::new(&sampling).unwrap();
    for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[]] {
        assert!(sampler.next(logits).unwrap_err().to_string().contains("not a number"));
    }
}

proptest! {
    /// Whatever ids come, the pieces put together are the decoded text, and no piece is cut
    /// inside a character.
    #[test]
    fn streamed_pieces_are_the_decoded_text(ids in prop::collection::vec(0u32..258, 0..120)) {
        let tokenizer = tokenizer();
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &id in &ids {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        prop_assert_eq!(text, tokenizer.decode(&ids).unwrap());
    }
}

#[test]
fn a_character_split_over_tokens_comes_out_whole_and_at_once() {
    let tokenizer = tokenizer();
    // "x" and the first byte of "日" are one token, the other two bytes one each.
    let ids = tokenizer.encode("x日🦀.", true).unwrap();
    assert_eq!(ids.len(), 1 + 2 + 4 + 1);
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["x", "", "日", "", "", "", "🦀", "."]);
    assert_eq!(stream.finish().unwrap(), "");
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(ids[0]).unwrap(), "x");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}", "an unfinished character is shown as such");
}

/// Llama 2's way: "▁" for spaces, the first one dropped, bytes as tokens of their own. There a
/// run of bytes is broken as a whole until it is complete.
#[test]
fn sentence_piece_spaces_and_bytes_stream_as_they_decode() {
    let tokens = ["<unk>", "▁Hi", "▁you", "<0xE6>", "<0x97>", "<0xA5>", "<0x0A>", "!"];
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, t)| (t.to_string(), json!(id))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": [] },
    });
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    let ids = [1, 2, 6, 3, 4, 5, 7, 2, 3, 7];
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap());
    assert_eq!(pieces[..8], ["Hi", " you", "\n", "", "", "日", "!", " you"]);
}
