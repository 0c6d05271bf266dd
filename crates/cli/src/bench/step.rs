//! `tercet bench step`: one training step of a model, end to end.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use tercet_model::{Batch, ForwardOptions, Model, ModelConfig};
use tercet_tensor::{AdamW, AdamWConfig, DType, Grads, Tape, clip};
use tercet_train::RunConfig;
use tercet_train::config::{FromData, Precision, TrainConfig};

use crate::error::user;
use crate::machine::Machine;
use crate::{human, machine, yardstick};

/// The model of the comparison with PyTorch.
const SMALL_LLAMA: &str = include_str!("../../../../configs/bench-step.toml");

/// Steps that warm up before any is counted.
const WARM_UP: usize = 3;

/// Time training steps (forward, backward, clipping, AdamW) of a run's model on random tokens.
///
/// Without --config it is the small dense Llama of bench/torch_step.py (vocabulary 512, width 256,
/// 4 layers, 8 heads, 4 sequences of 512 tokens, f32), so that the two can be compared.
#[derive(clap::Args)]
pub struct Args {
    /// A run's TOML file [default: the small dense Llama]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Replace keys of the file, such as data.context=1024
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Steps to take the median of
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
    /// Write the result as JSON to this file; `-` prints it instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a step takes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct StepTime {
    /// Median seconds.
    pub seconds: f64,
    /// Tokens of a step.
    pub tokens: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// Floating-point operations of the model per token, backward included.
    pub flops_per_token: f64,
    /// Loss of the last step.
    pub loss: f32,
    /// Peak resident memory, bytes (Linux).
    pub peak_bytes: Option<u64>,
}

impl StepTime {
    /// Tokens per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    /// Model FLOP/s.
    pub fn flops_per_second(&self) -> f64 {
        self.flops_per_token * self.tokens_per_second()
    }
}

/// Times the steps and prints.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = match &args.config {
        Some(path) => RunConfig::load(path, &args.overrides)?,
        None => RunConfig::parse(SMALL_LLAMA, &args.overrides)?,
    };
    let model = architecture(&config)?;
    let gemm = yardstick::gemm_gflops(15);
    let time = measure(&model, &config, args.steps as usize)?;
    let threads = rayon::current_num_threads();
    let share = time.flops_per_second() / 1e9 / gemm;
    let mut command = String::from("tercet bench step");
    if let Some(path) = &args.config {
        command.push_str(&format!(" --config {}", path.display()));
    }
    for text in &args.overrides {
        command.push_str(&format!(" '{text}'"));
    }
    command.push_str(&format!(" --steps {} --threads {threads}", args.steps));
    let json = serde_json::json!({
        "framework": concat!("tercet ", env!("CARGO_PKG_VERSION")),
        "cpu": Machine::detect().cpu,
        "threads": threads,
        "step": time,
        "tokens_per_second": time.tokens_per_second(),
        "gflops": time.flops_per_second() / 1e9,
        "gemm_gflops": gemm,
        "share_of_gemm": share,
        "command": command,
    });
    if args.json.as_ref().is_some_and(|path| path.as_os_str() == "-") {
        println!("{json}");
        return Ok(());
    }
    println!(
        "{} parameters, {} tokens a step, {threads} threads, gemm {gemm:.0} GFLOP/s\n\
         {} a step · {} tok/s · {:.0} GFLOP/s of the model · {:.0} % of gemm · peak {}\n\
         repeat with: {command}",
        human::count(time.parameters as f64),
        human::grouped(time.tokens as u64),
        human::seconds(time.seconds),
        human::grouped(time.tokens_per_second().round() as u64),
        time.flops_per_second() / 1e9,
        100.0 * share,
        time.peak_bytes.map_or_else(|| "?".into(), human::bytes),
    );
    if let Some(path) = &args.json {
        super::write(path, &(serde_json::to_string_pretty(&json)? + "\n"))?;
    }
    Ok(())
}

/// The architecture of a run, before its data are read.
pub fn architecture(config: &RunConfig) -> anyhow::Result<ModelConfig> {
    let vocab_size = config.data.vocab_size.unwrap_or(0);
    let from = FromData { vocab_size, context: config.data.context, bos: 0, eos: 0 };
    config
        .model
        .config(&from)
        .with_context(|| "the model cannot be built without its data".to_owned())
}

/// Median time of a training step of `model` with the batch, precision and optimizer of `run`, on
/// random tokens.
pub fn measure(model: &ModelConfig, run: &RunConfig, steps: usize) -> anyhow::Result<StepTime> {
    let train = &run.train;
    let dtype = match train.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    machine::reset_peak_memory();
    let mut model = Model::new(model.clone(), train.seed, dtype)?;
    let decayed: Vec<bool> = model.params().specs().iter().map(|spec| spec.decays()).collect();
    let mut optimizer = AdamW::new(optimizer_config(train), model.params().tensors(), &decayed)?;
    let mut grads = Grads::new(model.params().len());
    let batch = random_batch(model.config().vocab_size, run.micro_tokens(), run.data.context)?;
    let mut loss = 0.0;
    let mut once = || -> anyhow::Result<f64> {
        let start = Instant::now();
        grads.zero();
        for _ in 0..train.accumulation {
            let mut tape = Tape::recording();
            let options = ForwardOptions { recompute: train.recompute };
            let losses = model.forward_loss(&mut tape, &batch, &options)?;
            loss = losses.cross_entropy.value().item()?;
            tape.backward_scaled(&losses.loss, 1.0 / train.accumulation as f32, &mut grads)?;
        }
        let factor = clip::clip_factor(clip::global_norm(&grads)?, train.clip);
        optimizer.step(model.params_mut().tensors_mut(), &grads, train.lr, factor)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let times: anyhow::Result<Vec<f64>> = (0..WARM_UP + steps).map(|_| once()).collect();
    let mut times = times?.split_off(WARM_UP);
    times.sort_by(f64::total_cmp);
    Ok(StepTime {
        seconds: times[times.len() / 2],
        tokens: train.batch_tokens,
        parameters: model.params().elements(),
        flops_per_token: model.config().flops(run.data.context).training(),
        loss,
        peak_bytes: machine::peak_memory(),
    })
}

fn optimizer_config(train: &TrainConfig) -> AdamWConfig {
    AdamWConfig {
        beta1: train.betas[0],
        beta2: train.betas[1],
        eps: train.eps,
        weight_decay: train.weight_decay,
    }
}

/// `tokens` random ids in sequences of `context`.
fn random_batch(vocab: usize, tokens: usize, context: usize) -> anyhow::Result<Batch> {
    if !tokens.is_multiple_of(context) {
        return Err(user(format!(
            "a step works through {tokens} tokens at once, which is not a whole number of \
             sequences of data.context = {context}; set train.batch_tokens to a multiple"
        )));
    }
    let ids: Vec<i32> = (0..tokens as u64)
        .map(|i| ((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % vocab)
        .map(|id| id as i32)
        .collect();
    let sequences: Vec<&[i32]> = ids.chunks(context).collect();
    Ok(Batch::next_token(&sequences))
}
