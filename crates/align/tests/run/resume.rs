//! Exact resume: the reference is the policy as the run began, whatever the checkpoint holds.

use serde_json::json;

use crate::room::{ROUNDING, Room, contents, history, records, rows, run, run_with, weights};
use crate::tiny_chat::{model, write_rows};

/// Runs in one and in three parts; both must end with the same bits.
fn ends_alike(room: &Room, name: &str, overrides: &[&str]) {
    let mut all = vec!["checkpoint.every=2", "data.validation=0.3", "train.eval_every=3"];
    all.extend(overrides);
    let whole = room.config(&format!("{name}-whole"), &all);
    let report = run(&whole, false).unwrap();
    assert!(report.finished && report.validation_loss.is_some(), "{name}");
    let expected = contents(&report.checkpoint.unwrap());
    let parts = room.config(&format!("{name}-parts"), &all);
    for (resume, until) in [(false, 1), (true, 4)] {
        let report = run_with(&parts, resume, until, &mut Vec::new()).unwrap();
        assert_eq!((report.finished, report.steps), (false, until));
    }
    let found = contents(&run(&parts, true).unwrap().checkpoint.unwrap());
    for ((file, found), (expected_file, expected)) in found.iter().zip(&expected) {
        assert_eq!(file, expected_file);
        assert!(found == expected, "{name}: {file} differs");
    }
    assert_eq!(found.len(), expected.len());
    assert_eq!(history(&parts), history(&whole), "{name}");
}

#[test]
fn a_run_in_three_parts_ends_with_the_bits_of_one() {
    let room = Room::new(&rows(14));
    ends_alike(&room, "full", &[]);
    ends_alike(&room, "bf16", &["train.dtype=bf16", "train.micro_tokens=80"]);
    ends_alike(&room, "mappo", &["align.terms=[{objective='mappo'}, {objective='sft'}]"]);
    ends_alike(&room, "kto", &["align.terms=[{objective='kto'}]", "train.recompute=true"]);
    ends_alike(&room, "free", &["align.terms=[{objective='simpo'}]"]);
}

#[test]
fn a_run_with_a_precomputed_reference_ends_with_the_bits_of_one() {
    let room = Room::new(&rows(14));
    let known = "align.precompute=true";
    ends_alike(&room, "full", &[known, "align.ld_alpha=0.37"]);
    ends_alike(&room, "lora", &[known, "lora.r=2", "train.micro_tokens=80"]);
    ends_alike(&room, "bf16", &[known, "lora.r=2", "train.dtype=bf16"]);
}

#[test]
fn the_reference_of_an_adapter_that_goes_on_is_that_adapter_as_the_run_began() {
    let room = Room::new(&rows(14));
    ends_alike(&room, "fresh", &["lora={r=2, alpha=7.3}"]);
    let first = room.config("first", &["lora={r=2, alpha=64.0}", "train.lr=1e-2"]);
    let folder = run(&first, false).unwrap().checkpoint.unwrap();
    let on = format!("model.adapter='{}'", folder.display());
    for (name, precompute) in [("on", false), ("known", true)] {
        let known = format!("align.precompute={precompute}");
        ends_alike(&room, name, &[on.as_str(), known.as_str()]);
        let whole = room.config(&format!("{name}-whole"), &[on.as_str()]);
        let first = &records(&whole)[0];
        // Against the base its rewards would be far from 0.
        // Sums computed in other company differ by rounding.
        let margin = first.measures["rewards/margins"].abs();
        let off = (first.loss.unwrap() - std::f64::consts::LN_2).abs();
        let most = if precompute { ROUNDING } else { 0.0 };
        assert!(margin <= most && off <= most, "{name}: margin {margin:e}, loss off by {off:e}");
        // On resume the rewards go on: against the checkpoint they would begin again at 0.
        let parts = room.config(&format!("{name}-parts"), &[on.as_str()]);
        assert!(records(&parts)[4].measures["rewards/chosen"] != 0.0, "{name}");
    }
    // The base and the adapter it began with are as they were.
    assert!(weights(&folder) == weights(&run(&first, true).unwrap().checkpoint.unwrap()));
}

#[test]
fn other_pairs_or_another_objective_are_refused_on_resume() {
    let room = Room::new(&rows(8));
    let mappo = "align.terms=[{objective='mappo'}]";
    let config = room.config("run", &[mappo, "align.precompute=true", "data.context=17"]);
    let checkpoint = run_with(&config, false, 2, &mut Vec::new()).unwrap().checkpoint.unwrap();
    let before = contents(&checkpoint);
    let kept = ["rows.jsonl", "delta.svg", "reference.json", "metrics.jsonl", "config.toml"];
    let files = || kept.map(|name| std::fs::read(config.output.join(name)).unwrap());
    let all = files();
    assert!(!all[0].is_empty());
    let refused = |config: &tercet_align::AlignConfig, said: &str| {
        let text = run(config, true).err().unwrap_or_else(|| panic!("{said}: taken")).to_string();
        assert!(text.contains(said), "{text}");
        assert!(contents(&checkpoint) == before && files() == all, "{said}");
    };
    let mut other = rows(8);
    other[5]["delta"] = json!(0.99);
    write_rows(&room.at("rows.jsonl"), &other);
    refused(&config, "not what step 2 was trained on");
    other = rows(8);
    other[5]["rejected"] = json!(" else");
    write_rows(&room.at("rows.jsonl"), &other);
    refused(&config, "not what step 2 was trained on");
    write_rows(&room.at("rows.jsonl"), &rows(8));
    let with = |more: &[&str]| {
        let same = [mappo, "align.precompute=true", "data.context=17"];
        room.config("run", &[&same[..], more].concat())
    };
    refused(&with(&["align.terms=[{objective='dpo'}]"]), "align.terms");
    refused(&with(&["align.precompute=false"]), "align.precompute");
    refused(&with(&["align.delta.negative='swap'"]), "align.delta.negative");
    refused(&with(&["lora.r=2"]), "lora");
    // Rewards are measured against the model as the run began: another one is not taken for it.
    let weights = room.at("model/model.safetensors");
    let begun = std::fs::read(&weights).unwrap();
    model(99).save(&room.at("model")).unwrap();
    refused(&config, "not what step 2 was trained on");
    std::fs::write(&weights, begun).unwrap();
    assert!(run(&config, true).unwrap().finished);
}
