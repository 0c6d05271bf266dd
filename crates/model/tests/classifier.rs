//! Reward models: the scores are those of transformers, every family's names are known, and a
//! folder of anything else is refused with the reason.

use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tercet_model::{Model, SequenceClassifier};
use tercet_tensor::DType;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Every sequence of `expected.json` (written by `make.py` beside it) and its score.
fn expected() -> Vec<(Vec<i32>, f64)> {
    let text = std::fs::read_to_string(data("reward/expected.json")).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let lists = value.as_object().unwrap().values().flat_map(|list| list.as_array().unwrap());
    let one = |entry: &Value| {
        let ids = entry["ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap() as i32);
        (ids.collect(), entry["score"].as_f64().unwrap())
    };
    lists.map(one).collect()
}

/// A score sums 32 products of hidden states (of norm √32) and weights of deviation 0.25, so it
/// is of size 1. Sums of two layers in f32 in another order move each hidden state by some
/// 2⁻²⁴·√(additions ≈ 500) ≈ 1.3e-6; with 32 of them, √32·0.25 times that, and an allowance of 5.
const TOLERANCE: f64 = 1e-5;

#[test]
fn scores_are_those_of_transformers() {
    let model = SequenceClassifier::load(&data("reward"), None).unwrap();
    let expected = expected();
    assert_eq!(expected.len(), 13);
    let ids: Vec<&[i32]> = expected.iter().map(|(ids, _)| ids.as_slice()).collect();
    let scores = model.score(&ids).unwrap();
    let mut worst = 0f64;
    for (score, (ids, want)) in scores.iter().zip(&expected) {
        let error = (f64::from(*score) - want).abs();
        worst = worst.max(error);
        assert!(error <= TOLERANCE, "{score} is not {want}: {ids:?}");
    }
    println!("scores {worst:e}");
}

/// Whatever they are packed with, and over many packs.
#[test]
fn a_score_depends_on_its_own_sequence_alone() {
    let model = SequenceClassifier::load(&data("reward"), None).unwrap();
    let expected = expected();
    let mut ids: Vec<&[i32]> = expected.iter().map(|(ids, _)| ids.as_slice()).collect();
    // 13 sequences of some 500 tokens, 20 times over, are three packs.
    ids = std::iter::repeat_n(ids, 20).flatten().collect();
    let packed = model.score(&ids).unwrap();
    for (i, (score, (_, want))) in packed.iter().zip(expected.iter().cycle()).enumerate() {
        assert!((f64::from(*score) - want).abs() <= TOLERANCE, "sequence {i}");
    }
    assert_eq!(packed, model.score(&ids).unwrap());
    assert_eq!(model.score(&[]).unwrap(), Vec::<f32>::new());
}

#[test]
fn bf16_scores_are_near_and_not_rounded_into_ties() {
    let model = SequenceClassifier::load(&data("reward"), Some(DType::BF16)).unwrap();
    let expected = expected();
    let ids: Vec<&[i32]> = expected.iter().map(|(ids, _)| ids.as_slice()).collect();
    let scores = model.score(&ids).unwrap();
    // Each hidden state passes some 20 roundings of 2⁻⁹ of itself: 2⁻⁹·√20 ≈ 0.9 %, and the
    // score √32·0.25 ≈ 1.4 times that; three deviations, and the model's own amplification by
    // softmax and gates (weights of 0.25 make them steep) of another 3.
    for (score, (_, want)) in scores.iter().zip(&expected) {
        assert!((f64::from(*score) - want).abs() <= 0.12, "{score} {want}");
    }
    assert!(scores.iter().any(|&s| half::bf16::from_f32(s).to_f32() != s), "{scores:?}");
}

#[test]
fn impossible_sequences_are_refused() {
    let model = SequenceClassifier::load(&data("reward"), None).unwrap();
    let says = |ids: &[&[i32]], part: &str| {
        let error = model.score(ids).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    says(&[&[1], &[]], "sequence 1 has no tokens");
    says(&[&[1, 258]], "token id 258");
    says(&[&[-1]], "token id -1");
    says(&[&[1; 257]], "257 tokens is longer than the model's context of 256");
}

/// The causal model folders of `tests/data` and, when they are there, of the golden numbers.
fn causal_folders() -> Vec<PathBuf> {
    let mut folders = vec![data("gpt2"), data("qwen3")];
    let shared = std::env::var_os("TERCET_GOLDEN").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| data("../../../../../shared/golden")).join("hf");
    match std::fs::read_dir(&shared) {
        Ok(entries) => folders.extend(entries.map(|e| e.unwrap().path())),
        Err(_) => println!("no {}: only gpt2 and qwen3 are tested", shared.display()),
    }
    folders
}

/// A copy of a causal folder as a classifier whose row is that of one token in the output matrix.
fn as_classifier(from: &Path, to: &Path, token: usize) {
    let text = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let class = config["architectures"][0].as_str().unwrap();
    let stem = class.replace("ForCausalLM", "").replace("LMHeadModel", "");
    config["architectures"] = json!([format!("{stem}ForSequenceClassification")]);
    config["id2label"] = json!({ "0": "LABEL_0" });
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let head = ["lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"];
    let head = head.iter().find_map(|name| file.tensor(name).ok()).unwrap();
    assert_eq!(head.dtype(), Dtype::F32);
    let width = head.shape()[1];
    let row = &head.data()[4 * width * token..4 * width * (token + 1)];
    let row = TensorView::new(Dtype::F32, vec![1, width], row).unwrap();
    let kept = file.tensors().into_iter().filter(|(name, _)| name != "lm_head.weight");
    let tensors: Vec<_> = kept.chain([("score.weight".to_owned(), row)]).collect();
    let out = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(to.join("model.safetensors"), out).unwrap();
}

/// With a row of the output matrix as its row, a classifier's score is that token's logit at the
/// last position: the logits are tested against transformers elsewhere.
#[test]
fn every_family_is_read_as_a_classifier() {
    for from in causal_folders() {
        let to = tempfile::tempdir().unwrap();
        as_classifier(&from, to.path(), 11);
        let causal = Model::load(&from).unwrap();
        let model = SequenceClassifier::load(to.path(), None).unwrap();
        let ids: Vec<i32> = (0..40).map(|i| i * 7 % 90).collect();
        let logits = causal.logits(&ids, &[0, 40]).unwrap().to_vec_f32().unwrap();
        let vocab = causal.config().vocab_size;
        let want = logits[39 * vocab + 11];
        let got = model.score(&[&ids]).unwrap()[0];
        // One dot product of some 32 to 64 terms of size at most 1, in f64 or in f32.
        assert!((got - want).abs() <= 1e-5, "{}: {got} is not {want}", from.display());
    }
}

/// A copy of the reward model's folder with other fields in its config.json.
fn altered(fields: Value) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(data("reward/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    let weights = data("reward/model.safetensors");
    std::fs::copy(weights, to.path().join("model.safetensors")).unwrap();
    to
}

fn refused(dir: &Path, parts: &[&str]) {
    let Err(error) = SequenceClassifier::load(dir, None) else {
        panic!("{} was loaded", dir.display());
    };
    assert!(error.is_users());
    for part in parts {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn folders_of_anything_else_are_refused_with_the_reason() {
    refused(&data("qwen3"), &["config.json", "Qwen3ForCausalLM", "ForSequenceClassification"]);
    refused(altered(json!({ "id2label": { "0": "a", "1": "b" } })).path(), &["2 labels"]);
    refused(altered(json!({ "id2label": null })).path(), &["2 labels", "neither"]);
    refused(altered(json!({ "num_labels": 5 })).path(), &["5 labels"]);
    SequenceClassifier::load(altered(json!({ "num_labels": 1 })).path(), None).unwrap();
    refused(altered(json!({ "hidden_size": 64 })).path(), &["shape"]);

    let without = altered(json!({}));
    let bytes = std::fs::read(data("reward/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = file.tensors().into_iter().filter(|(n, _)| n != "score.weight").collect();
    let out = safetensors::serialize(kept, None).unwrap();
    std::fs::write(without.path().join("model.safetensors"), out).unwrap();
    refused(without.path(), &["no tensor score.weight"]);

    let two = altered(json!({}));
    let row = vec![0u8; 2 * 32 * 4];
    let row = TensorView::new(Dtype::F32, vec![2, 32], &row).unwrap();
    let kept = file.tensors().into_iter().filter(|(n, _)| n != "score.weight");
    let tensors: Vec<_> = kept.chain([("score.weight".to_owned(), row)]).collect();
    let out = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(two.path().join("model.safetensors"), out).unwrap();
    refused(two.path(), &["score.weight", "[2, 32]", "[1, 32]"]);
    refused(&data("nowhere"), &["nowhere"]);
}
