//! A schedule that was written down before the run: σ and thresholds move from a first to a last
//! factor, in equal ratios, over so many pieces of the run.
//!
//! Nothing is chosen from an output, so that the composition is a fixed one of different steps,
//! and the accountant of privacy-loss distributions counts it as it is. Pieces, since each
//! different σ costs that accountant a transform.

use serde::{Deserialize, Serialize};

use crate::accounting::{Phase, pld};
use crate::{Error, Result};

/// `[private.schedule]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Factors of σ at the beginning and at the end.
    pub sigma: [f64; 2],
    /// Factors of the threshold at the beginning and at the end.
    pub threshold: [f64; 2],
    /// Pieces of the run, each with one value.
    pub pieces: u64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { sigma: [1.0, 1.0], threshold: [1.0, 1.0], pieces: 16 }
    }
}

impl ScheduleConfig {
    /// Refuses factors outside 0.01 to 100 and more pieces than can be accounted.
    ///
    /// # Errors
    /// [`Error::Parameter`].
    pub fn check(&self) -> Result<()> {
        for factor in self.sigma.iter().chain(&self.threshold) {
            if !(0.01..=100.0).contains(factor) {
                let expected = "a schedule's factor is a number from 0.01 to 100";
                return Err(Error::parameter("schedule", *factor, expected));
            }
        }
        if !(1..=pld::MOST_PHASES as u64).contains(&self.pieces) {
            let expected = "a schedule has 1 to 256 pieces: each is accounted by itself";
            return Err(Error::parameter("pieces", self.pieces as f64, expected));
        }
        Ok(())
    }

    /// Whether σ stays as it is.
    pub fn keeps_sigma(&self) -> bool {
        self.sigma == [1.0, 1.0]
    }

    /// Factor of σ at `step` of `steps`.
    pub fn sigma(&self, step: u64, steps: u64) -> f64 {
        self.factor(self.sigma, step, steps)
    }

    /// Factor of the thresholds at `step` of `steps`.
    pub fn threshold(&self, step: u64, steps: u64) -> f64 {
        self.factor(self.threshold, step, steps)
    }

    fn factor(&self, [first, last]: [f64; 2], step: u64, steps: u64) -> f64 {
        let pieces = self.pieces.min(steps);
        let piece = (u128::from(step) * u128::from(pieces) / u128::from(steps.max(1))) as f64;
        let share = if pieces > 1 { piece / (pieces - 1) as f64 } else { 0.0 };
        first * libm::exp(share * libm::log(last / first))
    }

    /// The run as phases, for a σ that the factors multiply.
    ///
    /// # Errors
    /// As [`Phase::new`].
    pub fn phases(&self, sigma: f64, rate: f64, steps: u64) -> Result<Vec<Phase>> {
        let pieces = self.pieces.min(steps);
        // The first step of a piece: the least one that falls into it.
        let first = |piece: u64| (u128::from(piece) * u128::from(steps)).div_ceil(pieces.into());
        let phase = |piece: u64| {
            let (from, to) = (first(piece) as u64, first(piece + 1) as u64);
            Phase::new(sigma * self.sigma(from, steps), rate, to - from)
        };
        (0..pieces).map(phase).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_the_steps_one_by_one() {
        for (pieces, steps) in [(16, 100), (7, 7), (16, 5), (1, 30), (3, 1000)] {
            let config = ScheduleConfig { sigma: [1.4, 0.7], pieces, ..Default::default() };
            let phases = config.phases(2.0, 0.1, steps).unwrap();
            let mut step = 0;
            for phase in &phases {
                for _ in 0..phase.steps() {
                    assert_eq!(phase.sigma(), 2.0 * config.sigma(step, steps), "{step}");
                    step += 1;
                }
            }
            assert_eq!(step, steps);
            assert_eq!(config.sigma(0, steps), 1.4);
            if pieces > 1 {
                assert!((config.sigma(steps - 1, steps) / 0.7 - 1.0).abs() < 1e-15);
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let with = |sigma| ScheduleConfig { sigma, ..Default::default() }.check();
        assert!(with([0.0, 1.0]).is_err() && with([1.0, f64::NAN]).is_err());
        assert!(ScheduleConfig { pieces: 0, ..Default::default() }.check().is_err());
        assert!(ScheduleConfig { pieces: 257, ..Default::default() }.check().is_err());
    }
}
