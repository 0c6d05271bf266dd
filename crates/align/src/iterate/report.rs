//! What one sees at the end: `report.md` with its pictures.

use std::fmt::Write;
use std::path::PathBuf;

use tercet_train::run::METRICS;
use tercet_train::{Result, files, metrics};

use super::config::IterativeConfig;
use super::measure::Worth;
use super::rounds::Round;
use crate::chart::{Line, lines};

/// Writes `report.md`, `reward.svg` and `squeezing.svg` into the run's folder; returns the
/// report's path.
pub fn write(config: &IterativeConfig, rounds: &[Round]) -> Result<PathBuf> {
    let save =
        |name: &str, text: &str| files::write_atomic(&config.output.join(name), text.as_bytes());
    save("reward.svg", &rewards(rounds)?)?;
    save("squeezing.svg", &squeezing(config, rounds)?)?;
    save("report.md", &text(config, rounds))?;
    Ok(config.output.join("report.md"))
}

fn text(config: &IterativeConfig, rounds: &[Round]) -> String {
    let mut out = String::from("# Iterative alignment\n\n");
    let terms: Vec<String> = config
        .align
        .terms
        .iter()
        .map(|term| {
            let factor = if term.mappo { " with Δ" } else { "" };
            format!("{}{factor} × {}", term.objective.name(), term.weight)
        })
        .collect();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "{} rounds of {} answers a prompt at temperature {}; objective: {}; learning rate {:e}.\n",
        config.iterative.rounds,
        config.sampling.samples,
        config.sampling.temperature,
        terms.join(" + "),
        config.train.lr
    );
    out.push_str(
        "| round | sampled reward | pairs | tied | loss | held-out reward | tokens | ended | KL \
         from the start |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
    };
    for round in rounds {
        let held_out = |of: fn(&Worth) -> f64| round.held_out.as_ref().map(of);
        let reward = round.held_out.map_or_else(
            || "–".to_owned(),
            |worth| format!("{:.4} ± {:.4}", worth.reward, worth.interval),
        );
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {reward} | {} | {} | {} |",
            round.round,
            number(round.sampled.map(|worth| worth.reward), 4),
            round.picks.pairs,
            round.picks.tied,
            number(round.train_loss, 4),
            number(held_out(|worth| worth.length), 1),
            number(held_out(|worth| worth.ended), 2),
            number(round.held_out.and_then(|worth| worth.divergence), 3),
        );
    }
    out.push_str(
        "\nRound 0 is the start. Rewards are means over prompts, ± half a 95 % confidence interval \
         over prompts; KL is the mean of ln π(y) − ln π₀(y) over the answers, in nats.\n\n\
         ![held-out and sampled reward by round](reward.svg)\n\n\
         ![log-probabilities of chosen, rejected and most probable answers](squeezing.svg)\n\n",
    );
    for round in rounds.iter().filter(|round| round.round > 0) {
        let _ = writeln!(
            out,
            "Round {0}: [samples](round-{0}/samples.jsonl), [pairs](round-{0}/pairs.jsonl), \
             [Δ](round-{0}/train/delta.svg), [loss](round-{0}/train/curve.svg)\n",
            round.round
        );
    }
    out
}

fn rewards(rounds: &[Round]) -> Result<String> {
    let line = |name: &str, of: &dyn Fn(&Round) -> Option<f64>| Line {
        name: name.to_owned(),
        points: rounds.iter().filter_map(|round| Some((round.round as f64, of(round)?))).collect(),
    };
    lines(
        &[
            line("held out, after the round", &|r| r.held_out.map(|w| w.reward)),
            line("held out, upper end of the interval", &|r| {
                r.held_out.map(|w| w.reward + w.interval)
            }),
            line("held out, lower end of the interval", &|r| {
                r.held_out.map(|w| w.reward - w.interval)
            }),
            line("sampled, before the round", &|r| r.sampled.map(|w| w.reward)),
        ],
        "round",
        "mean reward",
    )
}

/// The rounds' steps one after the other.
fn squeezing(config: &IterativeConfig, rounds: &[Round]) -> Result<String> {
    let mut points: [Vec<(f64, f64)>; 3] = Default::default();
    let mut before = 0;
    for round in rounds.iter().filter(|round| round.round > 0) {
        let records = metrics::read(&config.round(round.round).join("train").join(METRICS))?;
        for record in &records {
            for (i, key) in ["logps/chosen", "logps/rejected", "logps/best"].iter().enumerate() {
                if let Some(&value) = record.measures.get(*key) {
                    points[i].push(((before + record.step) as f64, value));
                }
            }
        }
        before += records.len() as u64;
    }
    let names = ["chosen", "rejected", "most probable at the chosen answer's places"];
    let lines_of =
        names.iter().zip(points).map(|(name, points)| Line { name: (*name).to_owned(), points });
    lines(
        &lines_of.collect::<Vec<_>>(),
        "step, round after round",
        "log-probability of an answer (nats)",
    )
}
