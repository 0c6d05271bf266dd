//! `tercet eval` from outside: the table, the files it writes, and what it refuses.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tercet_model::{Adapter, LoraConfig, Model, ModelConfig};
use tercet_tensor::{DType, Tensor};

fn tercet(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tercet"));
    command.current_dir(folder).args(args).stdin(Stdio::null()).output().unwrap()
}

fn fine(folder: &Path, args: &[&str]) -> String {
    let output = tercet(folder, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// `model` with a tokenizer, a trained adapter `one`, and two tasks.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
    write("text.txt", &"to be or not to be, that is the question\n".repeat(40));
    std::fs::create_dir(at("model")).unwrap();
    std::fs::create_dir(at("one")).unwrap();
    let tokenizer = ["tokenizer", "train", "text.txt", "-v", "270", "-o", "model/tokenizer.json"];
    fine(folder.path(), &tokenizer);
    let config: ModelConfig = serde_json::from_value(json!({
        "model_type": "llama", "vocab_size": 270, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "initializer_range": 0.25,
    }))
    .unwrap();
    let model = Model::new(config, 1, DType::F32).unwrap();
    model.save(&at("model")).unwrap();
    let mut trained = model.clone();
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    trained.attach("one", Adapter::new(&model, lora, 1).unwrap()).unwrap();
    trained.activate(Some("one")).unwrap();
    let params = trained.trained_mut();
    for slot in 0..params.len() {
        let shape = params.tensor(slot).shape().to_vec();
        let len: usize = shape.iter().product();
        let values = (0..len).map(|i| ((i * 7 + slot) % 11) as f32 / 50.0 - 0.1).collect();
        params.set(slot, Tensor::from_f32(values, &shape).unwrap()).unwrap();
    }
    trained.adapter("one").unwrap().save(&at("one"), "model").unwrap();
    let head = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\n\
                test_split: test\ndoc_to_text: \"{{q}}\"\n";
    let choice = "task: pick\noutput_type: multiple_choice\ndoc_to_choice: c\ndoc_to_target: g\n\
                  metadata: {version: 1}\n";
    let write_text = "task: write\ndoc_to_target: \"{{c[0]}}\"\ngeneration_kwargs: \
                      {max_gen_toks: 5, until: [zzz]}\n";
    write("pick.yaml", &format!("{choice}{head}"));
    write("write.yaml", &format!("{write_text}{head}"));
    write(
        "rows.jsonl",
        "{\"q\": \"to be\", \"c\": [\"or not\", \"question\"], \"g\": 0}\n\
         {\"q\": \"that is\", \"c\": [\"the question\", \"to\", \"or\"], \"g\": 2}\n",
    );
    folder
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn tasks_come_to_a_table_results_and_a_line_for_each_row() {
    let folder = folder();
    let args = ["eval", "model", "pick.yaml", "write.yaml", "--device", "cpu"];
    let files = ["--json", "scores.json", "--log-samples", "rows-out.jsonl"];
    let output = tercet(folder.path(), &[&args[..], &files].concat());
    let (out, error) = (output.stdout, String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert!(error.contains("pick: no number depends on metadata"), "{error}");
    assert!(error.contains("7/7 requests") && error.contains("tok/s · eta 0s"), "{error}");
    let table = String::from_utf8(out).unwrap();
    for part in ["pick        2  acc", "pick        2  acc_norm", "write       2  exact_match", "±"]
    {
        assert!(table.contains(part), "{table}");
    }
    let scores: Value = serde_json::from_str(&read(folder.path(), "scores.json")).unwrap();
    assert_eq!(scores["n-samples"]["pick"], json!({ "original": 2, "effective": 2 }));
    assert!(scores["results"]["pick"]["acc_norm_stderr,none"].is_number());
    let lines = read(folder.path(), "rows-out.jsonl");
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[1]["arguments"][2], json!(["that is", " or"]));
    assert_eq!((&lines[1]["target"], &lines[3]["task"]), (&json!(2), &json!("write")));
    let mean = |name: &str, rows: &[Value]| {
        rows.iter().map(|row| row[name].as_f64().unwrap()).sum::<f64>() / rows.len() as f64
    };
    assert_eq!(scores["results"]["pick"]["acc,none"], json!(mean("acc", &lines[..2])));

    // The same bits whatever the number of threads; other numbers with an adapter.
    let again = ["--log-samples", "again.jsonl", "--threads", "1"];
    fine(folder.path(), &[&args[..], &again].concat());
    assert_eq!(read(folder.path(), "again.jsonl"), read(folder.path(), "rows-out.jsonl"));
    let adapted = ["--log-samples", "adapted.jsonl", "--adapter", "one", "--limit", "1"];
    fine(folder.path(), &[&args[..], &adapted].concat());
    let adapted = read(folder.path(), "adapted.jsonl");
    let first: Value = serde_json::from_str(adapted.lines().next().unwrap()).unwrap();
    assert_ne!(first["filtered_resps"], lines[0]["filtered_resps"]);
    assert_eq!(adapted.lines().count(), 2);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_computed() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("bad.yaml"), read(folder.path(), "pick.yaml") + "num_fewshot: 3\n").unwrap();
    std::fs::write(at("empty.yaml"), "").unwrap();
    for (args, part) in [
        (&["model", "bad.yaml"][..], "bad.yaml: num_fewshot: 3 is not supported"),
        (&["model", "empty.yaml"], "empty.yaml: is empty"),
        (&["model", "gone.yaml"], "gone.yaml"),
        (&["model", "pick.yaml", "pick.yaml"], "two tasks are called pick"),
        (&["gone", "pick.yaml"], "not a folder"),
        (&["model", "pick.yaml", "--limit", "0"], "0 is not in 1.."),
        (&["model", "pick.yaml", "--max-length", "4k"], "4096 tokens is outside 1 to 128"),
        (&["model", "pick.yaml", "--json", "no/x.json"], "no is no folder"),
        (&["model", "pick.yaml", "--json", "x", "--log-samples", "x"], "the same file"),
        (&["model", "write.yaml", "--max-length", "5"], "max_gen_toks is 5"),
    ] {
        let output = tercet(folder.path(), &[&["eval"], args].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains(part), "{args:?}: {error}");
        assert!(output.stdout.is_empty());
    }
    assert!(!at("x").exists());
}
