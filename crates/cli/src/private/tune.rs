//! `tercet private tune`: an adapter with a proof of what it gives away.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use tercet_private::tune::{PrivateConfig, tune};
use tercet_train::tune::Encoder;
use tercet_train::tune::start::Beside;

use crate::device::DeviceArg;
use crate::interrupt;
use crate::sft::{Tuned, painted};
use crate::watched::Watched;

/// Tune an adapter so that it hides whether any one person was in the data.
///
/// Rows are those of `tercet sft`, each with a column that says whose it is. Every step draws
/// persons by coins of their own, clips what each of them says, and adds noise; the ledger has the
/// step before the noise is used. The output folder receives checkpoints, metrics.jsonl (released
/// numbers alone), ledger.jsonl, and privacy.json, which stands beside the adapter and says what
/// is promised. Ctrl-C and SIGTERM save and leave; --resume goes on, with what was spent.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet plan configs/private.toml private.epsilon=2\n  \
    tercet private tune configs/private.toml model.path=SmolLM2 'data.paths=[\"rows.jsonl\"]'")]
pub struct Args {
    /// The run: [model], [lora], [data], [private], [train] and [checkpoint]; see
    /// configs/private.toml
    config: PathBuf,
    /// Replace keys of the file, such as private.epsilon=2
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on from the newest complete checkpoint of the output folder, and with its ledger
    #[arg(long)]
    resume: bool,
    /// Take coins and noise from this seed: the run can be repeated, and protects nobody
    #[arg(long, value_name = "N")]
    insecure_seed: Option<u64>,
    /// Print the first N persons, what is learnt in colour, and train nothing
    #[arg(long, value_name = "N")]
    show: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
}

/// Tunes, and shows how it goes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut config = PrivateConfig::load(&args.config, &args.overrides)?;
    config.private.insecure_seed = args.insecure_seed;
    if let Some(count) = args.show {
        return show(&config, count);
    }
    let mut stamps = Vec::new();
    let mut verb = "private tune".to_owned();
    if !config.private.noise {
        stamps.push("NOT PRIVATE: no noise");
    }
    if let Some(seed) = args.insecure_seed {
        eprintln!("{}", tercet_private::tune::budget::INSECURE);
        stamps.push("INSECURE SEED");
        verb.push_str(&format!(" --insecure-seed {seed}"));
    }
    let stamp = stamps.join(" · ");
    let watched = Watched {
        doing: "tuning privately",
        device: &args.device,
        resume: args.resume,
        yardstick: None,
        stamp: &stamp,
    };
    let report = watched.run(|control, observe| tune(&config, control, observe))?;
    let tuned = Tuned {
        verb: &verb,
        config: &args.config,
        overrides: &args.overrides,
        model: &config.model,
        adapter: true,
    };
    let closing = tuned.closing(&report);
    let promise = config.output.join(tercet_private::tune::report::FILE);
    let _ = writeln!(std::io::stdout(), "{closing}promise  {}", promise.display());
    Ok(())
}

/// Prints the first persons as the model will see them.
fn show(config: &PrivateConfig, count: usize) -> anyhow::Result<()> {
    let stop = interrupt::stop_flag()?;
    let beside = Beside::load(&config.model.path)?;
    let (model, _) = tercet_model::load_config(&config.model.path)?;
    let encoder = Encoder::new(&beside.tokenizer, &model, &beside.generation)?;
    let rows = tercet_private::tune::rows::rows(config, &encoder, &[], &stop)?;
    let mut out = format!("{}\n", rows.count);
    for (i, person) in rows.train.iter().take(count).enumerate() {
        let (tokens, learnt) = (person.tokens(), person.counted());
        out.push_str(&format!("\nperson {}: {tokens} tokens, {learnt} learnt\n", i + 1));
        for example in &person.examples {
            out.push_str(&painted(example, &encoder, std::io::stdout().is_terminal()));
            out.push('\n');
        }
    }
    let _ = write!(std::io::stdout(), "{out}");
    Ok(())
}
