//! The binomial distribution by its odds, and Clopper and Pearson's interval.

use super::check_error_rate;
use crate::{Error, Result};

/// No count is larger: a tail costs a walk over all outcomes.
pub const MOST: u64 = 1 << 24;

/// Pr[Bin(n, p) = k] for all k, as weights relative to the most likely outcome.
pub(super) struct Binomial {
    weights: Vec<f64>,
    total: f64,
}

impl Binomial {
    /// `odds` are p/(1−p), finite and above 0. Weights go out from the mode by
    /// `w(k+1)/w(k) = (n−k)/(k+1)·odds`, so that each is good to n roundings; what is too unlikely
    /// for a double is 0.
    pub fn new(n: u64, odds: f64) -> Self {
        let mode = (((n + 1) as f64) * (odds / (1.0 + odds))).floor().min(n as f64) as usize;
        let n = n as usize;
        let mut weights = vec![0.0; n + 1];
        weights[mode] = 1.0;
        for k in mode..n {
            weights[k + 1] = weights[k] * ((n - k) as f64 / (k + 1) as f64 * odds);
        }
        for k in (0..mode).rev() {
            weights[k] = weights[k + 1] * ((k + 1) as f64 / (n - k) as f64 / odds);
        }
        let total = weights.iter().sum();
        Self { weights, total }
    }

    /// Pr[X = k].
    pub fn at(&self, k: usize) -> f64 {
        self.weights[k] / self.total
    }

    /// Pr[X ≥ k].
    pub fn from(&self, k: usize) -> f64 {
        self.weights[k..].iter().sum::<f64>() / self.total
    }

    /// Pr[X ≤ k].
    fn to(&self, k: usize) -> f64 {
        self.weights[..=k].iter().sum::<f64>() / self.total
    }
}

/// An interval that holds a probability with confidence 1 − p, or more.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// Clopper & Pearson (1934): all probabilities that neither tail refutes at p/2. `hits` of `n`.
///
/// # Errors
/// [`Error::Audit`] for no trials, more than 2²⁴, or more hits than trials; [`Error::Parameter`] for
/// a `p` outside (0, 0.5].
pub fn clopper_pearson(hits: u64, n: u64, p: f64) -> Result<Interval> {
    check_error_rate(p)?;
    if n == 0 || n > MOST || hits > n {
        return Err(Error::Audit(format!(
            "{hits} hits of {n} have no interval; expected from 1 to {MOST} trials and no more hits"
        )));
    }
    let k = hits as usize;
    let low = if hits == 0 { 0.0 } else { edge(|odds| Binomial::new(n, odds).from(k) < p / 2.0) };
    let high = if hits == n { 1.0 } else { edge(|odds| Binomial::new(n, odds).to(k) >= p / 2.0) };
    Ok(Interval { low, high })
}

/// The probability up to which `holds` of its odds.
fn edge(holds: impl Fn(f64) -> bool) -> f64 {
    // Log-odds ±40 are probabilities within 5·10⁻¹⁸ of 0 and 1.
    let log_odds = bisect((-40.0, 40.0), |x| holds(libm::exp(x)));
    1.0 / (1.0 + libm::exp(-log_odds))
}

/// The last point of a range for which a statement holds that is true up to some point; its start
/// if it holds nowhere.
pub(super) fn bisect((mut low, mut high): (f64, f64), holds: impl Fn(f64) -> bool) -> f64 {
    for _ in 0..64 {
        let middle = 0.5 * (low + high);
        if holds(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_are_sums_of_powers() {
        // n = 3, p = ¼: 27, 27, 9, 1 of 64.
        let three = Binomial::new(3, 1.0 / 3.0);
        for (k, count) in [27.0, 27.0, 9.0, 1.0].into_iter().enumerate() {
            assert!((three.at(k) - count / 64.0).abs() < 1e-15);
        }
        assert!((three.from(2) - 10.0 / 64.0).abs() < 1e-15);
        assert!((three.to(1) - 54.0 / 64.0).abs() < 1e-15);
        // All of 600 right: p⁶⁰⁰, to 600 roundings.
        let odds = 200f64.exp();
        let exact = (0.995f64).powi(600);
        assert!((Binomial::new(600, 199.0).from(600) / exact - 1.0).abs() < 1e-12);
        assert_eq!(Binomial::new(10, odds).from(10), 1.0);
    }

    #[test]
    fn the_interval_is_the_exact_one_at_its_ends() {
        // No hit of n: (p/2)^(1/n) is what is left.
        let none = clopper_pearson(0, 10, 0.05).unwrap();
        assert_eq!(none.low, 0.0);
        assert!((none.high - (1.0 - 0.025f64.powf(0.1))).abs() < 1e-12, "{none:?}");
        let all = clopper_pearson(10, 10, 0.05).unwrap();
        assert!((all.low - 0.025f64.powf(0.1)).abs() < 1e-12 && all.high == 1.0);
        // At each end its tail is p/2.
        let some = clopper_pearson(37, 500, 0.1).unwrap();
        let tails = |p: f64| Binomial::new(500, p / (1.0 - p));
        assert!((tails(some.low).from(37) - 0.05).abs() < 1e-11);
        assert!((tails(some.high).to(37) - 0.05).abs() < 1e-11);
    }

    #[test]
    fn counts_that_mean_nothing_are_refused() {
        assert!(clopper_pearson(0, 0, 0.05).is_err() && clopper_pearson(2, 1, 0.05).is_err());
        assert!(clopper_pearson(1, u64::MAX, 0.05).is_err());
        for p in [0.0, -1.0, 0.51, f64::NAN] {
            assert!(clopper_pearson(1, 2, p).is_err());
        }
    }
}
