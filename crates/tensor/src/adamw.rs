//! AdamW with f32 master weights.

use crate::{Grads, Result, Tensor};

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment, β₁.
    pub beta1: f32,
    /// Decay of the second moment, β₂.
    pub beta2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f32,
}

/// What the optimizer knows of one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotState {
    /// First moment.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
    /// The f32 weights behind bf16 parameters; `None` for f32 parameters.
    pub master: Option<Vec<f32>>,
}

/// Everything a checkpoint must hold to go on with the same bits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdamWState {
    /// Steps made.
    pub step: u64,
    /// One per parameter.
    pub slots: Vec<SlotState>,
}

/// The optimizer.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    decayed: Vec<bool>,
    state: AdamWState,
}

impl AdamW {
    /// A fresh optimizer for `params`; `decayed[slot]` says which ones decay (matrices, usually
    /// not norms and biases).
    pub fn new(config: AdamWConfig, params: &[Tensor], decayed: &[bool]) -> Result<Self> {
        let _ = (config, params, decayed);
        todo!()
    }

    /// An optimizer that goes on from `state`.
    pub fn restore(
        config: AdamWConfig,
        params: &[Tensor],
        decayed: &[bool],
        state: AdamWState,
    ) -> Result<Self> {
        let _ = (config, params, decayed, state);
        todo!()
    }

    /// The state, for a checkpoint.
    pub fn state(&self) -> &AdamWState {
        &self.state
    }

    /// One step at learning rate `lr` with gradients multiplied by `grad_scale` (the clipping
    /// factor). Parameters without a gradient are left alone. Storage that something else
    /// shares is copied first, so drop the tape before.
    pub fn step(
        &mut self,
        params: &mut [Tensor],
        grads: &Grads,
        lr: f32,
        grad_scale: f32,
    ) -> Result<()> {
        let _ = (params, grads, lr, grad_scale, &self.config, &self.decayed);
        todo!()
    }
}
