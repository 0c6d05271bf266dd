//! The vocabulary of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

use serde_json::{Map, Value, json};

use super::read::Gguf;
use crate::Result;

/// ggml's token kinds that are matched in text before anything else.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Llama 3's and Qwen2's way to cut text before merging; they differ in how digits group.
const SPLIT: [&str; 3] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// The texts of the three files that describe a tokenizer.
pub(super) struct TokenizerFiles {
    pub tokenizer: String,
    pub config: String,
    pub generation: String,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

/// Builds the files; byte-level BPE ("gpt2") vocabularies only.
pub(super) fn tokenizer_files(gguf: &Gguf) -> Result<TokenizerFiles> {
    let kind = gguf.text("tokenizer.ggml.model")?.unwrap_or_default();
    if kind != "gpt2" {
        return gguf.fail(format!(
            "has a {kind:?} vocabulary; only byte-level BPE (\"gpt2\") is converted, so take \
             the model's original Hugging Face folder instead"
        ));
    }
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let tokens = gguf.need("tokenizer.ggml.tokens", tokens)?;
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    let merges = gguf.need("tokenizer.ggml.merges", merges)?;

    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if vocab.insert((*token).to_owned(), json!(id)).is_some() {
            return gguf.fail(format!("lists the token {token:?} twice"));
        }
    }
    let special = |name: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match gguf.count(&key)? {
            Some(id) if id >= tokens.len() => gguf.fail(format!("has a {key} without a token")),
            id => Ok(id.map(|id| id as u32)),
        }
    };
    let (bos, eos) = (special("bos")?, special("eos")?);
    let begins = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(false);
    let first = bos.filter(|_| begins).map(|id| (id, tokens[id as usize]));
    let (normalizer, pre_tokenizer, ignore_merges) = cutting(gguf)?;

    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(gguf, &tokens)?,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(first),
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    });
    let text = |id: Option<u32>| id.map(|id| tokens[id as usize]);
    let config = json!({
        "add_bos_token": begins,
        "bos_token": text(bos),
        "chat_template": gguf.text("tokenizer.chat_template")?,
        "clean_up_tokenization_spaces": false,
        "eos_token": text(eos),
        "pad_token": text(special("padding")?),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": text(special("unknown")?),
    });
    let generation = json!({ "bos_token_id": bos, "eos_token_id": eos });
    Ok(TokenizerFiles {
        tokenizer: format!("{tokenizer:#}\n"),
        config: format!("{config:#}\n"),
        generation: format!("{generation:#}\n"),
        bos,
        eos,
    })
}

fn added_tokens(gguf: &Gguf, tokens: &[&str]) -> Result<Vec<Value>> {
    let kinds = gguf.counts("tokenizer.ggml.token_type")?.unwrap_or_default();
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        return gguf.fail(format!("has {} token types for {} tokens", kinds.len(), tokens.len()));
    }
    let added = |(id, kind): (usize, &u64)| {
        matches!(*kind, CONTROL | USER_DEFINED).then(|| {
            json!({
                "id": id,
                "content": tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind == CONTROL,
            })
        })
    };
    Ok(kinds.iter().enumerate().filter_map(added).collect())
}

fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// Normalizer, pre-tokenizer and whether whole words skip the merges, by llama.cpp's name for
/// the combination. A wrong guess would change every id, so unknown names are refused.
fn cutting(gguf: &Gguf) -> Result<(Value, Value, bool)> {
    let name = gguf.text("tokenizer.ggml.pre")?.unwrap_or_default();
    let split = |digits: &str| {
        let [words, number, rest] = SPLIT;
        json!({
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": { "Regex": format!("{words}{number}{digits}{rest}") },
                    "behavior": "Isolated",
                    "invert": false,
                },
                byte_level(false),
            ],
        })
    };
    match name.as_str() {
        "gpt-2" => Ok((Value::Null, byte_level(true), false)),
        "smollm" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            let both = json!({ "type": "Sequence", "pretokenizers": [digits, byte_level(true)] });
            Ok((Value::Null, both, false))
        }
        "llama-bpe" => Ok((Value::Null, split("{1,3}"), true)),
        "qwen2" => Ok((json!({ "type": "NFC" }), split(""), false)),
        other => gguf.fail(format!(
            "cuts text by the rules called {other:?}; gpt-2, smollm, llama-bpe and qwen2 are known"
        )),
    }
}

/// Puts the first token before every text when the model was trained so.
fn post_processor(first: Option<(u32, &str)>) -> Value {
    let Some((id, token)) = first else { return byte_level(true) };
    let start = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |id: &str, kind: u8| json!({ "Sequence": { "id": id, "type_id": kind } });
    json!({
        "type": "TemplateProcessing",
        "single": [start, text("A", 0)],
        "pair": [start, text("A", 0), text("B", 1)],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}
