//! Tokens a second of answers written side by side.
//!
//! `cargo run --release -p tercet-model --example decode_many -- FOLDER 64 1 8 32`: a model folder,
//! tokens of an answer, and how many answers are written at once.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tercet_model::{Ask, Model, Sampling, Together, Tokenizer, sample_many};

type Any = Box<dyn std::error::Error>;

fn main() -> Result<(), Any> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [folder, max_tokens, at_once @ ..] = &words[..] else {
        return Err("give a model folder, tokens of an answer, and numbers of answers".into());
    };
    let (folder, max_tokens) = (std::path::Path::new(folder), max_tokens.parse()?);
    let (model, tokenizer) = (Model::load(folder)?, Tokenizer::load(folder)?);
    let prompt = tokenizer.encode("Once upon a time there was", true)?;
    let sampling = Sampling { temperature: 1.0, top_p: 1.0, max_tokens, ..Sampling::default() };
    let stop = AtomicBool::new(false);
    for at_once in at_once {
        let at_once: usize = at_once.parse()?;
        // Twice as many as have room, so that places are taken again.
        let asks: Vec<Ask> =
            (0..2 * at_once as u64).map(|seed| Ask { prompt: prompt.clone(), seed }).collect();
        let (mut tokens, mut log_prob) = (0, 0.0);
        let start = Instant::now();
        let together = Together { at_once, stop: &stop };
        // No token ends an answer, so that all are of one length.
        let ends = Some(&[][..]);
        sample_many(&model, &tokenizer, &asks, &sampling, ends, together, &mut |_, written| {
            tokens += written.tokens.len();
            log_prob += written.log_prob;
        })?;
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{at_once:3} at once: {tokens} tokens in {seconds:.2} s, {:.1} a second; {:.3} nats a token",
            tokens as f64 / seconds,
            -log_prob / tokens as f64
        );
    }
    Ok(())
}
