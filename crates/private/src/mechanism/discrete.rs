//! The discrete Gaussian, sampled exactly: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010),
//! Algorithms 1 to 3, in integers alone.
//!
//! On ℤ with weight `e^(−k²/(2σ²))` at k. A whole σ keeps every number within 128 bits and lets
//! Algorithm 3 use t = σ: a sample y of the discrete Laplace distribution of scale σ is accepted
//! with probability `e^(−(|y|−σ)²/(2σ²))`, and `e^(−|y|/σ)` times that is `e^(−y²/(2σ²))` up to a
//! factor. (The paper's t is ⌊σ⌋ + 1; any t is right, and those about σ accept most: `e^(−½)·√(π/2)` = 0.76 of them.)

use rand_chacha::rand_core::Rng;

use crate::{Error, Result};

/// Standard deviations that are sampled: fewer make the grid coarse, more leave 128 bits.
const LEAST: f64 = (1u64 << 20) as f64;
const MOST: f64 = (1u64 << 55) as f64;

/// The whole standard deviation for a wanted one: rounded up, so that there is never less noise.
pub(super) fn scale(sigma: f64) -> Result<u64> {
    if !(LEAST..=MOST).contains(&sigma) {
        return Err(Error::Step(format!(
            "hardened noise needs a standard deviation of 2^20 to 2^55 units of the grid, this is \
             {sigma:e}: it is out of proportion to the threshold"
        )));
    }
    Ok(sigma.ceil() as u64)
}

/// A sample for a whole σ up to 2⁵⁵.
pub(super) fn gaussian(rng: &mut impl Rng, sigma: u64) -> i128 {
    let denominator = 2 * u128::from(sigma) * u128::from(sigma);
    loop {
        let y = laplace(rng, sigma);
        let off = y.unsigned_abs().abs_diff(u128::from(sigma));
        // Beyond 2⁶⁴ a square would not fit; there it is accepted with less than e^(−2¹⁶).
        if off < 1 << 64 && bernoulli_exp(rng, off * off, denominator) {
            return y;
        }
    }
}

/// Algorithm 2: weight e^(−|y|/t) at y.
fn laplace(rng: &mut impl Rng, t: u64) -> i128 {
    loop {
        let low = below(rng, t.into());
        if !bernoulli_exp_unit(rng, low, t.into()) {
            continue;
        }
        let mut high = 0u128;
        while bernoulli_exp_unit(rng, 1, 1) {
            high += 1;
        }
        let size = (low + u128::from(t) * high) as i128;
        let negative = rng.next_u64() >> 63 == 1;
        // 0 must not come twice.
        if !(negative && size == 0) {
            return if negative { -size } else { size };
        }
    }
}

/// Whether an event of probability e^(−n/d) falls.
fn bernoulli_exp(rng: &mut impl Rng, n: u128, d: u128) -> bool {
    for _ in 0..n / d {
        if !bernoulli_exp_unit(rng, 1, 1) {
            return false;
        }
    }
    bernoulli_exp_unit(rng, n % d, d)
}

/// Algorithm 1 for n ≤ d: the first k at which an event of probability n/(d·k) fails is odd with
/// probability e^(−n/d).
fn bernoulli_exp_unit(rng: &mut impl Rng, n: u128, d: u128) -> bool {
    let mut k = 1;
    // Both independent events instead of one with a product that may not fit.
    while below(rng, d) < n && below(rng, k) == 0 {
        k += 1;
    }
    k % 2 == 1
}

/// A uniform number below `n` > 0: as many bits as it has, drawn until they are below.
fn below(rng: &mut impl Rng, n: u128) -> u128 {
    let bits = 128 - (n - 1).leading_zeros();
    if bits == 0 {
        return 0;
    }
    loop {
        let mut drawn = u128::from(rng.next_u64());
        if bits > 64 {
            drawn = drawn << 64 | u128::from(rng.next_u64());
            drawn >>= 128 - bits;
        } else {
            drawn >>= 64 - bits;
        }
        if drawn < n {
            return drawn;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::key::words;

    fn rng(stream: u64) -> impl Rng {
        words(&[9; 32], stream, 0)
    }

    #[test]
    fn small_gaussians_have_their_weights() {
        for (sigma, n) in [(1u64, 200_000), (3, 200_000)] {
            let mut rng = rng(sigma);
            let mut counts = [0u32; 41];
            for _ in 0..n {
                let y = gaussian(&mut rng, sigma);
                if let Some(count) = counts.get_mut((y + 20) as usize) {
                    *count += 1;
                }
            }
            let weight = |k: i32| (-f64::from(k * k) / (2.0 * (sigma * sigma) as f64)).exp();
            let sum: f64 = (-100..=100).map(weight).sum();
            for k in -20..=20i32 {
                let p = weight(k) / sum;
                let (got, expected) = (f64::from(counts[(k + 20) as usize]), p * f64::from(n));
                // Five standard errors of a count, and one for the rare.
                let most = 5.0 * (expected * (1.0 - p)).sqrt() + 1.0;
                assert!((got - expected).abs() <= most, "σ {sigma}, {k}: {got} for {expected}");
            }
        }
    }

    #[test]
    fn events_have_their_probabilities() {
        let mut rng = rng(1);
        let n = 100_000;
        for (a, b) in [(0u128, 5u128), (1, 3), (7, 7), (22, 7), (1 << 110, 1 << 109)] {
            let hits = (0..n).filter(|_| bernoulli_exp(&mut rng, a, b)).count() as f64;
            let p = (-(a as f64) / b as f64).exp();
            let most = 5.0 * (p * (1.0 - p) * f64::from(n)).sqrt();
            assert!((hits - p * f64::from(n)).abs() <= most, "{a}/{b}: {hits}");
        }
        assert!((0..1000).all(|_| below(&mut rng, 1) == 0));
        let wide = (1u128 << 90) + 1;
        assert!((0..1000).all(|_| below(&mut rng, wide) < wide));
        let mut seen = [0; 5];
        (0..50_000).for_each(|_| seen[below(&mut rng, 5) as usize] += 1);
        assert!(seen.iter().all(|&c: &i32| (c - 10_000).abs() < 5 * 90), "{seen:?}");
    }

    #[test]
    fn a_standard_deviation_is_rounded_up() {
        assert_eq!(scale(LEAST + 0.25).unwrap(), (1 << 20) + 1);
        assert_eq!(scale(MOST).unwrap(), 1 << 55);
        assert!(scale(1000.0).is_err() && scale(f64::NAN).is_err() && scale(1e30).is_err());
    }
}
