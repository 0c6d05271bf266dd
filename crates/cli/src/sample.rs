//! `tercet sample`: answers to prompts, and what they are worth.

use std::io::Write;
use std::path::PathBuf;

use tercet_align::iterate::{SampleConfig, sample};

use crate::device::DeviceArg;
use crate::human;
use crate::watched::Watched;

/// Let a model answer prompts, score the answers, and pair the best with the worst.
///
/// Rows are JSON lines with a "prompt" (a string or messages) and whatever the reward reads. The
/// output folder receives samples.jsonl (every answer with its tokens, log-probability, score and
/// what the score is made of), pairs.jsonl (rows for `tercet align`) and summary.json (mean reward
/// with its 95 % interval, length, divergence from [start]). --resume goes on where a run was
/// interrupted.
#[derive(clap::Args)]
#[command(after_help = "Example: tercet sample configs/sample.toml model.path=SmolLM2 \\\n    \
    'data.paths=[\"prompts.jsonl\"]' sampling.samples=8")]
pub struct Args {
    /// What is asked: [model], [start], [data], [sampling] and [reward]; see configs/sample.toml
    config: PathBuf,
    /// Replace keys of the file, such as sampling.temperature=0.7
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on where an interrupted run of the output folder was
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    device: DeviceArg,
}

/// Samples, and says what the answers are worth.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = SampleConfig::load(&args.config, &args.overrides)?;
    let watched = Watched {
        doing: "sampling",
        device: &args.device,
        resume: args.resume,
        yardstick: None,
        stamp: "",
    };
    let report = watched.run(|control, observe| sample(&config, control, observe))?;
    let mut out = String::new();
    match &report.worth {
        None => {
            let rest: Vec<String> = args.overrides.iter().map(|o| format!(" '{o}'")).collect();
            out.push_str(&format!(
                "stopped as asked; go on with: {} sample {}{} --resume\n",
                human::program(),
                args.config.display(),
                rest.concat()
            ));
        }
        Some(worth) => {
            out.push_str(&format!(
                "reward   {:.4} ± {:.4} (95 % over {} prompts)\nlength   {:.1} tokens, {:.0} % \
                 ended by the model\n",
                worth.reward,
                worth.interval,
                worth.prompts,
                worth.length,
                100.0 * worth.ended
            ));
            if let Some(divergence) = worth.divergence {
                out.push_str(&format!("KL       {divergence:.4} nats an answer from the start\n"));
            }
            let picks = &report.picks;
            if config.sampling.samples > 1 {
                out.push_str(&format!(
                    "pairs    {} ({} prompts tied)  {}\n",
                    picks.pairs,
                    picks.tied,
                    report.pairs.display()
                ));
            }
            out.push_str(&format!("samples  {}\n", report.samples.display()));
        }
    }
    let _ = write!(std::io::stdout(), "{out}");
    Ok(())
}
