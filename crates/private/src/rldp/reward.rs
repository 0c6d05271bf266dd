//! What a decision is paid: utility gained, per unit of privacy spent for it.

use super::positive;
use crate::{Error, Result};

/// `log1p(max(ΔU/(Δρ + η), −0.9))`, with `gain` ΔU the drop of a released (or public) loss in nats
/// and `spent` Δρ the Rényi divergence of the steps since the last decision at one order. `eta`
/// keeps steps that cost next to nothing from being paid without bound; like all scales it is fixed
/// before the run.
///
/// # Errors
/// [`Error::Step`] for a gain that is not finite, a negative or not finite `spent`;
/// [`Error::Parameter`] for an `eta` that is not above 0 and finite.
pub fn reward(gain: f64, spent: f64, eta: f64) -> Result<f32> {
    if !gain.is_finite() || !(0.0..f64::INFINITY).contains(&spent) {
        return Err(Error::Step(format!("a gain of {gain} for {spent} of privacy has no reward")));
    }
    // A quotient of finite numbers may still overflow; no gain is worth more than what f64 holds.
    let paid = (gain / (spent + positive("eta", eta)?)).clamp(-0.9, f64::MAX);
    Ok(libm::log1p(paid) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_follow_the_formula_and_a_loss_costs_a_bounded_amount() {
        // log1p(0.02/(0.01 + 0.01)) = log 2.
        assert!((reward(0.02, 0.01, 0.01).unwrap() - std::f32::consts::LN_2).abs() < 1e-7);
        assert_eq!(reward(0.0, 1.0, 0.1).unwrap(), 0.0);
        let worst = reward(-1e300, 0.0, 1e-3).unwrap();
        assert!((worst - 0.1f32.ln()).abs() < 1e-6);
        assert!(reward(1e300, 0.0, 1e-300).unwrap().is_finite());
        // The same gain is worth more when it cost less.
        assert!(reward(0.1, 0.1, 0.1).unwrap() > reward(0.1, 0.2, 0.1).unwrap());
        for (gain, spent, eta) in [(f64::NAN, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 0.0)] {
            assert!(reward(gain, spent, eta).is_err());
        }
        assert!(reward(1.0, f64::INFINITY, 1.0).is_err() && reward(1.0, 1.0, f64::NAN).is_err());
    }
}
