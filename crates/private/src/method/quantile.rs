//! Thresholds that follow a quantile of the norms (Andrew et al. 2021, arXiv 1905.03871):
//! `C ← C·exp(−η·(b̃ − γ))` with b̃ the noisy fraction of persons below C.
//!
//! The counts are centred, so that a person moves one by ½ and noise of standard deviation σ_b on it
//! is worth a multiplier of 2σ_b. Gradient and counts leave one draw together:
//! `z⁻² = z_grad⁻² + (2σ_b)⁻²`, which is the share `φ = (z/2σ_b)²` of the budget in the words of
//! [`crate::mechanism::statistics`].

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Thresholds stay within these.
const RANGE: (f64, f64) = (1e-6, 1e6);

/// `[private.quantile]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantileConfig {
    /// γ: the fraction of persons that is to stay below the threshold.
    pub target: f64,
    /// η: how fast the threshold moves.
    pub rate: f64,
    /// σ_b: standard deviation of the noise on a count, in persons; a twentieth of the expected
    /// batch when neither this nor `private.share` is given.
    pub count_noise: Option<f64>,
}

impl Default for QuantileConfig {
    fn default() -> Self {
        Self { target: 0.5, rate: 0.2, count_noise: None }
    }
}

impl QuantileConfig {
    /// Refuses numbers that mean nothing.
    ///
    /// # Errors
    /// [`Error::Parameter`].
    pub fn check(&self) -> Result<()> {
        if !(self.target > 0.0 && self.target < 1.0) {
            let expected = "the fraction below the threshold is between 0 and 1";
            return Err(Error::parameter("target", self.target, expected));
        }
        if !(self.rate > 0.0 && self.rate <= 10.0) {
            let expected = "the threshold's rate is above 0, at most 10; 0.2 is usual";
            return Err(Error::parameter("rate", self.rate, expected));
        }
        match self.count_noise {
            Some(noise) if !(noise > 0.0 && noise.is_finite()) => {
                let expected = "the noise on a count is a number of persons above 0";
                Err(Error::parameter("count_noise", noise, expected))
            }
            _ => Ok(()),
        }
    }

    /// The next thresholds, from noisy fractions below the present ones.
    pub fn next(&self, bounds: &[f64], below: &[f64]) -> Vec<f64> {
        let moved = |(bound, below): (&f64, &f64)| {
            let to = bound * libm::exp(-self.rate * (below - self.target));
            to.clamp(RANGE.0, RANGE.1)
        };
        bounds.iter().zip(below).map(moved).collect()
    }
}

/// The share of the budget that counts of `blocks` blocks take, each with noise `count_noise`, when
/// the whole has multiplier `z`: `G·(z/2σ_b)²`.
///
/// # Errors
/// [`Error::Parameter`] when they would take nearly all of it.
pub fn share(z: f64, count_noise: f64, blocks: usize) -> Result<f64> {
    let share = blocks as f64 * (z / (2.0 * count_noise)).powi(2);
    if share <= 0.9 {
        return Ok(share);
    }
    let expected = "so little noise on the counts takes more than 0.9 of the budget; raise \
                    private.quantile.count_noise, or set private.share";
    Err(Error::parameter("count_noise", count_noise, expected))
}

/// The gradient's multiplier as the paper writes it: `(z⁻² − (2σ_b)⁻²)^(−1/2)`; NaN when the counts
/// alone take more than z leaves.
pub fn gradient_multiplier(z: f64, count_noise: f64) -> f64 {
    1.0 / (1.0 / (z * z) - 1.0 / (4.0 * count_noise * count_noise)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::statistics::Statistics;

    #[test]
    fn both_ways_of_writing_the_budget_are_one() {
        for (z, noise) in [(0.7, 3.2), (1.3, 51.2), (4.0, 2.3)] {
            let share = share(z, noise, 1).unwrap();
            let statistics = Statistics::new(share, false, 1).unwrap();
            let (paper, ours) = (gradient_multiplier(z, noise), statistics.gradient_sigma(z));
            assert!((paper / ours - 1.0).abs() < 1e-12, "{paper} {ours}");
            // The noise on the count itself, up to the room above its sensitivity.
            let on_count = statistics.scales(z)[0];
            assert!((on_count / noise - 1.0).abs() < 3e-3, "{on_count} {noise}");
            assert!(on_count >= noise);
        }
        assert!(share(4.0, 2.0, 1).is_err());
    }

    /// Without noise the rule's fixed point is the quantile: norms 1..=100, γ = 0.3.
    #[test]
    fn the_threshold_goes_to_the_quantile() {
        let config = QuantileConfig { target: 0.3, ..Default::default() };
        let mut bounds = vec![1000.0];
        for _ in 0..400 {
            let below = (1..=100).filter(|&n| f64::from(n) <= bounds[0]).count() as f64 / 100.0;
            bounds = config.next(&bounds, &[below]);
        }
        assert!((29.0..=31.5).contains(&bounds[0]), "{bounds:?}");
    }
}
