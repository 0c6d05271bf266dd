//! A folder with a chat model of a few thousand parameters, whose ids are known beforehand: a byte
//! is its own id, and three special tokens follow. Shared by the tests of three crates.

#![allow(dead_code, reason = "every test binary uses its own part of this")]

use std::path::Path;

use serde_json::{Map, Value, json};
use tercet_model::{Model, ModelConfig};
use tercet_tensor::DType;

/// `<|endoftext|>`, which ends plain texts.
pub const EOS: i32 = 256;
/// `<|im_start|>`.
pub const START: i32 = 257;
/// `<|im_end|>`.
pub const END: i32 = 258;
/// Rows of the embedding; ids from 259 are free for merges.
pub const VOCAB: usize = 264;
/// Longest context of the model.
pub const CONTEXT: usize = 96;

/// Turns between `<|im_start|>` and `<|im_end|>`.
pub const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{{ m.content }}\
    <|im_end|>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}\
    {% endif %}";

/// A fresh model; the same seed gives the same one.
pub fn model(seed: u64) -> Model {
    model_with(&json!({}), seed)
}

/// The same with further keys of its configuration.
pub fn model_with(more: &Value, seed: u64) -> Model {
    let mut config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "tie_word_embeddings": true,
    });
    let more = more.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(more);
    let config: ModelConfig = serde_json::from_value(config).unwrap();
    Model::new(config, seed, DType::F32).unwrap()
}

/// A folder with such a model, its tokenizer, chat template and end token.
pub fn write_model(folder: &Path, seed: u64) {
    std::fs::create_dir_all(folder).unwrap();
    model(seed).save(folder).unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    write("tokenizer.json", &tokenizer(&[], &Value::Null));
    write("chat_template.jinja", CHATML);
    write("generation_config.json", "{\"eos_token_id\": 256}");
}

/// A `tokenizer.json` with merges of pairs of bytes, such as `"ab"`, and a post-processor.
pub fn tokenizer(merges: &[&str], post_processor: &Value) -> String {
    let mut vocab = Map::new();
    for byte in 0..=255u8 {
        vocab.insert(letter(byte).to_string(), json!(byte));
    }
    let names = [(EOS, "<|endoftext|>"), (START, "<|im_start|>"), (END, "<|im_end|>")];
    vocab.extend(names.map(|(id, name)| (name.to_owned(), json!(id))));
    let mut pairs = Vec::new();
    for (i, pair) in merges.iter().enumerate() {
        let [a, b] = [0, 1].map(|at| letter(pair.as_bytes()[at]).to_string());
        vocab.insert(format!("{a}{b}"), json!(259 + i));
        pairs.push(json!([a, b]));
    }
    let special = |(id, content): (i32, &str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let added = names.map(special);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": post_processor,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                  "byte_fallback": false, "vocab": vocab, "merges": pairs},
    })
    .to_string()
}

/// The letter that stands for a byte in the file of a byte-level tokenizer: printable Latin-1 is
/// itself, the others follow from U+0100.
fn letter(byte: u8) -> char {
    let is_itself = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_itself(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|&b| !is_itself(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}

/// The ids of a text; `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` are one each.
pub fn ids(text: &str) -> Vec<i32> {
    let mut ids = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.bytes().next() {
        let special = [(EOS, "<|endoftext|>"), (START, "<|im_start|>"), (END, "<|im_end|>")];
        match special.into_iter().find_map(|(id, name)| Some((id, rest.strip_prefix(name)?))) {
            Some((id, after)) => {
                ids.push(id);
                rest = after;
            }
            None => {
                ids.push(i32::from(first));
                // The texts of the tests are ASCII.
                rest = &rest[1..];
            }
        }
    }
    ids
}

/// Writes JSON lines.
pub fn write_rows(path: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(path, text).unwrap();
}
