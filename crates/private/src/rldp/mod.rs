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
    }
}
