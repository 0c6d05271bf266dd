//! Every parameter of a decoder: name, shape, how it starts, and where the decoder finds it.
//!
//! One walk builds both the list (index = slot) and the [`Decoder`] tree of slots, so that the
//! two cannot disagree. Names are those of Hugging Face's Llama for every family; GPT-2's other
//! names and layouts are translated at the file's edge by [`crate::stored`].

use tercet_attention::{Compressor, NsaSpec};

use crate::config::{Activation, ModelConfig};

/// How a fresh parameter is filled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Independent normal numbers of this standard deviation.
    Normal(f64),
    /// Independent numbers, each equally likely anywhere between minus this and this.
    Uniform(f64),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Averages a block: entry (token i, channel c) → channel c is 1/l, plus normal noise.
    /// A linear compressor starts as the mean, which is known to train.
    Averaging {
        /// Tokens of a block (l).
        block: usize,
        /// Standard deviation of the noise.
        noise: f64,
    },
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name, as in the file for all families but GPT-2.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element; never true for a valid configuration.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether weight decay is for it: matrices, not norms, biases or position encodings.
    pub fn decays(&self) -> bool {
        let last = self.name.rsplit('.').next().unwrap_or(&self.name);
        self.shape.len() >= 2 && last.contains("weight")
    }
}

/// Slots of y = x·Wᵀ + b.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearSlots {
    pub weight: usize,
    pub bias: Option<usize>,
}

/// Slots of a norm; a bias means LayerNorm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormSlots {
    pub weight: usize,
    pub bias: Option<usize>,
}

/// Slots of φ for keys or values.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PhiSlots {
    Mean,
    Linear { weight: usize, pe: usize },
    Mlp { weight1: usize, bias1: usize, weight2: usize, bias2: usize, pe: usize },
}

/// Keys and values of one branch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvSlots {
    pub k: LinearSlots,
    pub v: LinearSlots,
}

#[derive(Clone, Debug)]
pub(crate) struct DenseSlots {
    pub kv: KvSlots,
    /// Norms of query and key heads.
    pub qk_norm: Option<(usize, usize)>,
}

#[derive(Clone, Debug)]
pub(crate) struct NsaSlots {
    pub spec: NsaSpec,
    pub cmp: KvSlots,
    pub slc: KvSlots,
    pub win: KvSlots,
    pub gate: LinearSlots,
    pub phi_k: PhiSlots,
    pub phi_v: PhiSlots,
}

#[derive(Clone, Debug)]
pub(crate) enum AttentionSlots {
    Dense(DenseSlots),
    Nsa(Box<NsaSlots>),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SwiGluSlots {
    pub gate: LinearSlots,
    pub up: LinearSlots,
    pub down: LinearSlots,
}

#[derive(Clone, Debug)]
pub(crate) enum FeedForwardSlots {
    SwiGlu(SwiGluSlots),
    Gelu { up: LinearSlots, down: LinearSlots, exact: bool },
    Moe { router: usize, experts: Vec<SwiGluSlots>, shared: Option<SwiGluSlots> },
}

#[derive(Clone, Debug)]
pub(crate) struct LayerSlots {
    pub input_norm: NormSlots,
    pub q: LinearSlots,
    pub attention: AttentionSlots,
    pub o: LinearSlots,
    pub post_norm: NormSlots,
    pub feed_forward: FeedForwardSlots,
}

/// Where the decoder finds its parameters.
#[derive(Clone, Debug)]
pub(crate) struct DecoderSlots {
    pub embed: usize,
    pub positions: Option<usize>,
    pub layers: Vec<LayerSlots>,
    pub norm: NormSlots,
    /// The output matrix; the embedding's slot when tied.
    pub head: usize,
}

/// The parameters of a configuration in slot order.
pub fn parameters(config: &ModelConfig) -> Vec<ParamSpec> {
    layout(config).1
}

/// Slots and parameters of a valid configuration.
pub(crate) fn layout(config: &ModelConfig) -> (DecoderSlots, Vec<ParamSpec>) {
    let mut b = Builder { config, specs: Vec::new() };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let normal = Init::Normal(config.initializer_range);
    let embed = b.add("model.embed_tokens.weight", &[vocab, hidden], normal);
    let positions = config.learned_positions().then(|| {
        b.add("model.embed_positions.weight", &[config.max_position_embeddings, hidden], normal)
    });
    let layers = (0..config.num_hidden_layers).map(|i| b.layer(i)).collect();
    let norm = b.norm("model.norm");
    let head = if config.tie_word_embeddings {
        embed
    } else {
        b.add("lm_head.weight", &[vocab, hidden], normal)
    };
    (DecoderSlots { embed, positions, layers, norm, head }, b.specs)
}

struct Builder<'a> {
    config: &'a ModelConfig,
    specs: Vec<ParamSpec>,
}

impl Builder<'_> {
    fn add(&mut self, name: &str, shape: &[usize], init: Init) -> usize {
        self.specs.push(ParamSpec { name: name.to_owned(), shape: shape.to_vec(), init });
        self.specs.len() - 1
    }

    fn norm(&mut self, name: &str) -> NormSlots {
        let width = self.config.hidden_size;
        let weight = self.add(&format!("{name}.weight"), &[width], Init::Ones);
        let bias = self
            .config
            .layer_norm()
            .then(|| self.add(&format!("{name}.bias"), &[width], Init::Zeros));
        NormSlots { weight, bias }
    }

    fn linear(
        &mut self,
        name: &str,
        [out, inp]: [usize; 2],
        bias: bool,
        init: Init,
    ) -> LinearSlots {
        let weight = self.add(&format!("{name}.weight"), &[out, inp], init);
        let bias = bias.then(|| self.add(&format!("{name}.bias"), &[out], Init::Zeros));
        LinearSlots { weight, bias }
    }

    fn normal(&self) -> Init {
        Init::Normal(self.config.initializer_range)
    }

    /// Projections into the residual stream start smaller, so that its variance does not grow
    /// with depth (GPT-2 §2.3: two such sums a layer).
    fn residual(&self) -> Init {
        let sums = (2 * self.config.num_hidden_layers) as f64;
        Init::Normal(self.config.initializer_range / sums.sqrt())
    }

    fn layer(&mut self, index: usize) -> LayerSlots {
        let config = self.config;
        let (hidden, dims) = (config.hidden_size, config.dims());
        let name = format!("model.layers.{index}");
        let input_norm = self.norm(&format!("{name}.input_layernorm"));
        let at = format!("{name}.self_attn");
        let (bias, normal) = (config.qkv_bias(), self.normal());
        let width = dims.heads * dims.key_dim;
        let q = self.linear(&format!("{at}.q_proj"), [width, hidden], bias, normal);
        let attention = match &config.nsa {
            Some(spec) => self.nsa(&at, spec),
            None => {
                let kv = self.kv(&at, "");
                let qk_norm = config.qk_norm().then(|| {
                    let dim = [dims.key_dim];
                    let q = self.add(&format!("{at}.q_norm.weight"), &dim, Init::Ones);
                    (q, self.add(&format!("{at}.k_norm.weight"), &dim, Init::Ones))
                });
                AttentionSlots::Dense(DenseSlots { kv, qk_norm })
            }
        };
        let width = dims.heads * dims.value_dim;
        let residual = self.residual();
        let o =
            self.linear(&format!("{at}.o_proj"), [hidden, width], config.output_bias(), residual);
        let post_norm = self.norm(&format!("{name}.post_attention_layernorm"));
        let feed_forward = self.feed_forward(&format!("{name}.mlp"), index);
        LayerSlots { input_norm, q, attention, o, post_norm, feed_forward }
    }

    /// Keys and values of one branch; `branch` is "" or "cmp_", "slc_", "win_".
    fn kv(&mut self, at: &str, branch: &str) -> KvSlots {
        let (hidden, dims) = (self.config.hidden_size, self.config.dims());
        let (bias, normal) = (self.config.qkv_bias(), self.normal());
        let k = [dims.kv_heads * dims.key_dim, hidden];
        let v = [dims.kv_heads * dims.value_dim, hidden];
        KvSlots {
            k: self.linear(&format!("{at}.k_{branch}proj"), k, bias, normal),
            v: self.linear(&format!("{at}.v_{branch}proj"), v, bias, normal),
        }
    }

    fn nsa(&mut self, at: &str, spec: &NsaSpec) -> AttentionSlots {
        let (hidden, dims) = (self.config.hidden_size, self.config.dims());
        let [cmp, slc, win] = ["cmp_", "slc_", "win_"].map(|branch| self.kv(at, branch));
        // A zero gate opens every branch by half for every token; it then learns from there. The
        // bias lets a head lean to one branch without spending a direction of its input on it.
        let gate =
            self.linear(&format!("{at}.gate_proj"), [3 * dims.heads, hidden], true, Init::Zeros);
        let phi_k = self.phi(&format!("{at}.phi_k"), spec, dims.key_dim);
        let phi_v = self.phi(&format!("{at}.phi_v"), spec, dims.value_dim);
        AttentionSlots::Nsa(Box::new(NsaSlots {
            spec: spec.clone(),
            cmp,
            slc,
            win,
            gate,
            phi_k,
            phi_v,
        }))
    }

    fn phi(&mut self, name: &str, spec: &NsaSpec, dim: usize) -> PhiSlots {
        let (heads, block) = (self.config.num_key_value_heads, spec.compress_block);
        let flat = block * dim;
        match spec.compressor {
            Compressor::Mean => PhiSlots::Mean,
            Compressor::Linear => {
                let noise = self.config.initializer_range / (block as f64).sqrt();
                let init = Init::Averaging { block, noise };
                let weight = self.add(&format!("{name}_weight"), &[heads, flat, dim], init);
                let pe = self.add(&format!("{name}_pe"), &[heads, block, dim], Init::Zeros);
                PhiSlots::Linear { weight, pe }
            }
            Compressor::Mlp => {
                // As wide as its output; 1/√fan-in keeps the scale of a key through both layers.
                let fan_in = |n: usize| Init::Normal(1.0 / (n as f64).sqrt());
                let shapes = [[heads, flat, dim], [heads, dim, dim]];
                PhiSlots::Mlp {
                    weight1: self.add(&format!("{name}_weight1"), &shapes[0], fan_in(flat)),
                    bias1: self.add(&format!("{name}_bias1"), &[heads, dim], Init::Zeros),
                    weight2: self.add(&format!("{name}_weight2"), &shapes[1], fan_in(dim)),
                    bias2: self.add(&format!("{name}_bias2"), &[heads, dim], Init::Zeros),
                    pe: self.add(&format!("{name}_pe"), &[heads, block, dim], Init::Zeros),
                }
            }
        }
    }

    fn feed_forward(&mut self, at: &str, index: usize) -> FeedForwardSlots {
        let config = self.config;
        let hidden = config.hidden_size;
        if let Some(moe) = config.experts(index) {
            let normal = self.normal();
            let router =
                self.add(&format!("{at}.gate.weight"), &[moe.routed_experts, hidden], normal);
            let experts = (0..moe.routed_experts)
                .map(|e| self.swiglu(&format!("{at}.experts.{e}"), moe.expert_size, false))
                .collect();
            // Shared experts all see every token: one SwiGLU as wide as all of them.
            let width = moe.shared_experts * moe.expert_size;
            let shared =
                (width > 0).then(|| self.swiglu(&format!("{at}.shared_experts"), width, false));
            return FeedForwardSlots::Moe { router, experts, shared };
        }
        let (width, bias) = (config.intermediate_size, config.feed_forward_bias());
        match config.activation() {
            Activation::SwiGlu => FeedForwardSlots::SwiGlu(self.swiglu(at, width, bias)),
            gelu => {
                let (normal, residual) = (self.normal(), self.residual());
                let up = self.linear(&format!("{at}.up_proj"), [width, hidden], bias, normal);
                let down = self.linear(&format!("{at}.down_proj"), [hidden, width], bias, residual);
                FeedForwardSlots::Gelu { up, down, exact: gelu == Activation::GeluExact }
            }
        }
    }

    fn swiglu(&mut self, at: &str, width: usize, bias: bool) -> SwiGluSlots {
        let hidden = self.config.hidden_size;
        let (normal, residual) = (self.normal(), self.residual());
        SwiGluSlots {
            gate: self.linear(&format!("{at}.gate_proj"), [width, hidden], bias, normal),
            up: self.linear(&format!("{at}.up_proj"), [width, hidden], bias, normal),
            down: self.linear(&format!("{at}.down_proj"), [hidden, width], bias, residual),
        }
    }
}
