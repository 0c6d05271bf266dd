//! Log-probabilities of given tokens: what preference objectives are made of.

use std::sync::Arc;

use tercet_tensor::{Tape, log_sum_exp, ops};

use crate::batch::{Batch, Inputs};
use crate::decoder::ForwardOptions;
use crate::{Model, Result};

pub use tercet_tensor::ops::TokenLogProbs;

/// `ln p` of a token in the distribution of logits `[vocab]`.
pub(crate) fn log_prob(logits: &[f32], token: u32) -> f64 {
    f64::from(logits[token as usize]) - log_sum_exp(logits)
}

impl Model {
    /// `ln p` of each target of a batch, f32 `[T]`, 0 where none counts, with what describes the
    /// distribution it was taken from. Slots of the gradients are those of [`Model::trained`].
    /// Load-balance losses of experts are not part of it.
    pub fn token_log_probs<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &Batch,
        options: &ForwardOptions,
    ) -> Result<TokenLogProbs> {
        let Batch { input_ids, cu_seqlens, .. } = batch;
        let inputs = Arc::new(Inputs::new(self.config(), &self.device(), input_ids, cu_seqlens)?);
        let targets = self.targets(batch)?;
        let (hidden, _) = self.hidden(tape, &inputs, options)?;
        let head = self.param(tape, self.slots.head);
        Ok(ops::token_log_probs(tape, &hidden, &head, &targets)?)
    }
}
