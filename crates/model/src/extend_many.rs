//! One token for each of many sequences at once, so that the weights are read once for all.

use tercet_tensor::{Device, FEW_ROWS, Tape};

use crate::batch::Inputs;
use crate::cache::{Cache, LayerCache};
use crate::decoder::Site;
use crate::{Error, Model, Result};

impl Model {
    /// Appends one token to each of B sequences of any lengths; returns the logits after each,
    /// `[B, vocab]`, nothing for no sequences. Refused before anything changes: counts that
    /// differ, tokens outside the vocabulary, a full context (the error names the sequence),
    /// caches of other weights or of an earlier failure; a model on a GPU, which decodes many
    /// sequences in [`crate::slots::Slots`].
    ///
    /// A sequence's logits have the same bits whatever sequences stand beside it, those
    /// of [`Model::extend`]: products of few rows keep each row's own order of summation
    /// ([`FEW_ROWS`]; more sequences are taken in groups), everything else goes row by row, and
    /// each sequence attends to its own cache, the sequences in parallel.
    pub fn extend_many(&self, caches: &mut [&mut Cache], tokens: &[i32]) -> Result<Vec<f32>> {
        if caches.len() != tokens.len() {
            return Err(Error::Batch(format!(
                "{} tokens for {} sequences; each takes one",
                tokens.len(),
                caches.len()
            )));
        }
        if caches.is_empty() {
            return Ok(Vec::new());
        }
        let held: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
        Inputs::one_each(self.config(), &Device::Cpu, tokens, &held)?;
        for (i, cache) in caches.iter().enumerate() {
            let named = |error| match error {
                Error::Batch(text) => Error::Batch(format!("sequence {i}: {text}")),
                other => other,
            };
            self.check_cache(cache).map_err(named)?;
        }
        if self.device() != Device::Cpu {
            return Err(Error::Batch(
                "on a GPU caches of one sequence are not decoded together; use slots".into(),
            ));
        }
        caches.iter_mut().for_each(|cache| cache.broken = true);
        let group = tokens.len().div_ceil(tokens.len().div_ceil(FEW_ROWS));
        // One entry into the thread pool for the whole step, as in `extend`.
        let logits = rayon::scope(|_| -> Result<Vec<f32>> {
            let mut logits = Vec::with_capacity(tokens.len() * self.config().vocab_size);
            for (caches, tokens) in caches.chunks_mut(group).zip(tokens.chunks(group)) {
                logits.extend(self.one_each(caches, tokens)?);
            }
            Ok(logits)
        })?;
        for cache in caches {
            cache.len += 1;
            cache.broken = false;
        }
        Ok(logits)
    }

    /// The tokens' way through all layers: logits `[B, vocab]`.
    fn one_each(&self, caches: &mut [&mut Cache], tokens: &[i32]) -> Result<Vec<f32>> {
        let held: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
        let inputs = Inputs::one_each(self.config(), &self.device(), tokens, &held)?;
        let tape = &mut Tape::inference();
        let mut x = self.embed(tape, &inputs)?;
        for layer in 0..self.config().num_hidden_layers {
            let mut own: Vec<&mut LayerCache> =
                caches.iter_mut().map(|cache| &mut cache.layers[layer]).collect();
            let caches = &mut own[..];
            let site =
                Site { layer, inputs: &inputs, caches, sequence: 0, dropout: None, step: None };
            x = self.layer(tape, &x, site)?.swap_remove(0);
        }
        let hidden = self.norm(tape, &self.slots.norm, &x)?;
        Ok(self.head(tape, &hidden)?.to_vec_f32()?)
    }
}
