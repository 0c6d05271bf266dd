//! The decoder: embedding → N × [norm, attention, norm, feed-forward] → norm → logits or loss.

use std::sync::Arc;

use tercet_tensor::{Tape, Tensor, Var, ops};

use crate::batch::{Batch, IGNORE, Inputs};
use crate::cache::LayerCache;
use crate::decode_graph::{Branches, Places};
use crate::layout::{FeedForwardSlots, LinearSlots, NormSlots, SwiGluSlots};
use crate::{Error, Model, Result};

/// Choices of a training forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardOptions {
    /// Keep only each layer's input and compute its inside again in the backward pass.
    pub recompute: bool,
    /// The seed of this pass's dropout, which the active adapter asks for; the same seed drops the
    /// same numbers. `None` drops nothing: evaluation.
    pub dropout: Option<u64>,
}

/// A loss and its part that is cross-entropy; both scalars, mean over counted targets.
pub struct LossParts {
    /// What to descend: cross-entropy plus the weighted load-balance losses of MoE layers.
    pub loss: Var,
    /// Cross-entropy alone, in nats per token.
    pub cross_entropy: Var,
}

/// Where in the model a computation stands.
pub(crate) struct Site<'s> {
    /// Layer, from the bottom.
    pub layer: usize,
    /// Positions and offsets of the tokens.
    pub inputs: &'s Inputs,
    /// The layer's caches of the sequences that tokens are appended to, equally many to each;
    /// never while recording.
    pub caches: &'s mut [&'s mut LayerCache],
    /// Of a cache that holds some sequences, the one that tokens are appended to.
    pub sequence: usize,
    /// The seed of the adapter's dropout, when there is to be any.
    pub dropout: Option<u64>,
    /// One token of each of some sequences, at places that only the device knows; the layer's only
    /// cache then holds all of them.
    pub step: Option<&'s Places>,
}

/// What a layer's parts are told.
#[derive(Clone, Copy)]
struct Pass {
    dropout: Option<u64>,
    /// See [`Site::step`].
    step: bool,
}

impl Model {
    /// The loss of a batch. Slots of the gradients are those of [`Model::trained`]: the active
    /// adapter's parameters, else the base's.
    pub fn forward_loss<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &Batch,
        options: &ForwardOptions,
    ) -> Result<LossParts> {
        let inputs = Arc::new(Inputs::new(
            self.config(),
            &self.device(),
            &batch.input_ids,
            &batch.cu_seqlens,
        )?);
        let targets = self.targets(batch)?;
        let (hidden, balances) = self.hidden(tape, &inputs, options)?;
        let head = self.param(tape, self.slots.head);
        let cross_entropy = ops::linear_cross_entropy(tape, &hidden, &head, &targets)?;
        let mut loss = cross_entropy.clone();
        let weight = self.config().moe.as_ref().map_or(0.0, |moe| moe.balance_loss as f32);
        for balance in balances {
            let weighted = ops::scale(tape, &balance, weight)?;
            loss = ops::add(tape, &loss, &weighted)?;
        }
        Ok(LossParts { loss, cross_entropy })
    }

    /// The sum of the losses of a batch's tokens, and each one's loss, f32 `[T]`, 0 where none
    /// counts: what a token gives depends on no other sequence. Load-balance losses of experts are
    /// not part of it.
    pub fn forward_loss_sum<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        batch: &Batch,
        options: &ForwardOptions,
    ) -> Result<(Var, Tensor)> {
        let Batch { input_ids, cu_seqlens, .. } = batch;
        let inputs = Arc::new(Inputs::new(self.config(), &self.device(), input_ids, cu_seqlens)?);
        let targets = self.targets(batch)?;
        let (hidden, _) = self.hidden(tape, &inputs, options)?;
        let head = self.param(tape, self.slots.head);
        Ok(ops::linear_cross_entropy_sum(tape, &hidden, &head, &targets)?)
    }

    /// Logits of every position of packed sequences, f32 `[T, vocab]`. For short inputs: the
    /// whole matrix is made.
    pub fn logits(&self, ids: &[i32], cu_seqlens: &[i32]) -> Result<Tensor> {
        let tape = &mut Tape::inference();
        let inputs = Arc::new(Inputs::new(self.config(), &self.device(), ids, cu_seqlens)?);
        let (hidden, _) = self.hidden(tape, &inputs, &ForwardOptions::default())?;
        self.head(tape, &hidden)
    }

    pub(crate) fn head(&self, tape: &mut Tape, hidden: &Var) -> Result<Tensor> {
        let head = self.param(tape, self.slots.head);
        Ok(ops::logits(hidden.value(), head.value())?)
    }

    pub(crate) fn targets(&self, batch: &Batch) -> Result<Tensor> {
        let Batch { input_ids, targets, .. } = batch;
        if targets.len() != input_ids.len() {
            let (got, expected) = (targets.len(), input_ids.len());
            return Err(Error::Batch(format!("{got} targets for {expected} tokens")));
        }
        let vocab = self.config().vocab_size;
        let wrong = |&&t: &&i32| t != IGNORE && (t < 0 || t as usize >= vocab);
        if let Some(target) = targets.iter().find(wrong) {
            return Err(Error::Batch(format!(
                "target {target} is outside the model's vocabulary of {vocab}"
            )));
        }
        crate::batch::tensor_i32(&self.device(), targets.clone())
    }

    /// Output of the last norm `[T, C]` and the load-balance losses of the MoE layers.
    pub(crate) fn hidden<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        inputs: &Arc<Inputs>,
        options: &ForwardOptions,
    ) -> Result<(Var, Vec<Var>)> {
        let dropout = options.dropout;
        let mut x = self.embed(tape, inputs)?;
        let mut balances = Vec::new();
        for layer in 0..self.slots.layers.len() {
            let mut outputs = if options.recompute {
                let inputs = inputs.clone();
                let again = move |tape: &mut Tape<'a>, x: &[Var]| {
                    let inputs = &inputs;
                    let site =
                        Site { layer, inputs, caches: &mut [], sequence: 0, dropout, step: None };
                    self.layer(tape, &x[0], site).map_err(into_tensor_error)
                };
                tape.recompute(&[x], again)?
            } else {
                self.layer(
                    tape,
                    &x,
                    Site { layer, inputs, caches: &mut [], sequence: 0, dropout, step: None },
                )?
            };
            balances.extend(outputs.drain(1..));
            x = outputs.swap_remove(0);
        }
        Ok((self.norm(tape, &self.slots.norm, &x)?, balances))
    }

    pub(crate) fn embed(&self, tape: &mut Tape, inputs: &Inputs) -> Result<Var> {
        let table = self.param(tape, self.slots.embed);
        let x = ops::embedding(tape, &table, &inputs.ids)?;
        match self.slots.positions {
            None => Ok(x),
            Some(slot) => {
                let table = self.param(tape, slot);
                let at = ops::embedding(tape, &table, &inputs.positions)?;
                Ok(ops::add(tape, &x, &at)?)
            }
        }
    }

    /// One layer: x `[T, C]` to `[x]`, or `[x, balance]` when it has experts.
    pub(crate) fn layer(&self, tape: &mut Tape, x: &Var, site: Site) -> Result<Vec<Var>> {
        let slots = &self.slots.layers[site.layer];
        let pass = Pass { dropout: site.dropout, step: site.step.is_some() };
        let normed = self.norm(tape, &slots.input_norm, x)?;
        let attended = self.attention(tape, &normed, site)?;
        let x = ops::add(tape, x, &attended)?;
        let normed = self.norm(tape, &slots.post_norm, &x)?;
        let (y, balance) = self.feed_forward(tape, &slots.feed_forward, &normed, pass)?;
        let x = ops::add(tape, &x, &y)?;
        Ok(std::iter::once(x).chain(balance).collect())
    }

    fn feed_forward(
        &self,
        tape: &mut Tape,
        slots: &FeedForwardSlots,
        x: &Var,
        pass: Pass,
    ) -> Result<(Var, Option<Var>)> {
        let dropout = pass.dropout;
        match slots {
            FeedForwardSlots::SwiGlu(slots) => Ok((self.swiglu(tape, slots, x, pass)?, None)),
            FeedForwardSlots::Gelu { up, down, exact } => {
                let kind = if *exact { ops::Gelu::Exact } else { ops::Gelu::Tanh };
                let h = self.linear(tape, up, x, dropout)?;
                let h = ops::gelu(tape, &h, kind)?;
                Ok((self.linear(tape, down, &h, dropout)?, None))
            }
            FeedForwardSlots::Moe { router, experts, shared } => {
                let (y, balance) = self.moe(tape, *router, experts, x)?;
                let y = match shared {
                    None => y,
                    Some(slots) => {
                        let all = self.swiglu(tape, slots, x, pass)?;
                        ops::add(tape, &y, &all)?
                    }
                };
                Ok((y, Some(balance)))
            }
        }
    }

    /// Routed experts: each token's `top_k` most probable ones, weighted by their probability
    /// among all experts (DeepSeekMoE, arXiv 2401.06066, Eq. 3–5: not normalised again).
    fn moe(
        &self,
        tape: &mut Tape,
        router: usize,
        experts: &[SwiGluSlots],
        x: &Var,
    ) -> Result<(Var, Var)> {
        let top_k = self.config().moe.as_ref().map_or(1, |moe| moe.top_k);
        let router = self.param(tape, router);
        let logits = ops::linear(tape, x, &router, None)?;
        let routing = ops::moe_route(tape, &logits, top_k, false)?;
        let rows = ops::gather_rows(tape, x, &routing.plan)?;
        let weights = |tape: &Tape, pick: fn(&SwiGluSlots) -> LinearSlots| -> Vec<Var> {
            experts.iter().map(|e| self.param(tape, pick(e).weight)).collect()
        };
        let gate = weights(tape, |e| e.gate);
        let gate = ops::expert_linear(tape, &rows, &gate, &routing.plan)?;
        let up = weights(tape, |e| e.up);
        let up = ops::expert_linear(tape, &rows, &up, &routing.plan)?;
        let h = ops::swiglu(tape, &gate, &up)?;
        let down = weights(tape, |e| e.down);
        let y = ops::expert_linear(tape, &h, &down, &routing.plan)?;
        let y = ops::scatter_rows(tape, &y, &routing.weights, &routing.plan)?;
        Ok((y, routing.balance))
    }

    fn swiglu(
        &self,
        tape: &mut Tape,
        slots: &SwiGluSlots,
        x: &Var,
        Pass { dropout, step }: Pass,
    ) -> Result<Var> {
        let branches = Branches::begin(self, step)?;
        let gate = self.linear(tape, &slots.gate, x, dropout)?;
        branches.next()?;
        let up = self.linear(tape, &slots.up, x, dropout)?;
        branches.join()?;
        let h = ops::swiglu(tape, &gate, &up)?;
        self.linear(tape, &slots.down, &h, dropout)
    }

    /// `x·Wᵀ + b`, and what the active adapter adds to it.
    pub(crate) fn linear(
        &self,
        tape: &mut Tape,
        slots: &LinearSlots,
        x: &Var,
        dropout: Option<u64>,
    ) -> Result<Var> {
        let weight = self.param(tape, slots.weight);
        let bias = slots.bias.map(|slot| self.param(tape, slot));
        let y = ops::linear(tape, x, &weight, bias.as_ref())?;
        match self.adapters.at(slots.weight) {
            None => Ok(y),
            Some((adapter, place)) => {
                let update = adapter.update(tape, place, x, dropout)?;
                Ok(ops::add(tape, &y, &update)?)
            }
        }
    }

    pub(crate) fn norm(&self, tape: &mut Tape, slots: &NormSlots, x: &Var) -> Result<Var> {
        let weight = self.param(tape, slots.weight);
        let eps = self.config().norm_eps as f32;
        Ok(match slots.bias {
            None => ops::rms_norm(tape, x, &weight, eps)?,
            Some(slot) => {
                let bias = self.param(tape, slot);
                ops::layer_norm(tape, x, &weight, &bias, eps)?
            }
        })
    }

    /// A parameter of the base: a constant while an adapter is active, which alone is trained.
    pub(crate) fn param(&self, tape: &Tape, slot: usize) -> Var {
        let tensor = self.params().tensor(slot).clone();
        match self.adapters.active() {
            None => tape.param(tensor, slot),
            Some(_) => tape.leaf(tensor),
        }
    }
}

/// For closures of the tensor crate: inside a layer only tensor and attention errors arise.
pub(crate) fn into_tensor_error(error: Error) -> tercet_tensor::Error {
    match error {
        Error::Tensor(error) => error,
        Error::Attention(source) => tercet_tensor::Error::Attention { op: "layer", source },
        other => tercet_tensor::Error::Value { op: "layer", text: other.to_string() },
    }
}
