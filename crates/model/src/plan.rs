//! What a model and a training run of it will cost, before anything starts: parameters, memory
//! by part, FLOP per token, disk. Nothing is allocated; the 27B plan takes a millisecond.
//!
//! FLOP counts a multiplication and an addition as two, and only matrix products and attention;
//! norms, activations and softmax are left out, as everywhere.

use tercet_attention::{Compressor, NsaSpec};
use tercet_tensor::caches::{DenseCache, NsaCache, Pages};
use tercet_tensor::{DType, Mask};

use crate::config::{Activation, ModelConfig, MoeConfig};
use crate::layout::parameters;

/// How many parameters there are, and how many work on one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// All.
    pub total: u64,
    /// Those that one token passes: of the routed experts, only `top_k`.
    pub active: u64,
    /// The part of `active` in feed-forward layers and routers. This is what the NSA paper's
    /// "3B active" of 27B counts: its attention alone (30 layers, 64 heads of 192 and 128 at
    /// width 2560) has 2.1B more.
    pub active_feed_forward: u64,
    /// Of `total`, input embedding and output matrix (one if tied).
    pub embedding: u64,
}

/// A training run as far as memory and time depend on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Tokens of one sequence.
    pub context: usize,
    /// Tokens that go through the model at once.
    pub tokens_at_once: usize,
    /// Storage of weights and activations, f32 or bf16.
    pub dtype: DType,
    /// Whether layers are computed again in the backward pass.
    pub recompute: bool,
    /// Whether it happens on a GPU.
    pub cuda: bool,
}

/// Bytes by part while training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The weights the model computes with.
    pub weights: u64,
    /// Their gradients, f32.
    pub gradients: u64,
    /// AdamW's two moments, and f32 master weights where the weights are bf16.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations: u64,
    /// One chunk of logits, and the widest layer's gradients on their way back.
    pub workspace: u64,
}

impl Memory {
    /// All parts together.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.workspace
    }
}

/// FLOP of one token, forward, averaged over a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Products with weights.
    pub weights: f64,
    /// Attention as configured: NSA, window or dense.
    pub attention: f64,
    /// Attention if every earlier token were read: the dense twin.
    pub attention_dense: f64,
}

impl Flops {
    /// Forward.
    pub fn forward(&self) -> f64 {
        self.weights + self.attention
    }

    /// Forward of the dense twin.
    pub fn forward_dense(&self) -> f64 {
        self.weights + self.attention_dense
    }

    /// Forward and backward; the backward pass has two products for each of the forward's.
    /// Recomputation is work but not progress, so it is not counted here.
    pub fn training(&self) -> f64 {
        3.0 * self.forward()
    }
}

impl ModelConfig {
    /// Counts parameters.
    pub fn parameter_counts(&self) -> Parameters {
        let (mut total, mut embedding, mut routed, mut feed_forward) = (0u64, 0, 0, 0);
        for spec in parameters(self) {
            let count = spec.len() as u64;
            total += count;
            if spec.name.contains("embed") || spec.name.starts_with("lm_head") {
                embedding += count;
            }
            if spec.name.contains(".mlp.") {
                feed_forward += count;
            }
            if spec.name.contains(".mlp.experts.") {
                routed += count;
            }
        }
        let idle = self.moe.as_ref().map_or(0, |moe| {
            routed / moe.routed_experts as u64 * (moe.routed_experts - moe.top_k) as u64
        });
        Parameters {
            total,
            active: total - idle,
            active_feed_forward: feed_forward - idle,
            embedding,
        }
    }

    /// Memory of a training step.
    pub fn training_memory(&self, load: &Workload) -> Memory {
        if load.cuda {
            return crate::plan_cuda::training_memory(self, load);
        }
        let total = self.parameter_counts().total;
        let element = load.dtype.bytes() as u64;
        let tokens = load.tokens_at_once as u64;
        let masters = if load.dtype == DType::BF16 { 4 } else { 0 };
        let layers: Vec<u64> =
            (0..self.num_hidden_layers).map(|i| self.kept_per_token(i, element)).collect();
        let input = self.hidden_size as u64 * element;
        let kept = if load.recompute {
            layers.len() as u64 * input + layers.iter().max().copied().unwrap_or(0)
        } else {
            layers.iter().sum()
        };
        // Embedding, last norm's input and output, and the loss's gradient of it.
        let ends = 4 * input;
        let width = self.widest() as u64;
        let head = self.vocab_size as u64 * self.hidden_size as u64 * 4;
        // `linear_cross_entropy` holds its gradient of the head, and one chunk of logits.
        let logits = (1u64 << 22).max(128 * self.vocab_size as u64) * 4;
        Memory {
            weights: total * element,
            gradients: total * 4,
            optimizer: total * (8 + masters),
            activations: tokens * (kept + ends),
            workspace: head + logits + 3 * tokens * width * element,
        }
    }

    /// Bytes of one sequence's cache at `context` tokens.
    pub fn cache_bytes(&self, context: usize, dtype: DType) -> u64 {
        let dims = self.dims();
        let row = (dims.kv_heads * (dims.key_dim + dims.value_dim) * dtype.bytes()) as u64;
        let layer = |i: usize| match &self.nsa {
            Some(spec) => {
                let window = spec.window.min(context);
                row * (context + window + spec.compressed_blocks(context)) as u64
            }
            None => row * self.window(i).map_or(context, |w| w.min(context)) as u64,
        };
        (0..self.num_hidden_layers).map(layer).sum()
    }

    /// Bytes of [`Slots`](crate::slots::Slots) on a GPU: `count` slots of at most `tokens` tokens,
    /// which share `pages` pages of 64 of them. Each has its rings of windows, and of raw
    /// tokens that no compressed block is made of yet, whatever it holds.
    pub fn slots_bytes(&self, [count, tokens]: [usize; 2], pages: usize, dtype: DType) -> u64 {
        let dims = self.dims();
        let row = (dims.kv_heads * (dims.key_dim + dims.value_dim) * dtype.bytes()) as u64;
        let spec = self.nsa.as_ref();
        let [pages, blocks] = Pages::counts(spec, [count, tokens], pages);
        let layer = |i: usize| match (spec, self.window(i)) {
            (Some(spec), _) => {
                count * NsaCache::ring_rows(spec, tokens) + (pages + blocks) * Pages::ROWS
            }
            (None, Some(window)) => count * DenseCache::ring_rows(Mask::Window(window), tokens),
            (None, None) => pages * Pages::ROWS,
        };
        let rows: u64 = (0..self.num_hidden_layers).map(|i| layer(i) as u64).sum();
        let tables = match self.keeps_every_token() {
            true => Pages::table_bytes(spec, [count, tokens]),
            false => 0,
        };
        row * rows + tables as u64
    }

    /// Whether there is a layer whose cache grows with every token.
    pub(crate) fn keeps_every_token(&self) -> bool {
        self.nsa.is_some() || (0..self.num_hidden_layers).any(|i| self.window(i).is_none())
    }

    /// Bytes of one checkpoint: weights, and the optimizer's state.
    pub fn checkpoint_bytes(&self, dtype: DType) -> u64 {
        let state = if dtype == DType::BF16 { 12 } else { 8 };
        self.parameter_counts().total * (dtype.bytes() as u64 + state)
    }

    /// FLOP of one token in a sequence of `context`.
    pub fn flops(&self, context: usize) -> Flops {
        let Parameters { active, embedding, .. } = self.parameter_counts();
        let head = (self.vocab_size * self.hidden_size) as f64;
        let weights = 2.0 * ((active - embedding) as f64 - self.phi_parameters() + head);
        let dims = self.dims();
        // One key costs a product over D for its score and one over V for its value.
        let per_key = 2.0 * (dims.heads * (dims.key_dim + dims.value_dim)) as f64;
        let dense = per_key * causal_mean(context);
        let layers = self.num_hidden_layers;
        let attention = match &self.nsa {
            Some(spec) => layers as f64 * self.nsa_flops(spec, context, per_key),
            None => (0..layers)
                .map(|i| self.window(i).map_or(dense, |w| per_key * window_mean(context, w)))
                .sum(),
        };
        Flops { weights, attention, attention_dense: layers as f64 * dense }
    }

    /// One layer: φ, the compressed branch, the scores that selection computes again, the
    /// selected branch and the window.
    fn nsa_flops(&self, spec: &NsaSpec, context: usize, per_key: f64) -> f64 {
        let dims = self.dims();
        let blocks = compressed_mean(spec, context);
        let scores = 2.0 * (dims.heads * dims.key_dim) as f64 * blocks;
        let per_block = |dim: usize| {
            let flat = (dims.kv_heads * spec.compress_block * dim) as f64;
            match spec.compressor {
                Compressor::Mean => flat,
                Compressor::Linear => 2.0 * flat * dim as f64,
                Compressor::Mlp => 2.0 * (flat * dim as f64 + (dims.kv_heads * dim * dim) as f64),
            }
        };
        let made = spec.compressed_blocks(context) as f64 / context.max(1) as f64;
        let phi = made * (per_block(dims.key_dim) + per_block(dims.value_dim));
        let keys = blocks + selected_mean(spec, context) + window_mean(context, spec.window);
        phi + scores + per_key * keys
    }

    /// φ's matrices work once a block, not once a token.
    fn phi_parameters(&self) -> f64 {
        let specs = parameters(self);
        specs.iter().filter(|s| s.name.contains(".phi_")).map(|s| s.len() as f64).sum()
    }

    fn widest(&self) -> usize {
        let dims = self.dims();
        let expert = self.moe.as_ref().map_or(0, |m| m.top_k * m.expert_size.max(self.hidden_size));
        self.intermediate_size.max(self.hidden_size).max(dims.heads * dims.key_dim).max(expert)
    }

    /// Bytes that one layer keeps of one token, by what each op says it keeps.
    fn kept_per_token(&self, layer: usize, element: u64) -> u64 {
        let dims = self.dims();
        let (heads, kv_heads) = (dims.heads as u64, dims.kv_heads as u64);
        let (q, out) = (heads * dims.key_dim as u64, heads * dims.value_dim as u64);
        let kv = kv_heads * (dims.key_dim + dims.value_dim) as u64;
        // Residual stream before and after attention, and both norms' outputs.
        let stream = 4 * self.hidden_size as u64;
        let attention = match &self.nsa {
            None => element * (q + kv + out) + 4 * heads,
            Some(spec) => {
                let compressed = kv / spec.compress_stride as u64;
                let rows = q + 3 * kv + compressed + out + 3 * heads;
                let branches = 4 * (3 * out + 3 * heads + kv_heads * spec.select_count as u64);
                element * rows + branches
            }
        };
        let feed_forward = match self.experts(layer) {
            Some(moe) => element * moe_kept(moe, self.hidden_size) + 4 * moe.routed_experts as u64,
            None => {
                let tensors = if self.activation() == Activation::SwiGlu { 3 } else { 2 };
                element * tensors * self.intermediate_size as u64
            }
        };
        element * stream + attention + feed_forward
    }
}

/// Rows in and out of each chosen expert, its three inner tensors, and those of the shared ones.
fn moe_kept(moe: &MoeConfig, hidden: usize) -> u64 {
    let chosen = moe.top_k * (2 * hidden + 3 * moe.expert_size);
    (chosen + 3 * moe.shared_experts * moe.expert_size) as u64
}

/// Mean of p + 1 over the positions of a sequence.
fn causal_mean(context: usize) -> f64 {
    (context as f64 + 1.0) / 2.0
}

/// Mean of min(p + 1, w).
fn window_mean(context: usize, window: usize) -> f64 {
    if window >= context {
        return causal_mean(context);
    }
    let (n, w) = (context as f64, window as f64);
    (w * (w + 1.0) / 2.0 + (n - w) * w) / n
}

/// Mean of the compressed blocks visible.
fn compressed_mean(spec: &NsaSpec, context: usize) -> f64 {
    // Block i is visible to the context − (i·d + l) + 1 last positions.
    let blocks = spec.compressed_blocks(context) as f64;
    let (d, l, n) = (spec.compress_stride as f64, spec.compress_block as f64, context as f64);
    (blocks * (n - l + 1.0) - d * blocks * (blocks - 1.0) / 2.0) / n.max(1.0)
}

/// Mean of the keys of selected blocks, the current one only up to the query.
fn selected_mean(spec: &NsaSpec, context: usize) -> f64 {
    let (block, all) = (spec.select_block, spec.select_count * spec.select_block);
    if context <= all {
        return causal_mean(context);
    }
    // Until `all` tokens everything is selected; then n − 1 whole blocks and half of the last.
    let (n, all, block) = (context as f64, all as f64, block as f64);
    let full = all - block + (block + 1.0) / 2.0;
    (all * (all + 1.0) / 2.0 + (n - all) * full) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_key_counts_are_those_of_counting() {
        let spec = NsaSpec {
            compress_block: 8,
            compress_stride: 4,
            select_block: 16,
            select_count: 4,
            window: 20,
            ..NsaSpec::default()
        };
        // Multiples of the selection block, where the closed form is exact.
        for context in [16, 64, 80, 256] {
            let mean = |of: &dyn Fn(usize) -> usize| {
                (0..context).map(of).sum::<usize>() as f64 / context as f64
            };
            let selected = |p: usize| {
                let whole = (p / 16).min(3) * 16;
                whole + p % 16 + 1
            };
            let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{context}: {a} {b}");
            close(compressed_mean(&spec, context), mean(&|p| spec.visible_compressed(p)));
            close(window_mean(context, 20), mean(&|p| (p + 1).min(20)));
            close(selected_mean(&spec, context), mean(&selected));
        }
    }
}
