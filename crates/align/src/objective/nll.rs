//! Means of the chosen answers' negative log-likelihood.

use serde::{Deserialize, Serialize};

use super::StepTotals;

/// Over what the negative log-likelihood of the chosen answers is a mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NllMean {
    /// Σ −lw over all chosen tokens of the step (TRL).
    #[default]
    TokenMean,
    /// The mean over pairs of −lw (CPO as its paper writes it, arXiv 2401.08417).
    SeqSum,
    /// The mean over pairs of −lw/|w|.
    SeqMean,
}

impl NllMean {
    /// The factor of −lw in a step's loss.
    pub(super) fn factor(self, chosen_tokens: usize, totals: &StepTotals) -> f64 {
        match self {
            NllMean::TokenMean => 1.0 / totals.chosen_tokens as f64,
            NllMean::SeqSum => 1.0 / totals.pairs as f64,
            NllMean::SeqMean => 1.0 / (chosen_tokens as f64 * totals.pairs as f64),
        }
    }
}
