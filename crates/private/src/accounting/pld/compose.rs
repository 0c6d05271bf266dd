//! Many steps: the sum of independent losses, by one transform.
//!
//! Masses are tilted first: w_k = p_k·exp(λkh − K), with K ≈ log Σ p_k e^{λkh}. The tilt commutes with
//! composition, `p^{*T}[k] = exp(TK − λkh)·w^{*T}[k]`, and moves the bulk of the composed mass to
//! the losses around ε, so that an absolute error of the transform is a small *relative* error of δ,
//! be δ 10⁻⁵ or 10⁻⁴⁰.
//!
//! # The error of one frequency
//!
//! The forward transform errs by E ≤ fft.error()·Σw at every frequency. With R = |F̃| + E,
//! |F̃^T − F^T| ≤ T·R^{T−1}·E; a power by repeated squaring is a tree of T − 1 multiplications, each
//! off by √5·u, which adds R^T·3uT. A product of phases errs by err·|A| + |G|·err_A + 3u|G||A|. The
//! backward transform adds fft.error()·Σ|G|. So each composed mass errs by at most
//! κ = (Σ_j err_j + fft.error()·Σ_j|G_j|)/N.
//!
//! # Wrapping around
//!
//! A transform of N points adds up all masses whose indices are equal modulo N. What lies outside
//! the window is bounded by Chernoff on the masses themselves:
//! Σ_{k≥m} p^{*T}[k]·e^{λkh} ≤ exp(T·log Σ p e^{(λ+ν)kh} − ν·m·h), likewise below with −ν.

use super::curve::{Bound, Curve};
use super::fft::{Fft, U};
use super::plan::Window;
use super::pmf::Pmf;

const EPS: f64 = f64::EPSILON;
/// Frequencies whose power is below e^−80 are counted as error.
const NEGLIGIBLE: f64 = 80.0;

/// A composition in the making: the product of the phases' transforms.
pub(super) struct Composition {
    window: Window,
    h: f64,
    fft: Fft,
    re: Vec<f64>,
    im: Vec<f64>,
    error: Vec<f64>,
    /// Σ T·K, and the largest it may be off.
    scale: f64,
    scale_error: f64,
    /// Σ T·log-moment at λ + above and λ − below, rounded up.
    above: f64,
    below: f64,
    offset: f64,
    slop: f64,
    infinite: f64,
    /// Relative error of the tilted masses, all steps together.
    relative: f64,
}

impl Composition {
    /// An empty composition for steps of at most `masses` grid points.
    pub(super) fn new(window: Window, h: f64, masses: usize) -> Self {
        let points = ((window.high - window.low) / h) as usize + 2;
        let len = points.max(masses).next_power_of_two();
        Self {
            window,
            h,
            fft: Fft::new(len),
            re: vec![1.0; len],
            im: vec![0.0; len],
            error: vec![0.0; len],
            scale: 0.0,
            scale_error: 0.0,
            above: 0.0,
            below: 0.0,
            offset: 0.0,
            slop: 0.0,
            infinite: 0.0,
            relative: 0.0,
        }
    }

    /// Adds `steps` steps of `pmf`.
    pub(super) fn add(&mut self, pmf: &Pmf, steps: u64) {
        let times = steps as f64;
        // One number for λh everywhere, so that the tilt and its undoing are the same.
        let tilt = self.window.lambda * self.h;
        let (log_moment, _) = pmf.log_moment(self.window.lambda);
        let (mut re, mut im) = (vec![0.0; self.re.len()], vec![0.0; self.re.len()]);
        let mut total = 0.0;
        for (k, mass) in (pmf.first..).zip(&pmf.mass) {
            let w = mass * libm::exp(tilt * k as f64 - log_moment);
            re[k.rem_euclid(self.re.len() as i64) as usize] += w;
            total += w;
        }
        let farthest = tilt * pmf.first.abs().max(pmf.last().abs()) as f64;
        self.relative += times * EPS * (2.0 * farthest + 2.0 * log_moment.abs() + 6.0);

        self.fft.forward(&mut re, &mut im);
        // Twice covers the rounding of the sum.
        let error = self.fft.error() * total * (1.0 + 2.0 * EPS * re.len() as f64);
        self.multiply(&re, &im, error, steps);

        self.scale += times * log_moment;
        self.scale_error += 4.0 * EPS * (times * log_moment).abs();
        let outer = |theta: f64| {
            let (log, error) = pmf.log_moment(theta);
            times * (log + error) + 4.0 * EPS * (times * log).abs()
        };
        self.above += outer(self.window.lambda + self.window.above);
        self.below += outer(self.window.lambda - self.window.below);
        self.offset += times * pmf.offset;
        self.slop += times * (pmf.slop + EPS * pmf.offset.abs());
        self.infinite += times * pmf.infinite * (1.0 + 4.0 * EPS);
    }

    /// Multiplies by the `steps`-th power of a transform whose values err by at most `error`.
    fn multiply(&mut self, re: &[f64], im: &[f64], error: f64, steps: u64) {
        let times = steps as f64;
        let negligible = libm::exp(-NEGLIGIBLE / times);
        let negligible_power = libm::exp(-NEGLIGIBLE) * (1.0 + 1e-6);
        for (j, (&x, &y)) in re.iter().zip(im).enumerate() {
            let largest = (x * x + y * y).sqrt() * (1.0 + 8.0 * U) + error;
            let before = (self.re[j] * self.re[j] + self.im[j] * self.im[j]).sqrt();
            let before = before * (1.0 + 8.0 * U);
            if largest < negligible {
                self.error[j] = (before + self.error[j]) * negligible_power;
                (self.re[j], self.im[j]) = (0.0, 0.0);
                continue;
            }
            // R^{T−1} to 10⁻⁶ of itself: the exponent is at most 80, or hardly above 0.
            let power = libm::exp((times - 1.0) * libm::log(largest)) * (1.0 + 1e-6);
            let own = power * times * (error + 3.0 * U * largest) * (1.0 + 1e-6);
            let most = power * largest;
            self.error[j] =
                (self.error[j] * (most + own) + before * (own + 3.0 * U * most)) * (1.0 + 1e-6);
            let (px, py) = raise(x, y, steps);
            let (gx, gy) = (self.re[j], self.im[j]);
            (self.re[j], self.im[j]) = (gx * px - gy * py, gx * py + gy * px);
        }
    }

    /// The composed curve δ(ε).
    pub(super) fn finish(mut self, bound: Bound) -> Curve {
        let len = self.re.len();
        let moduli = self.re.iter().zip(&self.im).map(|(x, y)| (x * x + y * y).sqrt());
        let moduli: f64 = moduli.sum();
        let errors: f64 = self.error.iter().sum();
        // The sums of N positive numbers err by N·ε of themselves.
        let sums = 1.0 + 2.0 * EPS * len as f64;
        let kappa = (errors + self.fft.error() * moduli) / len as f64 * sums;
        self.fft.backward(&mut self.re, &mut self.im);

        let tilt = self.window.lambda * self.h;
        let lowest = libm::floor((self.window.low - self.offset) / self.h) as i64;
        let turn = lowest.rem_euclid(len as i64) as usize;
        self.re.rotate_left(turn);
        let per_len = 1.0 / len as f64;
        for mass in &mut self.re {
            let x = *mass * per_len;
            *mass = match bound {
                Bound::Upper => (x + kappa).max(0.0) * (1.0 + 2.0 * EPS),
                Bound::Lower => (x - kappa).max(0.0) * (1.0 - 2.0 * EPS),
            };
        }
        let edge_low = lowest as f64 * self.h;
        let edge_high = (lowest + len as i64) as f64 * self.h;
        // Tilted masses outside, in the units of w; the sums' own rounding is far below 10⁻³.
        let above = self.above - self.scale - self.window.above * edge_high;
        let below = self.below - self.scale + self.window.below * edge_low;
        let outside = |log: f64, parts: f64| {
            libm::exp(log + self.scale_error + 8.0 * EPS * (parts + log.abs()) + 1e-3)
        };
        let size = self.scale.abs() + self.above.abs() + self.below.abs();
        let above = outside(above, size + (self.window.above * edge_high).abs());
        let below = outside(below, size + (self.window.below * edge_low).abs());
        Curve::new(
            bound,
            self.re,
            super::curve::Frame {
                h: self.h,
                tilt,
                lowest,
                offset: self.offset,
                slop: self.slop,
                scale: self.scale,
                relative: self.relative + self.scale_error,
                infinite: self.infinite,
                above,
                below,
            },
        )
    }
}

/// (x + iy)^n by repeated squaring.
fn raise(mut x: f64, mut y: f64, mut n: u64) -> (f64, f64) {
    let (mut re, mut im) = (1.0, 0.0);
    while n > 0 {
        if n & 1 == 1 {
            (re, im) = (re * x - im * y, re * y + im * x);
        }
        (x, y) = (x * x - y * y, 2.0 * x * y);
        n >>= 1;
    }
    (re, im)
}
