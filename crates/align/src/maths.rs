//! Logistic functions that keep their digits far from zero; the same bits on every platform.

use std::f64::consts::LN_2;

/// `1/(1 + e⁻ˣ)`.
pub(crate) fn sigmoid(x: f64) -> f64 {
    let e = libm::exp(-x.abs());
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// `ln(1 + eˣ) = −ln σ(−x)`.
pub(crate) fn softplus(x: f64) -> f64 {
    x.max(0.0) + libm::log1p(libm::exp(-x.abs()))
}

/// `ln σ(x)`.
pub(crate) fn log_sigmoid(x: f64) -> f64 {
    -softplus(-x)
}

/// The slope of the logistic function, `σ(x)·σ(−x)`.
pub(crate) fn sigmoid_slope(x: f64) -> f64 {
    sigmoid(x) * sigmoid(-x)
}

/// `ln(1 − eˣ)` for x < 0 (Mächler 2012, "Accurately computing log(1 − exp(−|a|))").
pub(crate) fn log1m_exp(x: f64) -> f64 {
    if x > -LN_2 { libm::log(-libm::expm1(x)) } else { libm::log1p(-libm::exp(x)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_from_zero_nothing_is_lost() {
        // e⁻⁹⁰ of which 1 + e⁻⁹⁰ keeps nothing.
        let tiny = libm::exp(-90.0);
        assert_eq!((softplus(-90.0), softplus(90.0)), (tiny, 90.0));
        assert_eq!((sigmoid(-90.0), sigmoid(90.0)), (tiny, 1.0));
        assert_eq!((log_sigmoid(90.0), log_sigmoid(-90.0)), (-tiny, -90.0));
        assert_eq!((sigmoid_slope(90.0), sigmoid_slope(-90.0)), (tiny, tiny));
        assert_eq!((log1m_exp(-90.0), log1m_exp(-1e-20)), (-tiny, libm::log(1e-20)));
        assert_eq!((softplus(-1e4), sigmoid(-1e4), softplus(1e4)), (0.0, 0.0, 1e4));
    }

    #[test]
    fn near_zero_they_are_the_plain_formulas() {
        for i in -300..300 {
            let x = f64::from(i) / 100.0 + 0.005;
            let plain = 1.0 / (1.0 + (-x).exp());
            assert!((sigmoid(x) - plain).abs() < 1e-15);
            assert!((softplus(x) - (1.0 + x.exp()).ln()).abs() < 1e-14);
            assert!((log_sigmoid(x) - plain.ln()).abs() < 1e-14);
            if x < 0.0 {
                // The plain formula loses what 1 − eˣ cancels.
                assert!((log1m_exp(x) - (1.0 - x.exp()).ln()).abs() < 1e-15 / x.exp_m1().abs());
            }
        }
    }
}
