//! What is refused, in words, before anything is spent.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tercet_private::tune::rows::Person;
use tercet_train::tune::Encoder;
use tercet_train::tune::start::Beside;

use crate::common::{Room, error, rows, run};

/// A refused configuration's text.
fn refused(room: &Room, more: &[&str]) -> String {
    room.try_config("refused", more).map(|c| error(&c, false)).unwrap_or_else(|e| e.to_string())
}

#[test]
fn configurations_that_promise_nothing_are_refused_by_key() {
    let room = Room::new();
    for (more, says) in [
        (&["private.unit=\"\""][..], "private.unit` is missing"),
        (&["private.people=0"], "private.people` is missing"),
        (&["private.people=11"], "private.people = 11 is less than the persons there are"),
        (&["train.batch=20"], "so that the rate is below 1"),
        (&["train.batch=25"], "so that the rate is below 1"),
        (&["private.delta=0.05"], "private.weak_delta = true"),
        (&["private.delta=0"], "outside"),
        (&["private.epsilon=1e-9"], "private.epsilon"),
        (&["private.epsilon=nan"], "private.epsilon"),
        (&["private.sigma=1.0"], "keep one of the two"),
        (&["lora.dropout=0.1"], "lora.dropout` must be 0"),
        (&["private.cap=0"], "private.cap"),
        (&["private.method=\"rldp\"", "private.threshold=20"], "the box in which a controller"),
        (&["private.method=\"sgd\""], "private.method"),
        (&["private.mode=\"m2\""], "does not go with dp-sgd"),
        (&["private.method=\"schedule\"", "private.mode=\"m1\""], "does not go with schedule"),
        (&["private.insecure_seed=3"], "not a known key"),
        (&["private.epsilom=3"], "did you mean `private.epsilon`"),
        (&["private.quantile.target=0.4"], "the method is dp-sgd"),
        (&["private.schedule.sigma=[0.5, 1]"], "the method is dp-sgd"),
        (
            &["private.method=\"quantile\"", "private.quantile.target=1.5"],
            "private.quantile.target",
        ),
        (&["private.method=\"quantile\"", "private.quantile.count_noise=0.1"], "count_noise"),
        (&["private.method=\"adaclip\"", "private.balance=true"], "private.balance"),
        (&["private.method=\"random-action\"", "private.threshold=100"], "0.001..=10"),
        (&["private.division=\"controlled\""], "needs a controller"),
        (
            &[
                "private.method=\"rldp\"",
                "private.division=\"controlled\"",
                "private.thresholds=\"one\"",
            ],
            "needs a controller",
        ),
        (&["private.tangent=true", "private.freeze_a=true"], "with freeze_a"),
        (&["private.tangent=true", "private.balance=true"], "with balance"),
        (&["private.tangent=true", "private.method=\"geoclip\""], "with geoclip"),
        (&["private.public_validation=true"], "private.public_validation"),
        (&["private.share=0.95"], "private.share"),
        (&["private.threshold=0"], "private.threshold"),
        (&["data.context=5000000", "private.cap=1000"], "private.cap"),
    ] {
        let text = refused(&room, more);
        assert!(text.contains(says), "{more:?}: {text}");
        assert!(!room.at("refused").exists(), "{more:?} left a folder");
    }
    let weak = ["private.delta=0.06", "private.weak_delta=true"];
    let config = room.config("weak", &weak);
    run(&config, false).unwrap();
    let text = std::fs::read_to_string(config.output.join("privacy.json")).unwrap();
    assert!(text.contains("not below one over the persons"));
}

#[test]
fn an_epsilon_that_cannot_be_reached_is_told_with_the_smallest_that_can() {
    let room = Room::new();
    // Under the filter the Rényi conversion alone leaves more than this.
    let more =
        ["private.method=\"random-action\"", "private.mode=\"m2\"", "private.epsilon=0.0005"];
    let text = refused(&room, &more);
    assert!(text.contains("private.epsilon") && text.contains("the smallest epsilon"), "{text}");
}

#[test]
fn a_run_without_an_adapter_or_with_experts_is_refused() {
    let room = Room::new();
    let text = format!(
        "output = '{}'\n[model]\npath = '{}'\n[data]\npaths = ['x']\n[private]\nunit = 'who'\n\
         people = 20\nepsilon = 1.0\n[train]\nsteps = 1\nbatch = 2\n",
        room.at("none").display(),
        room.at("model").display()
    );
    let error = tercet_private::tune::PrivateConfig::parse(&text, &[]).unwrap_err().to_string();
    assert!(error.contains("`lora` is missing"), "{error}");
    let moe = json!({"model_type": "tercet", "tie_word_embeddings": false, "moe": {
        "routed_experts": 4, "shared_experts": 1, "top_k": 2, "expert_size": 8,
        "first_dense_layers": 1}});
    crate::tiny_chat::model_with(&moe, 1).save(&room.at("model")).unwrap();
    let text = refused(&room, &["lora.targets=[\"q_proj\"]"]);
    assert!(text.contains("mixture of experts"), "{text}");
}

#[test]
fn rows_whose_person_is_in_doubt_are_refused() {
    for (bad, says) in [
        (json!({"text": "whose?"}), "has no \"who\""),
        (json!({"who": 3, "text": "whose?"}), "two kinds of id"),
        (json!({"who": null, "text": "whose?"}), "null"),
        (json!({"who": "p1 ", "text": "whose?"}), "spaces"),
        (json!({"who": "p1", "text": 5}), "line 34 has neither"),
    ] {
        let mut rows: Vec<Value> = rows();
        assert_eq!(rows.len(), 33, "the line that is named below");
        rows.push(bad);
        let room = Room::with(&rows);
        let text = refused(&room, &[]);
        assert!(text.contains(says), "{text}");
    }
    let room = Room::with(&rows());
    let path = room.at("rows.jsonl");
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.push_str("{\"who\": \"p1\", \"text\": NaN}\n");
    std::fs::write(&path, text).unwrap();
    assert!(refused(&room, &[]).contains("34"));
}

#[test]
fn a_person_with_very_many_rows_is_cut_to_the_cap_and_counted() {
    let mut rows = rows();
    rows.extend((0..5000).map(|i| json!({"who": "p1", "text": format!("again {i}")})));
    let room = Room::with(&rows);
    let config = room.config("run", &["train.steps=1"]);
    run(&config, false).unwrap();
    let listed = std::fs::read_to_string(config.output.join("rows.jsonl")).unwrap();
    let over = listed.lines().filter(|line| line.contains("private.cap")).count();
    // p1 has two rows of its own among the others; p3, p4, p8 and p9 have four or five.
    let others: usize = (0..12).map(|p| (p % 5 + 1usize).min(5).saturating_sub(3)).sum();
    assert_eq!(over, 5000 + 2 - 3 + others, "{}", &listed[..300]);
    // Such a person weighs as much as any other: with the rows past the cap away nothing changes.
    let few: Vec<Value> = rows[..33 + 2].to_vec();
    let small = Room::with(&few);
    let other = small.config("run", &["train.steps=1"]);
    run(&other, false).unwrap();
    let adapter = |config: &tercet_private::tune::PrivateConfig| {
        crate::common::read(
            &config.output.join("checkpoints/step-00000001/adapter_model.safetensors"),
        )
    };
    assert!(adapter(&config) == adapter(&other));
}

#[test]
fn held_out_rows_of_somebody_who_is_trained_on_are_refused() {
    let room = Room::new();
    let paths = format!("data.validation_paths=['{}']", room.at("held.jsonl").display());
    crate::tiny_chat::write_rows(&room.at("held.jsonl"), &[json!({"who": "p3", "text": "me too"})]);
    assert!(refused(&room, &[&paths]).contains("somebody who is trained on"));
    crate::tiny_chat::write_rows(&room.at("held.jsonl"), &[json!({"who": "q", "text": "me too"})]);
    let config = room.config("other", &[&paths]);
    assert!(run(&config, false).unwrap().validation_loss.is_some());
    crate::tiny_chat::write_rows(&room.at("held.jsonl"), &[json!({"text": "nobody's"})]);
    assert!(refused(&room, &[&paths]).contains("has no \"who\""));
    let config = room.config("public", &[&paths, "private.public_validation=true"]);
    assert!(run(&config, false).unwrap().validation_loss.is_some());
    let promise = crate::common::json(&config.output.join("privacy.json"));
    assert_eq!(promise["validation"], "public rows");
}

#[test]
fn held_out_persons_are_whole_persons() {
    let room = Room::new();
    let config = room.config("run", &["data.validation=0.4"]);
    let report = run(&config, false).unwrap();
    assert!(report.validation_loss.is_some());
    let promise = crate::common::json(&config.output.join("privacy.json"));
    assert!(promise["validation"].as_str().unwrap().contains("parallel composition"));

    let beside = Beside::load(&room.at("model")).unwrap();
    let (model, _) = tercet_model::load_config(&room.at("model")).unwrap();
    let encoder = Encoder::new(&beside.tokenizer, &model, &beside.generation).unwrap();
    let stop = AtomicBool::new(false);
    let rows = tercet_private::tune::rows::rows(&config, &encoder, &[], &stop).unwrap();
    // Every text begins with its person's number, and ids of letters are their bytes.
    let whose = |people: &[Person]| -> Vec<Vec<i32>> {
        let number = |ids: &[i32]| ids.iter().copied().take_while(|&id| id != 32).collect();
        people
            .iter()
            .map(|person| {
                let all: BTreeSet<Vec<i32>> =
                    person.examples.iter().map(|example| number(&example.ids)).collect();
                assert_eq!(all.len(), 1, "rows of two persons are one");
                all.into_iter().next().unwrap()
            })
            .collect()
    };
    let (train, held_out) = (whose(&rows.train), whose(&rows.validation));
    assert!(!train.is_empty() && !held_out.is_empty());
    let all: BTreeSet<&Vec<i32>> = train.iter().chain(&held_out).collect();
    assert_eq!((all.len(), train.len() + held_out.len()), (12, 12), "somebody is on both sides");
}
