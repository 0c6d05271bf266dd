//! Hugging Face `config.json` ⇄ [`ModelConfig`].
//!
//! Reading is lenient about fields that do not change the arithmetic (there are dozens, and new
//! ones with every release of transformers) and strict about those that do: an activation or a
//! RoPE type we do not compute is an error, never ignored. The file of our own family is strict
//! throughout.

use serde_json::{Map, Value, json};

use crate::config::{Family, LayerType, ModelConfig, RopeScaling, default_head_dim};
use crate::{Error, Result};

/// Fields transformers adds to every file; they say nothing about the shape.
const BOOKKEEPING: [&str; 8] = [
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "pad_token_id",
    "auto_map",
];

fn fail<T>(text: String) -> Result<T> {
    Err(Error::Config(text))
}

/// Reads the text of a `config.json`.
pub fn from_json(text: &str) -> Result<ModelConfig> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| Error::Config(format!("is not JSON: {e}")))?;
    let Value::Object(mut map) = value else {
        return fail("is not a JSON object".into());
    };
    let family = match map.get("model_type").and_then(Value::as_str) {
        Some("tercet") => {
            for name in BOOKKEEPING {
                map.shift_remove(name);
            }
            return serde_json::from_value(Value::Object(map))
                .map_err(|e| Error::Config(strip_prefix(&e.to_string())));
        }
        Some("gpt2") => return gpt2(&Fields(&map)),
        Some("llama") => Family::Llama,
        Some("mistral") => Family::Mistral,
        Some("qwen2") => Family::Qwen2,
        Some("qwen3") => Family::Qwen3,
        Some(other) => {
            return fail(format!(
                "model_type \"{other}\" is not supported; expected one of gpt2, llama, mistral, \
                 qwen2, qwen3, tercet"
            ));
        }
        None => return fail("has no model_type".into()),
    };
    llama_like(family, &Fields(&map))
}

/// Writes the `config.json` of a model whose tensors are stored as `dtype` ("float32" or
/// "bfloat16").
pub fn to_json(config: &ModelConfig, dtype: &str) -> String {
    let value = match config.model_type {
        Family::Tercet => {
            let mut value = serde_json::to_value(config).unwrap_or_default();
            if let Value::Object(map) = &mut value {
                map.insert("architectures".into(), json!(["TercetForCausalLM"]));
            }
            value
        }
        Family::Gpt2 => gpt2_json(config),
        _ => llama_like_json(config),
    };
    let value = with_dtype(value, dtype);
    format!("{value:#}\n")
}

/// The same file for another storage type.
pub(crate) fn with_dtype(mut value: Value, dtype: &str) -> Value {
    if let Value::Object(map) = &mut value {
        // Every release of transformers reads `torch_dtype`; the newer name replaces it where
        // the file already uses it.
        let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(key.into(), json!(dtype));
    }
    value
}

/// Our own errors come through serde with our prefix already on them.
fn strip_prefix(text: &str) -> String {
    text.strip_prefix("model config: ").unwrap_or(text).to_owned()
}

/// Typed access to a JSON object; `null` is the same as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn read<T>(
        &self,
        name: &str,
        what: &str,
        as_type: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match as_type(value) {
            Some(read) => Ok(Some(read)),
            None => fail(format!("{name} = {value} is not {what}")),
        }
    }

    fn count(&self, name: &str) -> Result<Option<usize>> {
        self.read(name, "a whole number", |v| v.as_u64().and_then(|n| n.try_into().ok()))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.read(name, "a number", Value::as_f64)
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.read(name, "true or false", Value::as_bool)
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.read(name, "a text", Value::as_str)
    }

    fn need<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::Config(format!("{name} is missing")))
    }

    fn need_count(&self, name: &str) -> Result<usize> {
        self.need(name, self.count(name)?)
    }

    fn token(&self, name: &str) -> Result<Option<u32>> {
        self.read(name, "a token id", |v| v.as_u64().and_then(|n| n.try_into().ok()))
    }

    /// One id or a list of ids.
    fn tokens(&self, name: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.read(name, "a token id or a list of them", |v| match v {
            Value::Array(items) => items.iter().map(one).collect(),
            v => one(v).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// Refuses a value that would change the arithmetic in a way we do not compute.
    fn only(&self, name: &str, expected: Value) -> Result<()> {
        match self.get(name) {
            Some(value) if *value != expected => {
                fail(format!("{name} = {value} is not supported, only {expected}"))
            }
            _ => Ok(()),
        }
    }
}

/// Token ids outside the vocabulary stand in some published files (gpt2's 50256 over a cut
/// vocabulary) and mean that no such token exists.
fn fits(id: &u32, vocab_size: usize) -> bool {
    (*id as usize) < vocab_size
}

fn gpt2(fields: &Fields) -> Result<ModelConfig> {
    fields.only("add_cross_attention", json!(false))?;
    fields.only("scale_attn_weights", json!(true))?;
    fields.only("scale_attn_by_inverse_layer_idx", json!(false))?;
    let gelu_exact = match fields.text("activation_function")?.unwrap_or("gelu_new") {
        "gelu_new" | "gelu_pytorch_tanh" => false,
        "gelu" => true,
        other => {
            return fail(format!(
                "activation_function = \"{other}\" is not supported, only gelu_new, \
                 gelu_pytorch_tanh, gelu"
            ));
        }
    };
    let hidden_size = fields.need_count("n_embd")?;
    let heads = fields.need_count("n_head")?;
    let head_dim = default_head_dim(hidden_size, heads)?;
    let vocab_size = fields.need_count("vocab_size")?;
    let eos = fields.tokens("eos_token_id")?;
    let config = ModelConfig {
        model_type: Family::Gpt2,
        vocab_size,
        hidden_size,
        intermediate_size: fields.count("n_inner")?.unwrap_or(hidden_size.saturating_mul(4)),
        num_hidden_layers: fields.need_count("n_layer")?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        v_head_dim: head_dim,
        max_position_embeddings: fields.count("n_positions")?.unwrap_or(1024),
        norm_eps: fields.number("layer_norm_epsilon")?.unwrap_or(1e-5),
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(true),
        attention_bias: false,
        mlp_bias: false,
        gelu_exact,
        sliding_window: None,
        layer_types: None,
        initializer_range: fields.number("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id")?.filter(|id| fits(id, vocab_size)),
        eos_token_ids: eos.into_iter().filter(|id| fits(id, vocab_size)).collect(),
        nsa: None,
        moe: None,
    };
    config.validate()?;
    Ok(config)
}

fn llama_like(family: Family, fields: &Fields) -> Result<ModelConfig> {
    fields.only("hidden_act", json!("silu"))?;
    fields.only("partial_rotary_factor", json!(1.0))?;
    let hidden_size = fields.need_count("hidden_size")?;
    let heads = fields.need_count("num_attention_heads")?;
    let layers = fields.need_count("num_hidden_layers")?;
    let head_dim = match fields.count("head_dim")? {
        Some(dim) => dim,
        None => default_head_dim(hidden_size, heads)?,
    };
    let max_position_embeddings = fields.count("max_position_embeddings")?.unwrap_or(2048);
    let (rope_theta, rope_scaling) = rope(fields, max_position_embeddings)?;
    let (sliding_window, layer_types) = sliding(family, fields, layers)?;
    let biases = matches!(family, Family::Llama | Family::Qwen3);
    let vocab_size = fields.need_count("vocab_size")?;
    let eos = fields.tokens("eos_token_id")?;
    let config = ModelConfig {
        model_type: family,
        vocab_size,
        hidden_size,
        intermediate_size: fields.need_count("intermediate_size")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: fields.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        v_head_dim: head_dim,
        max_position_embeddings,
        norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: biases && fields.flag("attention_bias")?.unwrap_or(false),
        mlp_bias: family == Family::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
        gelu_exact: false,
        sliding_window,
        layer_types,
        initializer_range: fields.number("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id")?.filter(|id| fits(id, vocab_size)),
        eos_token_ids: eos.into_iter().filter(|id| fits(id, vocab_size)).collect(),
        nsa: None,
        moe: None,
    };
    config.validate()?;
    Ok(config)
}

/// Base and scaling from either spelling: `rope_theta` beside `rope_scaling` (transformers 4),
/// or both inside `rope_parameters` (transformers 5).
fn rope(fields: &Fields, context: usize) -> Result<(f64, Option<RopeScaling>)> {
    let object = |name: &str| -> Result<Option<Fields>> {
        Ok(fields.read(name, "an object", Value::as_object)?.map(Fields))
    };
    let inside = match object("rope_parameters")? {
        Some(inside) => Some(inside),
        None => object("rope_scaling")?,
    };
    let outside = fields.number("rope_theta")?;
    let Some(inside) = inside else { return Ok((outside.unwrap_or(10_000.0), None)) };
    let theta = inside.number("rope_theta")?.or(outside).unwrap_or(10_000.0);
    inside.only("partial_rotary_factor", json!(1.0))?;
    let kind = match inside.text("rope_type")? {
        Some(kind) => kind,
        None => inside.text("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => return Ok((theta, None)),
        "llama3" => RopeScaling::Llama3 {
            factor: inside.need("factor", inside.number("factor")?)?,
            low_freq_factor: inside.need("low_freq_factor", inside.number("low_freq_factor")?)?,
            high_freq_factor: inside
                .need("high_freq_factor", inside.number("high_freq_factor")?)?,
            original_max_position_embeddings: inside
                .need_count("original_max_position_embeddings")?,
        },
        "yarn" => yarn(&inside, context)?,
        other => {
            return fail(format!(
                "rope_type \"{other}\" is not supported, only default, llama3, yarn"
            ));
        }
    };
    Ok((theta, Some(scaling)))
}

fn yarn(inside: &Fields, context: usize) -> Result<RopeScaling> {
    // The order of the fallbacks is that of transformers' `_compute_yarn_parameters`.
    let original = inside.count("original_max_position_embeddings")?.unwrap_or(context);
    let factor = match inside.number("factor")? {
        Some(factor) => factor,
        None => context as f64 / original.max(1) as f64,
    };
    let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention_factor = match inside.number("attention_factor")? {
        Some(given) => Some(given),
        None => match (inside.number("mscale")?, inside.number("mscale_all_dim")?) {
            (Some(a), Some(b)) if a != 0.0 && b != 0.0 => Some(mscale(a) / mscale(b)),
            _ => None,
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast: inside.number("beta_fast")?.filter(|&b| b != 0.0).unwrap_or(32.0),
        beta_slow: inside.number("beta_slow")?.filter(|&b| b != 0.0).unwrap_or(1.0),
        attention_factor,
        truncate: inside.flag("truncate")?.unwrap_or(true),
    })
}

/// Which layers slide. Qwen has a switch and a first sliding layer beside the window.
fn sliding(
    family: Family,
    fields: &Fields,
    layers: usize,
) -> Result<(Option<usize>, Option<Vec<LayerType>>)> {
    let qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
    let window = fields.count("sliding_window")?;
    let window = match family {
        Family::Mistral => window,
        _ if qwen => window.filter(|_| fields.0.get("use_sliding_window") == Some(&json!(true))),
        _ => None,
    };
    if window.is_none() {
        return Ok((None, None));
    }
    let listed = fields.read("layer_types", "a list of attention kinds", |v| {
        serde_json::from_value::<Vec<LayerType>>(v.clone()).ok()
    })?;
    if listed.is_some() || !qwen {
        return Ok((window, listed));
    }
    let first = fields.count("max_window_layers")?.unwrap_or(28);
    let kind = |i| if i < first { LayerType::FullAttention } else { LayerType::SlidingAttention };
    // `layers` is checked later; a false file must not make this list long.
    Ok((window, Some((0..layers.min(1 << 12)).map(kind).collect())))
}

fn special_tokens(map: &mut Map<String, Value>, config: &ModelConfig) {
    map.insert("bos_token_id".into(), json!(config.bos_token_id));
    let eos = match config.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    map.insert("eos_token_id".into(), eos);
}

fn gpt2_json(config: &ModelConfig) -> Value {
    let mut map = Map::new();
    let activation = if config.gelu_exact { "gelu" } else { "gelu_new" };
    map.insert("activation_function".into(), json!(activation));
    map.insert("architectures".into(), json!(["GPT2LMHeadModel"]));
    special_tokens(&mut map, config);
    map.insert("initializer_range".into(), json!(config.initializer_range));
    map.insert("layer_norm_epsilon".into(), json!(config.norm_eps));
    map.insert("model_type".into(), json!("gpt2"));
    map.insert("n_embd".into(), json!(config.hidden_size));
    map.insert("n_head".into(), json!(config.num_attention_heads));
    map.insert("n_inner".into(), json!(config.intermediate_size));
    map.insert("n_layer".into(), json!(config.num_hidden_layers));
    map.insert("n_positions".into(), json!(config.max_position_embeddings));
    map.insert("tie_word_embeddings".into(), json!(config.tie_word_embeddings));
    map.insert("vocab_size".into(), json!(config.vocab_size));
    Value::Object(map)
}

fn llama_like_json(config: &ModelConfig) -> Value {
    let (architecture, qwen) = match config.model_type {
        Family::Mistral => ("MistralForCausalLM", false),
        Family::Qwen2 => ("Qwen2ForCausalLM", true),
        Family::Qwen3 => ("Qwen3ForCausalLM", true),
        _ => ("LlamaForCausalLM", false),
    };
    let mut map = Map::new();
    map.insert("architectures".into(), json!([architecture]));
    if matches!(config.model_type, Family::Llama | Family::Qwen3) {
        map.insert("attention_bias".into(), json!(config.attention_bias));
    }
    special_tokens(&mut map, config);
    map.insert("head_dim".into(), json!(config.head_dim));
    map.insert("hidden_act".into(), json!("silu"));
    map.insert("hidden_size".into(), json!(config.hidden_size));
    map.insert("initializer_range".into(), json!(config.initializer_range));
    map.insert("intermediate_size".into(), json!(config.intermediate_size));
    if let Some(types) = &config.layer_types {
        map.insert("layer_types".into(), json!(types));
    }
    map.insert("max_position_embeddings".into(), json!(config.max_position_embeddings));
    if config.model_type == Family::Llama {
        map.insert("mlp_bias".into(), json!(config.mlp_bias));
    }
    map.insert("model_type".into(), json!(config.model_type));
    map.insert("num_attention_heads".into(), json!(config.num_attention_heads));
    map.insert("num_hidden_layers".into(), json!(config.num_hidden_layers));
    map.insert("num_key_value_heads".into(), json!(config.num_key_value_heads));
    map.insert("rms_norm_eps".into(), json!(config.norm_eps));
    // The spelling of transformers 4, which 5 reads as well.
    map.insert("rope_scaling".into(), json!(config.rope_scaling));
    map.insert("rope_theta".into(), json!(config.rope_theta));
    if qwen || config.model_type == Family::Mistral {
        map.insert("sliding_window".into(), json!(config.sliding_window));
    }
    map.insert("tie_word_embeddings".into(), json!(config.tie_word_embeddings));
    if qwen {
        if config.sliding_window.is_some() && config.layer_types.is_none() {
            map.insert("max_window_layers".into(), json!(0));
        }
        map.insert("use_sliding_window".into(), json!(config.sliding_window.is_some()));
    }
    map.insert("vocab_size".into(), json!(config.vocab_size));
    Value::Object(map)
}
