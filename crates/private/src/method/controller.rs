//! What a controller sees and what it may do: the seam between a run and whatever decides.

use super::random_action::RandomAction;
use super::state::{Reader, State};
use crate::{Error, Result};

/// No threshold is moved below.
pub const LEAST_THRESHOLD: f64 = 1e-3;
/// No threshold is moved above.
pub const MOST_THRESHOLD: f64 = 10.0;

/// Released and free values since the last decision. Raw losses, raw norms, how many persons a step
/// really had: none of it has a place here.
#[derive(Clone, Debug, PartialEq)]
pub struct Released {
    /// Mean clipped loss in nats: the noised sum over the expected batch.
    pub loss: f64,
    /// The same, less that of the decision before; 0 at the first.
    pub loss_change: f64,
    /// Cosine of the released gradient with the mean of those before it.
    pub cosine: f64,
    /// Noise multiplier over the nominal one.
    pub sigma_ratio: f64,
    /// Steps done over steps planned.
    pub progress: f64,
    /// Share of the privacy budget that is spent.
    pub spent: f64,
    /// Rényi divergence of the steps since the last decision, at one order fixed before the run.
    pub cost: f64,
    /// By block, in one order for the whole run.
    pub adapters: Vec<Adapter>,
}

/// Released and free values of one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adapter {
    /// Fraction of gradients below the threshold, by noisy counts; noise may carry it out of [0, 1].
    pub below: f64,
    /// `|g̃|² − d·s²` over C²: the released gradient's squared norm without what noise adds on
    /// average; may be negative.
    pub signal: f64,
    /// Threshold C.
    pub threshold: f64,
}

/// Whatever decides.
#[derive(Clone, Debug)]
pub enum Controller {
    /// Chance.
    Random(RandomAction),
}

impl Controller {
    /// `actions` numbers of [−1, 1]: one a threshold, and where σ moves as well one for it.
    pub fn decide(&mut self, _seen: &Released, actions: usize) -> Result<Vec<f32>> {
        match self {
            Self::Random(chance) => Ok(chance.decide(actions)),
        }
    }

    pub(super) fn write(&self, state: &mut State) {
        match self {
            Self::Random(chance) => state.numbers.push(chance.decisions() as f64),
        }
    }

    pub(super) fn read(&mut self, reader: &mut Reader) -> Result<()> {
        match self {
            Self::Random(chance) => chance.go_on(reader.number()? as u64),
        }
        Ok(())
    }
}

/// Thresholds after an action: `log C_g += 0.3·a_g`, within [10⁻³, 10].
///
/// # Errors
/// [`Error::Step`] for another number of them, or an action outside [−1, 1].
pub fn thresholds(current: &[f64], action: &[f32]) -> Result<Vec<f64>> {
    if current.len() != action.len() {
        let (c, a) = (current.len(), action.len());
        return Err(Error::Step(format!("{c} thresholds cannot be moved by {a} actions")));
    }
    let moved = |(&bound, &action): (&f64, &f32)| {
        let moved = bound * libm::exp(0.3 * inside(action)?);
        Ok(moved.clamp(LEAST_THRESHOLD, MOST_THRESHOLD))
    };
    current.iter().zip(action).map(moved).collect()
}

/// The noise multiplier that an action stands for: `σ_nom·exp(0.25·a)`, within [0.7, 2]·σ_nom.
///
/// # Errors
/// [`Error::Step`] for an action outside [−1, 1].
pub fn sigma(nominal: f64, action: f32) -> Result<f64> {
    Ok(nominal * libm::exp(0.25 * inside(action)?).clamp(0.7, 2.0))
}

fn inside(action: f32) -> Result<f64> {
    if (-1.0..=1.0).contains(&action) {
        return Ok(action.into());
    }
    Err(Error::Step(format!("an action is {action}, outside [-1, 1]")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_move_within_their_box() {
        let moved = thresholds(&[0.1, 10.0, 1e-3], &[1.0, 1.0, -1.0]).unwrap();
        assert!((moved[0] / (0.1 * 0.3f64.exp()) - 1.0).abs() < 1e-15);
        assert_eq!(moved[1..], [10.0, 1e-3]);
        assert!((sigma(2.0, 1.0).unwrap() / (2.0 * 0.25f64.exp()) - 1.0).abs() < 1e-15);
        assert!(sigma(2.0, -1.0).unwrap() >= 1.4);
        for bad in [1.5, f32::NAN, -f32::INFINITY] {
            assert!(thresholds(&[1.0], &[bad]).is_err() && sigma(1.0, bad).is_err());
        }
        assert!(thresholds(&[1.0], &[]).is_err());
    }
}
