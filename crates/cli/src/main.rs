//! The `tercet` command. Every verb is one file (or folder) with an `Args` and a `run`.

mod align;
mod attend;
mod bench;
mod convert;
mod device;
mod doctor;
mod error;
mod eval;
mod generate;
mod human;
mod interrupt;
mod kernels;
mod lock;
mod machine;
mod merge;
mod picture;
mod plan;
mod pretrain;
mod private;
mod progress;
mod quickstart;
mod sample;
mod selftest;
mod serve;
mod sft;
mod svg;
mod tokenizer;
mod watched;
mod yardstick;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Language models whose attention is sparse from the first step.
///
/// Every query reads compressed summaries of the past, the few blocks those summaries point to,
/// and a sliding window (Native Sparse Attention, arXiv 2502.11089).
#[derive(Parser)]
#[command(
    name = "tercet",
    version,
    propagate_version = true,
    after_help = "Start here: tercet quickstart\n\
                  Exit codes: 0 fine, 2 something in what you gave, 1 a fault of tercet, 3 a claim that a test refuted."
)]
struct Cli {
    /// Worker threads; results do not depend on it [default: one per logical core]
    #[arg(long, global = true, value_name = "N", display_order = 900,
          value_parser = clap::value_parser!(u16).range(1..=MOST_THREADS))]
    threads: Option<u16>,

    #[command(subcommand)]
    verb: Verb,
}

/// More threads than any machine this runs on has; past it lies a typing error.
const MOST_THREADS: i64 = 4096;

#[derive(Subcommand)]
enum Verb {
    Align(align::Args),
    Attend(attend::Args),
    Bench(bench::Args),
    Convert(convert::Args),
    Doctor(doctor::Args),
    Eval(eval::Args),
    Generate(generate::Args),
    #[command(hide = true)]
    Kernels(kernels::Args),
    Merge(merge::Args),
    #[command(hide = true)]
    Picture(picture::Args),
    Plan(plan::Args),
    Pretrain(pretrain::Args),
    Private(private::Args),
    Quickstart(quickstart::Args),
    Sample(sample::Args),
    Selftest(selftest::Args),
    Serve(serve::Args),
    Sft(sft::Args),
    Tokenizer(tokenizer::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    std::panic::set_hook(Box::new(report_panic));
    let ended = std::panic::catch_unwind(|| run(&cli));
    device::farewell();
    match ended {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("tercet: {}", error::message(&error));
            ExitCode::from(error::exit_code(&error))
        }
        // The hook has already said what happened.
        Err(_) => ExitCode::from(1),
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    if let Some(threads) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
    }
    if !cli.verb.has_something_to_save() {
        interrupt::end_on_closed_pipe()?;
    }
    match &cli.verb {
        Verb::Align(args) => align::run(args),
        Verb::Attend(args) => attend::run(args),
        Verb::Bench(args) => bench::run(args),
        Verb::Convert(args) => convert::run(args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::Eval(args) => eval::run(args),
        Verb::Generate(args) => generate::run(args),
        Verb::Kernels(args) => kernels::run(args),
        Verb::Merge(args) => merge::run(args),
        Verb::Picture(args) => picture::run(args),
        Verb::Plan(args) => plan::run(args),
        Verb::Pretrain(args) => pretrain::run(args),
        Verb::Private(args) => private::run(args),
        Verb::Quickstart(args) => quickstart::run(args),
        Verb::Sample(args) => sample::run(args),
        Verb::Selftest(args) => selftest::run(args),
        Verb::Serve(args) => serve::run(args),
        Verb::Sft(args) => sft::run(args),
        Verb::Tokenizer(args) => tokenizer::run(args),
    }
}

impl Verb {
    /// Whether a closed output pipe must not end the verb.
    fn has_something_to_save(&self) -> bool {
        match self {
            Self::Private(args) => args.has_something_to_save(),
            _ => matches!(
                self,
                Self::Align(_)
                    | Self::Pretrain(_)
                    | Self::Quickstart(_)
                    | Self::Sample(_)
                    | Self::Serve(_)
                    | Self::Sft(_)
            ),
        }
    }
}

/// One sentence instead of a backtrace: a panic is always our fault, never the user's.
fn report_panic(info: &std::panic::PanicHookInfo) {
    let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line()));
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown");
    eprintln!(
        "tercet: this is a bug in tercet, not in what you gave it: {text}{}\n\
         Please report it with the command you ran and the output of `tercet doctor`.",
        place.unwrap_or_default()
    );
    if std::env::var_os("RUST_BACKTRACE").is_some() {
        eprintln!("{}", std::backtrace::Backtrace::force_capture());
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
