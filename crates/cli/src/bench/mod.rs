//! `tercet bench`: measurements that anybody can repeat.

pub mod attention;
mod flops;
mod gpu;
mod operands;
mod operator;
pub mod report;
pub mod step;
pub mod timing;

use std::path::Path;

use tercet_train::files;

/// Measure this machine. Every row prints the command that repeats it.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Attention(attention::Args),
    Step(step::Args),
}

/// Runs the chosen benchmark.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.what {
        What::Attention(args) => attention::run(args),
        What::Step(args) => step::run(args),
    }
}

/// Writes a report and says so.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    files::write_atomic(path, text.as_bytes())?;
    println!("wrote {}", path.display());
    Ok(())
}
