//! What the queries of a trained model read: the decoder walked layer by layer with the public
//! ops, keeping each layer's queries, compressed keys, gates and selected blocks.

use anyhow::Context;
use tercet_attention::{Compressor, NsaSpec, cpu};
use tercet_model::{Family, Model, ModelConfig};
use tercet_tensor::{RopeTable, Tape, Tensor, Var, ops};

use crate::error::user;

/// One layer's attention over one sequence.
pub struct LayerTrace {
    /// Queries `[T, H, D]`, rotated.
    q: Vec<f32>,
    /// Compressed keys `[N, K, D]`, rotated.
    k_cmp: Vec<f32>,
    /// Gates `[T, H, 3]`.
    gate: Vec<f32>,
    /// Selected blocks `[T, K, S]`, ascending, −1 padded.
    indices: Vec<i32>,
}

/// All layers of a sequence.
pub struct Trace {
    config: ModelConfig,
    /// Spec of every layer.
    pub spec: NsaSpec,
    /// Tokens (T).
    pub tokens: usize,
    /// Layers.
    pub layers: Vec<LayerTrace>,
}

/// Reads `ids` as one sequence. Takes models of our own family with mean compression and without
/// experts, such as the quickstart's.
pub fn trace(model: &Model, ids: &[u32]) -> anyhow::Result<Trace> {
    let config = model.config().clone();
    let Some(spec) = config.nsa.clone() else {
        return Err(user("this model is dense: it has no blocks to select"));
    };
    let plain = config.moe.is_none() && config.rope_scaling.is_none();
    if config.model_type != Family::Tercet || spec.compressor != Compressor::Mean || !plain {
        return Err(user(
            "the picture can be drawn of models with mean compression, plain RoPE and no experts",
        ));
    }
    let tape = &mut Tape::inference();
    let walk = Walk::new(model, &config, &spec, ids)?;
    let mut x = ops::embedding(tape, &walk.param("model.embed_tokens.weight")?, &walk.ids)?;
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let (next, trace) = walk.layer(tape, &x, layer)?;
        x = next;
        layers.push(trace);
    }
    Ok(Trace { config, spec, tokens: ids.len(), layers })
}

struct Walk<'a> {
    model: &'a Model,
    config: &'a ModelConfig,
    spec: &'a NsaSpec,
    rope: RopeTable,
    ids: Tensor,
    positions: Tensor,
    block_positions: Tensor,
    cu_seqlens: [i32; 2],
}

impl<'a> Walk<'a> {
    fn new(
        model: &'a Model,
        config: &'a ModelConfig,
        spec: &'a NsaSpec,
        ids: &[u32],
    ) -> anyhow::Result<Self> {
        let tokens = ids.len();
        let vector = |values: Vec<i32>| {
            let len = values.len();
            Tensor::from_i32(values, &[len])
        };
        let blocks = spec.compressed_blocks(tokens);
        Ok(Self {
            model,
            config,
            spec,
            rope: RopeTable::plain(config.head_dim, config.rope_theta)?,
            ids: vector(ids.iter().map(|&id| id as i32).collect())?,
            positions: vector((0..tokens as i32).collect())?,
            block_positions: vector(
                (0..blocks).map(|i| (i * spec.compress_stride) as i32).collect(),
            )?,
            cu_seqlens: [0, tokens as i32],
        })
    }

    fn param(&self, name: &str) -> anyhow::Result<Var> {
        let params = self.model.params();
        let slot = params.slot(name).with_context(|| format!("the model has no {name}"))?;
        Ok(Tape::inference().param(params.tensor(slot).clone(), slot))
    }

    fn linear(&self, tape: &mut Tape, x: &Var, name: &str) -> anyhow::Result<Var> {
        let weight = self.param(&format!("{name}.weight"))?;
        let bias = self.param(&format!("{name}.bias")).ok();
        Ok(ops::linear(tape, x, &weight, bias.as_ref())?)
    }

    fn norm(&self, tape: &mut Tape, x: &Var, name: &str) -> anyhow::Result<Var> {
        let weight = self.param(&format!("{name}.weight"))?;
        Ok(ops::rms_norm(tape, x, &weight, self.config.norm_eps as f32)?)
    }

    fn layer(&self, tape: &mut Tape, x: &Var, index: usize) -> anyhow::Result<(Var, LayerTrace)> {
        let name = format!("model.layers.{index}");
        let normed = self.norm(tape, x, &format!("{name}.input_layernorm"))?;
        let vars = self.branches(tape, &normed, &format!("{name}.self_attn"))?;
        let trace = self.look(&vars)?;
        let out = ops::attention_nsa(tape, &vars, self.spec, &self.cu_seqlens)?;
        let dims = self.config.dims();
        let out = out.reshape(&[x.shape()[0], dims.heads * dims.value_dim])?;
        let out = self.linear(tape, &out, &format!("{name}.self_attn.o_proj"))?;
        let x = ops::add(tape, x, &out)?;
        let normed = self.norm(tape, &x, &format!("{name}.post_attention_layernorm"))?;
        let gate = self.linear(tape, &normed, &format!("{name}.mlp.gate_proj"))?;
        let up = self.linear(tape, &normed, &format!("{name}.mlp.up_proj"))?;
        let h = ops::swiglu(tape, &gate, &up)?;
        let down = self.linear(tape, &h, &format!("{name}.mlp.down_proj"))?;
        Ok((ops::add(tape, &x, &down)?, trace))
    }

    fn branches(&self, tape: &mut Tape, x: &Var, at: &str) -> anyhow::Result<ops::NsaVars> {
        let dims = self.config.dims();
        let tokens = x.shape()[0];
        let mut heads = |name: &str, heads: usize, dim: usize| -> anyhow::Result<Var> {
            let y = self.linear(tape, x, &format!("{at}.{name}_proj"))?;
            Ok(y.reshape(&[tokens, heads, dim])?)
        };
        let q = heads("q", dims.heads, dims.key_dim)?;
        let k_raw = heads("k_cmp", dims.kv_heads, dims.key_dim)?;
        let v_raw = heads("v_cmp", dims.kv_heads, dims.value_dim)?;
        let k_slc = heads("k_slc", dims.kv_heads, dims.key_dim)?;
        let v_slc = heads("v_slc", dims.kv_heads, dims.value_dim)?;
        let k_win = heads("k_win", dims.kv_heads, dims.key_dim)?;
        let v_win = heads("v_win", dims.kv_heads, dims.value_dim)?;
        let gate = heads("gate", dims.heads, 3)?;
        let gate = ops::sigmoid(tape, &gate)?;
        let mut rope = |x: &Var, at: &Tensor| ops::rope(tape, x, at, &self.rope);
        let q = rope(&q, &self.positions)?;
        let k_slc = rope(&k_slc, &self.positions)?;
        let k_win = rope(&k_win, &self.positions)?;
        let k_cmp = ops::compress(tape, &k_raw, &ops::Phi::Mean, self.spec, &self.cu_seqlens)?;
        let v_cmp = ops::compress(tape, &v_raw, &ops::Phi::Mean, self.spec, &self.cu_seqlens)?;
        let k_cmp = ops::rope(tape, &k_cmp, &self.block_positions, &self.rope)?;
        Ok(ops::NsaVars { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate })
    }

    /// Asks the operator itself which blocks it selects.
    fn look(&self, vars: &ops::NsaVars) -> anyhow::Result<LayerTrace> {
        let numbers = |var: &Var| var.value().to_vec_f32();
        let (q, k_cmp, gate) = (numbers(&vars.q)?, numbers(&vars.k_cmp)?, numbers(&vars.gate)?);
        let (v_cmp, k_slc, v_slc) =
            (numbers(&vars.v_cmp)?, numbers(&vars.k_slc)?, numbers(&vars.v_slc)?);
        let (k_win, v_win) = (numbers(&vars.k_win)?, numbers(&vars.v_win)?);
        let dims = self.config.dims();
        let input = cpu::NsaInput {
            spec: self.spec,
            dims,
            cu_seqlens: &self.cu_seqlens,
            scale: dims.scale(),
            q: &q,
            k_cmp: &k_cmp,
            v_cmp: &v_cmp,
            k_slc: &k_slc,
            v_slc: &v_slc,
            k_win: &k_win,
            v_win: &v_win,
            gate: &gate,
        };
        let mut out = vec![0.0; q.len() / dims.key_dim * dims.value_dim];
        let indices = cpu::nsa_forward(&input, &mut out)?.indices;
        Ok(LayerTrace { q, k_cmp, gate, indices })
    }
}

impl Trace {
    /// Key/value heads (K).
    pub fn groups(&self) -> usize {
        self.config.num_key_value_heads
    }

    /// Attention of one query over its visible compressed blocks, averaged over the heads of a
    /// group; sums to 1.
    pub fn compressed(&self, layer: usize, position: usize, group: usize) -> Vec<f32> {
        let dims = self.config.dims();
        let (d, k) = (dims.key_dim, dims.kv_heads);
        let trace = &self.layers[layer];
        let blocks = self.spec.visible_compressed(position);
        let mut mean = vec![0.0f32; blocks];
        for head in group * dims.group()..(group + 1) * dims.group() {
            let q = &trace.q[(position * dims.heads + head) * d..][..d];
            let scores: Vec<f32> = (0..blocks)
                .map(|i| {
                    let key = &trace.k_cmp[(i * k + group) * d..][..d];
                    q.iter().zip(key).map(|(a, b)| a * b).sum::<f32>() * dims.scale()
                })
                .collect();
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = scores.iter().map(|s| (s - most).exp()).collect();
            let total: f32 = weights.iter().sum::<f32>() * dims.group() as f32;
            mean.iter_mut().zip(&weights).for_each(|(m, w)| *m += w / total);
        }
        mean
    }

    /// Blocks that one query selected.
    pub fn selected(&self, layer: usize, position: usize, group: usize) -> Vec<usize> {
        let indices = &self.layers[layer].indices;
        let count = indices.len() / self.tokens / self.config.num_key_value_heads;
        let row = &indices[(position * self.config.num_key_value_heads + group) * count..][..count];
        row.iter().filter(|&&block| block >= 0).map(|&block| block as usize).collect()
    }

    /// Gates of one query, averaged over the heads of a group.
    pub fn gates(&self, layer: usize, position: usize, group: usize) -> [f32; 3] {
        let heads = self.config.num_attention_heads;
        let size = self.config.dims().group();
        let rows = &self.layers[layer].gate[(position * heads + group * size) * 3..][..size * 3];
        [0, 1, 2].map(|branch| rows.chunks(3).map(|gate| gate[branch]).sum::<f32>() / size as f32)
    }
}
