//! `tercet private sigma`: the noise that a target needs.

use clap::ValueEnum;
use serde::Serialize;
use tercet_private::accounting::calibrate::{self, Accountant};

use super::run::Run;

/// Say how much noise an epsilon needs: the smallest sigma, never one that costs more.
///
/// The epsilon meant is the accountant's upper bound, for adding or removing one person. `gdp` is
/// not among the accountants: it is no bound, and noise set by it spends up to several times the target.
#[derive(clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Examples:\n  \
    tercet private sigma --epsilon 4 --rate 64/81412 --steps 3816 --delta 1e-5\n  \
    tercet private sigma --epsilon 4 --rate 64/81412 --steps 3816 --delta 1e-5 --accountant rdp"
)]
pub struct Args {
    /// The epsilon not to pass
    #[arg(long, value_name = "E")]
    epsilon: f64,
    #[command(flatten)]
    run: Run,
    /// Whose upper bound is meant
    #[arg(long, value_enum, default_value = "pld")]
    accountant: Choice,
    /// Write JSON, numbers in full
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Choice {
    /// Privacy-loss distributions: tight
    Pld,
    /// Rényi DP: looser, and what an adaptive run needs
    Rdp,
    /// Both
    All,
}

#[derive(Serialize)]
struct Line {
    accountant: Accountant,
    /// Noise multiplier.
    sigma: f64,
    /// Upper bound on ε at that σ, add or remove.
    epsilon: f64,
}

#[derive(Serialize)]
struct Report {
    target: f64,
    rate: f64,
    steps: u64,
    delta: f64,
    sigma: Vec<Line>,
}

/// Prints the noise.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let accountants: &[Accountant] = match args.accountant {
        Choice::Pld => &[Accountant::Pld],
        Choice::Rdp => &[Accountant::Rdp],
        Choice::All => &[Accountant::Pld, Accountant::Rdp],
    };
    let Args { epsilon: target, run: Run { rate, steps, delta }, .. } = *args;
    let mut report = Report { target, rate, steps, delta, sigma: Vec::new() };
    for &accountant in accountants {
        let found = calibrate::sigma(accountant, (target, delta), rate, steps)?;
        let (sigma, epsilon) = (found.sigma, found.epsilon);
        report.sigma.push(Line { accountant, sigma, epsilon });
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!("epsilon at most {target}, rate {rate}, {steps} steps, delta {delta:e}\n");
    println!("{:<11}{:<15}{:>12}{:>12}  kind", "accountant", "direction", "sigma", "epsilon");
    for Line { accountant, sigma, epsilon } in &report.sigma {
        let name = match accountant {
            Accountant::Pld => "pld",
            Accountant::Rdp => "rdp",
        };
        // Upwards: more noise than needed never costs more.
        let sigma = (sigma * 1e6).ceil() / 1e6;
        let epsilon = (epsilon * 1e6).ceil() / 1e6;
        println!("{name:<11}{:<15}{sigma:>12.6}{epsilon:>12.6}  upper bound", "add or remove");
    }
    Ok(())
}
