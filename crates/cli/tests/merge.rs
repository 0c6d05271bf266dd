//! Adapters on the command line: used beside the model, merged into it, refused.

use std::path::Path;
use std::process::{Command, Output, Stdio};

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

/// Standard error of a command that the user got wrong.
fn wrong(folder: &Path, args: &[&str]) -> String {
    let output = tercet(folder, args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    error
}

/// `model`, with a tokenizer, and the adapters `one` and `two`.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("text.txt"), "to be or not to be, that is the question\n".repeat(40))
        .unwrap();
    for name in ["model", "one", "two"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    fine(
        folder.path(),
        &["tokenizer", "train", "text.txt", "-v", "270", "-o", "model/tokenizer.json"],
    );
    let config: ModelConfig = serde_json::from_value(serde_json::json!({
        "model_type": "llama", "vocab_size": 270, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "initializer_range": 0.25,
    }))
    .unwrap();
    let model = Model::new(config, 1, DType::F32).unwrap();
    model.save(&at("model")).unwrap();
    for (name, seed) in [("one", 1), ("two", 2)] {
        let mut trained = model.clone();
        let lora = LoraConfig { r: 2, ..LoraConfig::default() };
        trained.attach(name, Adapter::new(&model, lora, seed).unwrap()).unwrap();
        trained.activate(Some(name)).unwrap();
        let params = trained.trained_mut();
        for slot in 0..params.len() {
            let shape = params.tensor(slot).shape().to_vec();
            let len: usize = shape.iter().product();
            let values = (0..len).map(|i| ((i * 7 + slot) % 11) as f32 / 50.0 - 0.1).collect();
            params.set(slot, Tensor::from_f32(values, &shape).unwrap()).unwrap();
        }
        trained.adapter(name).unwrap().save(&at(name), "model").unwrap();
    }
    folder
}

#[test]
fn a_merged_model_writes_what_the_model_writes_with_the_adapter() {
    let folder = folder();
    let generate = |args: &[&str]| {
        let all = [&["generate"], args, &["-t", "0", "-n", "12", "-p", "to be"]].concat();
        fine(folder.path(), &all)
    };
    let said = fine(folder.path(), &["merge", "model", "one", "merged"]);
    assert!(said.contains("merged one: rank 2, scale 16"), "{said}");
    assert!(said.contains("14 modules") && said.contains("merged: llama with 2 layers"), "{said}");
    let with = generate(&["model", "--adapter", "one"]);
    assert_eq!(generate(&["merged"]), with);
    assert_ne!(generate(&["model"]), with);

    // Several at once, or one after the other: the same bits.
    fine(folder.path(), &["merge", "model", "one", "two", "both"]);
    fine(folder.path(), &["merge", "merged", "two", "again"]);
    let bytes =
        |name: &str| std::fs::read(folder.path().join(name).join("model.safetensors")).unwrap();
    assert!(bytes("both") == bytes("again") && bytes("both") != bytes("merged"));
}

#[test]
fn what_cannot_be_merged_is_said_and_nothing_is_left_behind() {
    let folder = folder();
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    let text = wrong(folder.path(), &["merge", "model", "one", "two"]);
    assert!(text.contains("two: is not empty; name a new folder"), "{text}");
    let text = wrong(folder.path(), &["merge", "model", "three", "out"]);
    assert!(text.contains("three/adapter_config.json"), "{text}");
    let text = wrong(folder.path(), &["merge", "one", "two", "out"]);
    assert!(text.contains("one is neither a model folder"), "{text}");
    let text = wrong(folder.path(), &["generate", "model", "--adapter", "model", "-p", "to"]);
    assert!(text.contains("model/adapter_config.json"), "{text}");
    std::fs::write(folder.path().join("one/adapter_config.json"), "{").unwrap();
    let text = wrong(folder.path(), &["merge", "model", "one", "out"]);
    assert!(text.contains("is not a JSON object"), "{text}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before);
}

#[test]
fn what_was_promised_of_an_adapter_goes_with_it() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(at(name)).unwrap()).unwrap()
    };
    let privacy = |epsilon: f64| serde_json::json!({"private": true, "epsilon": epsilon});
    std::fs::write(at("one/privacy.json"), privacy(2.5).to_string()).unwrap();
    // From elsewhere, without the file: the field of its configuration.
    let mut config = json("two/adapter_config.json");
    config["privacy"] = privacy(4.0);
    std::fs::write(at("two/adapter_config.json"), config.to_string()).unwrap();

    let said = fine(folder.path(), &["merge", "model", "one", "first"]);
    assert!(said.contains("one is private with epsilon 2.5: privacy.json"), "{said}");
    assert_eq!(json("first/privacy.json"), privacy(2.5));
    let said = fine(folder.path(), &["merge", "first", "two", "second"]);
    assert!(said.contains("epsilon 4") && said.contains("add up"), "{said}");
    let both = [json("second/privacy-1.json"), json("second/privacy-2.json")];
    assert_eq!(both, [privacy(2.5), privacy(4.0)]);
    // A third on top: nothing is forgotten.
    fine(folder.path(), &["merge", "second", "one", "third"]);
    assert_eq!(json("third/privacy-3.json"), privacy(2.5));
    // Nor where the first of them was taken away.
    std::fs::remove_file(at("second/privacy-1.json")).unwrap();
    fine(folder.path(), &["merge", "second", "one", "gap"]);
    assert_eq!([json("gap/privacy-1.json"), json("gap/privacy-2.json")], [4.0, 2.5].map(privacy));
    // Of two promises that differ one was edited.
    std::fs::write(at("two/privacy.json"), privacy(0.1).to_string()).unwrap();
    let text = wrong(folder.path(), &["merge", "model", "two", "fourth"]);
    assert!(text.contains("epsilon = 0.1") && text.contains("was changed"), "{text}");
    std::fs::write(at("one/privacy.json"), privacy(-1.0).to_string()).unwrap();
    assert!(fine(folder.path(), &["merge", "model", "one", "below"]).contains("NOT PRIVATE"));
    std::fs::write(at("one/privacy.json"), "{").unwrap();
    let text = wrong(folder.path(), &["merge", "model", "one", "fourth"]);
    assert!(text.contains("one/privacy.json is not a JSON object"), "{text}");
    assert!(!at("fourth").exists());
}

/// A promise of one part of a model would be taken for one of all of it.
#[test]
fn an_adapter_of_which_nothing_was_promised_is_named_beside_the_promises() {
    let folder = folder();
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.path().join(name)).unwrap()).unwrap()
    };
    fine(folder.path(), &["merge", "model", "two", "plain"]);
    assert!(!folder.path().join("plain/privacy.json").exists());
    let privacy = serde_json::json!({"private": true, "epsilon": 2.5});
    std::fs::write(folder.path().join("one/privacy.json"), privacy.to_string()).unwrap();
    let said = fine(folder.path(), &["merge", "model", "one", "two", "mixed"]);
    assert!(said.contains("two is NOT PRIVATE: privacy-2.json"), "{said}");
    assert_eq!(json("mixed/privacy-1.json"), privacy);
    assert_eq!(json("mixed/privacy-2.json")["private"], false);
    assert!(!folder.path().join("mixed/privacy.json").exists());
    fine(folder.path(), &["merge", "model", "one", "first"]);
    fine(folder.path(), &["merge", "first", "two", "then"]);
    assert_eq!(json("then/privacy-2.json")["private"], false);
}
