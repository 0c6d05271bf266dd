//! AdaCliP (Pichapati et al. 2019, arXiv 1908.07643): every coordinate is clipped, and gets its
//! noise, on a scale of its own.
//!
//! A person's gradient goes in as `w = (g − a)/b` and is clipped to the threshold; what is released
//! comes back as `b·w̃ + a`. With s² the variance of a person's gradient about a, the b of least
//! noise under `E|w|² ≤ 1` is `b_i = √(s_i·Σ_j s_j)`. Both follow released gradients alone:
//!
//! `a ← β₁·a + (1 − β₁)·g̃`, `s² ← β₂·s² + (1 − β₂)·clamp(v, h₁, h₂)`.
//!
//! v is `B·((g̃ − a)² − (b·s_noise)²)`: the released mean of about B persons varies by a B-th of what
//! one person's gradient does, and the noise in it is known and taken away. (The paper takes the
//! mean's variance for a person's.)

use super::state::{Reader, State};
use crate::Result;

/// Averages of mean and variance.
const BETA: (f32, f32) = (0.99, 0.9);
/// Variances are kept within these.
const RANGE: (f32, f32) = (1e-12, 10.0);
/// The threshold in these coordinates.
pub const THRESHOLD: f64 = 1.0;

/// a, s² and b of every coordinate, by slot.
#[derive(Clone, Debug)]
pub struct Adaclip {
    mean: Vec<Vec<f32>>,
    square: Vec<Vec<f32>>,
    scale: Vec<Vec<f32>>,
}

impl Adaclip {
    /// a = 0 and `s² = √(h₁·h₂)` everywhere.
    pub fn new(sizes: &[usize]) -> Self {
        let square = (RANGE.0 * RANGE.1).sqrt();
        let fill = |value: f32| sizes.iter().map(|&size| vec![value; size]).collect();
        let mut new = Self { mean: fill(0.0), square: fill(square), scale: fill(1.0) };
        new.rescale();
        new
    }

    fn rescale(&mut self) {
        let deviation = |square: &f32| f64::from(*square).sqrt();
        let sum: f64 = self.square.iter().flatten().map(deviation).sum();
        for (scale, square) in self.scale.iter_mut().zip(&self.square) {
            for (scale, square) in scale.iter_mut().zip(square) {
                *scale = (deviation(square) * sum).sqrt() as f32;
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
                let variance = (batch * (off * off - known * known)).clamp(RANGE.0, RANGE.1);
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
        // E|w|² = Σ s²/b² = 1.
        let all = adaclip.square.iter().flatten().zip(adaclip.scale.iter().flatten());
        let sum: f32 = all.map(|(square, scale)| square / (scale * scale)).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    }

    /// Noise alone must not be taken for a signal: b would grow, and with it the noise.
    #[test]
    fn noise_alone_does_not_feed_itself() {
        let mut adaclip = Adaclip::new(&[1000]);
        let first = adaclip.scale[0][0];
        for step in 0..100 {
            let noise = |i: usize| if (i * 7 + step * 13) % 2 == 0 { 0.5 } else { -0.5 };
            adaclip.learn(&mut [(0..1000).map(noise).collect()], &[0.5], 64.0);
        }
        assert!(adaclip.scale[0][0] <= first, "{} {first}", adaclip.scale[0][0]);
    }
}
