//! From ggml's names, shapes and row order to a model folder.

use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use tercet_tensor::{DType, Tensor};

use super::dequant::Quant;
use super::read::Gguf;
use super::rope_factors;
use super::tokens::{TokenizerFiles, tokenizer_files};
use crate::config::{Family, ModelConfig, RopeScaling, default_head_dim};
use crate::folder::write_text;
use crate::layout::{ParamSpec, parameters};
use crate::{Model, Result, Tokenizer, folder};

/// Llama 3's RoPE divisors.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// What was imported.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The model's shape.
    pub config: ModelConfig,
    /// Its parameters.
    pub parameters: usize,
    /// How they are stored now.
    pub dtype: DType,
}

/// Converts a GGUF file into a new Hugging Face folder, stored as `dtype`, or when none is given
/// as f32 if the file is wholly f32 and else as bf16.
pub fn import(path: &Path, out: &Path, dtype: Option<DType>) -> Result<Imported> {
    let gguf = Gguf::open(path)?;
    let files = tokenizer_files(&gguf)?;
    let config = config(&gguf, &files)?;
    let tokenizer = Tokenizer::from_bytes(files.tokenizer.as_bytes())?;
    tokenizer.check_fits(config.vocab_size)?;
    let exact = gguf.tensors.values().all(|entry| entry.quant == Quant::F32);
    let dtype = dtype.unwrap_or(if exact { DType::F32 } else { DType::BF16 });

    folder::create(out, |dir| {
        let specs = parameters(&config);
        refuse_extras(&gguf, &specs)?;
        let tensors: Result<Vec<Tensor>> =
            specs.par_iter().map(|spec| tensor(&gguf, &config, spec, dtype)).collect();
        let model = Model::from_tensors(config.clone(), tensors?)?;
        model.save(dir)?;
        write_text(&dir.join("tokenizer.json"), &files.tokenizer)?;
        write_text(&dir.join("tokenizer_config.json"), &files.config)?;
        write_text(&dir.join("generation_config.json"), &files.generation)?;
        Ok(Imported { parameters: model.params().elements(), config, dtype })
    })
}

fn config(gguf: &Gguf, files: &TokenizerFiles) -> Result<ModelConfig> {
    let arch = gguf.text("general.architecture")?;
    let arch = gguf.need("general.architecture", arch)?;
    let family = match arch.as_str() {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => {
            return gguf.fail(format!(
                "is of architecture {other:?}; llama (with mistral), qwen2 and qwen3 are converted"
            ));
        }
    };
    let count = |name: &str| gguf.count(&format!("{arch}.{name}"));
    let need = |name: &str| -> Result<usize> {
        let key = format!("{arch}.{name}");
        gguf.need(&key, gguf.count(&key)?)
    };
    if count("expert_count")?.unwrap_or(0) > 0 {
        return gguf.fail("is a mixture of experts, which is not converted");
    }
    if count("attention.sliding_window")?.unwrap_or(0) > 0 {
        return gguf.fail("has a sliding window, which is not converted");
    }
    let hidden_size = need("embedding_length")?;
    let heads = need("attention.head_count")?;
    let head_dim = match count("attention.key_length")? {
        Some(dim) => dim,
        None => default_head_dim(hidden_size, heads)?,
    };
    let value_dim = count("attention.value_length")?.unwrap_or(head_dim);
    let rotated = count("rope.dimension_count")?.unwrap_or(head_dim);
    if rotated != head_dim || value_dim != head_dim {
        return gguf.fail(format!(
            "has heads of {head_dim} keys, {value_dim} values and {rotated} rotated dimensions; \
             only equal ones are converted"
        ));
    }
    let Some(embedding) = gguf.tensors.get("token_embd.weight") else {
        return gguf.fail("lacks tensor token_embd.weight");
    };
    let rope_theta = gguf.real(&format!("{arch}.rope.freq_base"))?.unwrap_or(10_000.0);
    let context = need("context_length")?;
    let config = ModelConfig {
        model_type: family,
        vocab_size: embedding.shape[0],
        hidden_size,
        intermediate_size: need("feed_forward_length")?,
        num_hidden_layers: need("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: count("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        v_head_dim: head_dim,
        max_position_embeddings: context,
        norm_eps: gguf
            .real(&format!("{arch}.attention.layer_norm_rms_epsilon"))?
            .map_or(1e-6, shortest),
        rope_theta,
        rope_scaling: rope_scaling(gguf, &arch, rope_theta, context)?,
        tie_word_embeddings: !gguf.tensors.contains_key("output.weight"),
        attention_bias: family == Family::Llama && gguf.tensors.contains_key("blk.0.attn_q.bias"),
        mlp_bias: false,
        gelu_exact: false,
        sliding_window: None,
        layer_types: None,
        initializer_range: 0.02,
        bos_token_id: files.bos,
        eos_token_ids: files.eos.into_iter().collect(),
        nsa: None,
        moe: None,
    };
    config.validate()?;
    Ok(config)
}

/// An epsilon stored as f32 as the decimal number it was written as: 1e-5, not 9.99999974e-6.
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn rope_scaling(
    gguf: &Gguf,
    arch: &str,
    theta: f64,
    context: usize,
) -> Result<Option<RopeScaling>> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let factor = gguf.real(&key("factor"))?;
    match gguf.text(&key("type"))?.as_deref() {
        None | Some("none") => {}
        Some("yarn") => {
            let original = gguf.count(&key("original_context_length"))?.unwrap_or(context);
            let factor = gguf.need(&key("factor"), factor)?;
            // llama.cpp multiplies this onto what the factor gives by default.
            if gguf.real(&key("attn_factor"))?.unwrap_or(1.0) != 1.0 {
                return gguf.fail("has a YaRN attention factor, which is not converted");
            }
            return Ok(Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: None,
                truncate: true,
            }));
        }
        Some(other) => {
            return gguf.fail(format!("scales RoPE by {other:?}; only yarn and llama3 are known"));
        }
    }
    let Some(entry) = gguf.tensors.get(ROPE_FACTORS) else { return Ok(None) };
    match rope_factors::recognise(&gguf.read(entry)?, theta) {
        Some(scaling) => Ok(Some(scaling)),
        None => gguf.fail(format!("has {ROPE_FACTORS} that are not those of Llama 3.1 or 3.2")),
    }
}

/// ggml's name of a parameter.
fn ggml_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let rest = name.strip_prefix("model.layers.").unwrap_or(name);
    let (layer, rest) = rest.split_once('.').unwrap_or(("", rest));
    let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{layer}.{module}.{kind}")
}

fn refuse_extras(gguf: &Gguf, specs: &[ParamSpec]) -> Result<()> {
    let known: std::collections::HashSet<String> =
        specs.iter().map(|spec| ggml_name(&spec.name)).collect();
    let extra = gguf.tensors.keys().find(|name| *name != ROPE_FACTORS && !known.contains(*name));
    match extra {
        Some(name) => gguf.fail(format!("has tensor {name}, which is not converted")),
        None => Ok(()),
    }
}

fn tensor(gguf: &Gguf, config: &ModelConfig, spec: &ParamSpec, dtype: DType) -> Result<Tensor> {
    let name = ggml_name(&spec.name);
    let Some(entry) = gguf.tensors.get(&name) else {
        return gguf.fail(format!("lacks tensor {name}"));
    };
    if entry.shape != spec.shape {
        return gguf.fail(format!(
            "gives tensor {name} the shape {:?}, expected {:?}",
            entry.shape, spec.shape
        ));
    }
    let mut values = gguf.read(entry)?;
    // llama.cpp stores Llama's q and k with each head's rotated pairs side by side.
    let paired = spec.name.contains(".q_proj.") || spec.name.contains(".k_proj.");
    if config.model_type == Family::Llama && paired {
        values = unpair(&values, spec.shape[0], config.head_dim);
    }
    Ok(match dtype {
        DType::BF16 => {
            Tensor::from_bf16(values.into_iter().map(bf16::from_f32).collect(), &spec.shape)?
        }
        _ => Tensor::from_f32(values, &spec.shape)?,
    })
}

/// Rows of each head from (x0, y0, x1, y1, …) to (x0, x1, …, y0, y1, …).
fn unpair(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / rows;
    let source = |row: usize| {
        let (head, at) = (row / head_dim, row % head_dim);
        let (side, pair) = (at / (head_dim / 2), at % (head_dim / 2));
        head * head_dim + 2 * pair + side
    };
    (0..rows).flat_map(|row| &values[source(row) * width..][..width]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotated_pairs_go_back_to_halves() {
        // Two heads of four rows: the file's order names each row by where it belongs.
        let file = [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
        let expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        assert_eq!(unpair(&file, 8, 4), expected);
    }

    #[test]
    fn epsilons_keep_the_decimal_they_were_written_as() {
        assert_eq!(shortest(f64::from(1e-5f32)), 1e-5);
    }
}
