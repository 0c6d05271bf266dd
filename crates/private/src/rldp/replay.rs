//! What happened: the last ten thousand transitions.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::mlp::are_numbers;
use super::random::Random;

/// Transitions that are kept.
const MOST: usize = 10_000;

/// One decision and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Transition {
    pub state: Vec<f32>,
    pub action: Vec<f32>,
    pub reward: f32,
    /// The state in which the next decision was made.
    pub next: Vec<f32>,
}

/// The newest transitions, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Replay(VecDeque<Transition>);

impl Replay {
    pub fn push(&mut self, transition: Transition) {
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        self.0.push_back(transition);
    }

    /// `min(most, len)` different ones, each as likely as any other.
    pub fn sample(&self, most: usize, random: &mut Random) -> Vec<Transition> {
        let mut places: Vec<usize> = (0..self.0.len()).collect();
        let count = most.min(places.len());
        for i in 0..count {
            let other = i + random.below(places.len() - i);
            places.swap(i, other);
        }
        places[..count].iter().map(|&place| self.0[place].clone()).collect()
    }

    /// Whether every transition is finite, with states and actions of these sizes.
    pub fn is_like(&self, dims: (usize, usize)) -> bool {
        let fits = |t: &Transition| {
            let states = [&t.state, &t.next].iter().all(|state| are_numbers(state, dims.0));
            states && are_numbers(&t.action, dims.1) && t.reward.is_finite()
        };
        self.0.len() <= MOST && self.0.iter().all(fits)
    }

    #[cfg(test)]
    pub fn transitions(&self) -> &VecDeque<Transition> {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(i: usize) -> Transition {
        let value = vec![i as f32];
        Transition { state: value.clone(), action: vec![0.0], reward: 0.0, next: value }
    }

    #[test]
    fn the_oldest_give_way_and_a_batch_never_repeats() {
        let mut replay = Replay::default();
        for i in 0..MOST + 3 {
            replay.push(numbered(i));
        }
        assert_eq!(replay.0.len(), MOST);
        assert_eq!(replay.0[0], numbered(3));
        assert_eq!(replay.0[MOST - 1], numbered(MOST + 2));
        let mut seen: Vec<u32> =
            replay.sample(32, &mut Random::new(3, 0)).iter().map(|t| t.state[0] as u32).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 32);
    }

    #[test]
    fn every_transition_is_drawn_as_often_as_any_other() {
        let mut replay = Replay::default();
        (0..10).for_each(|i| replay.push(numbered(i)));
        let (mut random, mut hits) = (Random::new(4, 0), [0.0f64; 10]);
        for _ in 0..10_000 {
            for t in replay.sample(4, &mut random) {
                hits[t.state[0] as usize] += 1.0;
            }
        }
        // Each is binomial(10⁴, 0.4): five standard deviations are 245.
        assert!(hits.iter().all(|hits| (hits - 4000.0).abs() < 245.0), "{hits:?}");
    }
}
