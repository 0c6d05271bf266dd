//! Rényi DP of the Poisson-subsampled Gaussian (Mironov, Talwar & Zhang 2019).
//!
//! ρ(α) = log A/(α−1) with A = E_{x~N(0,σ²)}[(1 + w(x))^α], w(x) = q·(exp((2x−1)/(2σ²)) − 1). The
//! remove direction is the larger one (their Theorem 5), so ρ holds for both.
//!
//! A is hardly more than 1, so A − 1 is what must be exact. Both forms here have no cancellation:
//! * integer α: expanding the power, every term of A that is 1 in the absence of noise sums to 1, so
//!   `A − 1 = Σ_{k≥2} C(α,k)(1−q)^{α−k} q^k·expm1((k²−k)/(2σ²))`, all positive;
//! * any α: `E[w] = 0`, so `A − 1 = E[(1+w)^α − 1 − αw]`, and Bernoulli's inequality says that the
//!   integrand is never negative. The integral is done by the trapezoidal rule, which for a function
//!   analytic within ±id of the line errs by about exp(−2πd/step) (Trefethen & Weideman 2014).

use std::f64::consts::PI;

use super::{Phase, check_delta, merged};
use crate::{Error, Result};

/// The largest order served; past it the integer sum is long and no ε of practice needs it.
const MOST_ORDER: f64 = 1e4;
/// The most points of one integral. An order that would need more is left out (ρ = ∞), which keeps
/// the minimum over orders a bound.
const MOST_POINTS: f64 = 65536.0;
/// Relative slack added to ε: the sums have at most 65 536 positive terms, each good to
/// 2⁻⁵² times its exponent (below 10⁴ where it matters), far below this.
const SLACK: f64 = 1e-10;

/// The orders that are tried when none are given: 1.1 to 10.9 by 0.1, 11 to 63, 128, 256, 512, 1024.
pub fn default_orders() -> Vec<f64> {
    let fine = (11..110).map(|i| f64::from(i) / 10.0);
    let whole = (11..64).map(f64::from);
    fine.chain(whole).chain([128.0, 256.0, 512.0, 1024.0]).collect()
}

/// An ε and the order that gave it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct RdpEpsilon {
    /// Upper bound on ε.
    pub epsilon: f64,
    /// The order α with the smallest ε.
    pub order: f64,
    /// Whether that is the first or last order tried, so that others may do better.
    pub at_edge: bool,
}

/// ρ(α) of one step; ∞ when the order would need more work than is allowed.
///
/// # Errors
/// [`Error::Parameter`] for an order outside (1, 10⁴].
pub fn rho(sigma: f64, rate: f64, order: f64) -> Result<f64> {
    let one = Phase::new(sigma, rate, 1)?;
    check_order(order)?;
    Ok(step(&one, order))
}

/// Upper bound on ε of a composition: the minimum over `orders` of
/// `Σρ + log((α−1)/α) − (log δ + log α)/(α−1)`, at least 0 (Balle et al. 2020, Theorem 21;
/// Canonne, Kamath & Steinke 2020, Proposition 12).
///
/// # Errors
/// [`Error::Parameter`] for no order, an order outside (1, 10⁴] or a δ out of range,
/// [`Error::TooManySteps`].
pub fn epsilon(phases: &[Phase], delta: f64, orders: &[f64]) -> Result<RdpEpsilon> {
    check_delta(delta)?;
    if orders.is_empty() {
        return Err(Error::parameter("orders", 0.0, "at least one order is needed"));
    }
    let phases = merged(phases)?;
    let mut best = RdpEpsilon { epsilon: f64::INFINITY, order: orders[0], at_edge: true };
    for (i, &order) in orders.iter().enumerate() {
        let rho = composed(&phases, order)?;
        let epsilon = to_epsilon(rho, order, delta);
        if epsilon < best.epsilon {
            let at_edge = i == 0 || i + 1 == orders.len();
            best = RdpEpsilon { epsilon, order, at_edge };
        }
    }
    Ok(best)
}

/// Σ ρ(α) of a composition.
pub(crate) fn composed(phases: &[Phase], order: f64) -> Result<f64> {
    check_order(order)?;
    Ok(phases.iter().map(|phase| phase.steps() as f64 * step(phase, order)).sum())
}

fn to_epsilon(rho: f64, order: f64, delta: f64) -> f64 {
    let less = order - 1.0;
    // log((α−1)/α) = log1p(−1/α)
    let epsilon = rho + libm::log1p(-1.0 / order) - (libm::log(delta) + libm::log(order)) / less;
    (epsilon + SLACK * (rho + epsilon.abs())).max(0.0)
}

pub(crate) fn check_order(order: f64) -> Result<()> {
    if order > 1.0 && order <= MOST_ORDER {
        return Ok(());
    }
    Err(Error::parameter("order", order, "a Rényi order is a number above 1 and at most 1e4"))
}

/// ρ(α) of one step of a phase.
pub(crate) fn step(phase: &Phase, order: f64) -> f64 {
    let (sigma, rate) = (phase.sigma(), phase.rate());
    if rate == 1.0 {
        return order / (2.0 * sigma * sigma);
    }
    let log_excess = if order == libm::floor(order) {
        log_excess_integer(sigma, rate, order)
    } else {
        log_excess_integral(sigma, rate, order)
    };
    // log A = log(1 + e^x); for large x that is x + log(1 + e^−x).
    let log_a = if log_excess < 0.0 {
        libm::log1p(libm::exp(log_excess))
    } else {
        log_excess + libm::log1p(libm::exp(-log_excess))
    };
    log_a / (order - 1.0)
}

/// log(A − 1) for an integer order.
fn log_excess_integer(sigma: f64, rate: f64, order: f64) -> f64 {
    let (log_rate, log_rest) = (libm::log(rate), libm::log1p(-rate));
    let mut sum = LogSum::default();
    let mut log_binomial = 0.0;
    let mut k = 0.0;
    while k < order {
        k += 1.0;
        log_binomial += libm::log((order - k + 1.0) / k);
        if k >= 2.0 {
            let growth = log_expm1(k * (k - 1.0) / (2.0 * sigma * sigma));
            sum.add(log_binomial + (order - k) * log_rest + k * log_rate + growth);
        }
    }
    sum.log()
}

/// log(A − 1) for any order, by the trapezoidal rule in y = x/σ.
///
/// (1+w)^α has its branch points where exp((y − 1/(2σ))/σ) = −(1−q)/q, at a distance πσ from the
/// line; the normal density's own step is limited by 2π²/step². A step of min(1/2, σ/2) makes both
/// errors less than e⁻³⁹. The integrand's bulk lies around y = 0 and y = α/σ, each of width 1; what
/// is left out past 12 on either side is less than e⁻⁷⁰ of the whole.
pub(super) fn log_excess_integral(sigma: f64, rate: f64, order: f64) -> f64 {
    let step = 0.5 * sigma.min(1.0);
    let (from, to) = (-12.0, order / sigma + 12.0);
    let points = libm::ceil((to - from) / step);
    if points > MOST_POINTS {
        return f64::INFINITY;
    }
    let log_norm = libm::log(step) - 0.5 * libm::log(2.0 * PI);
    let mut sum = LogSum::default();
    for i in 0..=points as u32 {
        let y = from + f64::from(i) * step;
        sum.add(log_norm - 0.5 * y * y + log_bernoulli(sigma, rate, order, y));
    }
    sum.log()
}

/// log((1+w)^α − 1 − αw) at y = x/σ.
fn log_bernoulli(sigma: f64, rate: f64, order: f64, y: f64) -> f64 {
    let u = (y - 0.5 / sigma) / sigma;
    if u > 600.0 {
        return order * (libm::log(rate) + u);
    }
    let w = rate * libm::expm1(u);
    if order * w.abs() < 0.1 {
        // The binomial series; each term is at most a tenth of the one before.
        let (mut term, mut series) = (order * w, 0.0);
        for k in 1..20 {
            let k = f64::from(k);
            term *= (order - k) / (k + 1.0) * w;
            series += term;
        }
        return libm::log(series);
    }
    let power = order * libm::log1p(w);
    // Past e⁶⁰⁰ the rest, at most α·w, is lost in the rounding.
    if power > 600.0 { power } else { libm::log(libm::expm1(power) - order * w) }
}

/// log(e^x − 1) for x > 0.
fn log_expm1(x: f64) -> f64 {
    if x > 40.0 { x + libm::log1p(-libm::exp(-x)) } else { libm::log(libm::expm1(x)) }
}

/// A sum of positive numbers given by their logarithms.
#[derive(Default)]
struct LogSum {
    largest: Option<f64>,
    scaled: f64,
}

impl LogSum {
    fn add(&mut self, log: f64) {
        if log == f64::NEG_INFINITY {
            return;
        }
        match self.largest {
            Some(largest) if log <= largest => self.scaled += libm::exp(log - largest),
            Some(largest) => {
                self.scaled = self.scaled * libm::exp(largest - log) + 1.0;
                self.largest = Some(log);
            }
            None => (self.largest, self.scaled) = (Some(log), 1.0),
        }
    }

    fn log(&self) -> f64 {
        self.largest.map_or(f64::NEG_INFINITY, |largest| largest + libm::log(self.scaled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_and_the_integral_are_the_same_number_at_integer_orders() {
        for (sigma, rate) in [(0.3, 0.1), (0.7, 1e-3), (1.0, 0.5), (5.0, 0.9), (40.0, 1e-6)] {
            for order in [2.0, 3.0, 7.0, 20.0, 63.0] {
                let sum = log_excess_integer(sigma, rate, order);
                let integral = log_excess_integral(sigma, rate, order);
                // Exponents of up to 2·10⁴ (order 63, sigma 0.3) carry 2⁻⁵² of their size.
                let slack = 1e-12 * sum.abs().max(1.0) + 1e-11;
                assert!((sum - integral).abs() < slack, "{sigma} {rate} {order}: {sum} {integral}");
            }
        }
    }

    #[test]
    fn no_steps_cost_nothing_and_epsilon_is_never_negative() {
        let orders = default_orders();
        let none = Phase::new(1.0, 0.1, 0).unwrap();
        assert_eq!(epsilon(&[none], 1e-5, &[1024.0]).unwrap().order, 1024.0);
        let tiny = Phase::new(1e6, 1e-6, 1).unwrap();
        for delta in [1e-5, 0.5, 0.99] {
            assert!(epsilon(&[tiny], delta, &orders).unwrap().epsilon >= 0.0);
        }
        assert!(epsilon(&[tiny], 1e-5, &[]).is_err());
        assert!(epsilon(&[tiny], 1e-5, &[1.0]).is_err());
    }
}
