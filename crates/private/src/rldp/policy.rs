//! A Gaussian squashed by tanh: actions within [−1, 1], and their log-probability.
//!
//! `a = tanh(u)`, `u = μ + e^λ·ξ`, ξ standard normal, so that with the density of u and the
//! derivative of tanh `log π(a) = Σ (−ξ²/2 − λ − ½·log 2π) − Σ log(1 − tanh²u)`. The last is taken
//! as `2(log 2 − u − softplus(−2u))`, which is finite for every u.

use std::f32::consts::{LN_2, PI};

/// Bounds of λ, the logarithm of the standard deviation.
const LOG_STD: (f32, f32) = (-20.0, 2.0);

/// The action that `noise` (standard normal, one a coordinate) makes of the network's `heads` (the
/// means, then the λ), and its log-probability.
pub(super) fn draw(heads: &[f32], noise: &[f32]) -> (Vec<f32>, f32) {
    let (means, log_stds) = heads.split_at(noise.len());
    let (mut action, mut log_prob) = (Vec::with_capacity(noise.len()), 0.0);
    for ((mean, log_std), xi) in means.iter().zip(log_stds).zip(noise) {
        let log_std = log_std.clamp(LOG_STD.0, LOG_STD.1);
        let u = mean + libm::expf(log_std) * xi;
        let log_slope = 2.0 * (LN_2 - u - softplus(-2.0 * u));
        log_prob += -0.5 * xi * xi - log_std - 0.5 * libm::logf(2.0 * PI) - log_slope;
        action.push(libm::tanhf(u));
    }
    (action, log_prob)
}

/// Gradient of the heads, given those of the action and of the log-probability; ξ is held.
///
/// `∂log π/∂u = 2·tanh u` by way of the correction, and `∂log π/∂λ` has −1 besides; a λ beyond its
/// bounds gets none.
pub(super) fn backward(
    heads: &[f32],
    noise: &[f32],
    d_action: &[f32],
    d_log_prob: f32,
) -> Vec<f32> {
    let dim = noise.len();
    let action = draw(heads, noise).0;
    let mut d_heads = vec![0.0; 2 * dim];
    for i in 0..dim {
        let (a, log_std) = (action[i], heads[dim + i]);
        let d_u = d_action[i] * (1.0 - a * a) + d_log_prob * 2.0 * a;
        d_heads[i] = d_u;
        if (LOG_STD.0..=LOG_STD.1).contains(&log_std) {
            d_heads[dim + i] = d_u * libm::expf(log_std) * noise[i] - d_log_prob;
        }
    }
    d_heads
}

/// `log(1 + e^x)` without overflow.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + libm::log1pf(libm::expf(-x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// π at `a`, by the noise that leads there.
    fn density(mean: f32, log_std: f32, a: f64) -> f64 {
        let xi = (a.atanh() - f64::from(mean)) / f64::from(log_std).exp();
        f64::from(draw(&[mean, log_std], &[xi as f32]).1).exp()
    }

    #[test]
    fn the_density_integrates_to_one_and_is_the_slope_of_the_distribution() {
        for (mean, log_std) in [(0.0, 0.0), (0.8, -1.0), (-2.0, 0.5), (0.3, -2.5)] {
            // Midpoints in u, where the density of a times da/du has no peak at the walls.
            let (count, wide) = (40_000, 10.0 * f64::from(log_std).exp());
            let step = 2.0 * wide / f64::from(count);
            let piece = |i: i32| {
                let u = f64::from(mean) - wide + (f64::from(i) + 0.5) * step;
                let slope = 1.0 / u.cosh().powi(2);
                // f32 tanh cannot be undone near ±1, so the noise is taken from u itself.
                let xi = (u - f64::from(mean)) / f64::from(log_std).exp();
                let log = draw(&[mean, log_std], &[xi as f32]).1;
                f64::from(log).exp() * slope * step
            };
            let mass: f64 = (0..count).map(piece).sum();
            // f32 logarithms near 10 are good to 1e-6.
            assert!((mass - 1.0).abs() < 1e-5, "{mean} {log_std}: {mass}");
            // Slope of Φ((atanh a − μ)/σ) by differences of erfc.
            let below = |a: f64| {
                let z = (a.atanh() - f64::from(mean)) / f64::from(log_std).exp();
                0.5 * libm::erfc(-z / 2f64.sqrt())
            };
            for a in [-0.95, -0.5, 0.0, 0.2, 0.6, 0.9] {
                let slope = (below(a + 1e-5) - below(a - 1e-5)) / 2e-5;
                let ours = density(mean, log_std, a);
                assert!((ours - slope).abs() < 2e-5 * (1.0 + slope), "{a}: {ours} {slope}");
            }
        }
    }

    #[test]
    fn far_out_nothing_overflows() {
        for mean in [-1e4, 1e4] {
            let drawn = draw(&[mean, 5.0], &[3.0]);
            assert_eq!(drawn.0[0], mean.signum());
            assert!(drawn.1.is_finite(), "{}", drawn.1);
            let d = backward(&[mean, 5.0], &[3.0], &[1.0], 1.0);
            assert!(d.iter().all(|d| d.is_finite()) && d[1] == 0.0, "{d:?}");
        }
    }
}
