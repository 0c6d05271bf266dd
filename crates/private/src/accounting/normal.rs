//! The normal distribution's tails, far out too.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Pr[N(0,1) > x]. For x ≥ 0 the relative error is at most ε·(2 + 2x(x+1)): `erfc` is good to one
/// unit in the last place, and rounding x/√2 moves x by at most εx, which changes the tail by
/// φ(x)·εx with φ(x) ≤ (x+1)·Pr[N > x].
pub(super) fn upper_tail(x: f64) -> f64 {
    0.5 * libm::erfc(x * FRAC_1_SQRT_2)
}

/// log Pr[N(0,1) > x], without underflow.
pub(super) fn log_upper_tail(x: f64) -> f64 {
    if x < 25.0 {
        // Near 1 the logarithm is that of the other tail's complement.
        if x < -1.0 {
            return libm::log1p(-upper_tail(-x));
        }
        return libm::log(upper_tail(x));
    }
    // Asymptotic series (Abramowitz & Stegun 26.2.12); the first term left out is 945/x¹⁰ < 10⁻¹¹,
    // beside a logarithm of at least 315.
    let w = 1.0 / (x * x);
    let series = w * (-1.0 + w * (3.0 + w * (-15.0 + w * 105.0)));
    -0.5 * x * x - libm::log(x) - 0.5 * libm::log(2.0 * PI) + libm::log1p(series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_of_the_tail_has_no_seam() {
        // Mills' ratio lies between x/(x²+1) and 1/x (Gordon 1941).
        for i in 0..400 {
            let x = 1.0 + 0.1 * f64::from(i);
            let density = -0.5 * x * x - 0.5 * libm::log(2.0 * PI);
            let log = log_upper_tail(x);
            assert!(log <= density - libm::log(x), "{x}");
            assert!(log >= density + libm::log(x / (x * x + 1.0)), "{x}");
        }
        let (before, after) = (log_upper_tail(25.0 - 1e-12), log_upper_tail(25.0));
        assert!((before - after).abs() < 1e-10, "{before} {after}");
        assert_eq!(log_upper_tail(0.0), libm::log(0.5));
        assert!((log_upper_tail(-9.0) + upper_tail(9.0)).abs() < 1e-30);
    }
}
