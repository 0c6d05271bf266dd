//! How much noise a target (ε, δ) needs.

use super::{Phase, check_delta, check_epsilon, pld, rdp};
use crate::{Error, Result};

/// The range of σ that is searched.
const LEAST_SIGMA: f64 = 0.01;
const MOST_SIGMA: f64 = 1e6;
/// σ is found to this share of itself, or ε to this share of the target.
const CLOSENESS: f64 = 1e-6;
/// More than any search took; each round ends with a valid σ.
const MOST_ROUNDS: usize = 100;

/// An accountant whose ε is an upper bound. (The central limit theorem's is not one; nothing is
/// calibrated by it.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Accountant {
    /// Privacy-loss distributions: tight.
    Pld,
    /// Rényi DP at the default orders: looser, and the one that a [filter](super::rdp_filter) needs.
    Rdp,
}

impl Accountant {
    /// The accountant's upper bound on ε.
    ///
    /// # Errors
    /// As [`pld::epsilon`] and [`rdp::epsilon`].
    pub fn epsilon(self, phases: &[Phase], delta: f64) -> Result<f64> {
        match self {
            Self::Pld => pld::epsilon_upper(phases, delta),
            Self::Rdp => Ok(rdp::epsilon(phases, delta, &rdp::default_orders())?.epsilon),
        }
    }
}

/// A noise multiplier and what it costs.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Calibrated {
    /// Noise multiplier.
    pub sigma: f64,
    /// The accountant's upper bound on ε at exactly this σ; never above the target.
    pub epsilon: f64,
}

/// The smallest σ (to 10⁻⁶ of itself) whose ε at `delta` after `steps` steps at `rate` is at most
/// `target`, in the accountant's upper bound. What is returned has been evaluated: rounding or a bound
/// that is not quite monotone cannot put it above the target.
///
/// # Errors
/// [`Error::Unreachable`] with the smallest ε within reach, when even σ = 10⁶ is too little;
/// [`Error::Parameter`] for numbers out of range or no steps, [`Error::TooManySteps`].
pub fn sigma(
    accountant: Accountant,
    (target, delta): (f64, f64),
    rate: f64,
    steps: u64,
) -> Result<Calibrated> {
    scaled(accountant, (target, delta), &[Phase::new(1.0, rate, steps)?])
}

/// As [`sigma`] for steps whose multipliers differ: the smallest factor on all of them. What is
/// called `sigma` in the answer is the factor.
///
/// # Errors
/// As [`sigma`], and [`Error::TooManyPhases`].
pub fn scaled(
    accountant: Accountant,
    (target, delta): (f64, f64),
    phases: &[Phase],
) -> Result<Calibrated> {
    check_epsilon(target)?;
    check_delta(delta)?;
    if phases.iter().all(|phase| phase.steps() == 0) {
        return Err(Error::parameter("steps", 0.0, "without a step no noise is needed"));
    }
    let at = |sigma: f64| -> Result<Calibrated> {
        let scaled = phases.iter().map(|p| Phase::new(sigma * p.sigma(), p.rate(), p.steps()));
        let epsilon = accountant.epsilon(&scaled.collect::<Result<Vec<_>>>()?, delta)?;
        Ok(Calibrated { sigma, epsilon })
    };
    let (mut low, mut high) = bracket(at, target)?;
    // Regula falsi on log ε over log σ, weighing down an end that stays (Illinois), and bisection
    // where there is no logarithm.
    let (mut low_weight, mut high_weight) = (1.0, 1.0);
    for _ in 0..MOST_ROUNDS {
        let near = high.epsilon >= target * (1.0 - CLOSENESS) && target > 0.0;
        if near || high.sigma / low.sigma - 1.0 <= CLOSENESS {
            break;
        }
        let above = low_weight * libm::log(low.epsilon / target);
        let below = high_weight * libm::log(high.epsilon / target);
        let usable = above.is_finite() && below.is_finite();
        let share = if usable { (above / (above - below)).clamp(0.01, 0.99) } else { 0.5 };
        let width = libm::log(high.sigma / low.sigma);
        let next = at(low.sigma * libm::exp(share * width))?;
        if next.epsilon <= target {
            (high, high_weight, low_weight) = (next, 1.0, 0.5 * low_weight);
        } else {
            (low, low_weight, high_weight) = (next, 1.0, 0.5 * high_weight);
        }
    }
    Ok(high)
}

/// A σ whose ε is above the target and one, at most twice as large, whose ε is not; both the same
/// when the smallest σ is enough.
fn bracket(
    at: impl Fn(f64) -> Result<Calibrated>,
    target: f64,
) -> Result<(Calibrated, Calibrated)> {
    let mut here = at(1.0)?;
    if here.epsilon <= target {
        loop {
            if here.sigma == LEAST_SIGMA {
                return Ok((here, here));
            }
            let lower = at((here.sigma / 2.0).max(LEAST_SIGMA))?;
            // Not "<= target": an ε that could not be bounded is above every target.
            if lower.epsilon > target || lower.epsilon.is_nan() {
                return Ok((lower, here));
            }
            here = lower;
        }
    }
    while here.sigma < MOST_SIGMA {
        let higher = at((here.sigma * 2.0).min(MOST_SIGMA))?;
        if higher.epsilon <= target {
            return Ok((here, higher));
        }
        here = higher;
    }
    Err(Error::Unreachable { target, reachable: here.epsilon, most_sigma: MOST_SIGMA })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_reached_is_said_with_what_can() {
        let error = sigma(Accountant::Rdp, (1e-4, 1e-5), 0.01, 1000).unwrap_err();
        let Error::Unreachable { reachable, .. } = &error else { panic!("{error}") };
        assert!(*reachable > 1e-4 && error.to_string().contains("smallest epsilon"), "{error}");
        // The PLD reaches it, and even 0: δ then covers all that is given away.
        let none = sigma(Accountant::Pld, (0.0, 1e-5), 0.01, 1000).unwrap();
        assert_eq!(none.epsilon, 0.0);
        let found = sigma(Accountant::Pld, (1e-4, 1e-5), 0.01, 1000).unwrap();
        assert!(found.epsilon <= 1e-4 && found.sigma < 1e6);
    }

    #[test]
    fn nonsense_is_refused() {
        for (target, delta, rate, steps) in [
            (f64::NAN, 1e-5, 0.1, 10),
            (-1.0, 1e-5, 0.1, 10),
            (1.0, 0.0, 0.1, 10),
            (1.0, 1e-5, 0.0, 10),
            (1.0, 1e-5, 1.5, 10),
            (1.0, 1e-5, 0.1, 0),
            (1.0, 1e-5, 0.1, u64::MAX),
        ] {
            let found = sigma(Accountant::Pld, (target, delta), rate, steps);
            assert!(found.is_err(), "{target} {delta} {rate} {steps}");
        }
    }
}
