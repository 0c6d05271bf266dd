//! A folder with a model and pairs, and runs in it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tercet_align::pairs::Pair;
use tercet_align::{AlignConfig, align};
use tercet_model::Model;
use tercet_tensor::Device;
use tercet_train::metrics::{self, StepRecord};
use tercet_train::tune::Example;
use tercet_train::{Control, Event, Report, Result};

use crate::tiny_chat::{write_model, write_rows};

/// Largest difference of two sums of the same terms in another order, as a share of the largest
/// value: a few thousand terms of f32, each rounded by 2⁻²⁴ at most, which walk apart by the square
/// root of their number and stay within 2⁻¹⁷ with room to spare.
pub const ROUNDING: f64 = 1.0 / 131_072.0;

/// Rows whose answers are of different lengths, with scores and Δ.
pub fn rows(count: usize) -> Vec<Value> {
    let row = |i: usize| {
        json!({"prompt": format!("{i} + {i} ="), "chosen": format!(" {}", 2 * i),
               "rejected": format!(" {} or so{}", i + 1, "!".repeat(i % 3)),
               "score_chosen": 1.0 + 0.25 * (i % 4) as f64, "score_rejected": -0.5,
               "delta": 0.125 * (i % 8) as f64})
    };
    (0..count).map(row).collect()
}

/// `count` pairs of ids without a text, of different lengths.
pub fn id_pairs(count: usize) -> Vec<Pair> {
    let answer = |i: usize, salt: usize| {
        let prompt: Vec<i32> = (0..3 + i % 4).map(|t| ((i * 5 + t * 3) % 256) as i32).collect();
        let len = 2 + (i * salt) % 5;
        let words: Vec<i32> = (0..len).map(|t| ((i * 7 + t * 11 + salt) % 256) as i32).collect();
        Example::completion(&prompt, &words)
    };
    let pair = |i: usize| Pair {
        chosen: answer(i, 3),
        rejected: answer(i, 4),
        delta: Some(0.25 * (i % 5) as f64),
    };
    (0..count).map(pair).collect()
}

/// Moves every weight that is trained a little, a function of its place and `salt` alone.
pub fn disturb(model: &mut Model, salt: usize) {
    for tensor in model.trained_mut().tensors_mut() {
        let values = tensor.as_f32_mut().unwrap().iter_mut().enumerate();
        values.for_each(|(i, value)| *value += ((i * 7 + salt) % 13) as f32 / 100.0 - 0.06);
    }
}

/// A folder with `model` and `rows.jsonl`, and the runs below it.
pub struct Room(pub tempfile::TempDir);

impl Room {
    pub fn new(list: &[Value]) -> Self {
        let room = Self(tempfile::tempdir().unwrap());
        write_model(&room.at("model"), 1);
        write_rows(&room.at("rows.jsonl"), list);
        room
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Six steps of DPO with four pairs, with output in a folder and further overrides.
    pub fn config(&self, output: &str, overrides: &[&str]) -> AlignConfig {
        self.try_config(output, overrides).unwrap()
    }

    pub fn try_config(&self, output: &str, overrides: &[&str]) -> Result<AlignConfig> {
        let mut all = vec![
            format!("output='{}'", self.at(output).display()),
            format!("model.path='{}'", self.at("model").display()),
            format!("data.paths=['{}']", self.at("rows.jsonl").display()),
        ];
        all.extend(overrides.iter().map(|text| (*text).to_owned()));
        let text = "[data]\ncontext = 64\n[align]\nterms = [{objective = \"dpo\"}]\n\
                    [align.delta]\nsource = \"column\"\n[train]\nsteps = 6\nbatch = 4\nlr = 1e-3\n\
                    warmup = 2\neval_every = 0\n[checkpoint]\nevery = 0\n";
        AlignConfig::parse(text, &all)
    }
}

pub fn run(config: &AlignConfig, resume: bool) -> Result<Report> {
    run_with(config, resume, u64::MAX, &mut Vec::new())
}

/// Runs until `steps` steps are done, then raises the stop flag; keeps what was noted.
pub fn run_with(
    config: &AlignConfig,
    resume: bool,
    steps: u64,
    notes: &mut Vec<String>,
) -> Result<Report> {
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume, gemm_flops: None, device: &Device::Cpu };
    align(config, &control, &mut |event| match event {
        Event::Step(progress) if progress.record.step >= steps => {
            stop.store(true, Ordering::Relaxed);
        }
        Event::Note(text) => notes.push(text.to_owned()),
        _ => {}
    })
}

/// The text of the error of a run that must be refused.
pub fn refused(config: Result<AlignConfig>) -> String {
    let error = config.and_then(|config| run(&config, false)).err();
    let error = error.unwrap_or_else(|| panic!("this should be refused"));
    assert!(error.is_users(), "{error}");
    error.to_string()
}

pub fn records(config: &AlignConfig) -> Vec<StepRecord> {
    metrics::read(&config.output.join("metrics.jsonl")).unwrap()
}

/// The history without the wall time, which no run repeats.
pub fn history(config: &AlignConfig) -> Vec<String> {
    let timeless = |mut record: StepRecord| {
        record.seconds = 0.0;
        format!("{record:?}")
    };
    records(config).into_iter().map(timeless).collect()
}

/// Every file of a checkpoint but those that name the run's folder.
pub fn contents(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for folder in [checkpoint.to_owned(), checkpoint.join("state")] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_file() && name != "manifest.json" && name != "config.toml" {
                files.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    assert!(files.iter().any(|(name, _)| name == "optimizer.safetensors"));
    files
}

/// Weights, or the adapter, of a checkpoint.
pub fn weights(checkpoint: &Path) -> Vec<u8> {
    let path = ["model.safetensors", "adapter_model.safetensors"]
        .map(|name| checkpoint.join(name))
        .into_iter()
        .find(|path| path.exists());
    std::fs::read(path.unwrap()).unwrap()
}
