//! ORPO's comparison: the odds `p/(1 − p)` of the answers' mean token probabilities.

use crate::maths::{log1m_exp, sigmoid, softplus};

/// The highest mean log-probability that is told from certainty: half the distance from 1 to the
/// f32 below it. Token log-probabilities are f32, so a mean of 0 means no more than this, and the
/// odds stay finite.
const CERTAIN: f64 = -1.0 / (1u64 << 25) as f64;

/// The log-odds of e^mean and their slope.
fn log_odds(mean: f64) -> (f64, f64) {
    let mean = mean.min(CERTAIN);
    (mean - log1m_exp(mean), -1.0 / libm::expm1(mean))
}

/// The log-odds ratio u of two mean log-probabilities, `−ln σ(u)`, and its slopes by them.
pub(super) fn at(w: f64, l: f64) -> (f64, f64, f64, f64) {
    let ((odds_w, slope_w), (odds_l, slope_l)) = (log_odds(w), log_odds(l));
    let u = odds_w - odds_l;
    (u, softplus(-u), -sigmoid(-u) * slope_w, sigmoid(-u) * slope_l)
}
