//! A reward model through its folder's own tokenizer and chat template, against transformers.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value, json};
use tercet_align::reward::{Answer, Error, RewardSource};

use super::{GO, row, says, score, source};

/// The tiny reward model, with the script that made it.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/reward")
}

fn model(folder: &Path) -> Result<RewardSource, Error> {
    source(&format!("model = {:?}", folder.to_str().unwrap()))
}

fn expected() -> Value {
    let text = std::fs::read_to_string(folder().join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// See the model's own test for the tolerance.
const TOLERANCE: f64 = 1e-5;

/// Conversations go through the template, other prompts are read plainly; more than are scored
/// at once, in two orders.
#[test]
fn scores_are_those_of_transformers_for_text() {
    let mut model = model(&folder()).unwrap();
    let expected = expected();
    let mut cases: Vec<(Map<String, Value>, &str, &str, f64)> = Vec::new();
    for chat in expected["chats"].as_array().unwrap() {
        let row = row(json!({ "messages": chat["messages"] }));
        model.check_row(0, &row).unwrap();
        let score = chat["score"].as_f64().unwrap();
        cases.push((row, "ignored", chat["answer"].as_str().unwrap(), score));
    }
    for plain in expected["plain"].as_array().unwrap() {
        let [prompt, answer] = ["prompt", "answer"].map(|key| plain[key].as_str().unwrap());
        cases.push((Map::new(), prompt, answer, plain["score"].as_f64().unwrap()));
    }
    assert_eq!(cases.len(), 8);
    let answer = |(i, case): (usize, &'_ usize)| (i as u64, *case);
    let order: Vec<usize> = (0..40).map(|i| i % 8).collect();
    for reversed in [false, true] {
        let mut list: Vec<(u64, usize)> = order.iter().enumerate().map(answer).collect();
        if reversed {
            list.reverse();
        }
        let answers: Vec<Answer> = list
            .iter()
            .map(|&(id, case)| {
                let (row, prompt, answer, _) = &cases[case];
                Answer { id, prompt, answer, tokens: 1, row }
            })
            .collect();
        for (scored, (_, case)) in model.score(&answers, &GO).unwrap().iter().zip(list) {
            let want = cases[case].3;
            assert!((scored.total - want).abs() <= TOLERANCE, "{} {want}", scored.total);
            assert!(scored.parts.is_empty());
        }
    }
}

#[test]
fn rows_and_answers_that_cannot_be_read_are_refused() {
    let mut model = model(&folder()).unwrap();
    for messages in
        [json!("hi"), json!([1]), json!([{ "role": "user" }]), json!([{ "content": "x" }])]
    {
        let row = row(json!({ "messages": messages }));
        says(&model.check_row(9, &row).unwrap_err(), &["prompt 9", "`messages` is not a list"]);
    }
    let ended =
        json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }]);
    for messages in [json!([]), ended] {
        let row = row(json!({ "messages": messages }));
        says(&model.check_row(9, &row).unwrap_err(), &["prompt 9", "assistant"]);
    }
    let long = "x".repeat(256);
    let error = score(&mut model, &long, &Map::new()).unwrap_err();
    says(&error, &["answer 7", "257 tokens", "1 to 256"]);

    let (row, stop) = (Map::new(), AtomicBool::new(true));
    let answer = Answer { id: 0, prompt: "", answer: "x", tokens: 1, row: &row };
    assert!(matches!(model.score(&[answer], &stop), Err(Error::Interrupted)));
}

/// A copy of the folder for tests to spoil.
fn copy() -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder().join(name), to.path().join(name)).unwrap();
    }
    to
}

#[test]
fn a_folder_without_what_is_needed_is_refused() {
    let none = copy();
    std::fs::remove_file(none.path().join("tokenizer.json")).unwrap();
    says(&model(none.path()).err().unwrap(), &["reward model", "tokenizer.json"]);

    let untalkative = copy();
    std::fs::remove_file(untalkative.path().join("tokenizer_config.json")).unwrap();
    let messages = row(json!({ "messages": [{ "role": "user", "content": "a" }] }));
    let model_ = model(untalkative.path()).unwrap();
    says(&model_.check_row(3, &messages).unwrap_err(), &["prompt 3", "no chat template"]);

    let causal = folder().join("../qwen3");
    says(&model(&causal).err().unwrap(), &["reward model", "Qwen3ForCausalLM"]);
    says(&model(Path::new("nowhere")).err().unwrap(), &["reward model", "nowhere"]);
}

/// The row is written last (safetensors orders by type, then name), here as NaN.
#[test]
fn a_score_that_is_not_finite_is_an_error() {
    let spoilt = copy();
    let path = spoilt.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = score(&mut model(spoilt.path()).unwrap(), "x", &Map::new()).unwrap_err();
    says(&error, &["answer 7", "NaN", "not finite"]);
}
