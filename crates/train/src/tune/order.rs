//! Which examples a step sees: epochs of shuffled examples, a pure function of (seed, step).

use std::ops::Range;

use crate::config::TuneTrain;
use crate::data::permutation;

/// The examples of a run in the order in which they are seen.
pub struct Order {
    examples: usize,
    batch: u64,
    total: u64,
    seed: u64,
    /// The epoch laid out last.
    epoch: Option<(u64, Vec<u32>)>,
}

impl Order {
    /// Of `examples` examples; fewer than 2³² of them.
    pub fn new(examples: usize, train: &TuneTrain) -> Self {
        let total = train.examples(examples);
        Self { examples, batch: train.batch as u64, total, seed: train.seed, epoch: None }
    }

    /// Positions of a step in the row of all epochs; the last step may have fewer.
    pub fn positions(&self, step: u64) -> Range<u64> {
        let at = |step: u64| step.saturating_mul(self.batch).min(self.total);
        at(step)..at(step + 1)
    }

    /// The examples of a step.
    pub fn step(&mut self, step: u64) -> Vec<usize> {
        self.positions(step).map(|position| self.at(position)).collect()
    }

    fn at(&mut self, position: u64) -> usize {
        let (epoch, within) = (position / self.examples as u64, position % self.examples as u64);
        if self.epoch.as_ref().is_none_or(|(number, _)| *number != epoch) {
            self.epoch = Some((epoch, permutation(self.seed, epoch, self.examples as u32)));
        }
        self.epoch.as_ref().map_or(0, |(_, order)| order[within as usize] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_every_example_once_and_the_last_step_takes_the_rest() {
        let train = TuneTrain { epochs: Some(2), batch: 4, ..TuneTrain::default() };
        let mut order = Order::new(5, &train);
        let steps = train.steps(5);
        assert_eq!(steps, 3);
        let seen: Vec<usize> = (0..steps).flat_map(|step| order.step(step)).collect();
        for epoch in seen.chunks(5) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            assert_eq!(epoch, [0, 1, 2, 3, 4]);
        }
        assert_ne!(seen[..5], seen[5..], "epochs are shuffled anew");
        assert_eq!(order.step(1), seen[4..8], "a step does not depend on those before it");
    }
}
