//! Llama 3's stretched RoPE, which GGUF stores as a tensor of divisors and not as parameters.

use crate::config::RopeScaling;

/// The parameters that Meta published: Llama 3.1, and 3.2's small models.
const PUBLISHED: [f64; 2] = [8.0, 32.0];
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: usize = 8192;

/// The scaling whose divisors are `factors` (one per pair of dimensions), if it is a published one.
pub(super) fn recognise(factors: &[f32], theta: f64) -> Option<RopeScaling> {
    let factor = PUBLISHED.into_iter().find(|&factor| {
        let dim = 2 * factors.len();
        factors.iter().enumerate().all(|(i, &got)| {
            let expected = divisor(theta.powf(2.0 * i as f64 / dim as f64), factor);
            // Stored as f32: a relative rounding error of 6e-8; 1e-4 separates all neighbours.
            (f64::from(got) / expected - 1.0).abs() < 1e-4
        })
    })?;
    Some(RopeScaling::Llama3 {
        factor,
        low_freq_factor: LOW,
        high_freq_factor: HIGH,
        original_max_position_embeddings: ORIGINAL,
    })
}

/// What the frequency of wavelength 2π·`period` is divided by.
fn divisor(period: f64, factor: f64) -> f64 {
    let wavelength = std::f64::consts::TAU * period;
    let original = ORIGINAL as f64;
    if wavelength < original / HIGH {
        return 1.0;
    }
    if wavelength > original / LOW {
        return factor;
    }
    let smooth = (original / wavelength - LOW) / (HIGH - LOW);
    1.0 / ((1.0 - smooth) / factor + smooth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_factors_are_recognised_and_others_are_not() {
        let of = |factor: f64| -> Vec<f32> {
            (0..64).map(|i| divisor(500_000f64.powf(i as f64 / 64.0), factor) as f32).collect()
        };
        for factor in PUBLISHED {
            let found = recognise(&of(factor), 500_000.0);
            assert!(matches!(found, Some(RopeScaling::Llama3 { factor: f, .. }) if f == factor));
        }
        assert_eq!(recognise(&of(16.0), 500_000.0), None);
        assert_eq!(recognise(&[f32::NAN; 64], 500_000.0), None);
    }
}
