//! `tercet private audit`: does the promise hold?

mod drawing;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;
use tercet_private::audit::binomial::Interval;
use tercet_private::audit::membership::Membership;
use tercet_private::audit::report::{self, Report, Scored};
use tercet_private::tune::attack::{SCORES, Suspects, attack};
use tercet_train::files;

use crate::device::DeviceArg;
use crate::{error, human, interrupt};

/// A larger one promises nothing.
const MOST_EPSILON: f64 = 1e6;

/// Set what attacks find beside the epsilon that was proven.
///
/// RUN is the output folder of `tercet private tune`: one that planted canaries of its own
/// (private.canaries), or given with the canaries of its rows (made by `tercet private records`), with
/// members and with persons it never saw. Its newest checkpoint is attacked, RUN/scores.jsonl gets the
/// scores, and epsilon and delta are those that were proven.
///
/// SCORES, from elsewhere, has a line a row: {"id": …, "included": true or false, "score": loss,
/// "kind": "canary", "member" or "nonmember"}; a canary may have "candidates", the losses of what
/// could have been planted in its stead. Canaries, planted by fair coins, give a lower bound on
/// epsilon from this one run (Steinke, Nasr and Jagielski 2023) and exposure; members and
/// nonmembers, membership inference. A lower bound above the proven epsilon refutes it, and the
/// verb leaves with 3. One below it proves nothing: it is what these attacks could show.
#[derive(clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Examples:\n  \
    tercet private audit run\n  \
    tercet private audit run --canaries canaries.jsonl\n  \
    tercet private audit --scores scores.jsonl --epsilon 4 --delta 1e-6\n  \
    tercet private audit --scores scores.jsonl --epsilon 4 --delta 1e-6 --svg audit.svg"
)]
pub struct Args {
    /// Output folder of `tercet private tune`
    #[arg(required_unless_present = "scores")]
    run: Option<PathBuf>,
    /// The manifest of the canaries among its rows, instead of those that it planted itself
    #[arg(long, value_name = "FILE", requires = "run")]
    canaries: Option<PathBuf>,
    /// Rows that it was trained on
    #[arg(long, value_name = "FILE", requires = "nonmembers", requires = "run")]
    members: Option<PathBuf>,
    /// Rows of the same kind, of persons it never saw
    #[arg(long, value_name = "FILE", requires = "members")]
    nonmembers: Option<PathBuf>,
    /// At most so many members, and so many nonmembers
    #[arg(long, value_name = "N", default_value_t = 1000)]
    rows: usize,
    /// Losses of canaries, members and nonmembers as JSON lines, instead of RUN
    #[arg(long, value_name = "FILE", conflicts_with = "run")]
    scores: Option<PathBuf>,
    /// The epsilon to judge by; what was proven for RUN when absent
    #[arg(long, value_name = "E", required_unless_present = "run")]
    epsilon: Option<f64>,
    /// The delta that belongs to it; that of RUN when absent
    #[arg(long, value_name = "D", required_unless_present = "run")]
    delta: Option<f64>,
    /// Of the bound and of each interval
    #[arg(long, value_name = "C", default_value_t = 0.95)]
    confidence: f64,
    /// Draw the ROC curves, and the bound against epsilon
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write JSON, numbers in full
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArg,
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
    if let Some(epsilon) = args.epsilon.filter(|e| !(0.0..=MOST_EPSILON).contains(e)) {
        return Err(error::user(format!(
            "epsilon = {epsilon} is refused: what was proven is a number from 0 to {MOST_EPSILON}"
        )));
    }
    let (rows, epsilon, delta) = rows(args)?;
    // 1 − 0.95 in doubles is not 0.05, and tables are made for 0.05.
    let p = ((1.0 - args.confidence) * 1e12).round() / 1e12;
    let found = report::audit(&rows, delta, p)?;
    if let Some(path) = &args.svg {
        files::write_atomic(path, drawing::draw(&found, epsilon).as_bytes())?;
    }
    let refuted = found.refutes(epsilon);
    if args.json {
        let verdict = Verdict { epsilon, refuted, found: &found };
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        print!("{}", said(&found, epsilon));
    }
    match &found.canaries {
        Some(canaries) if refuted => Err(error::Refuted(format!(
            "refuted: epsilon is at least {:.6} with {} % confidence, {epsilon} was claimed; no \
             model of this run should be handed out as private",
            down(canaries.epsilon),
            percent(found.confidence)
        ))
        .into()),
        _ => Ok(()),
    }
}

/// The scores, and the ε and δ to judge them by.
fn rows(args: &Args) -> anyhow::Result<(Vec<Scored>, f64, f64)> {
    let Some(run) = &args.run else {
        // The parser has seen to it that all three are there.
        let missing = || error::user("--scores, --epsilon and --delta belong together");
        let path = args.scores.as_ref().ok_or_else(missing)?;
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let (epsilon, delta) = args.epsilon.zip(args.delta).ok_or_else(missing)?;
        return Ok((report::parse(&text)?, epsilon, delta));
    };
    let suspects = Suspects {
        canaries: args.canaries.clone(),
        members: args.members.clone(),
        nonmembers: args.nonmembers.clone(),
        rows: args.rows,
    };
    let device = args.device.choose()?;
    let stop = interrupt::stop_flag()?;
    let found = attack(run, &suspects, (&stop, &device.tensors()))?;
    eprintln!("{}; scores in {}", found.checkpoint.display(), run.join(SCORES).display());
    let epsilon = args.epsilon.or(found.epsilon).ok_or_else(|| {
        error::user(format!(
            "nothing was proven for {}: it was trained without noise. Give --epsilon, what it \
             would be claimed to be",
            run.display()
        ))
    })?;
    Ok((found.scores, epsilon, args.delta.unwrap_or(found.delta)))
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
