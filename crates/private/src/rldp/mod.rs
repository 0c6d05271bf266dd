//! The controller of RLDP (arXiv 2507.22565): a Soft Actor-Critic that moves clipping thresholds,
//! and in an adaptive run the noise, while the model trains.
//!
//! | room | what it does |
//! |---|---|
//! | [`state`] | what the controller sees, all of it released already |
//! | [`reward`] | what it is paid: utility for privacy |
//! | [`agent`] | Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905) |
//!
//! It is post-processing: a pure function of a seed and of released values, so that it costs
//! nothing and its checkpoint may be published. What it chooses may change thresholds and the
//! noise's division among adapters under a fixed σ_eff; where it also moves σ the run must account
//! with [`crate::accounting::rdp_filter`].
//!
//! A run makes some tens of decisions, far fewer than such a policy needs to be learnt well: a gain
//! counts only beside random actions in the same box.

pub mod agent;
mod mlp;
mod policy;
mod random;
mod replay;
pub mod reward;
pub mod state;

pub use agent::Agent;

use crate::{Error, Result};

/// No threshold is moved below.
pub const LEAST_THRESHOLD: f64 = 1e-3;
/// No threshold is moved above.
pub const MOST_THRESHOLD: f64 = 10.0;

/// Thresholds after an action: `log C_g += 0.3·a_g`, within [1e-3, 10]. `action` has a number of
/// [−1, 1] for each.
///
/// # Errors
/// [`Error::Step`] for another number of them or a number outside; [`Error::Parameter`] for a
/// threshold that is not above 0 and finite.
pub fn thresholds(current: &[f64], action: &[f32]) -> Result<Vec<f64>> {
    if current.len() != action.len() {
        let (c, a) = (current.len(), action.len());
        return Err(Error::Step(format!("{c} thresholds cannot be moved by {a} actions")));
    }
    let moved = |(&bound, &action): (&f64, &f32)| {
        let moved = libm::log(positive("bound", bound)?) + 0.3 * inside(action)?;
        Ok(libm::exp(moved).clamp(LEAST_THRESHOLD, MOST_THRESHOLD))
    };
    current.iter().zip(action).map(moved).collect()
}

/// Shares of the budget after an action: `log w_g += 0.3·a_g`, within a tenth and ten times of the
/// even share, then to a sum of 1. Whatever they are, the noise of [`Split::Weights`] has the σ_eff
/// it is asked for: they say where the noise goes, not how much of it there is.
///
/// # Errors
/// As [`thresholds`].
///
/// [`Split::Weights`]: crate::mechanism::noise::Split::Weights
pub fn shares(current: &[f64], action: &[f32]) -> Result<Vec<f64>> {
    if current.len() != action.len() {
        let (c, a) = (current.len(), action.len());
        return Err(Error::Step(format!("{c} shares cannot be moved by {a} actions")));
    }
    let even = 1.0 / current.len() as f64;
    let moved = |(&share, &action): (&f64, &f32)| {
        let moved = libm::log(positive("share", share)?) + 0.3 * inside(action)?;
        Ok(libm::exp(moved).clamp(0.1 * even, 10.0 * even))
    };
    let mut moved: Vec<f64> = current.iter().zip(action).map(moved).collect::<Result<_>>()?;
    let sum: f64 = moved.iter().sum();
    moved.iter_mut().for_each(|share| *share /= sum);
    Ok(moved)
}

/// The noise multiplier that an action of [−1, 1] stands for: `exp(log σ_nom + 0.25·a)`, within
/// [0.7, 2]·σ_nom.
///
/// # Errors
/// [`Error::Step`] for an action outside, [`Error::Parameter`] for a `nominal` that is not above 0
/// and finite.
pub fn sigma(nominal: f64, action: f32) -> Result<f64> {
    positive("sigma", nominal)?;
    // The box is a promise to the filter; one action alone does not reach its walls.
    Ok((nominal * libm::exp(0.25 * inside(action)?)).clamp(0.7 * nominal, 2.0 * nominal))
}

fn positive(name: &'static str, value: f64) -> Result<f64> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(Error::parameter(name, value, "it must be above 0 and finite"))
}

fn inside(action: f32) -> Result<f64> {
    if (-1.0..=1.0).contains(&action) {
        return Ok(action.into());
    }
    Err(Error::Step(format!("an action of {action} is outside [-1, 1]")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::noise::{Split, effective_sigma};
    use proptest::prelude::*;

    #[test]
    fn actions_move_thresholds_by_a_factor_within_the_box() {
        let moved = thresholds(&[0.1, 0.1, 9.9, 1.001e-3], &[1.0, 0.0, 1.0, -1.0]).unwrap();
        let expected = [0.1 * 0.3f64.exp(), 0.1, MOST_THRESHOLD, LEAST_THRESHOLD];
        for (moved, expected) in moved.iter().zip(expected) {
            assert!((moved / expected - 1.0).abs() < 1e-14, "{moved} {expected}");
        }
        assert!((sigma(0.8, -1.0).unwrap() / (0.8 * (-0.25f64).exp()) - 1.0).abs() < 1e-14);
        assert!(thresholds(&[1.0], &[]).is_err() && thresholds(&[1.0], &[1.1]).is_err());
        assert!(thresholds(&[f64::NAN], &[0.0]).is_err() && thresholds(&[0.0], &[0.0]).is_err());
        assert!(sigma(0.0, 0.0).is_err() && sigma(1.0, f32::NAN).is_err());
        assert!(shares(&[1.0], &[]).is_err() && shares(&[0.5, 0.5], &[0.0, -1.1]).is_err());
    }

    proptest! {
        /// Whatever a policy does, for however long: the mechanism's multiplier is σ, not below it.
        #[test]
        fn shares_that_actions_can_reach_leave_sigma_as_it_is(
            actions in prop::collection::vec(prop::collection::vec(-1.0f32..=1.0, 5), 1..60),
            bounds in prop::collection::vec(LEAST_THRESHOLD..=MOST_THRESHOLD, 5),
            sigma in 0.3f64..20.0,
        ) {
            let (mut current, dims) = (vec![0.2; 5], [9216, 6144, 1, 40, 100_000]);
            for action in &actions {
                current = shares(&current, action).unwrap();
                prop_assert!((current.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                // A tenth of the even share over a sum of ten times the others, at the worst.
                prop_assert!(current.iter().all(|share| (0.02 / 50.0..=1.0).contains(share)));
                let scales = Split::Weights(current.clone()).scales(sigma, &bounds, &dims).unwrap();
                let found = effective_sigma(&bounds, &scales);
                prop_assert!((sigma..sigma * (1.0 + 1e-12)).contains(&found), "{found}");
            }
        }
    }
}
