//! The shape of a decoder: one struct for every family, native sparse attention or dense.
//!
//! The same field names stand in the `[model]` table of a TOML file and in the `config.json` of
//! our own family (`model_type` = "tercet"). Other families' `config.json` are translated by
//! [`crate::hf_config`].

use serde::{Deserialize, Serialize};
use tercet_attention::{Dims, NsaSpec};

use crate::{Error, Result};

/// Which decoder family a configuration belongs to; decides norms, biases and activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Ours: RMSNorm, RoPE, SwiGLU or MoE, NSA or dense attention, key dim ≠ value dim.
    #[default]
    Tercet,
    /// GPT-2: LayerNorm, learned positions, GELU, biases everywhere.
    Gpt2,
    /// Llama 1 to 3.x.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k, v.
    Qwen2,
    /// Qwen3: RMSNorm on each query and key head.
    Qwen3,
}

impl Family {
    /// The name in `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tercet => "tercet",
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// How RoPE frequencies are stretched beyond the context a model was first trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, smoothly between.
    Llama3 {
        /// Division of the low frequencies.
        factor: f64,
        /// Wavelengths longer than original / this are low.
        low_freq_factor: f64,
        /// Wavelengths shorter than original / this are high.
        high_freq_factor: f64,
        /// Context before stretching.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Context after / before stretching.
        factor: f64,
        /// Context before stretching.
        original_max_position_embeddings: usize,
        /// Rotations above which a frequency is kept.
        #[serde(default = "beta_fast")]
        beta_fast: f64,
        /// Rotations below which a frequency is divided by `factor`.
        #[serde(default = "beta_slow")]
        beta_slow: f64,
        /// Multiplies cos and sin; by default 0.1·ln(factor) + 1.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attention_factor: Option<f64>,
        /// Whether the ramp's ends are rounded to whole dimensions.
        #[serde(default = "yes")]
        truncate: bool,
    },
}

fn beta_fast() -> f64 {
    32.0
}

fn beta_slow() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// Attention of one layer in families whose layers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// Every earlier token is visible.
    FullAttention,
    /// Only the last `sliding_window` tokens are visible.
    SlidingAttention,
}

/// Nonlinearity of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate)·up, three matrices.
    SwiGlu,
    /// GELU by its tanh form, two matrices.
    GeluTanh,
    /// GELU by erf, two matrices.
    GeluExact,
}

/// Mixture of experts, as in DeepSeekMoE: shared experts see every token, `top_k` routed ones
/// are chosen per token by a softmax over all routed experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Experts to choose from (E).
    pub routed_experts: usize,
    /// Experts every token passes.
    #[serde(default)]
    pub shared_experts: usize,
    /// Routed experts per token.
    pub top_k: usize,
    /// Hidden width of one expert's SwiGLU.
    pub expert_size: usize,
    /// Layers at the bottom that keep a dense SwiGLU of `intermediate_size`.
    #[serde(default)]
    pub first_dense_layers: usize,
    /// Weight of the load-balance loss.
    #[serde(default = "balance_loss")]
    pub balance_loss: f64,
}

fn balance_loss() -> f64 {
    0.001
}

/// A decoder's shape. Build one by deserializing (TOML or JSON) or by [`crate::Model::load`];
/// both fill the defaults and check every rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct ModelConfig {
    /// Family.
    pub model_type: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Hidden width of the dense feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads (H).
    pub num_attention_heads: usize,
    /// Key/value heads (K); divides H.
    pub num_key_value_heads: usize,
    /// Query and key dimension of a head (D).
    pub head_dim: usize,
    /// Value dimension of a head (V).
    pub v_head_dim: usize,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// Epsilon of every norm.
    #[serde(rename = "rms_norm_eps")]
    pub norm_eps: f64,
    /// Base of RoPE's frequencies.
    pub rope_theta: f64,
    /// Stretching of RoPE's frequencies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases of q, k, v, o where the family leaves it open (llama, qwen3).
    #[serde(skip_serializing_if = "is_false")]
    pub attention_bias: bool,
    /// Biases of the feed-forward part where the family leaves it open (llama).
    #[serde(skip_serializing_if = "is_false")]
    pub mlp_bias: bool,
    /// Whether GPT-2's GELU is exact and not its tanh form.
    #[serde(skip_serializing_if = "is_false")]
    pub gelu_exact: bool,
    /// Keys a query of a sliding layer sees, itself included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
    /// Kind of each layer; none: every layer slides when `sliding_window` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<LayerType>>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// First token of a text, if the model was trained with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    #[serde(rename = "eos_token_id", skip_serializing_if = "Vec::is_empty")]
    pub eos_token_ids: Vec<u32>,
    /// Native sparse attention; none: dense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nsa: Option<NsaSpec>,
    /// Mixture of experts; none: every layer is dense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeConfig>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// What a person writes: what is not said follows from the rest.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    model_type: Family,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: Option<usize>,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    v_head_dim: Option<usize>,
    #[serde(default = "max_position_embeddings")]
    max_position_embeddings: usize,
    #[serde(default = "norm_eps")]
    rms_norm_eps: f64,
    #[serde(default = "rope_theta")]
    rope_theta: f64,
    rope_scaling: Option<RopeScaling>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    gelu_exact: bool,
    sliding_window: Option<usize>,
    layer_types: Option<Vec<LayerType>>,
    #[serde(default = "initializer_range")]
    initializer_range: f64,
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: OneOrMany,
    nsa: Option<NsaSpec>,
    moe: Option<MoeConfig>,
}

fn max_position_embeddings() -> usize {
    8192
}

fn norm_eps() -> f64 {
    1e-6
}

fn rope_theta() -> f64 {
    10_000.0
}

fn initializer_range() -> f64 {
    0.02
}

/// An end-of-text id, or several.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl From<OneOrMany> for Vec<u32> {
    fn from(ids: OneOrMany) -> Self {
        match ids {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

impl TryFrom<Raw> for ModelConfig {
    type Error = Error;

    fn try_from(raw: Raw) -> Result<Self> {
        let head_dim = match raw.head_dim {
            Some(dim) => dim,
            None => default_head_dim(raw.hidden_size, raw.num_attention_heads)?,
        };
        let config = Self {
            model_type: raw.model_type,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size.unwrap_or(raw.hidden_size.saturating_mul(4)),
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim,
            v_head_dim: raw.v_head_dim.unwrap_or(head_dim),
            max_position_embeddings: raw.max_position_embeddings,
            norm_eps: raw.rms_norm_eps,
            rope_theta: raw.rope_theta,
            rope_scaling: raw.rope_scaling,
            tie_word_embeddings: raw.tie_word_embeddings,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            gelu_exact: raw.gelu_exact,
            sliding_window: raw.sliding_window,
            layer_types: raw.layer_types,
            initializer_range: raw.initializer_range,
            bos_token_id: raw.bos_token_id,
            eos_token_ids: raw.eos_token_id.into(),
            nsa: raw.nsa,
            moe: raw.moe,
        };
        config.validate()?;
        Ok(config)
    }
}

/// `hidden_size / heads`, when it divides.
pub(crate) fn default_head_dim(hidden_size: usize, heads: usize) -> Result<usize> {
    if heads == 0 || !hidden_size.is_multiple_of(heads) {
        return Err(Error::Config(format!(
            "hidden_size = {hidden_size} is not divisible by num_attention_heads = {heads}; \
             change one of them or give head_dim"
        )));
    }
    Ok(hidden_size / heads)
}

impl ModelConfig {
    /// Heads and their dimensions.
    pub fn dims(&self) -> Dims {
        Dims {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            key_dim: self.head_dim,
            value_dim: self.v_head_dim,
        }
    }

    /// Whether norms are LayerNorm with a bias (else RMSNorm).
    pub fn layer_norm(&self) -> bool {
        self.model_type == Family::Gpt2
    }

    /// Whether positions are learned embeddings (else RoPE).
    pub fn learned_positions(&self) -> bool {
        self.model_type == Family::Gpt2
    }

    /// Whether query and key heads are normalised before RoPE.
    pub fn qk_norm(&self) -> bool {
        self.model_type == Family::Qwen3
    }

    /// Whether q, k, v have biases.
    pub fn qkv_bias(&self) -> bool {
        matches!(self.model_type, Family::Gpt2 | Family::Qwen2) || self.attention_bias
    }

    /// Whether the attention's output projection has a bias.
    pub fn output_bias(&self) -> bool {
        self.model_type == Family::Gpt2 || self.attention_bias
    }

    /// Whether the feed-forward part has biases.
    pub fn feed_forward_bias(&self) -> bool {
        self.model_type == Family::Gpt2 || self.mlp_bias
    }

    /// Nonlinearity of the feed-forward part.
    pub fn activation(&self) -> Activation {
        match (self.model_type, self.gelu_exact) {
            (Family::Gpt2, false) => Activation::GeluTanh,
            (Family::Gpt2, true) => Activation::GeluExact,
            _ => Activation::SwiGlu,
        }
    }

    /// The sliding window of a layer, if it has one.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let slides = match &self.layer_types {
            None => true,
            Some(types) => types.get(layer) == Some(&LayerType::SlidingAttention),
        };
        self.sliding_window.filter(|_| slides)
    }

    /// The experts of a layer, if it has any.
    pub fn experts(&self, layer: usize) -> Option<&MoeConfig> {
        self.moe.as_ref().filter(|moe| layer >= moe.first_dense_layers)
    }
}
