//! Random moves in the box a learnt controller moves in: what a controller must beat before
//! anything may be said for it.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Actions that depend on seed and number of the decision alone.
#[derive(Clone, Debug)]
pub struct RandomAction {
    seed: u64,
    decisions: u64,
}

impl RandomAction {
    /// From a public seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, decisions: 0 }
    }

    /// `actions` uniform numbers of [−1, 1].
    pub fn decide(&mut self, actions: usize) -> Vec<f32> {
        let mut rng = ChaCha20Rng::seed_from_u64(self.seed);
        rng.set_stream(self.decisions);
        self.decisions += 1;
        let unit = |word: u64| (word >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..actions).map(|_| unit(rng.next_u64())).collect()
    }

    /// Decisions taken so far.
    pub fn decisions(&self) -> u64 {
        self.decisions
    }

    /// Goes on after so many decisions.
    pub fn go_on(&mut self, decisions: u64) {
        self.decisions = decisions;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_fill_the_box_and_go_on_where_they_were() {
        let mut whole = RandomAction::new(3);
        let all: Vec<Vec<f32>> = (0..300).map(|_| whole.decide(7)).collect();
        let numbers: Vec<f32> = all.concat();
        assert!(numbers.iter().all(|x| (-1.0..=1.0).contains(x)));
        // 2100 uniform numbers: the mean's deviation is 1/√(3·2100) = 0.0126, five of it 0.063.
        let mean = numbers.iter().sum::<f32>() / 2100.0;
        assert!(mean.abs() < 0.063 && numbers.iter().any(|x| *x > 0.99), "{mean}");
        let mut late = RandomAction::new(3);
        late.go_on(200);
        assert_eq!(late.decide(7), all[200]);
        assert_ne!(RandomAction::new(4).decide(7), all[0]);
    }
}
