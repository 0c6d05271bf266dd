//! The Gaussian mechanism without sampling, exactly (Balle & Wang 2018, Theorem 8).
//!
//! T releases with multipliers σ_i are one release with 1/σ² = Σ 1/σ_i², described by μ = 1/σ
//! ("μ-GDP", Dong, Roth & Su 2019):
//! `δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)`.

use super::normal::log_upper_tail;
use super::{Phase, check_delta, check_epsilon};
use crate::{Error, Result};

/// μ of a composition of plain Gaussian releases: `sqrt(Σ T_i/σ_i²)`.
///
/// # Errors
/// [`Error::Parameter`] when a rate is not 1: a sampled Gaussian is not μ-GDP for any useful μ.
pub fn mu(phases: &[Phase]) -> Result<f64> {
    let mut sum = 0.0;
    for phase in phases {
        if phase.rate() != 1.0 {
            let expected = "the exact formula is for the Gaussian mechanism without sampling, \
                            rate 1; use the PLD";
            return Err(Error::parameter("rate", phase.rate(), expected));
        }
        sum += phase.steps() as f64 / (phase.sigma() * phase.sigma());
    }
    Ok(libm::sqrt(sum))
}

/// δ(ε) of a μ-GDP release.
///
/// # Errors
/// [`Error::Parameter`] for an `mu` that is negative or not finite, or an `epsilon` out of range.
pub fn delta(mu: f64, epsilon: f64) -> Result<f64> {
    check_mu(mu)?;
    check_epsilon(epsilon)?;
    Ok(curve(mu, epsilon))
}

/// The smallest ε ≥ 0 at which a μ-GDP release is (ε, δ)-DP, to rounding.
///
/// # Errors
/// [`Error::Parameter`] for an `mu` that is negative or not finite, or a `delta` out of range.
pub fn epsilon(mu: f64, delta: f64) -> Result<f64> {
    check_mu(mu)?;
    check_delta(delta)?;
    if mu == 0.0 || curve(mu, 0.0) <= delta {
        return Ok(0.0);
    }
    // The loss is N(μ²/2, μ²), so δ(ε) ≤ Pr[loss > ε] ≤ exp(−(ε − μ²/2)²/(2μ²)).
    let mut low = 0.0;
    let mut high = 0.5 * mu * mu + mu * libm::sqrt(-2.0 * libm::log(delta)) + f64::MIN_POSITIVE;
    while high - low > 1e-15 * high {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if curve(mu, middle) > delta { low = middle } else { high = middle }
    }
    Ok(high)
}

/// Both terms through logarithms: e^ε·Φ is neither overflow times underflow nor a difference of
/// rounded tails.
fn curve(mu: f64, epsilon: f64) -> f64 {
    if mu == 0.0 {
        return 0.0;
    }
    let first = log_upper_tail(epsilon / mu - 0.5 * mu);
    let second = epsilon + log_upper_tail(epsilon / mu + 0.5 * mu);
    (-libm::exp(first) * libm::expm1(second - first)).clamp(0.0, 1.0)
}

fn check_mu(mu: f64) -> Result<()> {
    if (0.0..=1e9).contains(&mu) {
        return Ok(());
    }
    Err(Error::parameter("mu", mu, "mu must be a number from 0 to 1e9"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_and_its_inverse_agree_over_twelve_decades() {
        for mu in [1e-3, 0.1, 1.0, 10.0, 1e3] {
            for delta in [1e-80, 1e-12, 1e-5, 0.1] {
                let epsilon = epsilon(mu, delta).unwrap();
                if epsilon > 0.0 {
                    let back = curve(mu, epsilon);
                    // ε = fl(ε)(1 ± 2⁻⁵²) and |d log δ/dε| ≤ (ε/μ + μ)/μ·2, plus the logarithms'
                    // own rounding of relative size 2⁻⁵² times their size over the difference.
                    let slack = 1e-14 * (epsilon / mu + mu).powi(2) + 1e-12 / mu.min(1.0);
                    assert!((back / delta - 1.0).abs() < slack, "{mu} {delta} {back}");
                }
            }
        }
    }

    #[test]
    fn at_epsilon_zero_it_is_the_total_variation_distance() {
        // TV(N(0,1), N(μ,1)) = 2Φ(μ/2) − 1 = erf(μ/(2√2)).
        for mu in [0.01, 0.5, 2.0] {
            let exact = libm::erf(mu / (2.0 * std::f64::consts::SQRT_2));
            assert!((curve(mu, 0.0) / exact - 1.0).abs() < 1e-12);
        }
        assert_eq!(epsilon(0.0, 1e-5).unwrap(), 0.0);
        assert!(epsilon(f64::NAN, 1e-5).is_err() && delta(-1.0, 1.0).is_err());
    }
}
