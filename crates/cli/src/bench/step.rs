//! `tercet bench step`: one training step of a model, end to end.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use tercet_model::{Batch, Family, ForwardOptions, Model, ModelConfig, Workload};
use tercet_tensor::{AdamW, AdamWConfig, DType, Grads, Tape, clip};
use tercet_train::RunConfig;
use tercet_train::config::{FromData, Precision, TrainConfig};

use crate::device::{Choice, DeviceArg};
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
/// 4 layers, 8 heads, 4 sequences of 512 tokens, f32), so that the two can be compared. With
/// --lengths, the model and its twin (the same with dense attention) at each context length; a step
/// then works through as many tokens at once as the run does, or one sequence if that is longer.
#[derive(clap::Args)]
#[command(
    after_help = "Example: tercet bench step --config configs/nsa-1b.toml --lengths 8k,32k,64k"
)]
pub struct Args {
    /// A run's TOML file [default: the small dense Llama]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Replace keys of the file, such as data.context=1024
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Context lengths, such as 8k,32k,64k; each for the model and for its dense twin
    #[arg(long, value_delimiter = ',', value_parser = human::parse_length, value_name = "T,…")]
    lengths: Vec<usize>,
    /// Steps to take the median of
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
    #[command(flatten)]
    device: DeviceArg,
    /// Write the result as JSON to this file; `-` prints it instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a step takes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct StepTime {
    /// `nsa` or `dense`.
    pub attention: &'static str,
    /// Tokens of a sequence.
    pub context: usize,
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
    /// Peak memory, bytes: of the process (on the CPU, where the system tells), of tensors on the
    /// device (on CUDA).
    pub peak_bytes: Option<u64>,
    /// What `tercet plan` foretells.
    pub planned_bytes: u64,
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
    let device = args.device.choose()?;
    let report = Report {
        args,
        rate: yardstick::matmul_gflops(&device, config.train.dtype == Precision::Bf16, 15)?,
        place: match &device {
            Choice::Cpu => Machine::detect().cpu,
            Choice::Cuda(gpu) => gpu.info().name.clone(),
        },
        device,
    };
    if args.lengths.is_empty() {
        let time = measure(&model, &config, args.steps as usize, &report.device)?;
        return report.single(&time);
    }
    report.lengths(&model, &config)
}

/// What all rows of a run share.
struct Report<'a> {
    args: &'a Args,
    device: Choice,
    /// GFLOP/s of a matrix product, measured in this run.
    rate: f64,
    /// The processor or the card.
    place: String,
}

impl Report<'_> {
    fn prints_json(&self) -> bool {
        self.args.json.as_ref().is_some_and(|path| path.as_os_str() == "-")
    }

    fn share(&self, time: &StepTime) -> f64 {
        time.flops_per_second() / 1e9 / self.rate
    }

    fn command(&self, length: Option<usize>) -> String {
        let mut command = String::from("tercet bench step");
        if let Some(path) = &self.args.config {
            command.push_str(&format!(" --config {}", path.display()));
        }
        for text in &self.args.overrides {
            command.push_str(&format!(" '{text}'"));
        }
        if let Some(length) = length {
            command.push_str(&format!(" --lengths {}", human::length(length)));
        }
        let threads = rayon::current_num_threads();
        let device = self.device.name();
        let steps = self.args.steps;
        command.push_str(&format!(" --steps {steps} --device {device} --threads {threads}"));
        command
    }

    fn json(&self, time: &StepTime, length: Option<usize>) -> serde_json::Value {
        serde_json::json!({
            "framework": concat!("tercet ", env!("CARGO_PKG_VERSION")),
            "device": self.place,
            "threads": rayon::current_num_threads(),
            "step": time,
            "tokens_per_second": time.tokens_per_second(),
            "gflops": time.flops_per_second() / 1e9,
            "gemm_gflops": self.rate,
            "share_of_gemm": self.share(time),
            "command": self.command(length),
        })
    }

    fn single(&self, time: &StepTime) -> anyhow::Result<()> {
        let json = self.json(time, None);
        if self.prints_json() {
            println!("{json}");
            return Ok(());
        }
        println!(
            "{} parameters, {} tokens a step, {}, matrix product {:.0} GFLOP/s\n\
             {} a step · {} tok/s · {:.0} GFLOP/s of the model · {:.0} % of it · peak {} \
             (planned {})\n\
             repeat with: {}",
            human::count(time.parameters as f64),
            human::grouped(time.tokens as u64),
            self.device,
            self.rate,
            human::seconds(time.seconds),
            human::grouped(time.tokens_per_second().round() as u64),
            time.flops_per_second() / 1e9,
            100.0 * self.share(time),
            time.peak_bytes.map_or_else(|| "?".into(), human::bytes),
            human::bytes(time.planned_bytes),
            self.command(None),
        );
        self.write(&json)
    }

    /// The model and its dense twin at every length.
    fn lengths(&self, model: &ModelConfig, config: &RunConfig) -> anyhow::Result<()> {
        let mut kinds = vec![model.clone()];
        if model.nsa.is_some() {
            kinds.push(dense_twin(model));
        }
        let say = |line: String| {
            if !self.prints_json() {
                println!("{line}");
            }
        };
        let (device, rate) = (&self.device, self.rate);
        say(format!("{device}, matrix product {rate:.0} GFLOP/s in this run\n"));
        say(format!(
            "{:<7}{:>8}{:>9}{:>10}{:>11}{:>10}{:>8}{:>12}{:>12}",
            "model", "context", "tokens", "step", "tok/s", "FLOP/s", "MFU", "peak", "planned"
        ));
        let mut rows = Vec::new();
        for &length in &self.args.lengths {
            let run = at_length(config, length);
            let mut times = Vec::new();
            for kind in &kinds {
                let model = ModelConfig {
                    max_position_embeddings: kind.max_position_embeddings.max(length),
                    ..kind.clone()
                };
                let time = measure(&model, &run, self.args.steps as usize, device)
                    .with_context(|| format!("at {} tokens", human::length(length)))?;
                say(self.line(&time));
                rows.push(self.json(&time, Some(length)));
                times.push(time.seconds);
            }
            if let [nsa, dense] = times[..] {
                say(format!("{:<24}{:>9.2}×", "dense / nsa", dense / nsa));
            }
        }
        let json = serde_json::json!({ "device": self.place, "gemm_gflops": rate, "rows": rows });
        if self.prints_json() {
            println!("{json}");
            return Ok(());
        }
        say(format!("\nrepeat with: {}", self.command(None) + &lengths(&self.args.lengths)));
        self.write(&json)
    }

    fn line(&self, time: &StepTime) -> String {
        format!(
            "{:<7}{:>8}{:>9}{:>10}{:>11}{:>10}{:>6.1} %{:>12}{:>12}",
            time.attention,
            human::length(time.context),
            human::grouped(time.tokens as u64),
            human::seconds(time.seconds),
            human::grouped(time.tokens_per_second().round() as u64),
            human::count(time.flops_per_second()),
            100.0 * self.share(time),
            time.peak_bytes.map_or_else(|| "?".into(), human::bytes),
            human::bytes(time.planned_bytes)
        )
    }

    fn write(&self, json: &serde_json::Value) -> anyhow::Result<()> {
        match &self.args.json {
            Some(path) => super::write(path, &(serde_json::to_string_pretty(json)? + "\n")),
            None => Ok(()),
        }
    }
}

fn lengths(all: &[usize]) -> String {
    let all: Vec<String> = all.iter().map(|&length| human::length(length)).collect();
    format!(" --lengths {}", all.join(","))
}

/// The same model with dense attention.
fn dense_twin(model: &ModelConfig) -> ModelConfig {
    ModelConfig { nsa: None, model_type: Family::Llama, ..model.clone() }
}

/// A run whose sequences have `length` tokens: as many tokens at once as before, in whole
/// sequences, and at least one; one part a step.
fn at_length(config: &RunConfig, length: usize) -> RunConfig {
    let mut run = config.clone();
    run.data.context = length;
    run.train.batch_tokens = (config.micro_tokens() / length).max(1) * length;
    run.train.accumulation = 1;
    run
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

/// What memory depends on in a run.
pub fn workload(config: &RunConfig, cuda: bool) -> Workload {
    Workload {
        context: config.data.context,
        tokens_at_once: config.micro_tokens(),
        dtype: dtype(config),
        recompute: config.train.recompute,
        cuda,
    }
}

/// Storage type of a run's tensors.
pub fn dtype(config: &RunConfig) -> DType {
    match config.train.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

/// Median time of a training step of `model` with the batch, precision and optimizer of `run`, on
/// random tokens.
pub fn measure(
    model: &ModelConfig,
    run: &RunConfig,
    steps: usize,
    device: &Choice,
) -> anyhow::Result<StepTime> {
    timed(model, run, steps, device).map_err(|error| advised(error, run))
}

/// The same error with the keys that help, when memory ran out.
fn advised(error: anyhow::Error, run: &RunConfig) -> anyhow::Error {
    let error = match error.downcast::<tercet_model::Error>() {
        Ok(error) => tercet_train::Error::from(error),
        Err(error) => match error.downcast::<tercet_tensor::Error>() {
            Ok(error) => error.into(),
            Err(error) => return error,
        },
    };
    error.with_advice(run).into()
}

fn timed(
    model: &ModelConfig,
    run: &RunConfig,
    steps: usize,
    device: &Choice,
) -> anyhow::Result<StepTime> {
    let train = &run.train;
    let workload = workload(run, device.gpu().is_some());
    match device {
        Choice::Cpu => {
            machine::reset_peak_memory();
        }
        Choice::Cuda(gpu) => gpu.reset_peak(),
    }
    let wait = || match device {
        Choice::Cpu => Ok(()),
        Choice::Cuda(gpu) => gpu.synchronize(),
    };
    let mut model = Model::new(model.clone(), train.seed, workload.dtype)?;
    model.to_device(&device.tensors())?;
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
            let options = ForwardOptions { recompute: train.recompute, dropout: None };
            let losses = model.forward_loss(&mut tape, &batch, &options)?;
            tape.backward_scaled(&losses.loss, 1.0 / train.accumulation as f32, &mut grads)?;
            loss = losses.cross_entropy.value().item()?;
        }
        let factor = clip::clip_factor(clip::global_norm(&grads)?, train.clip);
        optimizer.step(model.params_mut().tensors_mut(), &grads, train.lr, factor)?;
        wait()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let times: anyhow::Result<Vec<f64>> = (0..WARM_UP + steps).map(|_| once()).collect();
    let mut times = times?.split_off(WARM_UP);
    times.sort_by(f64::total_cmp);
    Ok(StepTime {
        attention: if model.config().nsa.is_some() { "nsa" } else { "dense" },
        context: run.data.context,
        seconds: times[times.len() / 2],
        tokens: train.batch_tokens,
        parameters: model.params().elements(),
        flops_per_token: model.config().flops(run.data.context).training(),
        loss,
        peak_bytes: match device {
            Choice::Cpu => machine::peak_memory(),
            Choice::Cuda(gpu) => Some(gpu.memory_use()?.peak),
        },
        planned_bytes: model.config().training_memory(&workload).total(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_keeps_the_tokens_at_once_in_whole_sequences() {
        let config = include_str!("../../../../configs/nsa-1b.toml");
        let config = RunConfig::parse(config, &[]).unwrap();
        let tokens = config.micro_tokens();
        for (length, expected) in [(8192, tokens / 8192 * 8192), (1 << 16, 1 << 16), (3000, 15000)]
        {
            let run = at_length(&config, length);
            assert_eq!((run.data.context, run.micro_tokens()), (length, expected));
        }
        let model = architecture(&config).unwrap();
        assert!(model.nsa.is_some() && dense_twin(&model).nsa.is_none());
        dense_twin(&model).validate().unwrap();
    }
}
