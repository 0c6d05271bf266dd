//! One optimizer step: a task's gradient, guard, clip, update.

use std::borrow::Cow;
use std::sync::atomic::AtomicBool;

use tercet_model::Model;
use tercet_tensor::{AdamW, AdamWConfig, AdamWState, Grads, clip};

use crate::config::TrainConfig;
use crate::error::Result;
use crate::guard::{Guard, Verdict};
use crate::run::{Measured, Task};

/// A model and what changes it.
pub struct Trainer {
    /// Shape and weights.
    pub model: Model,
    /// Watches loss and gradient norm.
    pub guard: Guard,
    optimizer: AdamW,
    grads: Grads,
}

/// What a step came to.
#[derive(Debug)]
pub struct Outcome {
    /// What the task says of it, `place` completed.
    pub measured: Measured,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// What the guard said.
    pub verdict: Verdict,
}

impl Trainer {
    /// A trainer with a fresh optimizer, or one that goes on from `state`.
    pub fn new(
        model: Model,
        state: Option<AdamWState>,
        guard: Guard,
        train: &TrainConfig,
    ) -> Result<Self> {
        let config = AdamWConfig {
            beta1: train.betas[0],
            beta2: train.betas[1],
            eps: train.eps,
            weight_decay: train.weight_decay,
        };
        let params = model.trained();
        let decayed: Vec<bool> = params.specs().iter().map(|spec| spec.decays()).collect();
        let optimizer = match state {
            None => AdamW::new(config, params.tensors(), &decayed)?,
            Some(state) => AdamW::restore(config, params.tensors(), &decayed, state)?,
        };
        let grads = Grads::new(params.len());
        Ok(Self { model, guard, optimizer, grads })
    }

    /// The optimizer's state, in main memory.
    pub fn optimizer(&self) -> Result<Cow<'_, AdamWState>> {
        Ok(self.optimizer.snapshot()?)
    }

    /// Trains on a task's step. `None` when `stop` was raised on the way: nothing has changed then.
    pub fn step(
        &mut self,
        task: &mut dyn Task,
        step: u64,
        train: &TrainConfig,
        lr: f64,
        stop: &AtomicBool,
    ) -> Result<Option<Outcome>> {
        self.grads.zero();
        let Some(mut measured) = task.step(&self.model, step, &mut self.grads, stop)? else {
            return Ok(None);
        };
        let grad_norm = clip::global_norm(&self.grads)?;
        if !grad_norm.is_finite() && measured.place.is_none() {
            measured.place = Some(self.wild_gradient()?);
        }
        let (patience, z) = (train.nan_patience, train.outlier_z);
        let verdict = self.guard.judge(measured.loss, grad_norm, patience, z);
        if matches!(verdict, Verdict::Fine | Verdict::Outlier { .. }) {
            let factor = match train.clip {
                0.0 => 1.0,
                most => clip::clip_factor(grad_norm, most),
            };
            let params = self.model.trained_mut().tensors_mut();
            self.optimizer.step(params, &self.grads, lr, factor)?;
        }
        Ok(Some(Outcome { measured, grad_norm, verdict }))
    }

    /// The first parameter whose gradient is not finite.
    fn wild_gradient(&self) -> Result<String> {
        for (slot, gradient) in self.grads.iter().enumerate() {
            if let Some(gradient) = gradient
                && let Some(value) = gradient.to_vec_f32()?.iter().find(|value| !value.is_finite())
            {
                let name = self.model.trained().name(slot);
                return Ok(format!("gradient {value} of {name}"));
            }
        }
        Ok("the norm of the gradients overflows".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RunConfig;
    use crate::config::FromData;
    use std::sync::atomic::Ordering;
    use tercet_model::{Batch, ForwardOptions};
    use tercet_tensor::{DType, Tape};

    /// Counts: 0 1 2 …
    struct Counting;

    impl Task for Counting {
        fn step(
            &mut self,
            model: &Model,
            _: u64,
            grads: &mut Grads,
            stop: &AtomicBool,
        ) -> Result<Option<Measured>> {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let batch = Batch {
                input_ids: (0..8).collect(),
                targets: (1..9).collect(),
                cu_seqlens: vec![0, 8],
            };
            let mut tape = Tape::recording();
            let parts = model.forward_loss(&mut tape, &batch, &ForwardOptions::default())?;
            tape.backward(&parts.loss, grads)?;
            let loss = f64::from(parts.loss.value().item()?);
            Ok(Some(Measured { loss: Some(loss), tokens: 8, ..Measured::default() }))
        }

        fn evaluate(&mut self, _: &Model) -> Result<Option<Measured>> {
            Ok(None)
        }

        fn position(&self, step: u64) -> u64 {
            8 * step
        }
    }

    fn bits(trainer: &Trainer) -> Vec<Vec<u32>> {
        let of = |t: &tercet_tensor::Tensor| -> Vec<u32> {
            t.as_f32().unwrap().iter().map(|x| x.to_bits()).collect()
        };
        trainer.model.params().tensors().iter().map(of).collect()
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing_and_the_next_good_one_does() {
        let text = "output = 'x'\n[model]\nhidden_size = 16\nnum_hidden_layers = 1\n\
                    num_attention_heads = 2\n[data]\nvocab_size = 300\ncontext = 8\n\
                    [train]\nsteps = 9\nbatch_tokens = 16\naccumulation = 2\n";
        let config = RunConfig::parse(text, &[]).unwrap();
        let data = FromData { vocab_size: 300, context: 8, bos: 0, eos: 0 };
        let model = Model::new(config.model.config(&data).unwrap(), 1, DType::F32).unwrap();
        let mut trainer = Trainer::new(model, None, Guard::default(), &config.train).unwrap();
        let stop = AtomicBool::new(false);
        let task = &mut Counting;
        let slot = trainer.model.params().slot("model.norm.weight").unwrap();
        let poison = |trainer: &mut Trainer, value: f32| {
            let tensors = trainer.model.params_mut().tensors_mut();
            tensors[slot].as_f32_mut().unwrap()[0] = value;
        };
        poison(&mut trainer, f32::NAN);
        let before = bits(&trainer);
        let outcome = trainer.step(task, 0, &config.train, 0.1, &stop).unwrap().unwrap();
        assert_eq!(outcome.verdict, Verdict::Skip);
        assert!(outcome.measured.place.unwrap().starts_with("gradient NaN of model."));
        assert!(bits(&trainer) == before && trainer.optimizer().unwrap().step == 0);

        poison(&mut trainer, 1.0);
        let before = bits(&trainer);
        stop.store(true, Ordering::Relaxed);
        assert!(trainer.step(task, 0, &config.train, 0.1, &stop).unwrap().is_none());
        assert!(bits(&trainer) == before);
        stop.store(false, Ordering::Relaxed);
        let outcome = trainer.step(task, 0, &config.train, 0.1, &stop).unwrap().unwrap();
        assert_eq!((outcome.verdict, outcome.measured.place), (Verdict::Fine, None));
        assert!(bits(&trainer) != before && trainer.optimizer().unwrap().step == 1);
    }
}
