//! `tercet private epsilon`: the ε that a run costs.

use std::fmt::Write;

use clap::ValueEnum;
use serde::Serialize;
use tercet_private::accounting::{Phase, gaussian, gdp, pld, rdp};

use super::run::Run;

/// Say what epsilon a run costs, by one accountant or by all.
///
/// `pld` gives an upper and a lower bound with the truth between them, for each direction of
/// adjacency; `rdp` an upper bound, looser, which also serves adaptive runs. `gdp` is a central
/// limit theorem's guess: information, often below the truth, never a guarantee. At rate 1 the exact
/// value is given as well.
#[derive(clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Examples:\n  \
    tercet private epsilon --sigma 1.1 --rate 256/60000 --steps 14062 --delta 1e-5\n  \
    tercet private epsilon --sigma 0.7 --rate 0.001 --steps 5000 --delta 1e-6 --accountant all"
)]
pub struct Args {
    /// Noise multiplier: standard deviation of the noise over the clipping norm
    #[arg(long, value_name = "S")]
    sigma: f64,
    #[command(flatten)]
    run: Run,
    /// Who counts
    #[arg(long, value_enum, default_value = "pld")]
    accountant: Choice,
    /// Write JSON, numbers in full
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Choice {
    /// Privacy-loss distributions: bounds on both sides
    Pld,
    /// Rényi DP: an upper bound
    Rdp,
    /// Central limit theorem: information, not a bound
    Gdp,
    /// All of them
    All,
}

/// One line of the table.
#[derive(Serialize)]
struct Line {
    accountant: &'static str,
    /// Which neighbours: `add or remove`, `remove`, `add`.
    direction: &'static str,
    /// `upper bound`, `lower bound`, `exact`, `information, not a bound`.
    kind: &'static str,
    /// Null where it is not finite.
    epsilon: Option<f64>,
    /// The Rényi order that gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    sigma: f64,
    rate: f64,
    steps: u64,
    delta: f64,
    epsilon: Vec<Line>,
}

/// Prints the table.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let Args { sigma, run: Run { rate, steps, delta }, .. } = *args;
    let phases = [Phase::new(sigma, rate, steps)?];
    let lines = lines(&phases, delta, args.accountant)?;
    let report = Report { sigma, rate, steps, delta, epsilon: lines };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(())
}

fn lines(phases: &[Phase], delta: f64, choice: Choice) -> anyhow::Result<Vec<Line>> {
    const BOTH: &str = "add or remove";
    let mut lines = Vec::new();
    let mut line = |accountant, direction, kind, epsilon: f64, order| {
        let epsilon = epsilon.is_finite().then_some(epsilon);
        lines.push(Line { accountant, direction, kind, epsilon, order });
    };
    if matches!(choice, Choice::Pld | Choice::All) {
        let found = pld::epsilon(phases, delta)?;
        let directions = [(BOTH, found.both()), ("remove", found.remove), ("add", found.add)];
        for (direction, bounds) in directions {
            line("pld", direction, "upper bound", bounds.upper, None);
            line("pld", direction, "lower bound", bounds.lower, None);
        }
    }
    if matches!(choice, Choice::Rdp | Choice::All) {
        let found = rdp::epsilon(phases, delta, &rdp::default_orders())?;
        line("rdp", BOTH, "upper bound", found.epsilon, Some(found.order));
    }
    if phases.iter().all(|phase| phase.rate() == 1.0) {
        let exact = gaussian::epsilon(gaussian::mu(phases)?, delta)?;
        line("gaussian", BOTH, "exact", exact, None);
    }
    if matches!(choice, Choice::Gdp | Choice::All) {
        let found = gdp::epsilon_clt(phases, delta)?;
        line("gdp", BOTH, "information, not a bound", found, None);
    }
    Ok(lines)
}

fn text(report: &Report) -> String {
    let Report { sigma, rate, steps, delta, .. } = report;
    let mut out = format!("sigma {sigma}, rate {rate}, {steps} steps, delta {delta:e}\n\n");
    let _ = writeln!(out, "{:<11}{:<15}{:>12}  kind", "accountant", "direction", "epsilon");
    for line in &report.epsilon {
        let epsilon = match line.epsilon {
            None => "unbounded".to_owned(),
            Some(epsilon) => rounded(epsilon, line.kind),
        };
        let order = line.order.map(|order| format!(" (order {order})")).unwrap_or_default();
        let Line { accountant, direction, kind, .. } = line;
        let _ = writeln!(out, "{accountant:<11}{direction:<15}{epsilon:>12}  {kind}{order}");
    }
    out
}

/// Six digits after the point, outwards: a bound that is printed holds as printed.
fn rounded(epsilon: f64, kind: &str) -> String {
    let scaled = epsilon * 1e6;
    let whole = match kind {
        "upper bound" => scaled.ceil(),
        "lower bound" => scaled.floor(),
        _ => scaled.round(),
    };
    format!("{:.6}", whole / 1e6)
}
