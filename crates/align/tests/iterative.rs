//! The loop as a whole, on a model small enough to be trained in seconds: it learns to answer with
//! one of two words, a rule prefers one, and rounds of sampling and training raise the share of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tercet_align::iterate::{IterativeConfig, IterativeReport, SampleConfig, iterate, sample};
use tercet_tensor::Device;
use tercet_train::{Control, Event, Result, RunConfig, pretrain};

const NAMES: [&str; 12] =
    ["ada", "ben", "cleo", "dan", "eve", "finn", "gus", "hal", "ivy", "jon", "kim", "leo"];

/// A model that answers "name: ada" with " good" or " poor", about as often, and ends.
fn base(room: &Path) -> PathBuf {
    let corpus = room.join("corpus");
    fs::create_dir_all(&corpus).unwrap();
    for (i, name) in NAMES.iter().enumerate() {
        for (j, word) in ["good", "poor"].iter().enumerate() {
            // Equal documents would count once: a number makes them differ.
            for k in 0..10 {
                let text = format!("name: {name} {k}: {word}");
                fs::write(corpus.join(format!("{i}-{j}-{k}.txt")), text).unwrap();
            }
        }
    }
    let output = room.join("base");
    let text = format!(
        "output = {output:?}\n[model]\nhidden_size = 32\nintermediate_size = 48\n\
         num_hidden_layers = 2\nnum_attention_heads = 4\nnum_key_value_heads = 2\nhead_dim = 8\n\
         tie_word_embeddings = true\n[data]\npaths = [{corpus:?}]\nvocab_size = 280\ncontext = 64\n\
         validation = 0.0\n[train]\nsteps = 120\nbatch_tokens = 512\nlr = 1e-2\nwarmup = 5\n\
         [checkpoint]\nevery = 0\n"
    );
    let config = RunConfig::parse(&text, &[]).unwrap();
    let stop = AtomicBool::new(false);
    let control = control(&stop, false);
    pretrain(&config, &control, &mut |_| ()).unwrap().checkpoint.unwrap()
}

fn control(stop: &AtomicBool, resume: bool) -> Control<'_> {
    Control { stop, resume, gemm_flops: None, device: &Device::Cpu }
}

fn prompts(room: &Path) -> (PathBuf, PathBuf) {
    let write = |name: &str, numbers: std::ops::Range<usize>| {
        let path = room.join(name);
        let row = |name: &str, k: usize| format!("{{\"prompt\": \"name: {name} {k}:\"}}\n");
        let rows: String =
            numbers.flat_map(|k| NAMES.iter().map(move |name| row(name, k))).collect();
        fs::write(&path, rows).unwrap();
        path
    };
    (write("train.jsonl", 0..5), write("held-out.jsonl", 5..10))
}

fn config(room: &Path, model: &Path, name: &str, overrides: &[&str]) -> IterativeConfig {
    let (train, held_out) = prompts(room);
    let output = room.join(name);
    let text = format!(
        "output = {output:?}\n[model]\npath = {model:?}\n[data]\npaths = [{train:?}]\n\
         validation_paths = [{held_out:?}]\ncontext = 64\n\
         [align]\nterms = [{{ objective = \"dpo\", mappo = true, beta = 0.2 }}]\n\
         delta = {{ source = \"identity\" }}\n\
         [train]\nepochs = 5\nbatch = 8\nlr = 2e-3\nwarmup = 1\n\
         [sampling]\nsamples = 6\nmax_tokens = 12\nat_once = 16\n\
         [reward]\nrules = [{{ kind = \"keywords\", words = [\"good\"] }}, \
         {{ kind = \"length\", unit = \"tokens\", max = 4, slack = 8.0 }}]\n\
         [iterative]\nrounds = 2\nheld_out_samples = 4\n"
    );
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    IterativeConfig::parse(&text, &overrides).unwrap()
}

/// Runs until done, or until `stop_at` is said.
fn run(config: &IterativeConfig, resume: bool, stop_at: Option<&str>) -> Result<IterativeReport> {
    let stop = AtomicBool::new(false);
    iterate(config, &control(&stop, resume), &mut |event| {
        let said = match &event {
            Event::Note(text) => (*text).to_owned(),
            Event::Step(progress) => format!("step {}", progress.record.step),
            _ => return,
        };
        if stop_at.is_some_and(|text| said.starts_with(text)) {
            stop.store(true, Ordering::Relaxed);
        }
    })
}

fn held_out(report: &IterativeReport) -> Vec<f64> {
    report.rounds.iter().map(|round| round.held_out.unwrap().reward).collect()
}

fn weights(report: &IterativeReport) -> Vec<u8> {
    fs::read(report.policy.as_ref().unwrap().join("model.safetensors")).unwrap()
}

#[test]
fn reward_rises_round_by_round_and_a_run_stopped_anywhere_ends_the_same() {
    let room = tempfile::tempdir().unwrap();
    let model = base(room.path());
    let whole = run(&config(room.path(), &model, "whole", &[]), false, None).unwrap();
    assert!(whole.finished);
    let rewards = held_out(&whole);
    assert!((0.65..0.85).contains(&rewards[0]), "{rewards:?}");
    // Where half are good the mean is 3/4, as a short poor answer has half the reward.
    assert!(rewards[1] > rewards[0] + 0.05 && rewards[2] > rewards[1], "{rewards:?}");
    let last = whole.rounds[2].held_out.unwrap();
    assert!(last.divergence.unwrap() > 0.0 && last.ended > 0.5, "{last:?}");
    let text = fs::read_to_string(whole.report.as_ref().unwrap()).unwrap();
    assert!(text.contains("| 2 |") && text.contains("(reward.svg)"), "{text}");
    for name in ["reward.svg", "squeezing.svg", "round-1/train/delta.svg"] {
        let drawn = fs::read_to_string(room.path().join("whole").join(name)).unwrap();
        assert!(drawn.contains("</svg>") && !drawn.contains("NaN"), "{name}");
    }

    // Stopped between samples and training of round 1, then in the middle of round 2's training.
    let parts = config(room.path(), &model, "parts", &[]);
    for (resume, stop_at) in [(false, Some("mean reward")), (true, Some("round 2"))] {
        assert!(!run(&parts, resume, stop_at).unwrap().finished);
    }
    let stopped = run(&parts, true, Some("step 7")).unwrap();
    assert!(!stopped.finished && stopped.rounds.len() == 2);
    let rest = run(&parts, true, None).unwrap();
    assert!(rest.finished);
    assert_eq!(rest.rounds, whole.rounds);
    assert!(weights(&rest) == weights(&whole), "resumed rounds must end with the same bits");

    // What is there is not overwritten, and not gone on with under another configuration.
    let refused = run(&parts, false, None).unwrap_err().to_string();
    assert!(refused.contains("--resume"), "{refused}");
    let other = config(room.path(), &model, "parts", &["train.lr=1e-3"]);
    let refused = run(&other, true, None).unwrap_err().to_string();
    assert!(refused.contains("train.lr"), "{refused}");
    // Nor with other prompts, or beside another first model.
    let train = room.path().join("train.jsonl");
    let rows = fs::read_to_string(&train).unwrap();
    let weights = model.join("model.safetensors");
    let begun = fs::read(&weights).unwrap();
    for other in [rows.replacen("ada", "abe", 1), rows] {
        fs::write(&train, other).unwrap();
        let refused = run(&parts, true, None).unwrap_err().to_string();
        assert!(refused.contains("are not what"), "{refused}");
        fs::copy(whole.policy.as_ref().unwrap().join("model.safetensors"), &weights).unwrap();
    }
    fs::write(&weights, begun).unwrap();
    assert!(run(&parts, true, None).unwrap().finished);
    // A round whose checkpoint is damaged does not go on from an older one unseen.
    let newest = rest.policy.unwrap();
    fs::write(newest.join("model.safetensors"), "cut").unwrap();
    assert!(run(&parts, true, None).is_err());
}

#[test]
fn an_adapter_goes_through_all_rounds_and_the_weights_stay() {
    let room = tempfile::tempdir().unwrap();
    let model = base(room.path());
    let before = fs::read(model.join("model.safetensors")).unwrap();
    let overrides = ["lora.r=4", "train.lr=4e-3", "train.epochs=1"];
    let report = run(&config(room.path(), &model, "lora", &overrides), false, None).unwrap();
    let moved: Vec<f64> =
        report.rounds.iter().map(|round| round.held_out.unwrap().divergence.unwrap()).collect();
    // A new adapter adds nothing: what the policy says is what the start says, to rounding.
    assert!(moved[0].abs() < 1e-4 && moved[1] > 1e-3, "{moved:?}");
    let second = fs::read_to_string(room.path().join("lora/round-2/train/config.toml")).unwrap();
    assert!(second.contains("lora/round-1/train/checkpoints/step-"), "{second}");
    let policy = report.policy.unwrap();
    assert!(policy.join("adapter_model.safetensors").is_file());
    assert!(!policy.join("model.safetensors").exists());
    assert!(fs::read(model.join("model.safetensors")).unwrap() == before);
}

#[test]
fn sampling_alone_scores_pairs_and_goes_on_and_a_refusal_leaves_nothing() {
    let room = tempfile::tempdir().unwrap();
    let model = base(room.path());
    let (train, _) = prompts(room.path());
    let file = room.path().join("sample.toml");
    let output = room.path().join("out");
    let text = format!(
        "output = {output:?}\n[model]\npath = {model:?}\n[start]\npath = {model:?}\n\
         [data]\npaths = [{train:?}]\ncontext = 64\n\
         [sampling]\nsamples = 4\nmax_tokens = 12\nat_once = 8\n\
         [reward]\nrules = [{{ kind = \"keywords\", words = [\"good\"] }}]\n"
    );
    fs::write(&file, text).unwrap();
    let load = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        SampleConfig::load(&file, &overrides)
    };
    let go = |config: &SampleConfig, resume: bool, stop: &AtomicBool| {
        sample(config, &control(stop, resume), &mut |event| {
            if let Event::Note(text) = event
                && text.contains("answered")
                && !resume
            {
                stop.store(true, Ordering::Relaxed);
            }
        })
    };
    for (change, said) in [
        ("reward.rules=[{kind=\"equals\", column=\"expected\"}]", "`expected` is missing"),
        ("start.path=\"nowhere\"", "nowhere"),
        ("model.path=\"nowhere\"", "`model.path` = nowhere is not a model folder"),
    ] {
        let error = go(&load(&[change]).unwrap(), false, &AtomicBool::new(false)).unwrap_err();
        assert!(error.to_string().contains(said), "{change}: {error}");
        assert!(!output.exists(), "{change}: a refused run leaves nothing");
    }
    let error = load(&["data.validation=0.5"]).unwrap_err().to_string();
    assert!(error.contains("`data.validation` holds nothing out"), "{error}");

    // Stopped after the first portion, then gone on with: the bits of one run.
    let config = load(&[]).unwrap();
    assert!(!go(&config, false, &AtomicBool::new(false)).unwrap().finished);
    let begun = fs::read(output.join("samples.jsonl")).unwrap();
    let report = go(&config, true, &AtomicBool::new(false)).unwrap();
    let all = fs::read(output.join("samples.jsonl")).unwrap();
    assert!(report.finished && !begun.is_empty() && all.starts_with(&begun));
    let elsewhere = room.path().join("whole");
    let config = load(&[&format!("output={elsewhere:?}")]).unwrap();
    let never = AtomicBool::new(false);
    assert!(sample(&config, &control(&never, false), &mut |_| ()).unwrap().finished);
    assert!(fs::read(elsewhere.join("samples.jsonl")).unwrap() == all);
    let worth = report.worth.unwrap();
    assert!(worth.divergence.unwrap().abs() < 1e-4 && worth.prompts == 60, "{worth:?}");
    let pairs = fs::read_to_string(output.join("pairs.jsonl")).unwrap();
    assert_eq!(pairs.lines().count(), report.picks.pairs);
    assert!(pairs.contains("\"score_chosen\":1.0") && !pairs.contains("\"delta\""), "{pairs}");
}

#[test]
fn a_reward_that_says_nothing_or_reads_what_is_not_there_is_an_error_before_hours_are_spent() {
    let room = tempfile::tempdir().unwrap();
    let model = base(room.path());
    let same = ["reward.rules=[{kind=\"keywords\", words=[\"zebra\"]}]"];
    let error = run(&config(room.path(), &model, "same", &same), false, None).unwrap_err();
    assert!(error.to_string().contains("scored the same"), "{error}");
    let column = ["reward.rules=[{kind=\"equals\", column=\"expected\"}]"];
    let error = run(&config(room.path(), &model, "column", &column), false, None).unwrap_err();
    assert!(error.to_string().contains("column `expected` is missing"), "{error}");
    assert!(!room.path().join("column").exists(), "a refused run leaves nothing");
    let overrides = ["align.delta.source=\"column\"".to_owned()];
    let text = fs::read_to_string(room.path().join("same/config.toml")).unwrap();
    let error = IterativeConfig::parse(&text, &overrides).unwrap_err().to_string();
    assert!(error.contains("`align.delta.source` = \"column\""), "{error}");
    for (change, says) in [
        ("sampling.temperature=0", "`sampling.temperature` = 0 writes the same answer"),
        ("reward.rules=[{kind=\"json\", weight=nan}]", "`reward.rules[0].weight` = null is not a"),
    ] {
        let error = IterativeConfig::parse(&text, &[change.to_owned()]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = run(&config(room.path(), &model, "many", &["iterative.rounds=100"]), false, None);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`iterative.rounds` = 100 is more than the 60 prompts"), "{error}");
}
