//! Stand-in until batched decoding is merged.
#![allow(missing_docs)]
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Finish, Generator, Model, Result, Sampling, Tokenizer};

pub struct Ask {
    pub prompt: Vec<u32>,
    pub seed: u64,
}

pub struct Written {
    pub tokens: Vec<u32>,
    pub text: String,
    pub ended: bool,
    pub log_prob: f64,
}

pub struct SampleMany<'a> {
    pub at_once: usize,
    pub context: usize,
    pub end_of_text: &'a [u32],
    pub stop: &'a AtomicBool,
}

pub fn sample_many(
    model: &Model,
    tokenizer: &Tokenizer,
    asks: &[Ask],
    sampling: &Sampling,
    options: &SampleMany,
    on_done: &mut dyn FnMut(usize, Written),
) -> Result<()> {
    let mut generator = Generator::new(model, tokenizer, Some(options.end_of_text.to_vec()))?;
    for (i, ask) in asks.iter().enumerate() {
        if options.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let sampling = Sampling { seed: ask.seed, ..sampling.clone() };
        let written =
            generator.generate(&ask.prompt, &sampling, &mut |_| ControlFlow::Continue(()))?;
        let ended = written.finish == Finish::EndOfText;
        let mut tokens = written.tokens;
        if ended {
            tokens.extend(options.end_of_text.first());
        }
        on_done(i, Written { tokens, text: written.text, ended, log_prob: 0.0 });
    }
    Ok(())
}
