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

/// The place at which the running sum of `e^((xᵢ − most)·scale)` first exceeds `share` of the whole,
/// 0 ≤ share < 1: where a uniform number falls in the distribution, in the order of the numbers.
/// `None` when all are −∞. The same place on every machine.
pub fn exp_quantile(x: &[f32], most: f32, scale: f32, share: f64) -> Option<usize> {
    let sums: Vec<f64> = x.chunks(RUN).map(|run| f64::from(run_sum(run, most, scale))).collect();
    let mut left = share * sums.iter().sum::<f64>();
    let mut last = None;
    for (run, (numbers, sum)) in x.chunks(RUN).zip(&sums).enumerate() {
        if left >= *sum {
            left -= sum;
            // Rounding may take the share past the end.
            last = if *sum > 0.0 { Some(run) } else { last };
            continue;
        }
        let weights: Vec<f32> = numbers.iter().map(|&x| math::exp((x - most) * scale)).collect();
        for (place, &weight) in weights.iter().enumerate() {
            left -= f64::from(weight);
            if left < 0.0 {
                return Some(run * RUN + place);
            }
        }
        return weights.iter().rposition(|&w| w > 0.0).map(|place| run * RUN + place);
    }
    let run = last?;
    let numbers = &x[run * RUN..(run * RUN + RUN).min(x.len())];
    let place = numbers.iter().rposition(|&x| math::exp((x - most) * scale) > 0.0)?;
    Some(run * RUN + place)
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

    #[test]
    fn a_quantile_is_where_the_running_sum_passes_it() {
        let hash = |i: u32| i.wrapping_mul(0x9e37_79b9) >> 8;
        let mut x: Vec<f32> = (0..3000).map(|i| (hash(i) % 997) as f32 / 150.0).collect();
        x[..5].fill(f32::NEG_INFINITY);
        x[2990..].fill(f32::NEG_INFINITY);
        let most = math::max(&x);
        let weights: Vec<f64> = x.iter().map(|&x| (0.5 * f64::from(x - most)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut before = 0.0;
        for (place, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            // In the middle of each number's share.
            let share = (before + weight / 2.0) / total;
            assert_eq!(exp_quantile(&x, most, 0.5, share), Some(place));
            before += weight;
        }
        assert_eq!(exp_quantile(&x, most, 0.5, 0.0), Some(5));
        assert_eq!(exp_quantile(&x, most, 0.5, 1.0 - 1e-16), Some(2989));
        let none = [f32::NEG_INFINITY; 4];
        assert_eq!(exp_quantile(&none, f32::NEG_INFINITY, 1.0, 0.5), None);
    }
}
