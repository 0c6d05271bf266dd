//! Losses that look at each answer on its own rather than at their difference.

use crate::maths::{sigmoid, sigmoid_slope, softplus};

/// A function of the two scores; formulas at [`super::Kind`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Sides {
    ApoZero,
    ApoDown,
    Bco,
    Nca,
    Sppo { target: f64 },
    Kto { desirable: f64, undesirable: f64 },
}

impl Sides {
    /// Loss and its slopes at the scores w of the chosen and l of the rejected answer; z is KTO's
    /// reference point on the scores' scale.
    pub(super) fn at(self, w: f64, l: f64, z: f64) -> (f64, f64, f64) {
        match self {
            Sides::ApoZero => (sigmoid(-w) + sigmoid(l), -sigmoid_slope(w), sigmoid_slope(l)),
            Sides::ApoDown => (
                sigmoid(w) + sigmoid(l - w),
                sigmoid_slope(w) - sigmoid_slope(w - l),
                sigmoid_slope(w - l),
            ),
            Sides::Bco => (softplus(-w) + softplus(l), -sigmoid(-w), sigmoid(l)),
            Sides::Nca => (
                softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(l),
                0.5 * sigmoid(w) - sigmoid(-w),
                0.5 * sigmoid(l),
            ),
            Sides::Sppo { target } => {
                let (low, high) = (w - target, l + target);
                (low * low + high * high, 2.0 * low, 2.0 * high)
            }
            Sides::Kto { desirable, undesirable } => (
                0.5 * (desirable * sigmoid(z - w) + undesirable * sigmoid(l - z)),
                -0.5 * desirable * sigmoid_slope(w - z),
                0.5 * undesirable * sigmoid_slope(z - l),
            ),
        }
    }
}
