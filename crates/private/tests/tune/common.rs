//! A folder with a model and persons' rows, and runs below it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tercet_private::tune::{PrivateConfig, tune};
use tercet_tensor::Device;
use tercet_train::metrics::{self, StepRecord};
use tercet_train::{Control, Event, Report, Result};

use crate::tiny_chat::{write_model, write_rows};

/// Six steps of six persons expected of twelve, who are said to be twenty.
const TEXT: &str = "[lora]\nr = 2\nalpha = 4.0\n[data]\ncontext = 64\n[private]\nunit = \"who\"\n\
    people = 20\nepsilon = 8.0\ncap = 3\n[train]\nsteps = 6\nbatch = 6\nlr = 3e-3\nwarmup = 2\n\
    clip = 0.0\neval_every = 0\n[checkpoint]\nevery = 0\nkeep = 9\n";

/// Twelve persons with one to five rows each.
pub fn rows() -> Vec<Value> {
    let mut rows = Vec::new();
    for round in 0..5 {
        for person in 0..12 {
            if person % 5 >= round {
                let text = format!("{person} has {round} {}", "and so on ".repeat(person % 4));
                rows.push(json!({"who": format!("p{person}"), "text": text}));
            }
        }
    }
    rows
}

pub struct Room(tempfile::TempDir);

impl Room {
    pub fn new() -> Self {
        Self::with(&rows())
    }

    pub fn with(rows: &[Value]) -> Self {
        let room = Self(tempfile::tempdir().unwrap());
        write_model(&room.at("model"), 1);
        write_rows(&room.at("rows.jsonl"), rows);
        room
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A run with output in a folder, a known seed and further overrides.
    pub fn config(&self, output: &str, overrides: &[&str]) -> PrivateConfig {
        self.try_config(output, overrides).unwrap()
    }

    pub fn try_config(&self, output: &str, overrides: &[&str]) -> Result<PrivateConfig> {
        let mut all = vec![
            format!("output='{}'", self.at(output).display()),
            format!("model.path='{}'", self.at("model").display()),
            format!("data.paths=['{}']", self.at("rows.jsonl").display()),
        ];
        all.extend(overrides.iter().map(|text| (*text).to_owned()));
        let mut config = PrivateConfig::parse(TEXT, &all)?;
        config.private.insecure_seed = Some(5);
        Ok(config)
    }
}

pub fn run(config: &PrivateConfig, resume: bool) -> Result<Report> {
    run_until(config, resume, u64::MAX)
}

/// Runs until `steps` steps are done, then raises the stop flag.
pub fn run_until(config: &PrivateConfig, resume: bool, steps: u64) -> Result<Report> {
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume, gemm_flops: None, device: &Device::Cpu };
    tune(config, &control, &mut |event| {
        if let Event::Step(progress) = event
            && progress.record.step >= steps
        {
            stop.store(true, Ordering::Relaxed);
        }
    })
}

pub fn error(config: &PrivateConfig, resume: bool) -> String {
    run(config, resume).unwrap_err().to_string()
}

pub fn records(config: &PrivateConfig) -> Vec<StepRecord> {
    metrics::read(&config.output.join("metrics.jsonl")).unwrap()
}

/// The adapter of a run's end, and what the optimizer and the method remember.
pub fn result(report: &Report) -> Vec<Vec<u8>> {
    let checkpoint = report.checkpoint.as_ref().unwrap();
    let files = ["adapter_model.safetensors", "state/optimizer.safetensors", "state/private.f32"];
    let mut all: Vec<Vec<u8>> = files.iter().map(|f| read(&checkpoint.join(f))).collect();
    all.push(std::fs::read(checkpoint.join("state/policy.bin")).unwrap_or_default());
    let kept: Value =
        serde_json::from_slice(&read(&checkpoint.join("state/private.json"))).unwrap();
    all.push(kept["numbers"].to_string().into_bytes());
    all
}

pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

/// Lines of a ledger after the first.
pub fn attempts(config: &PrivateConfig) -> usize {
    let text = std::fs::read_to_string(config.output.join("ledger.jsonl")).unwrap();
    text.lines().count() - 1
}
