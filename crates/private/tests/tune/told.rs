//! What a run tells: nothing of who was drawn.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::common::{Room, json, read, run};

/// The keys of a record that are released or public. Whoever adds one must say here that it is.
const TOLD: [&str; 9] =
    ["step", "loss", "lr", "grad_norm", "threshold", "sigma", "budget", "epsilon", "below"];

#[test]
fn records_hold_released_and_public_numbers_alone() {
    let room = Room::new();
    let config = room.config(
        "run",
        &["private.method=\"random-action\"", "private.every=2", "checkpoint.every=2"],
    );
    let report = run(&config, false).unwrap();
    let text = std::fs::read_to_string(config.output.join("metrics.jsonl")).unwrap();
    let mut keys = BTreeSet::new();
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        keys.extend(record.as_object().unwrap().keys().cloned());
    }
    assert!(keys.iter().all(|key| TOLD.contains(&key.as_str())), "{keys:?}");
    assert_eq!((report.tokens, report.tokens_per_second), (0, 0.0));
    let state = json(&report.checkpoint.unwrap().join("state/run.json"));
    assert_eq!((&state["tokens"], &state["data_position"]), (&0.into(), &6.into()));
    // All points of the event file have one time: how long a step took is how many were drawn.
    let folder = std::fs::read_dir(config.output.join("tensorboard")).unwrap();
    let events = read(&folder.map(|e| e.unwrap().path()).next().unwrap());
    let mut times = BTreeSet::new();
    let mut at = 0;
    while at < events.len() {
        let length = u64::from_le_bytes(events[at..at + 8].try_into().unwrap()) as usize;
        // After length and its check: field 1, a double.
        times.insert(events[at + 13..at + 21].to_vec());
        at += 8 + 4 + length + 4;
    }
    assert_eq!(times.len(), 1);
}

/// Whoever knows all rows but one must not be able to tell by a key whether that one was there.
#[test]
fn keys_of_the_data_are_salted() {
    let room = Room::new();
    let key = |name: &str| {
        let report = run(&room.config(name, &["train.steps=1"]), false).unwrap();
        json(&report.checkpoint.unwrap().join("state/run.json"))["data_key"].clone()
    };
    assert_ne!(key("a"), key("b"));
}

#[test]
fn the_promise_stands_beside_the_adapter_and_names_a_seed_that_can_be_known() {
    let room = Room::new();
    let mut config = room.config("run", &[]);
    let report = run(&config, false).unwrap();
    let beside = report.checkpoint.unwrap();
    let promise = json(&beside.join("privacy.json"));
    assert_eq!(promise, json(&config.output.join("privacy.json")));
    assert_eq!((&promise["insecure_seed"], &promise["private"]), (&true.into(), &false.into()));
    assert!(promise["epsilon"].as_f64().unwrap() <= 8.0);
    assert!(
        std::fs::read_to_string(config.output.join("config.toml"))
            .unwrap()
            .contains("insecure_seed = 5")
    );
    // The gist goes where the adapter goes, in one field that PEFT drops.
    let gist = json(&beside.join("adapter_config.json"))["privacy"].clone();
    for name in ["private", "epsilon", "delta", "unit", "adjacency", "steps", "accountant"] {
        assert_eq!(gist[name], promise[name], "{name}");
    }
    let model = tercet_model::Model::load(&room.at("model")).unwrap();
    tercet_model::Adapter::load(&beside, &model).unwrap();

    config.private.insecure_seed = None;
    config.output = room.at("secure");
    let one = run(&config, false).unwrap();
    let promise = json(&config.output.join("privacy.json"));
    assert_eq!((&promise["insecure_seed"], &promise["private"]), (&false.into(), &true.into()));
    config.output = room.at("again");
    let other = run(&config, false).unwrap();
    let adapter = |r: &tercet_train::Report| {
        read(&r.checkpoint.as_ref().unwrap().join("adapter_model.safetensors"))
    };
    assert!(adapter(&one) != adapter(&other), "two runs drew the same noise");
}
