//! `tercet private audit` and `records` through the binary.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Output};

fn tercet(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tercet")).current_dir(folder).args(args).output().unwrap()
}

/// Scores of 600 canaries: noise, less `apart` for the included ones.
fn scores(folder: &Path, apart: f64) {
    let mut text = String::new();
    let mut word = 1u32;
    let mut bits = || {
        // Numerical Recipes' generator; its upper bits are good enough for scores.
        word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        word >> 8
    };
    for i in 0..600 {
        let included = bits() & (1 << 20) != 0;
        let score = f64::from(bits()) / f64::from(1 << 24) - if included { apart } else { 0.0 };
        let _ = writeln!(
            text,
            "{{\"id\":\"{i}\",\"included\":{included},\"score\":{score},\"kind\":\"canary\"}}"
        );
    }
    std::fs::write(folder.join("scores.jsonl"), text).unwrap();
}

const AUDIT: &[&str] =
    &["private", "audit", "--scores", "scores.jsonl", "--epsilon", "1", "--delta", "1e-5"];

#[test]
fn scores_that_separate_refute_the_claim_and_scores_that_know_nothing_do_not() {
    let folder = tempfile::tempdir().unwrap();
    scores(folder.path(), 2.0);
    let caught = tercet(folder.path(), &[AUDIT, &["--svg", "roc.svg"]].concat());
    assert_eq!(caught.status.code(), Some(3));
    let said = String::from_utf8(caught.stderr).unwrap();
    assert!(said.contains("refuted: epsilon is at least"), "{said}");
    // What was found is printed and drawn all the same.
    assert!(String::from_utf8(caught.stdout).unwrap().contains("AUC 1.000"));
    assert!(std::fs::read_to_string(folder.path().join("roc.svg")).unwrap().ends_with("</svg>\n"));

    scores(folder.path(), 0.0);
    let fine = tercet(folder.path(), &[AUDIT, &["--json"]].concat());
    assert_eq!(fine.status.code(), Some(0));
    let found: serde_json::Value = serde_json::from_slice(&fine.stdout).unwrap();
    assert_eq!(found["refuted"], false);
    assert_eq!(found["canaries"]["epsilon"], 0.0);
    assert_eq!(found["canaries"]["guesses"]["canaries"], 600);
}

#[test]
fn records_are_made_once_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["private", "records", "--patients", "200", "--canaries", "40", "--output", "r"];
    let made = tercet(folder.path(), &[&args[..], &["--json"]].concat());
    assert_eq!(made.status.code(), Some(0));
    let said: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let train = std::fs::read_to_string(folder.path().join("r/train.jsonl")).unwrap();
    assert_eq!(said["train"]["encounters"], train.lines().count());
    assert_eq!(said["heldout"]["persons"], 20);
    let again = tercet(folder.path(), &args);
    assert_eq!(again.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(folder.path().join("r/train.jsonl")).unwrap(), train);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// What a plan can see of a run's mistakes it says, with and without the model's folder.
#[test]
fn a_plan_names_a_target_that_the_model_does_not_have() {
    let folder = tempfile::tempdir().unwrap();
    let config = "output = \"run\"\n[model]\npath = \"model\"\n[lora]\nr = 2\n\
        targets = [\"q_proj\", \"w_proj\"]\n[data]\npaths = [\"rows.jsonl\"]\n[private]\n\
        unit = \"who\"\npeople = 1000\nepsilon = 4.0\n[train]\nsteps = 10\nbatch = 10\n";
    std::fs::write(folder.path().join("run.toml"), config).unwrap();
    let plan = |more: &[&str]| tercet(folder.path(), &[&["plan", "run.toml"], more].concat());
    assert_eq!(plan(&[]).status.code(), Some(0), "the model may come later");
    std::fs::create_dir(folder.path().join("model")).unwrap();
    let model = serde_json::json!({
        "model_type": "llama", "vocab_size": 270, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "hidden_act": "silu", "tie_word_embeddings": true, "architectures": ["LlamaForCausalLM"],
    });
    std::fs::write(folder.path().join("model/config.json"), model.to_string()).unwrap();
    let wrong = plan(&[]);
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert_eq!(wrong.status.code(), Some(2), "{said}");
    assert!(said.contains("\"w_proj\" means no module of this model"), "{said}");
    let fine = plan(&[
        "lora.targets=[\"q_proj\"]",
        "private.canaries.kind=\"gradient\"",
        "private.canaries.count=100",
    ]);
    let said = String::from_utf8(fine.stdout).unwrap();
    assert_eq!(fine.status.code(), Some(0), "{}", String::from_utf8_lossy(&fine.stderr));
    assert!(said.contains("canaries    100, gradients along random coordinates"), "{said}");
}
