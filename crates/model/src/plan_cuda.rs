//! The memory of a training step on a GPU, counted tensor by tensor as the ops there keep them.
//!
//! Weights, gradients and the optimizer's state are always there. On top come the tensors that
//! wait for the backward pass, and whichever of three moments needs most beside them: the loss
//! with its chunk of logits, or the backward of the last layer's feed-forward part or attention.

use tercet_attention::{Compressor, NsaSpec};
use tercet_tensor::DType;

use crate::config::{Activation, ModelConfig};
use crate::plan::{Memory, Workload};

/// Logits that `linear_cross_entropy` makes at a time, at most.
const LOGITS: u64 = 1 << 27;

/// Scratch of cuBLASLt, and small things.
const SCRATCH: u64 = 40 << 20;

/// Bytes that one token needs in one layer.
struct Layer {
    /// Kept until the backward pass by the attention half, its norm's input and output included.
    attention: u64,
    /// Kept by the feed-forward half.
    feed_forward: u64,
    /// Needed beside what is kept while the attention half is walked back.
    attention_back: u64,
    /// The same of the feed-forward half.
    feed_forward_back: u64,
}

/// Bytes by part.
pub(crate) fn training_memory(config: &ModelConfig, load: &Workload) -> Memory {
    let total = config.parameter_counts().total;
    let element = load.dtype.bytes() as u64;
    let tokens = load.tokens_at_once as u64;
    let masters = if load.dtype == DType::BF16 { 4 } else { 0 };
    let width = config.hidden_size as u64;
    let stream = width * element;

    let layers: Vec<Layer> =
        (0..config.num_hidden_layers).map(|i| layer(config, i, element)).collect();
    let all = |l: &Layer| l.attention + l.feed_forward;
    let largest = layers.iter().map(all).max().unwrap_or(0);
    // Recomputation keeps the input of each layer and, while one is walked back, its inside.
    let kept = match load.recompute {
        true => layers.len() as u64 * stream,
        false => layers.iter().map(all).sum(),
    };
    // The last norm's input and output.
    let ends = 2 * stream;

    // The loss: one chunk of logits and its gradient, the gradients of the hidden rows and of the
    // output matrix.
    let vocab = config.vocab_size as u64;
    let logits = LOGITS.min(tokens * vocab);
    let beside = if load.dtype == DType::BF16 { 2 } else { 0 };
    let loss = logits * (4 + beside) + vocab * width * 4 + tokens * (stream + 4);
    // On the way back a layer holds the gradient of its output, and with recomputation its inside.
    let inside = if load.recompute { largest } else { 0 };
    let back = layers.iter().map(|l| {
        let feed_forward = l.feed_forward_back;
        let attention = l.attention_back.saturating_sub(l.feed_forward);
        feed_forward.max(attention)
    });
    let back = tokens * (inside + 2 * stream + back.max().unwrap_or(0));
    Memory {
        weights: total * element,
        gradients: total * 4,
        optimizer: total * (8 + masters),
        activations: tokens * (kept + ends),
        workspace: SCRATCH + loss.max(back),
    }
}

fn layer(config: &ModelConfig, index: usize, element: u64) -> Layer {
    let dims = config.dims();
    let (heads, kv_heads) = (dims.heads as u64, dims.kv_heads as u64);
    let (q, out) = (heads * dims.key_dim as u64, heads * dims.value_dim as u64);
    let kv = kv_heads * (dims.key_dim + dims.value_dim) as u64;
    // The norm's input and output, and an f32 of each row.
    let norm = 2 * config.hidden_size as u64 * element + 4;
    let (attention, attention_back) = match &config.nsa {
        None => {
            let lse = 4 * heads;
            let kept = element * (q + kv + out) + lse;
            (kept, element * (q + kv + 2 * out) + 4 * q + lse)
        }
        Some(spec) => nsa(spec, [q, out, kv, heads, kv_heads], element),
    };
    let inner = match config.experts(index) {
        Some(moe) => {
            let chosen = moe.top_k * (2 * config.hidden_size + 3 * moe.expert_size);
            let shared = 3 * moe.shared_experts * moe.expert_size;
            element * (chosen + shared) as u64 + 4 * moe.routed_experts as u64
        }
        None => {
            let tensors = if config.activation() == Activation::SwiGlu { 3 } else { 2 };
            element * tensors * config.intermediate_size as u64
        }
    };
    Layer {
        attention: norm + attention,
        feed_forward: norm + inner,
        attention_back,
        // The gradients of the two inner tensors, while those they come from are still there.
        feed_forward_back: inner * 2 / 3,
    }
}

/// What native sparse attention keeps of a token, and what its backward needs besides.
fn nsa(spec: &NsaSpec, [q, out, kv, heads, kv_heads]: [u64; 5], element: u64) -> (u64, u64) {
    let compressed = kv / spec.compress_stride as u64;
    // The mean keeps no input of its own.
    let raw = if spec.compressor == Compressor::Mean { 0 } else { kv };
    let rows = q + 2 * kv + raw + compressed + 3 * heads;
    let choice = 4 * kv_heads * spec.select_count as u64;
    let kept = element * (rows + 4 * out) + 12 * heads + choice;
    // Gradients of all inputs, the output's, the query's sum in f32, three corrections a head, and
    // the index from blocks to queries.
    let back = element * (q + 3 * kv + compressed + 3 * heads + out) + 4 * q + 12 * heads + choice;
    (kept, back)
}
