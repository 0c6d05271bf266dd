//! Tiny models and a tiny tokenizer.

#![allow(dead_code)] // every test file uses its own part

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tercet_model::{Adapter, Model, ModelConfig, Tokenizer};
use tercet_tensor::{DType, Tensor};

/// A config from JSON fields over small defaults of our own family.
pub fn config(fields: Value) -> ModelConfig {
    let mut base = json!({
        "model_type": "tercet",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
    });
    for (key, value) in fields.as_object().unwrap() {
        base[key] = value.clone();
    }
    serde_json::from_value(base).unwrap()
}

/// A spec whose every branch leaves something out within a hundred tokens.
pub fn spec(compressor: &str) -> Value {
    json!({
        "compress_block": 8,
        "compress_stride": 4,
        "select_block": 8,
        "select_count": 4,
        "window": 12,
        "compressor": compressor,
    })
}

pub fn nsa(compressor: &str) -> ModelConfig {
    config(json!({ "nsa": spec(compressor), "v_head_dim": 4 }))
}

pub fn model(config: ModelConfig) -> Model {
    Model::new(config, 7, DType::F32).unwrap()
}

/// Token ids that look random and are not.
pub fn ids(count: usize, vocab: usize) -> Vec<i32> {
    let mut state = 12345u64;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % vocab as u64) as i32
        })
        .collect()
}

/// The text of a byte-level `tokenizer.json`: one token a byte, in the order of the bytes'
/// letters, then one token that holds a character and a half ("x" and the first byte of "日"),
/// then `<|end|>`.
pub fn tokenizer_json() -> Value {
    let letters: BTreeSet<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    let mut vocab: serde_json::Map<String, Value> =
        letters.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    vocab.insert("xæ".into(), json!(256));
    vocab.insert("<|end|>".into(), json!(257));
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 257, "content": "<|end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": ["x æ"],
        },
    })
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(tokenizer_json().to_string().as_bytes()).unwrap()
}

/// Writes a model folder with the tiny tokenizer.
pub fn save(model: &Model, dir: &Path) {
    model.save(dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
}

/// A copy of the model with the adapter active, every B holding numbers within ±0.1.
pub fn train_by_chance(adapter: Adapter, model: &Model, name: &str) -> Model {
    let mut model = model.clone();
    model.attach(name, adapter).unwrap();
    model.activate(Some(name)).unwrap();
    let params = model.trained_mut();
    for slot in 0..params.len() {
        if params.name(slot).contains("lora_B") {
            let (shape, dtype) = (params.tensor(slot).shape().to_vec(), params.dtype());
            let len: usize = shape.iter().product();
            let at = |i: usize| (((i * 37 + slot * 11) % 101) as f32 / 50.0 - 1.0) * 0.1;
            let tensor = Tensor::from_f32((0..len).map(at).collect(), &shape).unwrap();
            params.set(slot, tensor.to_dtype(dtype).unwrap()).unwrap();
        }
    }
    model
}

/// Where shared golden files are; `None`, said aloud, when they are not there.
pub fn golden(name: &str) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let given = std::env::var_os("TERCET_GOLDEN").map(PathBuf::from);
    let shared = given.unwrap_or_else(|| own.join("../../../shared/golden")).join("hf").join(name);
    let found = [shared, own.join("tests/data").join(name)].into_iter().find(|dir| dir.is_dir());
    if found.is_none() {
        println!("no golden {name}: not tested");
    }
    found
}
