//! The question: how many steps with which noise and rate, and which δ.

use crate::{Error, Result};

/// The most steps of all phases together. Up to here the rounding errors that grow with the number
/// of steps stay small against the bounds they are added to.
pub const MOST_STEPS: u64 = 1_000_000_000;

/// The smallest noise multiplier: one step at less gives away ε of about 10⁶.
const LEAST_SIGMA: f64 = 1e-3;
/// The largest noise multiplier.
const MOST_SIGMA: f64 = 1e9;
/// The smallest sampling rate.
const LEAST_RATE: f64 = 1e-12;

/// Equal steps of the Poisson-subsampled Gaussian mechanism.
///
/// Each step draws every person independently with probability `rate`, sums contributions of L2
/// norm at most 1 and adds N(0, `sigma`²) noise. An empty draw is a step as well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Phase {
    sigma: f64,
    rate: f64,
    steps: u64,
}

impl Phase {
    /// Checks the numbers: `sigma` within [10⁻³, 10⁹], `rate` within [10⁻¹², 1] (1 is the plain
    /// Gaussian mechanism), `steps` at most [`MOST_STEPS`].
    ///
    /// # Errors
    /// [`Error::Parameter`] or [`Error::TooManySteps`].
    pub fn new(sigma: f64, rate: f64, steps: u64) -> Result<Self> {
        if !(LEAST_SIGMA..=MOST_SIGMA).contains(&sigma) {
            let expected = "the noise multiplier (standard deviation over L2 sensitivity) must be \
                            a number from 1e-3 to 1e9";
            return Err(Error::parameter("sigma", sigma, expected));
        }
        if !(LEAST_RATE..=1.0).contains(&rate) {
            let expected = "the sampling rate is a probability above 0 (from 1e-12) and at most \
                            1; it is the expected batch over the number of people";
            return Err(Error::parameter("rate", rate, expected));
        }
        if steps > MOST_STEPS {
            return Err(Error::TooManySteps { steps: steps.into(), most: MOST_STEPS });
        }
        Ok(Self { sigma, rate, steps })
    }

    /// Noise multiplier: standard deviation over L2 sensitivity.
    pub fn sigma(&self) -> f64 {
        self.sigma
    }

    /// Probability with which each person is drawn.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

/// Phases with equal (sigma, rate) joined, empty ones dropped. The order of the steps does not
/// matter to any accountant here, since nothing is chosen from outputs.
pub(crate) fn merged(phases: &[Phase]) -> Result<Vec<Phase>> {
    let total: u128 = phases.iter().map(|p| u128::from(p.steps)).sum();
    if total > MOST_STEPS.into() {
        return Err(Error::TooManySteps { steps: total, most: MOST_STEPS });
    }
    let mut sorted: Vec<Phase> = phases.iter().copied().filter(|p| p.steps > 0).collect();
    sorted.sort_by(|x, y| x.sigma.total_cmp(&y.sigma).then(x.rate.total_cmp(&y.rate)));
    let mut out: Vec<Phase> = Vec::new();
    for phase in sorted {
        match out.last_mut() {
            Some(last) if last.sigma == phase.sigma && last.rate == phase.rate => {
                last.steps += phase.steps;
            }
            _ => out.push(phase),
        }
    }
    Ok(out)
}

/// δ within [10⁻¹⁰⁰, 1).
pub(crate) fn check_delta(delta: f64) -> Result<()> {
    if (1e-100..1.0).contains(&delta) {
        return Ok(());
    }
    let expected = "delta is a probability above 0 (from 1e-100) and below 1, and should be well \
                    below one over the number of people";
    Err(Error::parameter("delta", delta, expected))
}

/// ε within [0, 10⁶].
pub(crate) fn check_epsilon(epsilon: f64) -> Result<()> {
    if (0.0..=1e6).contains(&epsilon) {
        return Ok(());
    }
    Err(Error::parameter("epsilon", epsilon, "epsilon must be a number from 0 to 1e6"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        let nonsense = [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300];
        for bad in nonsense {
            assert!(Phase::new(bad, 0.1, 1).is_err(), "sigma {bad}");
            assert!(Phase::new(1.0, bad, 1).is_err(), "rate {bad}");
            assert!(check_delta(bad).is_err(), "delta {bad}");
        }
        assert!(Phase::new(1.0, 1.0 + f64::EPSILON, 1).is_err());
        assert!(Phase::new(1.0, 0.1, u64::MAX).is_err());
        assert!(Phase::new(1.0, 1.0, 0).is_ok());
        assert!(check_epsilon(f64::NAN).is_err() && check_epsilon(-1e-9).is_err());
    }

    #[test]
    fn equal_phases_are_joined_and_their_sum_is_bounded() {
        let one = Phase::new(1.0, 0.1, 3).unwrap();
        let other = Phase::new(2.0, 0.1, 5).unwrap();
        let none = Phase::new(3.0, 0.1, 0).unwrap();
        let joined = merged(&[one, other, none, one]).unwrap();
        assert_eq!(joined, [Phase::new(1.0, 0.1, 6).unwrap(), other]);
        let most = Phase::new(1.0, 0.1, MOST_STEPS).unwrap();
        assert!(matches!(merged(&[most, one]), Err(Error::TooManySteps { .. })));
    }
}
