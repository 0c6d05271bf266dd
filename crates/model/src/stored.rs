//! How a parameter stands in a file: under its own name for every family but GPT-2, whose
//! matrices are transposed (`Conv1D`, `[in, out]`) and whose q, k, v are one tensor.

use crate::config::{Family, ModelConfig};

/// Which part of the file's tensor a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// Its transpose.
    Transposed,
    /// The i-th third of the columns, transposed: q, k or v of GPT-2's `c_attn` weight.
    TransposedThird(usize),
    /// The i-th third: q, k or v of GPT-2's `c_attn` bias.
    Third(usize),
}

/// Where a parameter stands in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub name: String,
    pub part: Part,
}

impl Stored {
    /// The file's tensor for the parameter called `name`.
    pub fn of(config: &ModelConfig, name: &str) -> Self {
        match config.model_type {
            Family::Gpt2 => gpt2(name),
            _ => Self { name: name.to_owned(), part: Part::Whole },
        }
    }

    /// The shape of the file's tensor when the parameter's is `shape`.
    pub fn shape(&self, shape: &[usize]) -> Vec<usize> {
        match (self.part, shape) {
            (Part::Transposed, &[out, inp]) => vec![inp, out],
            (Part::TransposedThird(_), &[out, inp]) => vec![inp, 3 * out],
            (Part::Third(_), &[out]) => vec![3 * out],
            _ => shape.to_vec(),
        }
    }
}

fn gpt2(name: &str) -> Stored {
    use Part::{Third, Transposed, TransposedThird, Whole};
    let stored = |name: &str, part| Stored { name: name.to_owned(), part };
    match name {
        "model.embed_tokens.weight" => return stored("transformer.wte.weight", Whole),
        "model.embed_positions.weight" => return stored("transformer.wpe.weight", Whole),
        "model.norm.weight" => return stored("transformer.ln_f.weight", Whole),
        "model.norm.bias" => return stored("transformer.ln_f.bias", Whole),
        _ => {}
    }
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|r| r.split_once('.'))
    else {
        return stored(name, Whole);
    };
    let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let bias = kind == "bias";
    let (module, part) = match module {
        "input_layernorm" => ("ln_1", Whole),
        "post_attention_layernorm" => ("ln_2", Whole),
        "self_attn.q_proj" => ("attn.c_attn", if bias { Third(0) } else { TransposedThird(0) }),
        "self_attn.k_proj" => ("attn.c_attn", if bias { Third(1) } else { TransposedThird(1) }),
        "self_attn.v_proj" => ("attn.c_attn", if bias { Third(2) } else { TransposedThird(2) }),
        "self_attn.o_proj" => ("attn.c_proj", if bias { Whole } else { Transposed }),
        "mlp.up_proj" => ("mlp.c_fc", if bias { Whole } else { Transposed }),
        _ => ("mlp.c_proj", if bias { Whole } else { Transposed }),
    };
    stored(&format!("transformer.h.{layer}.{module}.{kind}"), part)
}

/// Whether a tensor that no parameter asks for is a known buffer without meaning: causal masks
/// and inverse frequencies that old files carry.
pub(crate) fn is_buffer(config: &ModelConfig, name: &str) -> bool {
    match config.model_type {
        Family::Gpt2 => name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"),
        Family::Tercet => false,
        _ => name.ends_with(".rotary_emb.inv_freq"),
    }
}
