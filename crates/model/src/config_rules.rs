//! The rules a [`ModelConfig`] must keep, each with a message that says what to do.

use crate::config::{Family, ModelConfig, MoeConfig, RopeScaling};
use crate::{Error, Result};

/// Sizes beyond these are typing errors; they also keep every product of sizes inside 64 bits.
const LARGEST: [(&str, usize); 6] = [
    ("vocab_size", 1 << 24),
    ("hidden_size", 1 << 17),
    ("intermediate_size", 1 << 20),
    ("num_hidden_layers", 1 << 12),
    ("num_attention_heads", 1 << 12),
    ("max_position_embeddings", 1 << 27),
];

const MOST_EXPERTS: usize = 1 << 12;

/// Routed experts of all layers; each is three tensors with names of their own.
const MOST_EXPERTS_IN_ALL: usize = 1 << 17;

fn fail<T>(text: String) -> Result<T> {
    Err(Error::Config(text))
}

impl ModelConfig {
    /// Checks every rule; the error names the field, its value and the rule.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.max_position_embeddings,
        ];
        for ((name, largest), value) in LARGEST.into_iter().zip(sizes) {
            if value == 0 || value > largest {
                return fail(format!("{name} = {value} is outside 1..={largest}"));
            }
        }
        self.dims().validate().map_err(|e| Error::Config(e.to_string()))?;
        if !self.learned_positions() && !self.head_dim.is_multiple_of(2) {
            let dim = self.head_dim;
            return fail(format!("head_dim = {dim} must be even: RoPE rotates pairs"));
        }
        for (name, value) in [
            ("rms_norm_eps", self.norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
        ] {
            positive(name, value)?;
        }
        if let Some(scaling) = &self.rope_scaling {
            rope_scaling(scaling)?;
        }
        self.family_rules()?;
        self.attention_rules()?;
        if let Some(moe) = &self.moe {
            experts(moe, self.num_hidden_layers)?;
        }
        let special = self.eos_token_ids.iter().chain(&self.bos_token_id);
        if let Some(id) = special.into_iter().find(|&&id| id as usize >= self.vocab_size) {
            let vocab = self.vocab_size;
            return fail(format!("token id {id} does not fit vocab_size = {vocab}"));
        }
        Ok(())
    }

    fn family_rules(&self) -> Result<()> {
        let family = self.model_type.name();
        if self.model_type != Family::Tercet {
            for (name, given) in [("nsa", self.nsa.is_some()), ("moe", self.moe.is_some())] {
                if given {
                    return fail(format!(
                        "{name} is not part of model_type = \"{family}\"; \
                         use model_type = \"tercet\" or leave {name} out"
                    ));
                }
            }
            if self.v_head_dim != self.head_dim {
                return fail(format!(
                    "v_head_dim = {} differs from head_dim = {}, which model_type = \"{family}\" \
                     cannot express; use model_type = \"tercet\"",
                    self.v_head_dim, self.head_dim
                ));
            }
        }
        let biases = matches!(self.model_type, Family::Llama | Family::Qwen3);
        for (name, given, allowed) in [
            ("attention_bias", self.attention_bias, biases),
            ("mlp_bias", self.mlp_bias, self.model_type == Family::Llama),
            ("gelu_exact", self.gelu_exact, self.model_type == Family::Gpt2),
        ] {
            if given && !allowed {
                return fail(format!(
                    "{name} cannot be chosen for model_type = \"{family}\"; leave it out"
                ));
            }
        }
        if self.model_type == Family::Gpt2 {
            let whole = self.num_attention_heads * self.head_dim == self.hidden_size;
            if !whole || self.num_key_value_heads != self.num_attention_heads {
                return fail(
                    "gpt2 heads must fill hidden_size exactly, with as many key/value heads".into(),
                );
            }
            if self.rope_scaling.is_some() || self.sliding_window.is_some() {
                return fail("gpt2 has neither rope_scaling nor sliding_window".into());
            }
        }
        Ok(())
    }

    fn attention_rules(&self) -> Result<()> {
        if let Some(spec) = &self.nsa {
            spec.validate().map_err(|e| Error::Config(e.to_string()))?;
            if self.sliding_window.is_some() {
                return fail(
                    "sliding_window and nsa exclude each other: NSA has its own nsa.window".into(),
                );
            }
        }
        if self.sliding_window == Some(0) {
            return fail("sliding_window = 0 must be at least 1, or left out".into());
        }
        if let Some(types) = &self.layer_types
            && types.len() != self.num_hidden_layers
        {
            return fail(format!(
                "layer_types has {} entries, expected num_hidden_layers = {}",
                types.len(),
                self.num_hidden_layers
            ));
        }
        Ok(())
    }
}

fn positive(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    fail(format!("{name} = {value} must be a positive number"))
}

fn rope_scaling(scaling: &RopeScaling) -> Result<()> {
    let original = match *scaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            positive("rope_scaling.factor", factor)?;
            positive("rope_scaling.low_freq_factor", low_freq_factor)?;
            positive("rope_scaling.high_freq_factor", high_freq_factor)?;
            if high_freq_factor <= low_freq_factor {
                return fail(format!(
                    "rope_scaling.high_freq_factor = {high_freq_factor} must be above \
                     low_freq_factor = {low_freq_factor}"
                ));
            }
            original_max_position_embeddings
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: _,
        } => {
            positive("rope_scaling.factor", factor)?;
            positive("rope_scaling.beta_fast", beta_fast)?;
            positive("rope_scaling.beta_slow", beta_slow)?;
            positive("rope_scaling.attention_factor", attention_factor.unwrap_or(1.0))?;
            original_max_position_embeddings
        }
    };
    if original == 0 {
        return fail("rope_scaling.original_max_position_embeddings must be at least 1".into());
    }
    Ok(())
}

fn experts(moe: &MoeConfig, layers: usize) -> Result<()> {
    let MoeConfig { routed_experts, shared_experts, top_k, expert_size, .. } = *moe;
    if routed_experts == 0 || routed_experts > MOST_EXPERTS || shared_experts > MOST_EXPERTS {
        return fail(format!(
            "moe.routed_experts = {routed_experts} must lie in 1..={MOST_EXPERTS} and \
             moe.shared_experts = {shared_experts} in 0..={MOST_EXPERTS}"
        ));
    }
    if routed_experts * layers > MOST_EXPERTS_IN_ALL {
        return fail(format!(
            "moe.routed_experts = {routed_experts} in {layers} layers are more than \
             {MOST_EXPERTS_IN_ALL} experts"
        ));
    }
    if top_k == 0 || top_k > routed_experts {
        return fail(format!(
            "moe.top_k = {top_k} must lie in 1..=routed_experts = {routed_experts}"
        ));
    }
    if expert_size == 0 || expert_size > 1 << 17 {
        return fail(format!("moe.expert_size = {expert_size} is outside 1..={}", 1 << 17));
    }
    if moe.first_dense_layers > layers {
        return fail(format!(
            "moe.first_dense_layers = {} is more than num_hidden_layers = {layers}",
            moe.first_dense_layers
        ));
    }
    if !(moe.balance_loss.is_finite() && moe.balance_loss >= 0.0) {
        return fail(format!("moe.balance_loss = {} must be 0 or more", moe.balance_loss));
    }
    Ok(())
}
