//! Draws of one person: a stream of words of its own.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::mechanism::noise::two_normals;

pub(super) struct Chance(ChaCha20Rng);

impl Chance {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut words = ChaCha20Rng::seed_from_u64(seed);
        words.set_stream(stream);
        Self(words)
    }

    /// From [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 * 2f64.powi(-53)
    }

    pub fn normal(&mut self, mean: f64, deviation: f64) -> f64 {
        mean + deviation * two_normals(&mut self.0)[0]
    }

    pub fn happens(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// By log-odds.
    pub fn logit(&mut self, log_odds: f64) -> bool {
        self.happens(1.0 / (1.0 + libm::exp(-log_odds)))
    }

    /// A place below `end`, which is above 0.
    pub fn below(&mut self, end: usize) -> usize {
        ((self.unit() * end as f64) as usize).min(end - 1)
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// A place by weights, none below 0 and some above.
    pub fn weighted(&mut self, weights: impl Iterator<Item = f64> + Clone) -> usize {
        let mut left = self.unit() * weights.clone().sum::<f64>();
        let mut last = 0;
        for (at, weight) in weights.enumerate() {
            last = at;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
        last
    }

    /// Knuth's product of uniforms; `rate` is small.
    pub fn poisson(&mut self, rate: f64) -> usize {
        let (end, mut product, mut count) = (libm::exp(-rate), self.unit(), 0);
        while product > end {
            product *= self.unit();
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_their_means() {
        let mut chance = Chance::new(1, 2);
        let count = 100_000;
        // Five standard errors each.
        let poisson = (0..count).map(|_| chance.poisson(1.5)).sum::<usize>() as f64;
        assert!((poisson / 1e5 - 1.5).abs() < 5.0 * (1.5f64 / 1e5).sqrt());
        let mut hits = [0f64; 3];
        (0..count).for_each(|_| hits[chance.weighted([1.0, 0.0, 3.0].into_iter())] += 1.0);
        assert!((hits[2] / 1e5 - 0.75).abs() < 5.0 * (0.1875f64 / 1e5).sqrt() && hits[1] == 0.0);
        assert!((0..count).all(|_| chance.below(3) < 3));
    }
}
