//! What is released beside the gradient, in the same draw and by the same mechanism: a clipped sum
//! of losses, and how many persons stayed below each threshold.
//!
//! Each statistic is one more block of the sum, with a sensitivity of its own, and all of them
//! together take a share φ of the budget: the gradient gets noise of multiplier `σ/√(1−φ)`, the
//! statistics of `σ/√φ`, and the whole is one Gaussian mechanism of multiplier σ, which is what
//! the ledger holds. Nothing here looks at more than one person at a time, and what comes back is
//! divided by the expected batch alone.

use super::clip::{Norms, Rule};
use crate::{Error, Result};

/// Losses are counted up to here, in nats per token.
pub const MOST_LOSS: f64 = 5.0;
/// Keeps what is exactly as long as its sensitivity clear of the clip's safety factor.
const ROOM: f64 = 1.0 + 1.0 / 512.0;
/// Shares of all statistics together.
const SHARES: std::ops::RangeInclusive<f64> = 1e-6..=0.9;

/// One statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// `Σ min(loss, L)`, one number.
    Loss,
    /// `Σ (1[n_g ≤ C_g] − ½)` for each of so many blocks: centred, so that a person moves it by
    /// half as much.
    Below(usize),
}

/// Which statistics, and their shares of the budget.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Statistics {
    kept: Vec<(What, f64)>,
}

/// What came out of a step, or a mean of several.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Noisy {
    /// Mean loss in nats, of losses clipped at [`MOST_LOSS`].
    pub loss: Option<f64>,
    /// Fraction of persons below the threshold, by block; noise may carry it out of [0, 1].
    pub below: Option<Vec<f64>>,
}

impl Statistics {
    /// The mean loss where `loss`, and counts for `blocks` thresholds (0 for none), which share
    /// `share` equally.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a share outside [10⁻⁶, 0.9] when there is something to release.
    pub fn new(share: f64, loss: bool, blocks: usize) -> Result<Self> {
        let below = (blocks > 0).then_some(What::Below(blocks));
        let kept: Vec<What> = loss.then_some(What::Loss).into_iter().chain(below).collect();
        if !kept.is_empty() && !SHARES.contains(&share) {
            let expected = "the statistics' share of the budget is from 1e-6 to 0.9";
            return Err(Error::parameter("share", share, expected));
        }
        let each = share / kept.len().max(1) as f64;
        Ok(Self { kept: kept.into_iter().map(|what| (what, each)).collect() })
    }

    /// Whether nothing is released.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The share φ of the budget of all together.
    pub fn share(&self) -> f64 {
        self.kept.iter().map(|(_, share)| share).sum()
    }

    /// Numbers in each statistic: each is one slot and one block.
    pub fn sizes(&self) -> Vec<usize> {
        let size = |(what, _): &(What, f64)| match what {
            What::Loss => 1,
            What::Below(blocks) => *blocks,
        };
        self.kept.iter().map(size).collect()
    }

    /// L2 sensitivities.
    pub fn bounds(&self) -> Vec<f64> {
        let bound = |(what, _): &(What, f64)| match what {
            What::Loss => ROOM * MOST_LOSS,
            What::Below(blocks) => ROOM * (*blocks as f64).sqrt() / 2.0,
        };
        self.kept.iter().map(bound).collect()
    }

    /// Rules of the blocks: never another than clipping.
    pub fn rules(&self) -> Vec<Rule> {
        vec![Rule::Clip; self.kept.len()]
    }

    /// Standard deviations when the whole step has noise multiplier `sigma`: `σ·C/√share`.
    pub fn scales(&self, sigma: f64) -> Vec<f64> {
        // The last bits upwards, as for the gradient.
        let up = 1.0 + 1.0 / (1u64 << 45) as f64;
        let shares = self.kept.iter().zip(self.bounds());
        shares.map(|((_, share), bound)| sigma * bound / share.sqrt() * up).collect()
    }

    /// What is left for the gradient: `σ/√(1−φ)`.
    pub fn gradient_sigma(&self, sigma: f64) -> f64 {
        sigma / (1.0 - self.share()).sqrt()
    }

    /// What persons contribute: for each statistic `[persons, size]`, from losses in nats, norms
    /// `[persons, blocks]` and the thresholds they are held against. Private.
    ///
    /// # Errors
    /// [`Error::Step`] when numbers of persons or blocks do not fit.
    pub fn rows(&self, losses: &[f32], norms: &Norms, bounds: &[f64]) -> Result<Vec<Vec<f32>>> {
        let fits = |what: &What| match what {
            What::Loss => true,
            What::Below(blocks) => {
                *blocks == bounds.len() && norms.norms.len() == losses.len() * blocks
            }
        };
        if !self.kept.iter().all(|(what, _)| fits(what)) {
            return Err(Error::Step(format!(
                "{} norms of {} persons do not fit {} thresholds",
                norms.norms.len(),
                losses.len(),
                bounds.len()
            )));
        }
        let row = |(what, _): &(What, f64)| match what {
            // What is not a number stays none: such a person counts for nothing in the whole step.
            What::Loss => losses.iter().map(|&l| l.clamp(0.0, MOST_LOSS as f32)).collect(),
            What::Below(_) => {
                let own = norms.norms.iter().zip(bounds.iter().cycle());
                own.map(|(norm, bound)| if norm <= bound { 0.5 } else { -0.5 }).collect()
            }
        };
        Ok(self.kept.iter().map(row).collect())
    }

    /// Names the numbers that [`super::clip::ClippedSum::release`] gave for these slots.
    pub fn read(&self, released: &[Vec<f32>]) -> Noisy {
        let mut noisy = Noisy::default();
        for ((what, _), numbers) in self.kept.iter().zip(released) {
            let numbers = numbers.iter().map(|&x| f64::from(x));
            match what {
                What::Loss => noisy.loss = numbers.into_iter().next(),
                What::Below(_) => noisy.below = Some(numbers.map(|x| x + 0.5).collect()),
            }
        }
        noisy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::noise::{Split, effective_sigma};

    #[test]
    fn gradient_and_statistics_are_one_mechanism_of_the_ledgers_sigma() {
        for (share, loss, blocks) in [(0.02, true, 12), (0.5, false, 3), (0.1, true, 0)] {
            let statistics = Statistics::new(share, loss, blocks).unwrap();
            let (c, d) = ([0.3, 0.1, 2.0], [100, 7, 30]);
            let own = Split::LeastEnergy.scales(statistics.gradient_sigma(0.7), &c, &d).unwrap();
            let bounds = [&c[..], &statistics.bounds()].concat();
            let scales = [own, statistics.scales(0.7)].concat();
            let sigma = effective_sigma(&bounds, &scales);
            assert!((0.7..0.7 * (1.0 + 1e-12)).contains(&sigma), "{sigma}");
        }
        let none = Statistics::new(f64::NAN, false, 0).unwrap();
        assert!(none.is_empty() && none.gradient_sigma(0.7) == 0.7);
        for share in [0.0, -1.0, 1.0, f64::NAN] {
            assert!(Statistics::new(share, true, 0).is_err(), "{share}");
        }
    }

    #[test]
    fn nobody_contributes_more_than_the_sensitivity() {
        let statistics = Statistics::new(0.1, true, 4).unwrap();
        let norms = Norms { norms: vec![0.0, 1.0, 2.0, 1e30, 5.0, 5.0, 5.0, 5.0] };
        let rows = statistics.rows(&[1e30, -3.0], &norms, &[1.0; 4]).unwrap();
        assert_eq!(rows[0], [5.0, 0.0]);
        assert_eq!(rows[1], [0.5, 0.5, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5]);
        for (row, (bound, size)) in rows.iter().zip(statistics.bounds().iter().zip([1, 4])) {
            for own in row.chunks(size) {
                let norm = own.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                assert!(norm <= bound * (1.0 - 1.0 / 1024.0), "{norm} {bound}");
            }
        }
        assert!(statistics.rows(&[1.0], &norms, &[1.0; 4]).is_err());
        assert!(statistics.rows(&[1.0, 1.0], &norms, &[1.0; 3]).is_err());
    }
}
