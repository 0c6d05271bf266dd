//! `tercet private audit`: does the promise hold?

mod drawing;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;
use tercet_private::audit::binomial::Interval;
use tercet_private::audit::membership::Membership;
use tercet_private::audit::report::{self, Report};

use crate::{error, files, human};

/// A larger one promises nothing.
const MOST_EPSILON: f64 = 1e6;

/// Set what attacks find beside the epsilon that was proven.
///
/// SCORES has a line a row: {"id": …, "included": true or false, "score": loss, "kind": "canary",
/// "member" or "nonmember"}; a canary may have "candidates", the losses of what could have been
/// planted in its stead. Canaries, planted by fair coins, give a lower bound on epsilon from this
/// one run (Steinke, Nasr and Jagielski 2023) and exposure; members and nonmembers, membership
/// inference. A lower bound above the proven epsilon refutes it, and the verb leaves with 2. One
/// below it proves nothing: it is what these attacks could show.
#[derive(clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Examples:\n  \
    tercet private audit --scores scores.jsonl --epsilon 4 --delta 1e-6\n  \
    tercet private audit --scores scores.jsonl --epsilon 4 --delta 1e-6 --svg audit.svg"
)]
pub struct Args {
    /// Losses of canaries, members and nonmembers as JSON lines
    #[arg(long, value_name = "FILE")]
    scores: PathBuf,
    /// The epsilon that was proven
    #[arg(long, value_name = "E")]
    epsilon: f64,
    /// The delta that it was proven with
    #[arg(long, value_name = "D")]
    delta: f64,
    /// Of the bound and of each interval
    #[arg(long, value_name = "C", default_value_t = 0.95)]
    confidence: f64,
    /// Draw the ROC curves, and the bound against epsilon
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write JSON, numbers in full
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Verdict<'a> {
    /// The proven ε.
    epsilon: f64,
    refuted: bool,
    #[serde(flatten)]
    found: &'a Report,
}

/// Prints what was found; an error when it refutes the proof.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let Args { epsilon, delta, .. } = *args;
    if !(0.0..=MOST_EPSILON).contains(&epsilon) {
        return Err(error::user(format!(
            "epsilon = {epsilon} is refused: what was proven is a number from 0 to {MOST_EPSILON}"
        )));
    }
    let text = std::fs::read_to_string(&args.scores)
        .with_context(|| format!("cannot read {}", args.scores.display()))?;
    let rows = report::parse(&text)?;
    // 1 − 0.95 in doubles is not 0.05, and tables are made for 0.05.
    let p = ((1.0 - args.confidence) * 1e12).round() / 1e12;
    let found = report::audit(&rows, delta, p)?;
    if let Some(path) = &args.svg {
        files::write(path, drawing::draw(&found, epsilon).as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let refuted = found.refutes(epsilon);
    if args.json {
        let verdict = Verdict { epsilon, refuted, found: &found };
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        print!("{}", said(&found, epsilon));
    }
    match &found.canaries {
        Some(canaries) if refuted => Err(error::user(format!(
            "refuted: epsilon is at least {:.6} with {} % confidence, {epsilon} was claimed; no \
             model of this run should be handed out as private",
            down(canaries.epsilon),
            percent(found.confidence)
        ))),
        _ => Ok(()),
    }
}

/// A lower bound holds as printed.
fn down(bound: f64) -> f64 {
    (bound * 1e6).floor() / 1e6
}

fn percent(share: f64) -> f64 {
    (share * 1e8).round() / 1e6
}

fn said(found: &Report, epsilon: f64) -> String {
    let (confidence, delta) = (percent(found.confidence), found.delta);
    let mut out = format!(
        "proven epsilon {epsilon} at delta {delta:e}; bounds and intervals at {confidence} % confidence\n\n"
    );
    if let Some(canaries) = &found.canaries {
        let [planned, made, right] =
            [canaries.guesses.canaries, canaries.guesses.made, canaries.guesses.right]
                .map(human::grouped);
        let _ = writeln!(
            out,
            "canaries     {planned}, {made} guessed, {right} right: epsilon at least {:.6}",
            down(canaries.epsilon)
        );
        if let Some(exposure) = canaries.exposure {
            let _ = writeln!(
                out,
                "exposure     mean {:.2} bits, median {:.2}, largest {:.2} of {:.2}; never seen, mean 1.44",
                exposure.mean, exposure.median, exposure.largest, exposure.possible
            );
        }
        if let Some(membership) = &canaries.membership {
            inference(&mut out, "in or out", membership);
        }
    }
    if let Some(membership) = &found.membership {
        inference(&mut out, "members", membership);
    }
    if found.canaries.is_none() {
        out.push_str("\nWithout canaries there is no bound to set beside the proof.\n");
    } else if !found.refutes(epsilon) {
        out.push_str(
            "\nNot refuted: these attacks show less than the proof allows. That proves nothing more.\n",
        );
    }
    out
}

fn inference(out: &mut String, name: &str, found: &Membership) {
    let interval = |Interval { low, high }| format!("{low:.3} to {high:.3}");
    let [members, nonmembers] = [found.members, found.nonmembers].map(human::grouped);
    let _ = writeln!(
        out,
        "{name:<13}{members} against {nonmembers}: AUC {:.3} ({}), TPR at 1 % FPR {:.3} ({}), \
         balanced accuracy in hindsight {:.3}",
        found.auc,
        interval(found.auc_interval),
        found.tpr_at_1_percent,
        interval(found.tpr_interval),
        found.balanced_accuracy
    );
}
