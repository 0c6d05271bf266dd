//! A Fourier transform whose rounding is bounded by proof.
//!
//! Radix 2, natural order → bit-reversed (decimation in frequency) and back (decimation in time), so
//! that nothing is ever permuted; plain multiplications and additions in a fixed order, so the same
//! bits everywhere. It is written here because the bound is part of what this crate promises, and a
//! bound holds for one algorithm.
//!
//! # The bound
//!
//! With u = 2⁻⁵³. Each of the L = log₂N levels maps (a, b) to (a + b, (a − b)·w) or (a + bw, a − bw).
//! A complex addition errs by at most u of its result, a complex multiplication by √5·u (Brent,
//! Percival & Zimmermann 2007), a twiddle by μ: its angle, below π, is rounded twice (2πu), sine and
//! cosine once each (√2·u), so μ < 8u. Every output is a sum over inputs, each passed through L levels
//! and multiplied there by a factor of modulus 1 with relative error at most
//! η = (1+u)(1+√5u)(1+8u) − 1 < 12u. By induction |error of any output| ≤ ((1+η)^L − 1)·Σ|inputs|.

use std::f64::consts::PI;

/// Unit roundoff.
pub(super) const U: f64 = f64::EPSILON / 2.0;

/// Tables for one length.
pub(super) struct Fft {
    len: usize,
    /// Twiddles exp(−iπj/half) of the level with blocks of 2·half at `half + j`.
    cos: Vec<f64>,
    sin: Vec<f64>,
}

/// Below this many points a transform goes level by level; above, half by half, which keeps to caches.
const BLOCK: usize = 4096;

impl Fft {
    /// Tables for `len` points, a power of two.
    pub(super) fn new(len: usize) -> Self {
        debug_assert!(len.is_power_of_two());
        let (mut cos, mut sin) = (vec![1.0; len], vec![0.0; len]);
        let mut half = 1;
        while half < len {
            for j in 0..half {
                let angle = PI * (j as f64 / half as f64);
                (sin[half + j], cos[half + j]) = libm::sincos(-angle);
            }
            half *= 2;
        }
        Self { len, cos, sin }
    }

    /// `(1+η)^L − 1`: the largest error of any output over the sum of the moduli of the inputs.
    pub(super) fn error(&self) -> f64 {
        let levels = f64::from(self.len.trailing_zeros());
        // (1+12u)^L − 1 ≤ 12uL·exp(12uL) < 12.1·u·L
        12.1 * U * levels
    }

    /// Σ_k x_k exp(−2πijk/N), in bit-reversed order.
    pub(super) fn forward(&self, re: &mut [f64], im: &mut [f64]) {
        let half = re.len() / 2;
        if half == 0 {
            return;
        }
        self.split(re, im, half);
        if half >= BLOCK {
            let (re_low, re_high) = re.split_at_mut(half);
            let (im_low, im_high) = im.split_at_mut(half);
            self.forward(re_low, im_low);
            self.forward(re_high, im_high);
            return;
        }
        let mut half = half / 2;
        while half > 0 {
            let blocks = re.chunks_exact_mut(2 * half).zip(im.chunks_exact_mut(2 * half));
            blocks.for_each(|(re, im)| self.split(re, im, half));
            half /= 2;
        }
    }

    /// Σ_j X_j exp(+2πijk/N) from bit-reversed order, *not* divided by N.
    pub(super) fn backward(&self, re: &mut [f64], im: &mut [f64]) {
        let whole = re.len();
        if whole > 2 * BLOCK {
            let (re_low, re_high) = re.split_at_mut(whole / 2);
            let (im_low, im_high) = im.split_at_mut(whole / 2);
            self.backward(re_low, im_low);
            self.backward(re_high, im_high);
            self.join(re, im, whole / 2);
            return;
        }
        let mut half = 1;
        while half < whole {
            let blocks = re.chunks_exact_mut(2 * half).zip(im.chunks_exact_mut(2 * half));
            blocks.for_each(|(re, im)| self.join(re, im, half));
            half *= 2;
        }
    }

    /// (a, b) → (a + b, (a − b)·w)
    fn split(&self, re: &mut [f64], im: &mut [f64], half: usize) {
        let (re_a, re_b) = re.split_at_mut(half);
        let (im_a, im_b) = im.split_at_mut(half);
        let (cos, sin) = (&self.cos[half..2 * half], &self.sin[half..2 * half]);
        let a = re_a.iter_mut().zip(im_a);
        let b = re_b.iter_mut().zip(im_b);
        for ((a, b), (c, s)) in a.zip(b).zip(cos.iter().zip(sin)) {
            let (re, im) = (*a.0 - *b.0, *a.1 - *b.1);
            *a.0 += *b.0;
            *a.1 += *b.1;
            *b.0 = re * c - im * s;
            *b.1 = re * s + im * c;
        }
    }

    /// (a, b) → (a + b·w̄, a − b·w̄)
    fn join(&self, re: &mut [f64], im: &mut [f64], half: usize) {
        let (re_a, re_b) = re.split_at_mut(half);
        let (im_a, im_b) = im.split_at_mut(half);
        let (cos, sin) = (&self.cos[half..2 * half], &self.sin[half..2 * half]);
        let a = re_a.iter_mut().zip(im_a);
        let b = re_b.iter_mut().zip(im_b);
        for ((a, b), (c, s)) in a.zip(b).zip(cos.iter().zip(sin)) {
            let re = *b.0 * c + *b.1 * s;
            let im = *b.1 * c - *b.0 * s;
            *b.0 = *a.0 - re;
            *b.1 = *a.1 - im;
            *a.0 += re;
            *a.1 += im;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_output_is_within_the_proven_bound_of_the_sum() {
        let len = 256_usize;
        let fft = Fft::new(len);
        let input: Vec<f64> = (0..len).map(|k| ((k * k + 3) % 17) as f64 / 17.0).collect();
        let total: f64 = input.iter().sum();
        let (mut re, mut im) = (input.clone(), vec![0.0; len]);
        fft.forward(&mut re, &mut im);
        for j in 0..len {
            let (mut exact_re, mut exact_im) = (0.0, 0.0);
            for (k, x) in input.iter().enumerate() {
                // The angle reduced exactly, by integers.
                let angle = -2.0 * PI * ((j * k % len) as f64 / len as f64);
                exact_re += x * libm::cos(angle);
                exact_im += x * libm::sin(angle);
            }
            let at = j.reverse_bits() >> (usize::BITS - len.trailing_zeros());
            let error = libm::hypot(re[at] - exact_re, im[at] - exact_im);
            // The direct sum errs as well: N additions and angles off by 2πu.
            let direct = (len as f64 + 8.0) * U * total;
            assert!(error <= fft.error() * total + direct, "{j}: {error:e}");
        }
    }

    #[test]
    fn there_and_back_is_the_identity_also_past_the_cache_blocks() {
        for len in [1_usize, 2, 8, BLOCK, 2 * BLOCK, 8 * BLOCK] {
            let fft = Fft::new(len);
            let input: Vec<f64> = (0..len).map(|k| ((k * 7919) % 1009) as f64 / 1009.0).collect();
            let total: f64 = input.iter().sum();
            let (mut re, mut im) = (input.clone(), vec![0.0; len]);
            fft.forward(&mut re, &mut im);
            let moduli: f64 = re.iter().zip(&im).map(|(x, y)| libm::hypot(*x, *y)).sum();
            fft.backward(&mut re, &mut im);
            let bound = fft.error() * (total * len as f64 + moduli) * 1.01;
            for (x, y) in input.iter().zip(&re) {
                assert!((x * len as f64 - y).abs() <= bound, "{len}");
            }
        }
    }
}
