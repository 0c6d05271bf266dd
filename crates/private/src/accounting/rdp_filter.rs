//! A privacy filter: the accountant for noise and rates that were chosen from past outputs.
//!
//! When σ_t (or q_t, or the moment to stop) depends on what was already released, the theorems of
//! fixed composition do not apply, and a PLD of the realised path is *not* a bound (arXiv
//! 2602.06756). What does hold (Feldman & Zrnic 2021; Lécuyer 2021): choose **one** Rényi order α
//! and a budget R before the first step, and take a step only while Σ ρ_t(α) stays within R. The
//! whole run is then (ε, δ)-DP for R = ε − log((α−1)/α) + (log δ + log α)/(α−1).

use super::{Phase, check_delta, check_epsilon, rdp};
use crate::{Error, Result};

/// Each step's ρ is counted this much larger, to cover the rounding of ρ and of the sum of up to
/// 10⁹ of them (compensated: Neumaier's sum errs by 2⁻⁵²).
const SLACK: f64 = 1e-10;

/// Stops a run before it would pass (ε, δ), whatever was chosen on the way.
#[derive(Clone, Debug)]
pub struct RdpFilter {
    order: f64,
    budget: f64,
    spent: f64,
    lost_bits: f64,
}

impl RdpFilter {
    /// A filter for (ε, δ) at one `order`, which must have been chosen before any private data was
    /// looked at; [`best_order`] chooses by a nominal plan.
    ///
    /// # Errors
    /// [`Error::Parameter`] for numbers out of range, or an order whose budget is not positive: no
    /// step at all would fit.
    pub fn new(epsilon: f64, delta: f64, order: f64) -> Result<Self> {
        let budget = budget(epsilon, delta, order)?;
        if budget <= 0.0 {
            let expected = "this Rényi order leaves no budget at the given epsilon and delta; \
                            take a larger order, or let one be chosen from a nominal plan";
            return Err(Error::parameter("order", order, expected));
        }
        Ok(Self { order, budget, spent: 0.0, lost_bits: 0.0 })
    }

    /// Counts one step if it fits, and says whether it did. After `false` nothing was counted and
    /// the step must not be taken; a later, cheaper step may still fit.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a σ or rate out of range; nothing was counted.
    pub fn try_step(&mut self, sigma: f64, rate: f64) -> Result<bool> {
        let rho = rdp::rho(sigma, rate, self.order)? * (1.0 + SLACK);
        let sum = self.spent + rho;
        // Neumaier: the bits that the addition lost.
        let lost = if self.spent >= rho { self.spent - sum + rho } else { rho - sum + self.spent };
        // Not "sum > budget": an infinite or undefined cost must not fit.
        let fits = sum + (self.lost_bits + lost) <= self.budget;
        if fits {
            self.spent = sum;
            self.lost_bits += lost;
        }
        Ok(fits)
    }

    /// The order α.
    pub fn order(&self) -> f64 {
        self.order
    }

    /// The budget R at that order.
    pub fn budget(&self) -> f64 {
        self.budget
    }

    /// Σ ρ of the steps taken.
    pub fn spent(&self) -> f64 {
        self.spent + self.lost_bits
    }
}

/// R(α) of (ε, δ); not positive when the order is too small for them.
///
/// # Errors
/// [`Error::Parameter`] for numbers out of range.
pub fn budget(epsilon: f64, delta: f64, order: f64) -> Result<f64> {
    check_epsilon(epsilon)?;
    check_delta(delta)?;
    rdp::check_order(order)?;
    let correction = (libm::log(delta) + libm::log(order)) / (order - 1.0);
    Ok(epsilon - libm::log1p(-1.0 / order) + correction)
}

/// The order among `orders` that lets most steps of a nominal plan (`sigma`, `rate`) through, and
/// how many. Ties go to the smallest order with a positive budget.
///
/// # Errors
/// [`Error::Parameter`] for numbers out of range, or when no order has a budget.
pub fn best_order(
    (epsilon, delta): (f64, f64),
    (sigma, rate): (f64, f64),
    orders: &[f64],
) -> Result<(f64, u64)> {
    let phase = Phase::new(sigma, rate, 1)?;
    let mut best: Option<(f64, u64)> = None;
    for &order in orders {
        let budget = budget(epsilon, delta, order)?;
        if budget <= 0.0 {
            continue;
        }
        let steps = (budget / (rdp::step(&phase, order) * (1.0 + SLACK))) as u64;
        if best.is_none_or(|(_, most)| steps > most) {
            best = Some((order, steps));
        }
    }
    best.ok_or_else(|| {
        let expected = "no Rényi order has a budget at so small an epsilon; raise epsilon or delta";
        Error::parameter("epsilon", epsilon, expected)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_lets_through_exactly_the_steps_that_fit() {
        let (order, most) =
            best_order((4.0, 1e-5), (0.5, 64.0 / 81412.0), &rdp::default_orders()).unwrap();
        let mut filter = RdpFilter::new(4.0, 1e-5, order).unwrap();
        let taken = (0..10_000).filter(|_| filter.try_step(0.5, 64.0 / 81412.0).unwrap()).count();
        assert_eq!(taken as u64, most);
        assert!(filter.spent() <= filter.budget());
        // A cheaper step still fits after a refusal; a nonsense one is refused and costs nothing.
        let spent = filter.spent();
        assert!(filter.try_step(f64::NAN, 0.5).is_err());
        assert!(!filter.try_step(1e-3, 1.0).unwrap());
        assert_eq!(filter.spent(), spent);
        assert!(filter.try_step(1e6, 1e-6).unwrap());
    }

    #[test]
    fn an_order_without_budget_is_refused() {
        assert!(RdpFilter::new(0.1, 1e-5, 2.0).is_err());
        assert!(best_order((0.0, 1e-9), (1.0, 0.1), &[2.0, 3.0]).is_err());
        assert!(RdpFilter::new(1.0, 1e-5, f64::NAN).is_err());
    }
}
