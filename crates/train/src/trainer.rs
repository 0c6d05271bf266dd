//! One optimizer step: forward and backward over the parts of a batch, guard, clip, update.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

use tercet_model::{Batch, ForwardOptions, Model};
use tercet_tensor::{AdamW, AdamWConfig, AdamWState, Grads, Tape, clip};

use crate::config::TrainConfig;
use crate::error::Result;
use crate::guard::{Guard, Verdict};

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
    /// Mean cross-entropy in nats per token.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// What the guard said.
    pub verdict: Verdict,
    /// Where the first number that is not finite was found, if there is one.
    pub place: Option<String>,
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
        let params = model.params();
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

    /// Trains on the `parts` of a batch, which have equally many targets. `None` when `stop` was
    /// raised on the way: nothing has changed then.
    pub fn step(
        &mut self,
        parts: &mut dyn FnMut(usize) -> Batch,
        train: &TrainConfig,
        lr: f64,
        stop: &AtomicBool,
    ) -> Result<Option<Outcome>> {
        let options = ForwardOptions { recompute: train.recompute };
        let share = 1.0 / train.accumulation as f64;
        let (mut loss, mut place) = (0.0, None);
        // Read when all parts are done: a GPU would have nothing to do while its loss is waited for.
        let mut losses_of_parts = Vec::with_capacity(train.accumulation);
        self.grads.zero();
        for part in 0..train.accumulation {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let batch = parts(part);
            let mut tape = Tape::recording();
            let losses = self.model.forward_loss(&mut tape, &batch, &options)?;
            tape.backward_scaled(&losses.loss, share as f32, &mut self.grads)?;
            losses_of_parts.push(losses.cross_entropy.value().clone());
        }
        for (part, part_loss) in losses_of_parts.iter().enumerate() {
            let part_loss = f64::from(part_loss.item()?);
            if !part_loss.is_finite() && place.is_none() {
                place = Some(format!("loss {part_loss} in part {} of the batch", part + 1));
            }
            loss += share * part_loss;
        }
        let grad_norm = clip::global_norm(&self.grads)?;
        if !grad_norm.is_finite() && place.is_none() {
            place = Some(self.wild_gradient()?);
        }
        let verdict = self.guard.judge(loss, grad_norm, train.nan_patience, train.outlier_z);
        if matches!(verdict, Verdict::Fine | Verdict::Outlier { .. }) {
            let factor = match train.clip {
                0.0 => 1.0,
                most => clip::clip_factor(grad_norm, most),
            };
            let params = self.model.params_mut().tensors_mut();
            self.optimizer.step(params, &self.grads, lr, factor)?;
        }
        Ok(Some(Outcome { loss, grad_norm, verdict, place }))
    }

    /// The first parameter whose gradient is not finite.
    fn wild_gradient(&self) -> Result<String> {
        for (slot, gradient) in self.grads.iter().enumerate() {
            if let Some(gradient) = gradient
                && let Some(value) = gradient.to_vec_f32()?.iter().find(|value| !value.is_finite())
            {
                let name = self.model.params().name(slot);
                return Ok(format!("gradient {value} of {name}"));
            }
        }
        Ok("the norm of the gradients overflows".into())
    }

    /// Mean cross-entropy over batches, in nats per token; each target counts the same.
    pub fn evaluate(&self, batches: &[Batch]) -> Result<f64> {
        let (mut sum, mut targets) = (0.0, 0usize);
        for batch in batches {
            let mut tape = Tape::inference();
            let losses = self.model.forward_loss(&mut tape, batch, &ForwardOptions::default())?;
            sum += f64::from(losses.cross_entropy.value().item()?) * batch.targets.len() as f64;
            targets += batch.targets.len();
        }
        Ok(sum / targets as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RunConfig;
    use crate::config::FromData;
    use tercet_tensor::DType;

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
        let mut batch = |part: usize| Batch {
            input_ids: (0..8).map(|i| i + part as i32).collect(),
            targets: (1..9).map(|i| i + part as i32).collect(),
            cu_seqlens: vec![0, 8],
        };
        let slot = trainer.model.params().slot("model.norm.weight").unwrap();
        let poison = |trainer: &mut Trainer, value: f32| {
            let tensors = trainer.model.params_mut().tensors_mut();
            tensors[slot].as_f32_mut().unwrap()[0] = value;
        };
        poison(&mut trainer, f32::NAN);
        let before = bits(&trainer);
        let outcome = trainer.step(&mut batch, &config.train, 0.1, &stop).unwrap().unwrap();
        assert_eq!(outcome.verdict, Verdict::Skip);
        assert_eq!(outcome.place.as_deref(), Some("loss NaN in part 1 of the batch"));
        assert!(bits(&trainer) == before && trainer.optimizer().unwrap().step == 0);

        poison(&mut trainer, 1.0);
        let before = bits(&trainer);
        stop.store(true, Ordering::Relaxed);
        assert!(trainer.step(&mut batch, &config.train, 0.1, &stop).unwrap().is_none());
        assert!(bits(&trainer) == before);
        stop.store(false, Ordering::Relaxed);
        let outcome = trainer.step(&mut batch, &config.train, 0.1, &stop).unwrap().unwrap();
        assert_eq!((outcome.verdict, outcome.place), (Verdict::Fine, None));
        assert!(bits(&trainer) != before && trainer.optimizer().unwrap().step == 1);
    }
}
