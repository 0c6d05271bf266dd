//! `tercet plan`: what a run will cost, before anything starts.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use tercet_model::{ModelConfig, Workload};
use tercet_tensor::DType;
use tercet_train::RunConfig;
use tercet_train::config::Precision;

use crate::bench::step;
use crate::machine::Machine;
use crate::{human, yardstick};

/// Share of the matrix-product rate that a training step is expected to reach; measured steps
/// here reach 35 to 50 %.
const EXPECTED_SHARE: f64 = 0.4;

/// Say what a run will cost before it starts.
///
/// Parameters, memory by part, FLOP per token (sparse and dense), time on this machine, disk.
/// Starts nothing and reads no data.
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
}

/// Prints the plan.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let model = step::architecture(&config)?;
    let rate = match args.gflops {
        Some(rate) if rate.is_finite() && rate > 0.0 => Rate { gflops: rate, measured: false },
        Some(rate) => {
            return Err(crate::error::user(format!("--gflops {rate} is not a rate above zero")));
        }
        None => Rate { gflops: yardstick::gemm_gflops(5), measured: true },
    };
    print!("{}", text(&config, &model, &rate, Machine::detect().memory_available));
    Ok(())
}

struct Rate {
    gflops: f64,
    measured: bool,
}

fn text(config: &RunConfig, model: &ModelConfig, rate: &Rate, available: u64) -> String {
    let dtype = match config.train.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    let context = config.data.context;
    let load = Workload {
        context,
        tokens_at_once: config.micro_tokens(),
        dtype,
        recompute: config.train.recompute,
    };
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
    line(
        "memory",
        format!(
            "{}: weights {}, gradients {}, optimizer {}, activations {}, workspace {}",
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
    let seconds = tokens * flops.training() / (rate.gflops * 1e9 * EXPECTED_SHARE);
    let wait = human::duration(Duration::from_secs_f64(seconds.clamp(0.0, 1e15)));
    line(
        "time",
        format!(
            "{wait} for {} steps of {} tokens ({} tokens), at {:.0} % of {:.0} GFLOP/s ({})",
            human::grouped(steps),
            human::grouped(config.train.batch_tokens as u64),
            human::count(tokens),
            100.0 * EXPECTED_SHARE,
            rate.gflops,
            if rate.measured { "measured now" } else { "given" }
        ),
    );
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
    if available > 0 && total > available {
        line("WARNING", format!("only {} of memory are available here", human::bytes(available)));
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
        let rate = Rate { gflops: 4e5, measured: false };
        let text = text(&config, &model, &rate, 8 << 30);
        for part in ["27.", "72 routed + 2 shared", "active", "dense twin", "GiB", "WARNING"] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
    }
}
