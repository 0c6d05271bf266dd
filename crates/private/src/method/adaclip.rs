//! AdaCliP (Pichapati et al. 2019, arXiv 1908.07643): every coordinate is clipped, and gets its
//! noise, on a scale of its own.
//!
//! A person's gradient goes in as `w = (g − a)/b` and is clipped to the threshold; what is released
//! comes back as `b·w̃ + a`. With s² the variance of a person's gradient about a, noise is least, for
//! a given `E|w|²`, at `b_i² ∝ s_i`. Both follow released gradients alone:
//!
//! `a ← β₁·a + (1 − β₁)·g̃`, `s² ← β₂·s² + (1 − β₂)·B·((g̃ − a)² − (b·s_noise)²)`;
//!
//! the released mean of about B persons varies by a B-th of what one person's gradient does, and the
//! noise in it is known and taken away.
//!
//! The paper takes the scale of all b from s as well, and clips at 1. Where there are more
//! coordinates than persons (`d·σ²/B² > 1`: every adapter), what is left of the noise in s then
//! widens b, which widens the noise, without end. Here the mean of b² is 1, and the threshold says
//! how long a gradient may be.

use super::state::{Reader, State};
use crate::Result;

/// Averages of mean and variance, and the share of the mean variance below which none counts. The
/// rule is the paper's, `s² ← β₂·s² + (1 − β₂)·clamp((g̃ − a)² − b²σ², h₁, h₂)` (as in
/// github.com/soominkwon/DP-dSNE, too); its β and h are for gradients of another size and could not
/// be confirmed, so these are ours, chosen without data.
const BETA: (f32, f32) = (0.99, 0.9);
const LEAST: f64 = 1e-4;

/// a, s² and b of every coordinate, by slot.
#[derive(Clone, Debug)]
pub struct Adaclip {
    mean: Vec<Vec<f32>>,
    /// Without its noise, so that it may come out below 0.
    square: Vec<Vec<f32>>,
    scale: Vec<Vec<f32>>,
}

impl Adaclip {
    /// Nothing known yet: a = 0, b = 1.
    pub fn new(sizes: &[usize]) -> Self {
        let fill = |value: f32| sizes.iter().map(|&size| vec![value; size]).collect();
        Self { mean: fill(0.0), square: fill(0.0), scale: fill(1.0) }
    }

    fn rescale(&mut self) {
        let count = self.square.iter().map(Vec::len).sum::<usize>() as f64;
        let mean = |of: &dyn Fn(f64) -> f64| {
            self.square.iter().flatten().map(|&square| of(square.into())).sum::<f64>() / count
        };
        let least = LEAST * mean(&|square| square.max(0.0));
        let deviation = |square: f64| square.max(least).sqrt();
        let all = mean(&deviation);
        // Nothing stands out of the noise.
        let known = all > 0.0;
        for (scale, square) in self.scale.iter_mut().zip(&self.square) {
            for (scale, &square) in scale.iter_mut().zip(square) {
                *scale = if known { (deviation(square.into()) / all).sqrt() as f32 } else { 1.0 };
            }
        }
    }

    /// A person's gradient of a slot into these coordinates.
    pub fn forward(&self, slot: usize, values: &mut [f32]) {
        let rule = self.mean[slot].iter().zip(&self.scale[slot]);
        for (x, (mean, scale)) in values.iter_mut().zip(rule) {
            *x = (*x - mean) / scale;
        }
    }

    /// Brings back what was released, with noise of standard deviation `noise` on each number of
    /// it, and learns from it; `batch` is the expected one.
    pub fn learn(&mut self, released: &mut [Vec<f32>], noise: &[f64], batch: f64) {
        for (slot, values) in released.iter_mut().enumerate() {
            let (noise, batch) = (noise[slot] as f32, batch as f32);
            let rule = self.mean[slot].iter_mut().zip(&mut self.square[slot]);
            for ((x, scale), (mean, square)) in values.iter_mut().zip(&self.scale[slot]).zip(rule) {
                let off = scale * *x;
                *x = off + *mean;
                let known = scale * noise;
                let variance = batch * (off * off - known * known);
                *mean = BETA.0 * *mean + (1.0 - BETA.0) * *x;
                *square = BETA.1 * *square + (1.0 - BETA.1) * variance;
            }
        }
        self.rescale();
    }

    pub(super) fn write(&self, state: &mut State) {
        state.arrays.extend(self.mean.iter().chain(&self.square).cloned());
    }

    pub(super) fn read(&mut self, reader: &mut Reader) -> Result<()> {
        for array in self.mean.iter_mut().chain(&mut self.square) {
            *array = reader.array(array.len())?;
        }
        self.rescale();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_went_in_and_scales_follow_the_variance() {
        let mut adaclip = Adaclip::new(&[2, 1]);
        // Persons' gradients vary by 1 and by 0.01 in the two coordinates; the mean of 100 of
        // them, as released, by a tenth of that.
        let mut sign = 1.0;
        for _ in 0..200 {
            let mut seen = vec![vec![0.1 * sign, 0.001 * sign], vec![0.0]];
            let want = seen.clone();
            for (slot, values) in seen.iter_mut().enumerate() {
                adaclip.forward(slot, values);
            }
            adaclip.learn(&mut seen, &[0.0; 2], 100.0);
            for (x, want) in seen.iter().flatten().zip(want.iter().flatten()) {
                assert!((x - want).abs() < 1e-6, "{x} {want}");
            }
            sign = -sign;
        }
        let square = &adaclip.square[0];
        assert!((square[0].sqrt() - 1.0).abs() < 0.05, "{square:?}");
        assert!((square[1].sqrt() / 0.01 - 1.0).abs() < 0.05, "{square:?}");
        // b² is as the deviations are, and 1 on average; the third is at the floor.
        let b: Vec<f32> = adaclip.scale.iter().flatten().map(|b| b * b).collect();
        assert!((b[0] / b[1] / 100.0 - 1.0).abs() < 0.1, "{b:?}");
        assert!((b.iter().sum::<f32>() / 3.0 - 1.0).abs() < 1e-5, "{b:?}");
    }

    /// Noise alone must not be taken for a signal: b would grow, and with it the noise.
    #[test]
    fn noise_alone_does_not_feed_itself() {
        let mut adaclip = Adaclip::new(&[1000]);
        let mut state = 7u64;
        for _ in 0..300 {
            // Uniform numbers of ±1 have a standard deviation of 1/√3.
            let mut noise = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            adaclip.learn(&mut [(0..1000).map(|_| noise()).collect()], &[3f64.powf(-0.5)], 64.0);
            let energy: f32 = adaclip.scale[0].iter().map(|b| b * b).sum();
            assert!((energy / 1000.0 - 1.0).abs() < 1e-4, "{energy}");
        }
    }
}
