//! `tercet sft`: supervised tuning.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use tercet_model::Tokenizer;
use tercet_train::Report;
use tercet_train::config::TuneModel;
use tercet_train::tune::start::Beside;
use tercet_train::tune::{Encoder, Example, SftConfig, sft};

use crate::device::DeviceArg;
use crate::watched::Watched;
use crate::{human, interrupt};

/// Tune a model on prompts and completions, conversations or text.
///
/// Rows are JSON lines: {"messages": [{"role": …, "content": …}, …]}, {"prompt": …,
/// "completion": …} or {"text": …}. Of conversations the assistant's turns are learnt, of pairs the
/// completion, of texts everything. With a [lora] section an adapter is trained (PEFT's format)
/// and the weights stay; without one every weight is trained. Ctrl-C and SIGTERM save and leave;
/// --resume goes on with exactly the bits of a run that was never interrupted.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet sft configs/sft.toml model.path=SmolLM2 'data.paths=[\"rows.jsonl\"]'\n  \
    tercet sft configs/sft.toml --show 3")]
pub struct Args {
    /// The run: [model], [lora], [data], [train] and [checkpoint]; see configs/sft.toml
    config: PathBuf,
    /// Replace keys of the file, such as train.lr=3e-5
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on from the newest complete checkpoint of the output folder
    #[arg(long)]
    resume: bool,
    /// Print the first N examples, what is learnt in colour, and train nothing
    #[arg(long, value_name = "N")]
    show: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
}

/// Tunes, and shows how it goes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = SftConfig::load(&args.config, &args.overrides)?;
    if let Some(count) = args.show {
        let stop = interrupt::stop_flag()?;
        return show(&config, count, &stop);
    }
    let watched = Watched {
        doing: "tuning",
        device: &args.device,
        resume: args.resume,
        yardstick: Some(config.train.dtype),
        stamp: "",
    };
    let report = watched.run(|control, observe| sft(&config, control, observe))?;
    let tuned = Tuned {
        verb: "sft",
        config: &args.config,
        overrides: &args.overrides,
        model: &config.model,
        adapter: config.lora.is_some() || config.model.adapter.is_some(),
    };
    let _ = write!(std::io::stdout(), "{}", tuned.closing(&report));
    Ok(())
}

/// What a tuning run was asked, for its last words.
pub struct Tuned<'a> {
    /// The verb.
    pub verb: &'a str,
    /// Its file and overrides.
    pub config: &'a Path,
    /// The `key=value` arguments.
    pub overrides: &'a [String],
    /// What was tuned.
    pub model: &'a TuneModel,
    /// Whether an adapter was.
    pub adapter: bool,
}

impl Tuned<'_> {
    /// Figures, where things are, and what to do next.
    pub fn closing(&self, report: &Report) -> String {
        let mut text = crate::pretrain::summary(report);
        text.push_str(&crate::pretrain::how_to_go_on(
            report,
            self.verb,
            self.config,
            self.overrides,
        ));
        if let Some(folder) = &report.checkpoint {
            let (program, new, base) =
                (human::program(), folder.display(), self.model.path.display());
            let (what, with) = match self.adapter {
                true => ("adapter", format!("{base} --adapter {new}")),
                false => ("model", new.to_string()),
            };
            text.push_str(&format!(
                "{what:<8} {new}\ncurve    {}\nwrite    {program} generate {with} -p \"…\"\n",
                report.curve.display()
            ));
        }
        text
    }
}

/// Prints the first examples as the model will see them.
fn show(
    config: &SftConfig,
    count: usize,
    stop: &std::sync::atomic::AtomicBool,
) -> anyhow::Result<()> {
    let beside = Beside::load(&config.model.path)?;
    let (model, _) = tercet_model::load_config(&config.model.path)?;
    let encoder = Encoder::new(&beside.tokenizer, &model, &beside.generation)?;
    let rows = tercet_train::tune::sft::rows(&config.data, &encoder, stop)?;
    let mut out = format!("{}\n", rows.count);
    for (i, example) in rows.train.iter().take(count).enumerate() {
        let (tokens, learnt) = (example.ids.len(), example.counted());
        out.push_str(&format!("\nexample {}: {tokens} tokens, {learnt} learnt\n", i + 1));
        out.push_str(&painted(example, &encoder, std::io::stdout().is_terminal()));
        out.push('\n');
    }
    let _ = write!(std::io::stdout(), "{out}");
    Ok(())
}

/// Tokens apart, learnt ones green; without colours learnt ones stand in ⟦ ⟧.
pub fn painted(example: &Example, encoder: &Encoder, colour: bool) -> String {
    let (on, off) = if colour { ("\x1b[32m", "\x1b[0m") } else { ("⟦", "⟧") };
    let mut out = String::new();
    let mut inside = false;
    for (&id, &learnt) in example.ids.iter().zip(&example.learnt) {
        if learnt != inside {
            out.push_str(if learnt { on } else { off });
            inside = learnt;
        }
        out.push_str(&readable(encoder.tokenizer(), id as u32));
        out.push('│');
    }
    if inside {
        out.push_str(off);
    }
    out
}

/// A token's text; special ones and parts of characters by their name.
fn readable(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.decode(&[id]) {
        Ok(text) if !text.is_empty() && !text.contains('\u{FFFD}') => text.replace('\n', "⏎\n"),
        _ => tokenizer.token(id).unwrap_or_else(|| format!("<{id}>")),
    }
}
