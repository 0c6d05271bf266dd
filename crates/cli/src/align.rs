//! `tercet align`: preferences.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use tercet_align::{AlignConfig, align};
use tercet_train::Control;
use tercet_train::config::Precision;

use crate::device::DeviceArg;
use crate::progress::Watcher;
use crate::sft::Tuned;
use crate::{interrupt, yardstick};

/// Align a model with preferences: DPO and its family, and MaPPO.
///
/// Rows are JSON lines: {"prompt": …, "chosen": …, "rejected": …}, strings or lists of messages;
/// without a prompt it is what the two answers share. "score_chosen" and "score_rejected", or
/// "delta", are what MaPPO scales the rejected answer's term with; a pair without them is an error
/// there, never Δ = 1. The output folder receives checkpoints, metrics.jsonl under the names that
/// TRL made usual, delta.svg (how Δ is distributed) and squeezing.svg (what became of the answers'
/// log-probabilities). --resume goes on with exactly the bits of a run that was never interrupted.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet align configs/align.toml model.path=SmolLM2 'data.paths=[\"pairs.jsonl\"]'\n  \
    tercet align configs/align.toml 'align.terms=[{objective=\"simpo\"}]' train.lr=1e-6")]
pub struct Args {
    /// The run: [model], [lora], [data], [align], [train] and [checkpoint]; see configs/align.toml
    config: PathBuf,
    /// Replace keys of the file, such as train.lr=5e-7
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on from the newest complete checkpoint of the output folder
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    device: DeviceArg,
}

/// Aligns, and shows how it goes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = AlignConfig::load(&args.config, &args.overrides)?;
    let stop = interrupt::stop_flag()?;
    let device = args.device.choose()?;
    let tensors = device.tensors();
    let bf16 = config.train.dtype == Precision::Bf16;
    eprintln!("aligning on {device}");
    let control = Control {
        stop: &stop,
        resume: args.resume,
        gemm_flops: Some(1e9 * yardstick::matmul_gflops(&device, bf16, 5)?),
        device: &tensors,
    };
    let mut watcher = Watcher::new(Duration::ZERO);
    let report = align(&config, &control, &mut |event| watcher.show(&event));
    watcher.finish();
    let tuned = Tuned {
        verb: "align",
        config: &args.config,
        overrides: &args.overrides,
        model: &config.model,
        adapter: config.lora.is_some() || config.model.adapter.is_some(),
    };
    let _ = write!(std::io::stdout(), "{}", tuned.closing(&report?));
    Ok(())
}
