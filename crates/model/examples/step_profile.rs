//! Where a training step of a model spends its time on the first CUDA device, kernel by kernel.
//!
//! `cargo run --release -p tercet-model --example step_profile -- configs/nsa-1b.toml 8192 2 keep`:
//! a recipe, tokens of a sequence, sequences, and `keep` or `recompute`; `dense` as a fifth word
//! takes the sparse attention out.

use std::time::Instant;

use tercet_attention::cuda::Gpu;
use tercet_model::{Batch, ForwardOptions, Model, ModelConfig};
use tercet_tensor::{AdamW, AdamWConfig, DType, Device, Grads, Tape, clip};

type Any = Box<dyn std::error::Error>;

fn config(path: &str, dense: bool) -> Result<ModelConfig, Any> {
    let mut table: toml::Table = std::fs::read_to_string(path)?.parse()?;
    let mut model = table.remove("model").ok_or("no [model]")?;
    if let Some(model) = model.as_table_mut() {
        let vocabulary = table["data"]["vocab_size"].clone();
        model.insert("vocab_size".into(), vocabulary);
        model.entry("model_type").or_insert_with(|| "tercet".into());
        if dense {
            model.remove("nsa");
        }
    }
    Ok(model.try_into()?)
}

fn main() -> Result<(), Any> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |i: usize, other: &str| words.get(i).cloned().unwrap_or(other.into());
    let config = config(&word(0, "configs/nsa-1b.toml"), word(4, "") == "dense")?;
    let (tokens, count): (usize, usize) = (word(1, "8192").parse()?, word(2, "1").parse()?);
    let options = ForwardOptions { recompute: word(3, "keep") == "recompute", dropout: None };
    let gpu = Gpu::open(0)?;
    let cache = std::env::temp_dir().join("tercet-step-profile");
    gpu.use_cache(Some(cache));
    let flops = config.flops(tokens).training() * (tokens * count) as f64;
    let mut model = Model::new(config, 1, DType::BF16)?;
    model.to_device(&Device::Cuda(gpu.clone()))?;
    let settings = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let decayed: Vec<bool> = model.params().specs().iter().map(|spec| spec.decays()).collect();
    let mut optimizer = AdamW::new(settings, model.params().tensors(), &decayed)?;
    let mut grads = Grads::new(model.params().len());
    let vocabulary = model.config().vocab_size;
    let text: Vec<i32> =
        (0..tokens * count).map(|i| ((i * i * 31 + i * 7) % vocabulary) as i32).collect();
    let sequences: Vec<&[i32]> = (0..count).map(|i| &text[i * tokens..(i + 1) * tokens]).collect();
    let batch = Batch::next_token(&sequences);
    let mut step = || -> Result<[f64; 4], Any> {
        grads.zero();
        let start = Instant::now();
        let mut tape = Tape::recording();
        let losses = model.forward_loss(&mut tape, &batch, &options)?;
        let enqueued = start.elapsed().as_secs_f64();
        gpu.synchronize()?;
        let forward = start.elapsed().as_secs_f64();
        tape.backward(&losses.loss, &mut grads)?;
        drop(losses);
        drop(tape);
        let norm = clip::global_norm(&grads)?;
        let backward = start.elapsed().as_secs_f64();
        let factor = clip::clip_factor(norm, 1.0);
        optimizer.step(model.params_mut().tensors_mut(), &grads, 1e-4, factor)?;
        gpu.synchronize()?;
        Ok([enqueued, forward, backward, start.elapsed().as_secs_f64()])
    };
    for i in 0..5 {
        let [enqueued, forward, backward, all] = step()?.map(|s| s * 1e3);
        println!(
            "step {i}: {all:.1} ms = forward {forward:.1} (enqueued in {enqueued:.1}) + backward {:.1} + optimizer {:.1}; {:.0} TFLOP/s of the model",
            backward - forward,
            all - backward,
            flops / all / 1e9
        );
    }
    println!("memory {:?}", gpu.memory_use()?);
    let (_, times) = gpu.profile(step)?;
    let sum: f64 = times.iter().map(|t| t.milliseconds).sum();
    println!("{sum:.1} ms in kernels");
    for time in times.iter().take(60) {
        let (name, count, ms) = (&time.name, time.count, time.milliseconds);
        println!(
            "{ms:9.3} ms {:5.1} % {count:5} x {:8.1} µs  {name}",
            100.0 * ms / sum,
            1e3 * ms / count as f64
        );
    }
    Ok(())
}
