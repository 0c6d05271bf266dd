//! Random numbers of a decision: a pure function of the seed and of which decision it is.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::mechanism::noise::two_normals;

/// One stream of ChaCha20 a decision, so that nothing of it need be saved.
pub(super) struct Random(ChaCha20Rng);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut words = ChaCha20Rng::seed_from_u64(seed);
        words.set_stream(stream);
        Self(words)
    }

    /// A uniform number from [−1, 1).
    pub fn centred(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * 2f32.powi(-23) - 1.0
    }

    /// Independent standard normal numbers.
    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        let pairs = (0..count.div_ceil(2)).flat_map(|_| two_normals(&mut self.0));
        pairs.take(count).map(|n| n as f32).collect()
    }

    /// A whole number below `end`; 64 bits over at most 10⁴ are uneven by less than 10⁻¹⁵.
    pub fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end as u64) as usize
    }
}
