//! Sums of exponentials over a vocabulary, for choosing tokens and for their log-probabilities.

use crate::math;
use crate::simd::multiversion;

/// Numbers whose exponentials are added in f32 before they join the f64 sum.
const RUN: usize = 1024;

/// `Σ e^((xᵢ − most)·scale)`, within 1e-6 of it where `most` is the largest x and all are finite or
/// −∞. The same bits on every machine.
pub fn exp_sum(x: &[f32], most: f32, scale: f32) -> f64 {
    x.chunks(RUN).map(|run| f64::from(run_sum(run, most, scale))).sum()
}

multiversion! {
    fn run_sum(x: &[f32], most: f32, scale: f32) -> f32 {
        math::sum(x, |x| math::exp((x - most) * scale))
    }
}

/// `ln Σ e^xᵢ` in nats, within 1e-6 of it; −∞ where nothing is more, NaN where something is.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    if x.iter().any(|x| x.is_nan()) {
        return f64::NAN;
    }
    let most = math::max(x);
    if most == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    f64::from(most) + libm::log(exp_sum(x, most, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_within_their_bound() {
        for (count, spread) in [(1, 1.0), (1023, 0.1), (1025, 30.0), (50_000, 8.0), (50_000, 200.0)]
        {
            let hash = |i: u32| i.wrapping_mul(0x9e37_79b9) >> 8;
            let mut x: Vec<f32> =
                (0..count).map(|i| hash(i) as f32 / (1 << 24) as f32 * spread).collect();
            if count > 1 {
                x[1] = f32::NEG_INFINITY;
            }
            let exact: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
            let off = log_sum_exp(&x) - exact.ln();
            assert!(off.abs() < 1e-6, "{count} numbers up to {spread}: {off:e}");
        }
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
        assert!(log_sum_exp(&[1.0, f32::NAN, 2.0]).is_nan());
    }
}
