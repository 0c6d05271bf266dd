//! `tercet plan`: what a run will cost, before anything starts.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use tercet_model::{ModelConfig, Workload};
use tercet_tensor::DType;
use tercet_train::RunConfig;

use crate::bench::step;
use crate::device::{Choice, DeviceArg};
use crate::machine::Machine;
use crate::{human, private, yardstick};

/// Share of the matrix-product rate that a training step is expected to reach; measured steps
/// here reach 35 to 50 %.
const EXPECTED_SHARE: f64 = 0.4;

/// Say what a run will cost before it starts.
///
/// Parameters, memory by part, FLOP per token (sparse and dense), time on this machine, disk.
/// Of a private run (a file with [private]): noise, epsilon, who is protected, and what the method
/// costs. Starts nothing and reads no data. A plan with --device cuda can be made without a GPU.
#[derive(clap::Args)]
#[command(after_help = "Example: tercet plan configs/nsa-27b-moe.toml --gflops 400000")]
pub struct Args {
    /// The run: see configs/
    config: PathBuf,
    /// Replace keys of the file, such as data.context=8192
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Rate of a matrix product to estimate the time with [default: measured here]
    #[arg(long, value_name = "GFLOP/S")]
    gflops: Option<f64>,
    #[command(flatten)]
    device: DeviceArg,
}

/// Prints the plan.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if private::plan::is_private(&args.config, &args.overrides) {
        return private::plan::print(&args.config, &args.overrides);
    }
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let model = step::architecture(&config)?;
    let device = match args.device.choose() {
        Ok(device) => Some(device),
        // A plan for a GPU is made without one, too.
        Err(_) if args.device.is_cuda() => None,
        Err(error) => return Err(error),
    };
    let bf16 = step::dtype(&config) == DType::BF16;
    let rate = match (args.gflops, &device) {
        (Some(rate), _) if rate.is_finite() && rate > 0.0 => Some((rate, "given")),
        (Some(rate), _) => {
            return Err(crate::error::user(format!("--gflops {rate} is not a rate above zero")));
        }
        (None, Some(device)) => Some((yardstick::matmul_gflops(device, bf16, 5)?, "measured now")),
        (None, None) => None,
    };
    let (cuda, available) = match &device {
        None => (true, 0),
        Some(Choice::Cpu) => (false, Machine::detect().memory_available),
        Some(Choice::Cuda(gpu)) => (true, gpu.memory()?.0),
    };
    print!("{}", text(&config, &model, &Place { cuda, available, rate }));
    Ok(())
}

/// Where the run would happen.
struct Place {
    cuda: bool,
    /// Bytes of memory that can be had; 0 when that is not known.
    available: u64,
    /// GFLOP/s of a matrix product, and where the number comes from.
    rate: Option<(f64, &'static str)>,
}

fn text(config: &RunConfig, model: &ModelConfig, place: &Place) -> String {
    let load = step::workload(config, place.cuda);
    let Workload { context, dtype, .. } = load;
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<12}{text}");
    };
    line("model", architecture(model, context));

    let counts = model.parameter_counts();
    let count = |n: u64| human::count(n as f64);
    line(
        "parameters",
        format!("{} ({}), embedding {}", count(counts.total), human::grouped(counts.total), {
            count(counts.embedding)
        }),
    );
    if counts.active != counts.total {
        line(
            "active",
            format!(
                "{} per token, {} of them in feed-forward layers",
                count(counts.active),
                count(counts.active_feed_forward)
            ),
        );
    }

    let memory = model.training_memory(&load);
    let total = memory.total();
    let whose = if place.cuda { " of the GPU" } else { "" };
    line(
        "memory",
        format!(
            "{}{whose}: weights {}, gradients {}, optimizer {}, activations {}, workspace {}",
            human::bytes(total),
            human::bytes(memory.weights),
            human::bytes(memory.gradients),
            human::bytes(memory.optimizer),
            human::bytes(memory.activations),
            human::bytes(memory.workspace)
        ),
    );
    line(
        "cache",
        format!("{} for one sequence of {context} tokens", {
            human::bytes(model.cache_bytes(context, dtype))
        }),
    );

    let flops = model.flops(context);
    let mut work = format!(
        "{} per token trained, at {context} tokens of context; attention is {:.1} % of it",
        human::count(flops.training()),
        100.0 * flops.attention / flops.forward()
    );
    if model.nsa.is_some() {
        let _ = write!(
            work,
            "; the dense twin takes {} ({:.2}×)",
            human::count(3.0 * flops.forward_dense()),
            flops.forward_dense() / flops.forward()
        );
    }
    line("FLOP", work);

    let steps = config.steps();
    let tokens = steps as f64 * config.train.batch_tokens as f64;
    let work = format!(
        "{} steps of {} tokens ({} tokens)",
        human::grouped(steps),
        human::grouped(config.train.batch_tokens as u64),
        human::count(tokens)
    );
    let time = match place.rate {
        None => format!("{work}; --gflops says how fast the GPU is, which is not here"),
        Some((rate, whence)) => {
            let seconds = tokens * flops.training() / (rate * 1e9 * EXPECTED_SHARE);
            let wait = human::duration(Duration::from_secs_f64(seconds.clamp(0.0, 1e15)));
            let share = 100.0 * EXPECTED_SHARE;
            format!("{wait} for {work}, at {share:.0} % of {rate:.0} GFLOP/s ({whence})")
        }
    };
    line("time", time);
    let checkpoint = model.checkpoint_bytes(dtype);
    // A new checkpoint is complete before the oldest one is removed.
    let kept = config.checkpoint.keep as u64 + 1;
    line(
        "disk",
        format!(
            "{} a checkpoint, up to {} with {} kept and one being written",
            human::bytes(checkpoint),
            human::bytes(checkpoint * kept),
            config.checkpoint.keep
        ),
    );
    if place.available > 0 && total > place.available {
        let available = human::bytes(place.available);
        line("WARNING", format!("only {available} of memory are available{whose}"));
    }
    out
}

fn architecture(model: &ModelConfig, context: usize) -> String {
    let dims = model.dims();
    let mut text = format!(
        "{} layers, width {}, {} query heads on {} key/value, dims {}/{}, vocabulary {}, ",
        model.num_hidden_layers,
        model.hidden_size,
        dims.heads,
        dims.kv_heads,
        dims.key_dim,
        dims.value_dim,
        human::grouped(model.vocab_size as u64)
    );
    match &model.nsa {
        Some(spec) => {
            let _ = write!(
                text,
                "native sparse attention {}/{}, {}×{}, window {}",
                spec.compress_block,
                spec.compress_stride,
                spec.select_count,
                spec.select_block,
                spec.window
            );
        }
        None => text.push_str("dense attention"),
    }
    if let Some(moe) = &model.moe {
        let _ = write!(
            text,
            ", {} routed + {} shared experts, top-{}",
            moe.routed_experts, moe.shared_experts, moe.top_k
        );
    }
    let _ = write!(text, ", context {}", human::grouped(context as u64));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_27b_is_planned_with_its_parts() {
        let config = include_str!("../../../configs/nsa-27b-moe.toml");
        let config = RunConfig::parse(config, &[]).unwrap();
        let model = step::architecture(&config).unwrap();
        let place = Place { cuda: false, available: 8 << 30, rate: Some((4e5, "given")) };
        let text = text(&config, &model, &place);
        for part in ["27.", "72 routed + 2 shared", "active", "dense twin", "GiB", "WARNING"] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
    }
}
