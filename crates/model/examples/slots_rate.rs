//! Decoding of many sequences at once: milliseconds of a step and tokens/s, and what reading a
//! prompt took.
//!
//! `cargo run --release -p tercet-model --example slots_rate -- configs/nsa-1b.toml 8192 1,8,64`: a
//! recipe, tokens that every sequence holds, numbers of sequences. Further words: `dense` takes the
//! sparse attention out, `apart` reads every prompt by itself, where copies would share pages and a
//! GPU's second-level cache, `cpu` stays off the GPU, `sample` draws from every row as well, `vocab=N`
//! and `layers=N` cut the model down: what a step's time is made of.

use std::time::Instant;

use rayon::prelude::*;
use tercet_attention::cuda::Gpu;
use tercet_model::{Model, ModelConfig, Sampler, Sampling};
use tercet_tensor::{DType, Device};

type Any = Box<dyn std::error::Error>;

/// Steps before the timed ones, and timed ones.
const STEPS: [usize; 2] = [3, 20];

fn config(path: &str, tokens: usize, words: &[String]) -> Result<ModelConfig, Any> {
    let mut table: toml::Table = std::fs::read_to_string(path)?.parse()?;
    let vocabulary = table["data"]["vocab_size"].clone();
    let Some(model) = table.get_mut("model").and_then(toml::Value::as_table_mut) else {
        return Err("no [model]".into());
    };
    let number = |name: &str| {
        words
            .iter()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse::<i64>().ok())
    };
    model.insert("vocab_size".into(), number("vocab").map_or(vocabulary, Into::into));
    if let Some(layers) = number("layers") {
        model.insert("num_hidden_layers".into(), layers.into());
    }
    model.insert("max_position_embeddings".into(), (tokens as i64 + 256).into());
    model.entry("model_type").or_insert_with(|| "tercet".into());
    if words.iter().any(|word| word == "dense") {
        model.remove("nsa");
    }
    Ok(toml::Value::Table(std::mem::take(model)).try_into()?)
}

fn main() -> Result<(), Any> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [path, tokens, counts, rest @ ..] = &words[..] else {
        return Err("a recipe, tokens, and numbers of sequences".into());
    };
    let tokens: usize = tokens.parse()?;
    let config = config(path, tokens, rest)?;
    let mut model = Model::new(config, 1, DType::BF16)?;
    if !rest.iter().any(|word| word == "cpu") {
        let gpu = Gpu::open(0)?;
        gpu.use_cache(std::env::var_os("TERCET_CACHE").map(Into::into));
        model.to_device(&Device::Cuda(gpu))?;
    }
    let vocabulary = model.config().vocab_size;
    let text: Vec<i32> = (0..tokens).map(|i| ((i * i * 31 + i * 7) % vocabulary) as i32).collect();
    for count in counts.split(',') {
        let count: usize = count.parse()?;
        let mut slots = model.slots(count, tokens + 64)?;
        let start = Instant::now();
        slots.read(&model, 0, &text)?;
        let read = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for slot in 1..count {
            match rest.iter().any(|word| word == "apart") {
                true => drop(slots.read(&model, slot, &text)?),
                false => slots.copy(0, slot)?,
            }
        }
        let copied = start.elapsed().as_secs_f64();
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
        let mut samplers: Vec<Sampler> = (0..count)
            .map(|seed| Sampler::new(&Sampling { seed: seed as u64, ..sampling.clone() }))
            .collect::<Result<_, _>>()?;
        let mut next: Vec<(usize, i32)> = (0..count).map(|slot| (slot, 1)).collect();
        let (mut steps, mut draws) = (Vec::new(), Vec::new());
        for _ in 0..STEPS[0] + STEPS[1] {
            let start = Instant::now();
            let logits = slots.step(&model, &next)?;
            steps.push(start.elapsed().as_secs_f64() * 1e3);
            if rest.iter().any(|word| word == "sample") {
                let start = Instant::now();
                let rows = logits.par_chunks_exact(vocabulary);
                let drawn: Result<Vec<u32>, _> =
                    samplers.par_iter_mut().zip(rows).map(|(own, row)| own.next(row)).collect();
                next = drawn?.into_iter().map(|id| id as i32).enumerate().collect();
                draws.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let median = |times: &[f64]| {
            let mut times = times.iter().copied().skip(STEPS[0]).collect::<Vec<_>>();
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied().unwrap_or(0.0)
        };
        let (step, draw) = (median(&steps), median(&draws));
        println!(
            "{words:?} · {count} sequences of {tokens}: step {step:.2} ms (first {:.0}), draw {draw:.2} \
             ms, {:.0} tok/s; read in {read:.2} s ({:.0} tok/s), copies {copied:.2} s, {:.1} GiB",
            steps[0],
            count as f64 / (step + draw) * 1e3,
            tokens as f64 / read,
            slots.bytes() as f64 / f64::from(1 << 30),
        );
    }
    Ok(())
}
