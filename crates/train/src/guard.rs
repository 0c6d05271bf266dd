//! Watches the numbers of every step: nothing that is not finite reaches the weights, and what
//! is far out of the ordinary is noted.

use serde::{Deserialize, Serialize};

/// Steps the mean and deviation are taken over.
pub const WINDOW: usize = 128;
/// Values before the first judgement; with fewer, a deviation says little.
const LEAST: usize = 16;

/// The last [`WINDOW`] values of a quantity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Oldest first, as IEEE bits: a checkpoint must give back the same numbers.
    bits: Vec<u64>,
}

impl History {
    /// How many standard deviations `value` lies above the mean of the window, which it then
    /// joins. `None` while the window is short or does not vary.
    pub fn z_score(&mut self, value: f64) -> Option<f64> {
        let values = self.bits.iter().map(|&bits| f64::from_bits(bits));
        let count = self.bits.len();
        let mean = values.clone().sum::<f64>() / count as f64;
        let variance = values.map(|v| (v - mean).powi(2)).sum::<f64>() / count as f64;
        if count == WINDOW {
            self.bits.remove(0);
        }
        self.bits.push(value.to_bits());
        (count >= LEAST && variance > 0.0).then(|| (value - mean) / variance.sqrt())
    }
}

/// What the guard says of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Update the weights.
    Fine,
    /// Update the weights; one of the two is an outlier.
    Outlier {
        /// Deviations of the loss above its mean, when it is an outlier.
        loss_z: Option<f64>,
        /// Deviations of the gradient norm above its mean, when it is an outlier.
        grad_norm_z: Option<f64>,
    },
    /// Loss or gradient is not finite: leave the weights alone.
    Skip,
    /// As `Skip`, and the patience is used up.
    Stop,
}

/// Judges loss and gradient norm of each step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    loss: History,
    grad_norm: History,
    /// Steps skipped since the last good one.
    pub skipped_in_a_row: usize,
    /// Steps skipped in the whole run.
    pub skipped: u64,
}

impl Guard {
    /// Looks at a step, whose loss may not be told. `patience` skipped steps in a row stop the run; an outlier lies more than
    /// `outlier_z` deviations above the mean (0: nothing is an outlier).
    pub fn judge(
        &mut self,
        loss: Option<f64>,
        grad_norm: f64,
        patience: usize,
        outlier_z: f64,
    ) -> Verdict {
        if loss.is_some_and(|loss| !loss.is_finite()) || !grad_norm.is_finite() {
            self.skipped_in_a_row += 1;
            self.skipped += 1;
            return if self.skipped_in_a_row >= patience { Verdict::Stop } else { Verdict::Skip };
        }
        self.skipped_in_a_row = 0;
        let far = |z: &f64| outlier_z > 0.0 && *z > outlier_z;
        let loss_z = loss.and_then(|loss| self.loss.z_score(loss)).filter(far);
        let grad_norm_z = self.grad_norm.z_score(grad_norm).filter(far);
        if loss_z.is_some() || grad_norm_z.is_some() {
            Verdict::Outlier { loss_z, grad_norm_z }
        } else {
            Verdict::Fine
        }
    }
}
