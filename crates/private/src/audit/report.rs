//! All attacks at once, from the losses of rows.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::exposure::exposure;
use super::membership::{self, Membership};
use super::one_run::{self, Guesses};
use super::{MOST_SCORES, check_error_rate};
use crate::{Error, Result};

/// What a row is to the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Planted by a coin.
    Canary,
    /// In the data anyway.
    Member,
    /// Not in the data, of the same kind as what is.
    Nonmember,
}

/// A row and its loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scored {
    /// Its name, not that of another row.
    pub id: String,
    /// Whether it was learnt from.
    pub included: bool,
    /// Its loss, or anything that is lower for rows that were learnt from.
    pub score: f64,
    /// What it is.
    pub kind: Kind,
    /// Of a canary: losses of what could have been planted in its stead, without its own. Without
    /// them the canaries that were not included stand in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<f64>,
}

/// How far up the included canaries rank, in bits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Exposures {
    /// Canaries that were included.
    pub canaries: u64,
    /// Mean over them.
    pub mean: f64,
    /// Half of them have no more.
    pub median: f64,
    /// The most exposed one.
    pub largest: f64,
    /// What a canary that ranks first has.
    pub possible: f64,
}

/// What the canaries show.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Canaries {
    /// The guesses that gave the bound.
    pub guesses: Guesses,
    /// Lower bound on ε at the δ asked for, at the confidence asked for.
    pub epsilon: f64,
    /// None when no canary was included, or nothing is there to rank it among.
    pub exposure: Option<Exposures>,
    /// How well losses tell the included ones from the others; None with fewer than two of either.
    pub membership: Option<Membership>,
}

/// What all attacks show.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Confidence 1 − p of bound and intervals, each for itself.
    pub confidence: f64,
    /// The δ of the lower bound.
    pub delta: f64,
    /// When there are canaries.
    pub canaries: Option<Canaries>,
    /// When there are members and nonmembers.
    pub membership: Option<Membership>,
}

impl Report {
    /// Whether the canaries refute a proven ε.
    pub fn refutes(&self, epsilon: f64) -> bool {
        self.canaries.as_ref().is_some_and(|canaries| canaries.epsilon > epsilon)
    }
}

/// Audits `rows` at `delta`, with confidence 1 − `p` for the bound and for each interval.
///
/// # Errors
/// [`Error::Audit`] for rows that contradict themselves, share an id, have scores that are not
/// finite or come without anything to compare; [`Error::Parameter`] for `delta` or `p` out of range.
pub fn audit(rows: &[Scored], delta: f64, p: f64) -> Result<Report> {
    check_error_rate(p)?;
    check_rows(rows)?;
    let scores = |kind| rows.iter().filter(move |row| row.kind == kind).map(|row| row.score);
    let members: Vec<f64> = scores(Kind::Member).collect();
    let nonmembers: Vec<f64> = scores(Kind::Nonmember).collect();
    let canaries: Vec<&Scored> = rows.iter().filter(|row| row.kind == Kind::Canary).collect();
    if canaries.is_empty() && (members.is_empty() || nonmembers.is_empty()) {
        return Err(Error::Audit(
            "there is nothing to compare; expected canaries, or members and nonmembers".into(),
        ));
    }
    let canaries = match &canaries[..] {
        [] => None,
        canaries => Some(judge(canaries, delta, p)?),
    };
    let membership = match (&members[..], &nonmembers[..]) {
        ([], _) | (_, []) => None,
        (members, nonmembers) => Some(membership::infer(members, nonmembers, p)?),
    };
    Ok(Report { confidence: 1.0 - p, delta, canaries, membership })
}

fn judge(canaries: &[&Scored], delta: f64, p: f64) -> Result<Canaries> {
    let scores: Vec<f64> = canaries.iter().map(|row| row.score).collect();
    let coins: Vec<bool> = canaries.iter().map(|row| row.included).collect();
    let (guesses, epsilon) = one_run::best(&scores, &coins, delta, p)?;
    let absent: Vec<f64> =
        canaries.iter().filter(|row| !row.included).map(|row| row.score).collect();
    let (mut bits, mut possible) = (Vec::new(), 0.0f64);
    for row in canaries.iter().filter(|row| row.included) {
        let others = if row.candidates.is_empty() { &absent } else { &row.candidates };
        if !others.is_empty() {
            bits.push(exposure(row.score, others)?);
            possible = possible.max(libm::log2((others.len() + 1) as f64));
        }
    }
    bits.sort_by(f64::total_cmp);
    let exposure = bits.last().map(|&largest| Exposures {
        canaries: bits.len() as u64,
        mean: bits.iter().sum::<f64>() / bits.len() as f64,
        median: bits[(bits.len() - 1) / 2],
        largest,
        possible,
    });
    let present: Vec<f64> =
        canaries.iter().filter(|row| row.included).map(|row| row.score).collect();
    let membership = (present.len() >= 2 && absent.len() >= 2)
        .then(|| membership::infer(&present, &absent, p))
        .transpose()?;
    Ok(Canaries { guesses, epsilon, exposure, membership })
}

fn check_rows(rows: &[Scored]) -> Result<()> {
    let mut ids = HashSet::with_capacity(rows.len());
    for (at, row) in rows.iter().enumerate() {
        let refuse =
            |problem: &str| Err(Error::Audit(format!("row {} ({:?}) {problem}", at + 1, row.id)));
        match row.kind {
            Kind::Member if !row.included => {
                return refuse("is a member and was not included; expected one or the other");
            }
            Kind::Nonmember if row.included => {
                return refuse("is a nonmember and was included; expected one or the other");
            }
            Kind::Member | Kind::Nonmember if !row.candidates.is_empty() => {
                return refuse("has candidates, which only canaries have");
            }
            _ => {}
        }
        if !row.score.is_finite() || row.candidates.iter().any(|score| !score.is_finite()) {
            return refuse("has a score that is not finite");
        }
        if !ids.insert(row.id.as_str()) {
            return refuse("has the id of an earlier row");
        }
    }
    Ok(())
}

/// Rows from JSON lines: `{"id", "included", "score", "kind", "candidates"}`, the last one optional.
///
/// # Errors
/// [`Error::Audit`] names the line that is not such a row.
pub fn parse(text: &str) -> Result<Vec<Scored>> {
    let mut rows = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if rows.len() == MOST_SCORES {
            return Err(Error::Audit(format!("there are more than {MOST_SCORES} rows")));
        }
        rows.push(serde_json::from_str(line).map_err(|error| {
            Error::Audit(format!(
                "line {} is not a scored row ({error}); expected {{\"id\": text, \"included\": \
                 true or false, \"score\": number, \"kind\": \"canary\", \"member\" or \
                 \"nonmember\"}}",
                at + 1
            ))
        })?);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::canary;
    use crate::audit::tests::random;

    /// Canaries whose scores are noise and, as far as `apart`, their coin.
    fn canaries(count: usize, apart: f64, seed: u64) -> Vec<Scored> {
        let mut words = random(seed);
        let row = |(at, included)| Scored {
            id: canary::id(at),
            included,
            score: words() - if included { apart } else { 0.0 },
            kind: Kind::Canary,
            candidates: Vec::new(),
        };
        canary::coins(count, seed).enumerate().map(row).collect()
    }

    #[test]
    fn a_mechanism_without_noise_is_caught() {
        let found = audit(&canaries(1000, 2.0, 1), 1e-5, 0.05).unwrap();
        assert!(found.refutes(1.0), "{found:?}");
        let canaries = found.canaries.unwrap();
        // 500 right guesses of 500 at p = 0.05/7: p₀ = 0.00714^(1/500), log-odds 4.6.
        assert!(canaries.epsilon > 4.0, "{canaries:?}");
        assert_eq!(canaries.guesses.right, canaries.guesses.made);
        let exposure = canaries.exposure.unwrap();
        assert!((exposure.mean - exposure.possible).abs() < 1e-9, "{exposure:?}");
        assert_eq!(exposure.largest, exposure.possible);
    }

    #[test]
    fn scores_that_know_nothing_refute_nothing() {
        // A bound above 0 in at most 5 % of runs: 200 runs, 10 + 5 standard deviations = 25.
        let mut above = 0;
        for seed in 0..200 {
            let found = audit(&canaries(400, 0.0, seed), 1e-5, 0.05).unwrap();
            assert!(!found.refutes(1.0), "{seed}: {found:?}");
            above += usize::from(found.refutes(0.0));
        }
        assert!(above <= 25, "{above}");
    }

    #[test]
    fn candidates_of_a_canary_are_what_it_is_ranked_among() {
        let mut rows = canaries(20, 0.0, 3);
        for row in &mut rows {
            row.candidates = vec![row.score + 1.0; 1023];
        }
        let exposure = audit(&rows, 0.0, 0.05).unwrap().canaries.unwrap().exposure.unwrap();
        assert_eq!((exposure.median, exposure.possible), (10.0, 10.0));
    }

    #[test]
    fn members_and_others_are_compared_when_there_are_both() {
        let row = |id: &str, kind, score| Scored {
            id: id.into(),
            included: kind == Kind::Member,
            score,
            kind,
            candidates: Vec::new(),
        };
        let both = [
            row("a", Kind::Member, 1.0),
            row("b", Kind::Member, 2.0),
            row("c", Kind::Nonmember, 3.0),
            row("d", Kind::Nonmember, 4.0),
        ];
        let found = audit(&both, 0.0, 0.05).unwrap();
        assert_eq!(found.membership.as_ref().unwrap().auc, 1.0);
        assert!(found.canaries.is_none() && !found.refutes(0.0));
        assert!(audit(&both[..2], 0.0, 0.05).is_err());
        assert!(audit(&[], 0.0, 0.05).is_err());
    }

    #[test]
    fn rows_that_contradict_themselves_are_refused() {
        let good = canaries(50, 0.0, 2);
        let spoilt: [fn(&mut Vec<Scored>); 6] = [
            |rows| rows[3].id = rows[2].id.clone(),
            |rows| rows[3].score = f64::NAN,
            |rows| rows[3].candidates = vec![f64::INFINITY],
            |rows| (rows[3].kind, rows[3].included) = (Kind::Member, false),
            |rows| (rows[3].kind, rows[3].included) = (Kind::Nonmember, true),
            |rows| rows.iter_mut().for_each(|row| row.included = true),
        ];
        for spoil in spoilt {
            let mut rows = good.clone();
            spoil(&mut rows);
            assert!(matches!(audit(&rows, 1e-5, 0.05), Err(Error::Audit(_))));
        }
        assert!(audit(&good, 2.0, 0.05).is_err() && audit(&good, 1e-5, 0.0).is_err());
        for line in [
            "",
            "{}",
            "[]",
            "\u{0}",
            r#"{"id":"a","included":true,"score":null,"kind":"canary"}"#,
            r#"{"id":"a","included":true,"score":1e999,"kind":"canary"}"#,
            r#"{"id":"a","included":true,"score":1,"kind":"canary","loss":2}"#,
            r#"{"id":"a","included":true,"score":1,"kind":"stranger"}"#,
        ] {
            let refused = parse(&format!("{line}\n"));
            assert!(matches!(refused, Err(Error::Audit(_))), "{line}");
        }
        let text: Vec<String> = good.iter().map(|r| serde_json::to_string(r).unwrap()).collect();
        assert_eq!(parse(&text.join("\n")).unwrap(), good);
    }
}
