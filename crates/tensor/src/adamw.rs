//! AdamW (arXiv 1711.05101) with f32 master weights.
//!
//! `m = β₁m + (1−β₁)g`, `v = β₂v + (1−β₂)g²`, then
//! `w = w·(1 − lr·λ) − lr·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)`. Parameters stored as bf16 have f32
//! masters, and are their rounding.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use crate::cuda::adamw::Moments;
use crate::parallel::CHUNK;
use crate::simd::multiversion;
use crate::tensor::convert_slice;
use crate::{DType, Device, Error, Grads, Result, Tensor};

const OP: &str = "adamw";

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment, β₁, in `0..1`.
    pub beta1: f64,
    /// Decay of the second moment, β₂, in `0..1`.
    pub beta2: f64,
    /// Added to the denominator, ε.
    pub eps: f64,
    /// Decoupled weight decay per unit of learning rate, λ.
    pub weight_decay: f64,
}

/// What the optimizer knows of one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotState {
    /// First moment.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
    /// The f32 weights behind a bf16 parameter; `None` for f32.
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
    /// Of parameters on a device, the step alone.
    state: AdamWState,
    device: Option<Moments>,
}

impl AdamW {
    /// A fresh optimizer for `params`; `decayed[slot]` says which ones decay (matrices, usually
    /// not norms and biases).
    pub fn new(config: AdamWConfig, params: &[Tensor], decayed: &[bool]) -> Result<Self> {
        if let Device::Cuda(gpu) = device_of(params)? {
            check_settings(&config)?;
            check_counts(params, decayed.len(), params.len())?;
            let device = Some(Moments::fresh(&gpu, params)?);
            let state = AdamWState::default();
            return Ok(AdamW { config, decayed: decayed.to_vec(), state, device });
        }
        let slot = |p: &Tensor| {
            let master = match p.dtype() {
                DType::BF16 => Some(p.to_vec_f32()?),
                _ => None,
            };
            Ok(SlotState { m: vec![0.0; p.len()], v: vec![0.0; p.len()], master })
        };
        let slots = params.iter().map(slot).collect::<Result<_>>()?;
        Self::restore(config, params, decayed, AdamWState { step: 0, slots })
    }

    /// An optimizer that goes on from `state`, which must fit `params`.
    pub fn restore(
        config: AdamWConfig,
        params: &[Tensor],
        decayed: &[bool],
        state: AdamWState,
    ) -> Result<Self> {
        check_settings(&config)?;
        check_counts(params, decayed.len(), state.slots.len())?;
        for (i, (p, slot)) in params.iter().zip(&state.slots).enumerate() {
            let wanted = (p.dtype() == DType::BF16).then_some(p.len());
            let fits = slot.m.len() == p.len()
                && slot.v.len() == p.len()
                && slot.master.as_ref().map(Vec::len) == wanted;
            if !fits {
                let text = format!("the state of slot {i} does not fit {p:?}");
                return Err(Error::value(OP, text));
            }
        }
        let decayed = decayed.to_vec();
        match device_of(params)? {
            Device::Cpu => Ok(AdamW { config, decayed, state, device: None }),
            Device::Cuda(gpu) => {
                let AdamWState { step, slots } = state;
                let device = Some(Moments::upload(&gpu, params, slots)?);
                Ok(AdamW { config, decayed, state: AdamWState { step, slots: Vec::new() }, device })
            }
        }
    }

    /// The state in main memory. That of parameters on a device has its `slots` there:
    /// [`AdamW::snapshot`] fetches them.
    pub fn state(&self) -> &AdamWState {
        &self.state
    }

    /// The state, for a checkpoint; fetched when it is on a device.
    pub fn snapshot(&self) -> Result<Cow<'_, AdamWState>> {
        Ok(match &self.device {
            None => Cow::Borrowed(&self.state),
            Some(device) => {
                Cow::Owned(AdamWState { step: self.state.step, slots: device.download()? })
            }
        })
    }

    /// Elements of each parameter.
    fn lens(&self) -> Vec<usize> {
        match &self.device {
            None => self.state.slots.iter().map(|slot| slot.m.len()).collect(),
            Some(device) => device.lens().collect(),
        }
    }

    /// One step at learning rate `lr` with gradients multiplied by `grad_scale` (the clipping
    /// factor). Parameters without a gradient are left alone. Storage that something else
    /// shares is copied first, so drop the tape before.
    pub fn step(
        &mut self,
        params: &mut [Tensor],
        grads: &Grads,
        lr: f64,
        grad_scale: f32,
    ) -> Result<()> {
        let lens = self.lens();
        let slots = lens.len();
        if params.len() != slots || grads.len() != slots {
            let text =
                format!("{} parameters, {} gradients, {slots} states", params.len(), grads.len());
            return Err(Error::value(OP, text));
        }
        // All checks come before the first write, so that an error leaves everything as it was.
        let device = device_of(params)?;
        if matches!(device, Device::Cpu) != self.device.is_none() {
            let text = "the parameters have moved to another device since the optimizer was made";
            return Err(Error::value(OP, text));
        }
        for (i, (p, &len)) in params.iter().zip(&lens).enumerate() {
            let grad = grads.get(i);
            if grad.is_some_and(|g| g.shape() != p.shape()) || len != p.len() {
                let text = format!("slot {i}: {p:?} does not fit its gradient {grad:?} or state");
                return Err(Error::value(OP, text));
            }
            if let Some(grad) = grad
                && grad.device() != device
            {
                return Err(Error::device(OP, "a gradient", &device, &grad.device()));
            }
        }
        self.state.step += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        let corrected = |beta: f64| 1.0 - libm::pow(beta, self.state.step as f64);
        let keep = |decayed: bool| {
            let decay = if decayed { weight_decay } else { 0.0 };
            (1.0 - lr * decay) as f32
        };
        let rule = Rule {
            beta1: beta1 as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            keep: 1.0,
            rate: (lr / corrected(beta1)) as f32,
            root: (1.0 / corrected(beta2).sqrt()) as f32,
            eps: eps as f32,
            grad_scale,
        };
        if let Some(device) = &mut self.device {
            let keep: Vec<f32> = self.decayed.iter().map(|&decayed| keep(decayed)).collect();
            return device.step(params, grads, &rule, &keep);
        }
        for (i, (p, slot)) in params.iter_mut().zip(&mut self.state.slots).enumerate() {
            let Some(grad) = grads.get(i) else { continue };
            let rule = Rule { keep: keep(self.decayed[i]), ..rule };
            let grad = grad.as_f32()?;
            let SlotState { m, v, master } = slot;
            match master {
                None => rule.run(p.as_f32_mut()?, m, v, grad),
                Some(master) => {
                    rule.run(master, m, v, grad);
                    crate::parallel::map(p.as_bf16_mut()?, master, convert_slice::<f32, bf16>);
                }
            }
        }
        Ok(())
    }
}

/// Where all parameters live.
fn device_of(params: &[Tensor]) -> Result<Device> {
    let device = params.first().map_or(Device::Cpu, Tensor::device);
    for p in params {
        let got = p.device();
        if got != device {
            return Err(Error::device(OP, "a parameter", &device, &got));
        }
    }
    Ok(device)
}

fn check_settings(config: &AdamWConfig) -> Result<()> {
    let AdamWConfig { beta1, beta2, eps, weight_decay } = *config;
    for (name, value, fits) in [
        ("beta1", beta1, (0.0..1.0).contains(&beta1)),
        ("beta2", beta2, (0.0..1.0).contains(&beta2)),
        ("eps", eps, eps > 0.0 && eps.is_finite()),
        ("weight_decay", weight_decay, weight_decay >= 0.0 && weight_decay.is_finite()),
    ] {
        if !fits {
            let text = format!(
                "{name} = {value}; betas lie in 0..1, eps is positive, the decay not negative"
            );
            return Err(Error::value(OP, text));
        }
    }
    Ok(())
}

/// As many of everything as parameters, and none of integers.
fn check_counts(params: &[Tensor], decayed: usize, slots: usize) -> Result<()> {
    let count = params.len();
    if decayed != count || slots != count {
        let text = format!("{count} parameters, {decayed} decay flags, {slots} states");
        return Err(Error::value(OP, text));
    }
    match params.iter().find(|p| p.dtype() == DType::I32) {
        Some(p) => Err(Error::value(OP, format!("{p:?} is not a parameter"))),
        None => Ok(()),
    }
}

/// The numbers of one parameter's update.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) beta1: f32,
    pub(crate) rest1: f32,
    pub(crate) beta2: f32,
    pub(crate) rest2: f32,
    pub(crate) keep: f32,
    pub(crate) rate: f32,
    pub(crate) root: f32,
    pub(crate) eps: f32,
    pub(crate) grad_scale: f32,
}

impl Rule {
    fn run(self, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        w.par_chunks_mut(CHUNK)
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .zip(g.par_chunks(CHUNK))
            .for_each(|((w, (m, v)), g)| update(w, m, v, g, self));
    }
}

multiversion! {
    fn update(w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], rule: Rule) {
        for ((w, g), (m, v)) in w.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
            let g = g * rule.grad_scale;
            *m = rule.beta1 * *m + rule.rest1 * g;
            *v = rule.beta2 * *v + rule.rest2 * (g * g);
            *w = *w * rule.keep - rule.rate * *m / (v.sqrt() * rule.root + rule.eps);
        }
    }
}
