//! What the controller sees. Everything here has left the mechanism already, with its noise, or
//! never was about a person.

use serde::{Deserialize, Serialize};

use super::mlp::are_numbers;
use crate::{Error, Result};

/// Released and free values since the last decision. Raw losses, raw norms, how many persons a step
/// really had: none of it has a place here, and nothing of the kind may be put into one.
#[derive(Clone, Debug, PartialEq)]
pub struct Released {
    /// Mean clipped loss in nats: the noised sum over the *expected* batch, or that of public text.
    pub loss: f64,
    /// The same, less that of the decision before (0 at the first).
    pub loss_change: f64,
    /// Cosine of the released gradient with the mean of those before it.
    pub cosine: f64,
    /// Noise multiplier over the nominal one.
    pub sigma_ratio: f64,
    /// Steps done over steps planned.
    pub progress: f64,
    /// Share of the privacy budget that is spent.
    pub spent: f64,
    /// Rényi divergence of the steps since the last decision, at one order fixed before the run:
    /// what the reward divides by, and no part of the state.
    pub cost: f64,
    /// By adapter, in one order for the whole run.
    pub adapters: Vec<Adapter>,
}

/// Released and free values of one adapter (or whatever has a threshold of its own).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adapter {
    /// Fraction of gradients below the threshold, by noised counts; noise may carry it out of [0, 1].
    pub below: f64,
    /// `|g̃|² − d·s²` over C²: the released gradient's squared norm without what noise adds on
    /// average; may be negative.
    pub signal: f64,
    /// Threshold C.
    pub threshold: f64,
}

impl Released {
    /// How many numbers [`Self::vector`] has.
    pub fn width(adapters: usize) -> usize {
        6 + 3 * adapters
    }

    /// The state: the six scalars in their order here, then three numbers an adapter. Ratios and
    /// thresholds are logarithms, the signal is taken by asinh.
    ///
    /// # Errors
    /// [`Error::Step`] when a value is not finite, or a ratio or threshold not above 0.
    pub fn vector(&self) -> Result<Vec<f32>> {
        let Self { loss, loss_change, cosine, sigma_ratio, progress, spent, .. } = *self;
        let scalars = [loss, loss_change, cosine, libm::log(sigma_ratio), progress, spent];
        let adapters = self.adapters.iter().flat_map(|adapter| {
            [adapter.below, libm::asinh(adapter.signal), libm::log(adapter.threshold)]
        });
        let state: Vec<f32> = scalars.into_iter().chain(adapters).map(|v| v as f32).collect();
        if are_numbers(&state, state.len()) {
            return Ok(state);
        }
        Err(Error::Step(format!("the controller's state is not of finite numbers: {state:?}")))
    }
}

/// Mean and variance of each coordinate so far (Welford 1962).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Normaliser {
    seen: u64,
    mean: Vec<f64>,
    /// Sum of squared deviations.
    spread: Vec<f64>,
}

/// Normalised coordinates end here.
const WALL: f64 = 10.0;

impl Normaliser {
    pub fn new(dim: usize) -> Self {
        Self { seen: 0, mean: vec![0.0; dim], spread: vec![0.0; dim] }
    }

    /// Takes `state` into account and returns it normalised: `(x − mean)/√(variance + 1e-8)` within
    /// ±10, so the first is 0.
    pub fn normalise(&mut self, state: &[f32]) -> Vec<f32> {
        self.seen += 1;
        let count = self.seen as f64;
        let mut out = Vec::with_capacity(state.len());
        for ((&x, mean), spread) in state.iter().zip(&mut self.mean).zip(&mut self.spread) {
            let x = f64::from(x);
            let off = x - *mean;
            *mean += off / count;
            *spread += off * (x - *mean);
            let normal = (x - *mean) / (*spread / count + 1e-8).sqrt();
            out.push(normal.clamp(-WALL, WALL) as f32);
        }
        out
    }

    /// Whether it can have seen `seen` states of `dim` numbers.
    pub fn is_like(&self, dim: usize, seen: u64) -> bool {
        self.seen == seen
            && seen < 1 << 40
            && (self.mean.len(), self.spread.len()) == (dim, dim)
            && self.mean.iter().all(|mean| mean.abs() <= f32::MAX.into())
            && self.spread.iter().all(|spread| (0.0..1e300).contains(spread))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released() -> Released {
        let adapter = Adapter { below: 0.6, signal: -3.0, threshold: 0.1 };
        Released {
            loss: 2.5,
            loss_change: -0.1,
            cosine: 0.2,
            sigma_ratio: 1.0,
            progress: 0.5,
            spent: 0.4,
            cost: 0.1,
            adapters: vec![adapter; 3],
        }
    }

    #[test]
    fn a_state_has_its_width_and_refuses_what_is_not_finite() {
        let state = released().vector().unwrap();
        assert_eq!(state.len(), Released::width(3));
        assert_eq!(&state[..6], &[2.5, -0.1, 0.2, 0.0, 0.5, 0.4]);
        assert!((f64::from(state[8]) - 0.1f64.ln()).abs() < 1e-6);
        let spoilt: [fn(&mut Released); 5] = [
            |s| s.loss = f64::NAN,
            |s| s.sigma_ratio = 0.0,
            |s| s.adapters[1].threshold = -1.0,
            |s| s.adapters[2].signal = f64::INFINITY,
            |s| s.loss_change = 1e300,
        ];
        for spoil in spoilt {
            let mut state = released();
            spoil(&mut state);
            assert!(state.vector().is_err(), "{state:?}");
        }
    }

    #[test]
    fn normalised_states_have_mean_0_and_variance_1() {
        let mut normaliser = Normaliser::new(2);
        let states: Vec<[f32; 2]> =
            (0..1000).map(|i| [5.0 + (i as f32).sin(), 1e-3 * (i as f32).cos()]).collect();
        assert_eq!(normaliser.normalise(&states[0]), [0.0, 0.0]);
        states[1..].iter().for_each(|state| drop(normaliser.normalise(state)));
        for i in 0..2 {
            // In two passes.
            let values: Vec<f64> = states.iter().map(|s| f64::from(s[i])).collect();
            let mean = values.iter().sum::<f64>() / 1000.0;
            let spread: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
            assert!((normaliser.mean[i] - mean).abs() < 1e-12);
            assert!((normaliser.spread[i] / spread - 1.0).abs() < 1e-9);
        }
        // The largest numbers there are do not spoil it.
        let far = normaliser.normalise(&[f32::MAX, f32::MIN]);
        assert!(far.iter().all(|v| v.is_finite()));
        assert!(normaliser.normalise(&[0.0, 0.0]).iter().all(|v| v.is_finite()));
    }
}
