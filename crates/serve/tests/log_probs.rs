//! Log-probabilities of the engine are those that training computes, to rounding.

mod common;

use common::*;
use tercet_model::{Batch, ForwardOptions, Model};
use tercet_serve::engine::{Event, LogProbs, Request};
use tercet_tensor::{DType, Tape};

/// `ln p` of every token but the first, by the forward pass that training runs.
fn trained(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let tokens: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let batch = Batch::next_token(&[&tokens]);
    let mut tape = Tape::inference();
    let found = model.token_log_probs(&mut tape, &batch, &ForwardOptions::default()).unwrap();
    let mut values = found.log_probs.value().to_vec_f32().unwrap();
    values.pop();
    values
}

fn prompt_log_probs(events: &[Event]) -> Vec<Option<LogProbs>> {
    let found = events.iter().filter_map(|event| match event {
        Event::PromptLogProbs(found) => Some(found.clone()),
        _ => None,
    });
    let mut found: Vec<_> = found.collect();
    assert_eq!(found.len(), 1, "sent once");
    found.remove(0)
}

/// Sums of at most 48 products in another order, some ten of them one after the other, on numbers
/// of the size of the logits (below 16): 16 · 10 · √48 · 2⁻²⁴ is 7e-5 for f32. Where activations are
/// stored in bf16, another order may round each to its neighbour: 16 · 2⁻⁸ · √10 is 0.2.
#[test]
fn the_engine_and_the_trainer_agree_on_log_probabilities() {
    for (what, config) in kinds() {
        for (dtype, tolerance) in [(DType::F32, 7e-5), (DType::BF16, 0.2)] {
            let model = Model::new(config.clone(), 7, dtype).unwrap();
            let (handle, _thread) = start(&model, limits());
            let asks = (0..4).map(|seed| Request {
                log_probs: Some(5),
                prompt_log_probs: Some(3),
                ..request(&ids(40 + 60 * seed as usize, seed), 40)
            });
            let receivers: Vec<_> = asks.map(|ask| handle.submit(ask).unwrap()).collect();
            let mut worst = 0.0f32;
            for (seed, receiver) in receivers.into_iter().enumerate() {
                let answer = wait(receiver);
                let prompt = ids(40 + 60 * seed, seed as u64);
                let all = [&prompt[..], &answer.tokens()].concat();
                let read = prompt_log_probs(&answer.events);
                assert_eq!(read.len(), prompt.len());
                assert_eq!(read[0], None);
                let mut found = Vec::new();
                for (known, &token) in read[1..].iter().zip(&prompt[1..]) {
                    let known = known.as_ref().unwrap();
                    assert_eq!((known.token, known.top.len()), (token, 3));
                    found.push(known.log_prob);
                }
                found.extend(answer.log_probs());
                let want = trained(&model, &all);
                assert_eq!(found.len(), want.len());
                for (found, want) in found.iter().zip(&want) {
                    worst = worst.max((found - want).abs());
                }
            }
            println!("{what}, {dtype:?}: at most {worst:.1e} apart");
            assert!(worst <= tolerance, "{what}, {dtype:?}: {worst}");
        }
    }
}

/// What echo of a text gives is what writing it gave, to rounding, and a prompt that is only read
/// is not written after.
#[test]
fn a_prompt_is_worth_what_it_was_written_for() {
    let model = model(nsa());
    let (handle, _thread) = start(&model, limits());
    let written = wait(handle.submit(request(&ids(30, 1), 50)).unwrap());
    let whole = [&ids(30, 1)[..], &written.tokens()].concat();
    let echo = Request { prompt_log_probs: Some(0), ..request(&whole, 0) };
    let answer = wait(handle.submit(echo).unwrap());
    assert_eq!((answer.tokens().len(), answer.usage.completion), (0, 0));
    let read = prompt_log_probs(&answer.events);
    for (read, written) in read[30..].iter().zip(written.log_probs()) {
        let read = read.as_ref().unwrap();
        assert!((read.log_prob - written).abs() <= 7e-5, "{} {written}", read.log_prob);
        assert!(read.top.is_empty());
    }
}

#[test]
fn the_most_probable_tokens_are_listed_in_order_and_are_the_models_own() {
    let (handle, _thread) = start(&model(nsa()), limits());
    let mut ask = Request { log_probs: Some(20), ..request(&ids(30, 1), 20) };
    // Neither the filter nor the bias is part of what is told.
    ask.sampling.temperature = 0.0;
    ask.sampling.logit_bias = vec![(9, 100.0)];
    let answer = wait(handle.submit(ask).unwrap());
    for event in &answer.events {
        let Event::Token { id, log_prob, top, .. } = event else { continue };
        assert_eq!((*id, top.len()), (9, 20));
        assert!(*log_prob < 0.0 && log_prob.is_finite());
        assert!(top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        assert!(top.iter().map(|(_, p)| p.exp()).sum::<f32>() <= 1.0 + 1e-6);
        assert!(top[0].1 >= *log_prob);
    }
    let silent = Request { log_probs: None, ..request(&ids(30, 1), 3) };
    let answer = wait(handle.submit(silent).unwrap());
    assert!(answer.log_probs().iter().all(|p| p.is_nan()));
}
