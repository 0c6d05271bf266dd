//! What the engine costs: tokens a second of answers written side by side by the engine, and by
//! [`Model::extend_many`] with nothing around it; then prompts read in chunks of several sizes.
//!
//! `cargo run --release -p tercet-serve --example engine_rate -- [FOLDER]`: a model folder, or random
//! weights in the shape of the quickstart's model.

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tercet_model::{Cache, Model, Sampling};
use tercet_serve::engine::{Engine, Event, Handle, Limits, Models, Request};
use tercet_tensor::DType;

type Any = Box<dyn std::error::Error>;

/// Tokens of an answer.
const ANSWER: usize = 200;
/// Runs of each, one after the other in turn; the fastest counts.
const RUNS: usize = 15;

fn main() -> Result<(), Any> {
    let model = match std::env::args().nth(1) {
        Some(folder) => Model::load(Path::new(&folder))?,
        None => Model::new(
            serde_json::from_value(json!({
                "model_type": "tercet", "vocab_size": 2048, "hidden_size": 256,
                "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 8192,
                "tie_word_embeddings": true,
                "nsa": { "compress_block": 32, "compress_stride": 16, "select_block": 64,
                         "select_count": 8, "window": 256, "compressor": "mean" },
            }))?,
            1,
            DType::F32,
        )?,
    };
    println!("decode, {ANSWER} tokens each; the lower quartile of {RUNS} times {ANSWER} steps:");
    for together in [1, 4, 16] {
        let limits = Limits { running: together, prefix_cache: false, ..Limits::default() };
        let (handle, _thread) = Engine::start(Models::new(model.clone())?, limits)?;
        let (mut bare, mut engine) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            bare.extend(bare_steps(&model, together)?);
            engine.extend(engine_steps(&handle, &model, together)?);
        }
        let [bare, engine] = [bare, engine].map(lower_quartile);
        println!(
            "{together:3} together: extend_many alone {:.0} tokens/s, engine {:.0}: {:+.1} µs a step, {:+.1} %",
            together as f64 / bare,
            together as f64 / engine,
            (engine - bare) * 1e6,
            100.0 * (engine / bare - 1.0)
        );
    }
    println!("a prompt of 4096 tokens, in chunks of:");
    for chunk in [64, 128, 256, 512] {
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let (prompt, mut cache) = (prompt(&model, 0, 4096), model.cache()?);
            let start = Instant::now();
            for chunk in prompt.chunks(chunk) {
                model.read(&mut cache, chunk)?;
            }
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("{chunk:4}: {:.0} tokens/s", 4096.0 / best);
    }
    Ok(())
}

fn prompt(model: &Model, seed: usize, tokens: usize) -> Vec<i32> {
    let vocab = model.config().vocab_size;
    (0..tokens).map(|i| ((i * 31 + seed * 7) % vocab) as i32).collect()
}

/// A step's seconds when others use the machine, too, now and then.
fn lower_quartile(mut steps: Vec<f64>) -> f64 {
    steps.sort_unstable_by(f64::total_cmp);
    steps[steps.len() / 4]
}

/// Seconds of each step, which takes the most probable tokens.
fn bare_steps(model: &Model, together: usize) -> Result<Vec<f64>, Any> {
    let mut caches = Vec::new();
    let mut tokens = vec![0; together];
    for (seed, token) in tokens.iter_mut().enumerate() {
        let mut cache = model.cache()?;
        *token = best(&model.read(&mut cache, &prompt(model, seed, 64))?);
        caches.push(cache);
    }
    let mut steps = Vec::new();
    for _ in 1..ANSWER {
        let start = Instant::now();
        let mut each: Vec<&mut Cache> = caches.iter_mut().collect();
        let logits = model.extend_many(&mut each, &tokens)?;
        let rows = logits.chunks_exact(model.config().vocab_size);
        tokens.iter_mut().zip(rows).for_each(|(token, row)| *token = best(row));
        steps.push(start.elapsed().as_secs_f64());
    }
    Ok(steps)
}

fn best(logits: &[f32]) -> i32 {
    let of = |best: usize, (i, l): (usize, &f32)| if *l > logits[best] { i } else { best };
    logits.iter().enumerate().fold(0, of) as i32
}

/// Seconds between the tokens of the sequence that came last, from when all are written.
fn engine_steps(handle: &Handle, model: &Model, together: usize) -> Result<Vec<f64>, Any> {
    let mut receivers = Vec::new();
    for seed in 0..together {
        receivers.push(handle.submit(Request {
            prompt: prompt(model, seed, 64).into_iter().map(|id| id as u32).collect(),
            adapter: None,
            sampling: Sampling::greedy(1),
            // The first to come write on until the last is done.
            max_tokens: if seed + 1 == together { ANSWER } else { ANSWER + together },
            min_tokens: 0,
            stop_tokens: Vec::new(),
            ignore_eos: true,
            log_probs: None,
            prompt_log_probs: None,
            namespace: String::new(),
            reads: false,
            constraint: None,
        })?);
    }
    let (mut last, mut steps) = (None, Vec::new());
    if let Some(mut receiver) = receivers.pop() {
        while let Some(event) = receiver.blocking_recv() {
            if matches!(event, Event::Token { .. }) {
                let now = Instant::now();
                steps.extend(last.replace(now).map(|last| (now - last).as_secs_f64()));
            }
        }
    }
    for receiver in &mut receivers {
        while receiver.blocking_recv().is_some() {}
    }
    Ok(steps)
}
