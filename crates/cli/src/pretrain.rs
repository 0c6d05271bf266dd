//! `tercet pretrain`: a language model from text.

use std::io::Write;
use std::path::{Path, PathBuf};

use tercet_train::{DryRun, Report, RunConfig};

use crate::device::DeviceArg;
use crate::watched::Watched;
use crate::{human, interrupt};

/// Train a language model from text, as a TOML file says.
///
/// The output folder receives checkpoints (Hugging Face folders that `tercet generate` and others
/// read), metrics.jsonl, TensorBoard events and the loss curve. Ctrl-C and SIGTERM save and leave;
/// --resume goes on from the newest complete checkpoint with exactly the bits of a run that was
/// never interrupted.
#[derive(clap::Args)]
#[command(after_help = "Example: tercet pretrain configs/quickstart.toml output=my-run \
    'data.paths=[\"my/text/**/*.md\"]' train.steps=2000")]
pub struct Args {
    /// The run: [model], [data], [train] and [checkpoint]; see configs/
    config: PathBuf,
    /// Replace keys of the file, such as train.lr=3e-4
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on from the newest complete checkpoint of the output folder
    #[arg(long)]
    resume: bool,
    /// Check everything and say what would happen, without training
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    device: DeviceArg,
}

/// Trains, and shows how it goes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = RunConfig::load(&args.config, &args.overrides)?;
    if args.dry_run {
        let (stop, device) = (interrupt::stop_flag()?, args.device.choose()?);
        let dry = tercet_train::dry_run(&config, args.resume, &device.tensors(), &stop)?;
        let _ = write!(std::io::stdout(), "{}", rehearsal(&dry));
        return Ok(());
    }
    let watched = Watched {
        doing: "training",
        device: &args.device,
        resume: args.resume,
        yardstick: Some(config.train.dtype),
        stamp: "",
    };
    let report =
        watched.run(|control, observe| tercet_train::pretrain(&config, control, observe))?;
    let text = closing(&report, args);
    let _ = write!(std::io::stdout(), "{text}");
    Ok(())
}

/// What a run would do.
fn rehearsal(dry: &DryRun) -> String {
    let mut out = format!(
        "text        {} files, {} documents, {}\n",
        human::grouped(dry.files as u64),
        human::grouped(dry.documents),
        human::bytes(dry.bytes)
    );
    let mut line = |name: &str, text: String| out.push_str(&format!("{name:<12}{text}\n"));
    let skipped = dry.skipped.to_string();
    if !skipped.is_empty() {
        line("passed over", skipped);
    }
    for damaged in &dry.damaged {
        line("DAMAGED", damaged.clone());
    }
    let counts = dry.model.parameter_counts();
    line(
        "model",
        format!(
            "{} parameters, {} tokens of vocabulary",
            human::count(counts.total as f64),
            human::grouped(dry.vocab_size as u64)
        ),
    );
    line("memory", human::bytes(dry.model.training_memory(&dry.workload).total()));
    line(
        "training",
        format!("{} steps, {} tokens", human::grouped(dry.steps), human::grouped(dry.tokens)),
    );
    match &dry.resume_from {
        Some(path) => line("goes on", format!("from {}", path.display())),
        None => line("begins", "afresh".into()),
    }
    line("", "everything checked; nothing was written. `tercet plan` says more of the cost".into());
    out
}

fn closing(report: &Report, args: &Args) -> String {
    let mut out = summary(report);
    out.push_str(&how_to_go_on(report, "pretrain", &args.config, &args.overrides));
    if let Some(folder) = &report.checkpoint {
        out.push_str(&format!(
            "model  {}\ncurve  {}\nwrite  {} generate {} -p \"…\"\n",
            folder.display(),
            report.curve.display(),
            human::program(),
            folder.display()
        ));
    }
    out
}

/// For a run that was stopped: where, and the command that goes on.
pub fn how_to_go_on(report: &Report, verb: &str, config: &Path, overrides: &[String]) -> String {
    if report.finished {
        return String::new();
    }
    let rest: Vec<String> = overrides.iter().map(|o| format!(" '{o}'")).collect();
    format!(
        "\nstopped as asked after step {}; go on with: {} {verb} {}{} --resume\n",
        report.steps,
        human::program(),
        config.display(),
        rest.concat()
    )
}

/// Losses and pace of a run, in a few lines.
pub fn summary(report: &Report) -> String {
    let mut out = format!("{} steps", human::grouped(report.steps));
    // A private run tells neither tokens nor their rate.
    if report.tokens > 0 {
        out.push_str(&format!(
            ", {} tokens, {} tok/s, {:.0} GFLOP/s",
            human::grouped(report.tokens),
            human::grouped(report.tokens_per_second.round() as u64),
            report.flops_per_second / 1e9,
        ));
    }
    if let Some(share) = report.gemm_share {
        out.push_str(&format!(", {:.0} % of gemm", 100.0 * share));
    }
    out.push('\n');
    let unit = match report.loss_unit {
        "" => String::new(),
        unit => format!(" {unit}"),
    };
    if let Some(loss) = report.train_loss {
        out.push_str(&format!("training loss    {loss:.4}{unit} (last tenth)\n"));
    }
    if let Some(loss) = report.validation_loss {
        out.push_str(&format!("validation loss  {loss:.4}{unit}\n"));
        if let Some(entropy) = report.unigram_entropy {
            out.push_str(&format!(
                "unigram entropy  {entropy:.4} nats per token of the same text; the model is {:.4} \
                 below\n",
                entropy - loss
            ));
        }
    }
    if report.skipped > 0 {
        out.push_str(&format!("{} steps were skipped: not finite\n", report.skipped));
    }
    out
}
