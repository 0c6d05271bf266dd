//! Losses of one number: by how much the chosen answer's score exceeds the rejected one's.

use crate::maths::{log_sigmoid, sigmoid, sigmoid_slope, softplus};

/// A function of the margin u; formulas at [`super::Kind`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Margin {
    Logistic,
    Smoothed { smoothing: f64 },
    Robust { smoothing: f64 },
    Hinge,
    Exo { smoothing: f64 },
    Discopop { tau: f64 },
    Square { target: f64 },
}

impl Margin {
    /// Loss and slope at u.
    pub(super) fn at(self, u: f64) -> (f64, f64) {
        match self {
            Margin::Logistic => (softplus(-u), -sigmoid(-u)),
            Margin::Smoothed { smoothing: e } => (
                (1.0 - e) * softplus(-u) + e * softplus(u),
                e * sigmoid(u) - (1.0 - e) * sigmoid(-u),
            ),
            Margin::Robust { smoothing: e } => (
                ((1.0 - e) * softplus(-u) - e * softplus(u)) / (1.0 - 2.0 * e),
                (-(1.0 - e) * sigmoid(-u) - e * sigmoid(u)) / (1.0 - 2.0 * e),
            ),
            Margin::Hinge if u < 1.0 => (1.0 - u, -1.0),
            Margin::Hinge => (0.0, 0.0),
            Margin::Exo { smoothing: e } => {
                let (right, wrong) = (libm::log1p(-e), libm::log(e));
                let loss =
                    sigmoid(u) * (log_sigmoid(u) - right) + sigmoid(-u) * (log_sigmoid(-u) - wrong);
                // ln σ(u) − ln σ(−u) = u.
                (loss, sigmoid_slope(u) * (u - right + wrong))
            }
            Margin::Discopop { tau } => {
                let (mix, rest) = (sigmoid(u / tau), sigmoid(-u / tau));
                // e⁻ᵘ·m as one exponential: either factor alone leaves the range of f64.
                let exponential = libm::exp(log_sigmoid(u / tau) - u);
                let loss = softplus(-u) * rest + exponential;
                let slope = -sigmoid(-u) * rest - softplus(-u) * mix * rest / tau - exponential
                    + exponential * rest / tau;
                (loss, slope)
            }
            Margin::Square { target } => {
                let off = u - target;
                (off * off, 2.0 * off)
            }
        }
    }
}
