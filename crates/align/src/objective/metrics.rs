//! What is logged of a step, under the names TRL made usual.

use super::{PairLogProbs, PairOutcome};
use crate::maths::sigmoid;

/// Implicit rewards of a pair: β times log-ratio, or, without a reference, log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rewards {
    /// Of the chosen answer.
    pub chosen: f64,
    /// Of the rejected answer.
    pub rejected: f64,
}

impl Rewards {
    /// Chosen minus rejected.
    pub fn margin(&self) -> f64 {
        self.chosen - self.rejected
    }

    /// Whether the chosen answer's is strictly higher.
    pub fn accurate(&self) -> bool {
        self.chosen > self.rejected
    }
}

/// Means over pairs: `rewards/…` and `logps/…` as TRL defines them, `objective/u`, the margin, and
/// `objective/weight`, σ(−u), the share of its full gradient that a logistic objective still has.
/// Only what the objective knows; nothing of no pairs.
pub fn metrics(pairs: &[PairLogProbs], outcomes: &[PairOutcome]) -> Vec<(&'static str, f64)> {
    let mut found = Vec::new();
    let mut mean = |name, of: &dyn Fn(&PairLogProbs, &PairOutcome) -> Option<f64>| {
        let values = pairs.iter().zip(outcomes).filter_map(|(pair, outcome)| of(pair, outcome));
        let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x, count + 1));
        if count > 0 {
            found.push((name, sum / count as f64));
        }
    };
    mean("rewards/chosen", &|_, o| Some(o.rewards?.chosen));
    mean("rewards/rejected", &|_, o| Some(o.rewards?.rejected));
    mean("rewards/margins", &|_, o| Some(o.rewards?.margin()));
    mean("rewards/accuracies", &|_, o| Some(f64::from(u8::from(o.rewards?.accurate()))));
    mean("logps/chosen", &|p, _| Some(p.chosen));
    mean("logps/rejected", &|p, _| Some(p.rejected));
    mean("objective/u", &|_, o| o.u);
    mean("objective/weight", &|_, o| Some(sigmoid(-o.u?)));
    found
}
