//! `tercet quickstart`: from nothing to a model that writes, in minutes, without a download.

mod corpus;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use tercet_attention::{Dims, NsaSpec};
use tercet_model::{Generator, Model, Sampling, Tokenizer};
use tercet_train::{Control, Report, RunConfig, files};

use crate::bench::attention;
use crate::bench::report;
use crate::bench::step;
use crate::bench::timing::Effort;
use crate::device::{Choice, DeviceArg};
use crate::error::user;
use crate::machine::Machine;
use crate::progress::Watcher;
use crate::{human, interrupt, picture, pretrain, yardstick};

/// What is trained and how; steps, data and output are filled in.
const CONFIG: &str = include_str!("../../../../configs/quickstart.toml");

/// What the sample continues.
const PROMPT: &str = "/// Returns the number of";

/// Steps that are timed to find out how many fit.
const TIMED_STEPS: usize = 5;

/// Train a small sparse language model from nothing, in minutes.
///
/// No download, no account, no GPU. The text is Rust: the sources of the crates that cargo fetched
/// to build this. Trains a tokenizer and a 3-million-parameter model at context 2048 for about four
/// minutes, lets it write, and measures sparse against dense attention on this machine.
#[derive(clap::Args)]
pub struct Args {
    /// Minutes to train for
    #[arg(long, default_value_t = 4.0, value_name = "M")]
    minutes: f64,
    /// Seconds to train for, instead of minutes
    #[arg(long, conflicts_with = "minutes", value_name = "S")]
    seconds: Option<f64>,
    /// Train on this file, folder or glob instead; may be given several times
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
    /// Folder for everything that is made [default: quickstart-run, or the next free
    /// quickstart-run-2, -3, …]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
}

/// The whole way.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let seconds = args.seconds.unwrap_or(60.0 * args.minutes);
    if !(1.0..=86_400.0).contains(&seconds) {
        return Err(user(format!("{seconds} seconds of training is outside 1 second to 1 day")));
    }
    let stop = interrupt::stop_flag()?;
    let device = args.device.choose()?;
    let out = output_folder(args.output.as_deref())?;
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let machine = Machine::detect();
    say(&format!(
        "tercet {}: a language model with native sparse attention, from nothing\n\
         {device}, on {}; everything goes to {}/",
        env!("CARGO_PKG_VERSION"),
        machine.cpu,
        out.display()
    ));

    phase(1, "the text");
    let paths = text(args, &out)?;

    phase(2, "the speed of this machine");
    let gemm = yardstick::matmul_gflops(&device, false, 9)?;
    say(&format!("a matrix product runs at {gemm:.0} GFLOP/s, the yardstick from here on"));
    let config = fitted(&out, &paths, seconds, gemm, &device)?;

    phase(3, &format!("training for about {}", human::duration(Duration::from_secs_f64(seconds))));
    let tensors = device.tensors();
    let control =
        Control { stop: &stop, resume: false, gemm_flops: Some(1e9 * gemm), device: &tensors };
    let mut watcher = Watcher::new(Duration::from_secs(2), "");
    let report = tercet_train::pretrain(&config, &control, &mut |event| watcher.show(&event));
    watcher.finish();
    let report = report?;
    say(pretrain::summary(&report).trim_end());
    let model = match &report.checkpoint {
        Some(folder) if report.finished => folder,
        _ => return stopped(&config, &report),
    };

    phase(4, "what it writes");
    write_sample(model, &out, &device)?;

    phase(5, "sparse against dense attention on this machine");
    compare(&out, seconds, &device, &stop)?;

    say(&format!(
        "\nthe model     {model}  (curve: {curve})\n\
         let it write  {program} generate {model} -p \"pub fn new(\"\n\
         your own      {program} pretrain configs/quickstart.toml output=my-run \
         'data.paths=[\"my/text\"]' train.steps=2000",
        model = model.display(),
        curve = report.curve.display(),
        program = human::program(),
    ));
    Ok(())
}

/// Where this run goes. The usual folder is never written over: a second run takes the next free
/// name and says so.
fn output_folder(wanted: Option<&Path>) -> anyhow::Result<PathBuf> {
    let free = |path: &Path| {
        std::fs::read_dir(path).map_or(!path.exists(), |mut entries| entries.next().is_none())
    };
    if let Some(path) = wanted {
        if free(path) {
            return Ok(path.to_owned());
        }
        return Err(user(format!("{} is not an empty folder; name a new one", path.display())));
    }
    let usual = PathBuf::from("quickstart-run");
    if free(&usual) {
        return Ok(usual);
    }
    let next = (2..).map(|n| PathBuf::from(format!("quickstart-run-{n}"))).find(|p| free(p));
    let next = next.unwrap_or(usual);
    say(&format!(
        "quickstart-run/ holds an earlier run and is left alone; this one trains afresh in {}/",
        next.display()
    ));
    Ok(next)
}

/// The paths to train on: the user's, or the gathered corpus.
fn text(args: &Args, out: &Path) -> anyhow::Result<Vec<String>> {
    if !args.data.is_empty() {
        say(&format!("yours: {}", args.data.join(", ")));
        return Ok(args.data.clone());
    }
    let corpus = corpus::gather(&out.join("corpus"))?;
    say(&format!(
        "{}: {} files, {}, copied to {}",
        corpus.origin,
        human::grouped(corpus.files as u64),
        human::bytes(corpus.bytes),
        corpus.folder.display()
    ));
    Ok(vec![corpus.folder.display().to_string()])
}

/// The run with as many steps as fit into `seconds` here: a few are timed first.
fn fitted(
    out: &Path,
    paths: &[String],
    seconds: f64,
    gemm: f64,
    device: &Choice,
) -> anyhow::Result<RunConfig> {
    let mut config = RunConfig::parse(CONFIG, &[])?;
    config.output = out.join("train");
    config.data.paths = paths.to_vec();
    let model = step::architecture(&config)?;
    let time = step::measure(&model, &config, TIMED_STEPS, device)?;
    let steps = ((seconds / time.seconds) as u64).max(10);
    config.train.steps = Some(steps);
    config.train.warmup = (steps / 12).clamp(2, config.train.warmup);
    say(&format!(
        "a training step of the {}-parameter model takes {} ({} tok/s, {:.0} % of the yardstick): \
         {steps} steps of {} tokens fit",
        human::count(time.parameters as f64),
        human::seconds(time.seconds),
        human::grouped(time.tokens_per_second().round() as u64),
        100.0 * time.flops_per_second() / 1e9 / gemm,
        human::grouped(time.tokens as u64)
    ));
    Ok(config)
}

fn stopped(config: &RunConfig, report: &Report) -> anyhow::Result<()> {
    say(&format!(
        "\nstopped as asked after step {} of {}; go on with: {} pretrain {} --resume",
        report.steps,
        config.steps(),
        human::program(),
        config.output.join("config.toml").display()
    ));
    Ok(())
}

/// Lets the model write, on the screen and into a file.
fn write_sample(folder: &Path, out: &Path, device: &Choice) -> anyhow::Result<()> {
    let (mut model, tokenizer) = (Model::load(folder)?, Tokenizer::load(folder)?);
    model.to_device(&device.tensors())?;
    let mut generator = Generator::new(&model, &tokenizer, None)?;
    let sampling = Sampling { seed: 1, max_tokens: 160, ..Sampling::default() };
    let prompt = tokenizer.encode(PROMPT, true)?;
    say_now(PROMPT);
    let written = generator.generate(&prompt, &sampling, &mut |piece| {
        say_now(piece);
        ControlFlow::Continue(())
    })?;
    say(&format!("\n\n({} tokens at {:.0} tok/s)", written.tokens.len(), written.decode_rate()));
    save(&out.join("sample.txt"), &format!("{PROMPT}{}\n", written.text))?;
    model.to_device(&Choice::Cpu.tensors())?;
    draw_query(&model, &tokenizer, out)
}

/// Draws what one query of the model reads in a file of the corpus.
fn draw_query(model: &Model, tokenizer: &Tokenizer, out: &Path) -> anyhow::Result<()> {
    let Some(text) = corpus::one_file(&out.join("corpus")) else { return Ok(()) };
    let path = out.join("reads.svg");
    save(&path, &picture::reads(model, tokenizer, &text)?)?;
    say(&format!("what one of its queries reads, as a picture: {}", path.display()));
    Ok(())
}

/// Measures both kinds of attention and writes table, JSON and chart.
fn compare(out: &Path, seconds: f64, device: &Choice, stop: &AtomicBool) -> anyhow::Result<()> {
    // The grouping the paper trains with: sixteen query heads share one key/value head.
    let dims = Dims { heads: 16, kv_heads: 1, key_dim: 64, value_dim: 64 };
    let all = [1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10];
    let lengths = if seconds < 120.0 { &all[..3] } else { &all[..] };
    // A GPU's products and kernels are made for 16 bits.
    let bf16 = device.gpu().is_some();
    let setting = attention::setting(dims, NsaSpec::default(), bf16, None, 0, device)?;
    let wanted = |row: &str| {
        let whole = row.ends_with("/dense") || row.ends_with("/nsa");
        whole && !stop.load(Ordering::Relaxed)
    };
    say(&format!(
        "{} query heads sharing {} key/value head, dims {}/{}, the paper's blocks (32/16, 64×16, \
         window 512), {}",
        dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim, setting.dtype
    ));
    let rows =
        attention::measure(&setting, device, lengths, &wanted, Effort { seconds: 0.3 }, |m| {
            say(&format!(
                "  {:<15}{:>5} tokens  {:>9}  {:>4.0} % of gemm",
                m.row,
                human::length(m.tokens),
                human::seconds(m.seconds),
                100.0 * setting.share(m)
            ));
        })?;
    let Some(table) = report::speedups(&rows) else { return Ok(()) };
    say(&format!("\n{table}"));
    save(&out.join("attention.txt"), &table)?;
    save(&out.join("attention.json"), &setting.json(&rows)?)?;
    save(&out.join("attention.svg"), &setting.svg(&rows))?;
    say(&format!("table, figures and chart: {}/attention.{{txt,json,svg}}", out.display()));
    Ok(())
}

fn save(path: &Path, text: &str) -> anyhow::Result<()> {
    Ok(files::write_atomic(path, text.as_bytes())?)
}

fn phase(number: usize, what: &str) {
    say(&format!("\n[{number}/5] {what}"));
}

/// A line for the user; a closed output is no reason to lose the run.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn say_now(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quickstart_model_has_three_to_five_million_parameters_at_context_2048() {
        let config = RunConfig::parse(CONFIG, &[]).unwrap();
        let model = step::architecture(&config).unwrap();
        let parameters: usize = tercet_model::parameters(&model).iter().map(|p| p.len()).sum();
        assert!((3_000_000..=5_000_000).contains(&parameters), "{parameters}");
        assert_eq!(model.max_position_embeddings, 2048);
        assert!(model.nsa.is_some());
    }

    #[test]
    fn a_folder_with_something_in_it_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        assert!(output_folder(Some(folder.path())).is_ok());
        std::fs::write(folder.path().join("mine.txt"), "precious").unwrap();
        assert!(output_folder(Some(folder.path())).is_err());
    }
}
