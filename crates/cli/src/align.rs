//! `tercet align`: preferences.

use std::io::Write;
use std::path::PathBuf;

use tercet_align::iterate::{IterativeConfig, IterativeReport, iterate};
use tercet_align::{AlignConfig, align};
use tercet_train::config::Precision;

use crate::device::DeviceArg;
use crate::sft::Tuned;
use crate::watched::Watched;

/// Align a model with preferences: DPO and its family, and MaPPO.
///
/// Rows are JSON lines: {"prompt": …, "chosen": …, "rejected": …}, strings or lists of messages;
/// without a prompt it is what the two answers share. "score_chosen" and "score_rejected", or
/// "delta", are what MaPPO scales the rejected answer's term with; a pair without them is an error
/// there, never Δ = 1. The output folder receives checkpoints, metrics.jsonl under the names that
/// TRL made usual, delta.svg (how Δ is distributed) and squeezing.svg (what became of the answers'
/// log-probabilities). With --iterative the rows are prompts: round after round the policy answers
/// each several times, [reward] scores the answers, the best is set against the worst, and the
/// policy is trained on these pairs; a report closes it. --resume goes on with exactly the bits of a run that was never interrupted.
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
    /// Sample, score and train round after round: also [sampling], [reward] and [iterative]; see
    /// configs/iterative.toml
    #[arg(long)]
    iterative: bool,
    /// Go on from the newest complete checkpoint (or portion of samples) of the output folder
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    device: DeviceArg,
}

impl Args {
    fn watched<'a>(&'a self, doing: &'a str, dtype: Precision) -> Watched<'a> {
        Watched {
            doing,
            device: &self.device,
            resume: self.resume,
            yardstick: Some(dtype),
            stamp: "",
        }
    }
}

/// Aligns, and shows how it goes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.iterative {
        return rounds(args);
    }
    let config = AlignConfig::load(&args.config, &args.overrides)?;
    let watched = args.watched("aligning", config.train.dtype);
    let report = watched.run(|control, observe| align(&config, control, observe))?;
    let tuned = Tuned {
        verb: "align",
        config: &args.config,
        overrides: &args.overrides,
        model: &config.model,
        adapter: config.lora.is_some() || config.model.adapter.is_some(),
    };
    let _ = write!(std::io::stdout(), "{}", tuned.closing(&report));
    Ok(())
}

/// The iterative loop.
fn rounds(args: &Args) -> anyhow::Result<()> {
    let config = IterativeConfig::load(&args.config, &args.overrides)?;
    let watched = args.watched("sampling and aligning", config.train.dtype);
    let report = watched.run(|control, observe| iterate(&config, control, observe))?;
    let _ = write!(std::io::stdout(), "{}", last_words(&report, args));
    Ok(())
}

fn last_words(report: &IterativeReport, args: &Args) -> String {
    let mut out = String::from("\nround  held-out reward      tokens  KL from the start\n");
    for round in &report.rounds {
        if let Some(worth) = round.held_out {
            out.push_str(&format!(
                "{:>5}  {:.4} ± {:.4}    {:>6.1}  {:.3}\n",
                round.round,
                worth.reward,
                worth.interval,
                worth.length,
                worth.divergence.unwrap_or(0.0)
            ));
        }
    }
    if let Some(policy) = &report.policy {
        out.push_str(&format!("policy  {}\n", policy.display()));
    }
    match &report.report {
        Some(path) => out.push_str(&format!("report  {}\n", path.display())),
        None => {
            let rest: Vec<String> = args.overrides.iter().map(|o| format!(" '{o}'")).collect();
            out.push_str(&format!(
                "stopped as asked; go on with: {} align {}{} --iterative --resume\n",
                crate::human::program(),
                args.config.display(),
                rest.concat()
            ));
        }
    }
    out
}
