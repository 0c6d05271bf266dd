//! `metrics.jsonl`: one line a step, the run's exact history.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;

/// What is known after a step. Steps are counted from 1 here: `step` steps are done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done.
    pub step: u64,
    /// Tokens trained on, in all; 0, and left out, where that may not be told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tokens: u64,
    /// What was descended: in pretraining the mean cross-entropy of the step's targets, in nats;
    /// `None` when it is not finite, or may not be told.
    pub loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping; `None` when it is not finite.
    pub grad_norm: Option<f64>,
    /// Whether the weights were left alone because something was not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Deviations of the loss above its recent mean, when that is an outlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_z: Option<f64>,
    /// Deviations of the gradient norm above its recent mean, when that is an outlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm_z: Option<f64>,
    /// The same of the held-out examples, when they were looked at after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Wall time of the step in seconds, evaluation and saving left out; 0, and left out, where
    /// that may not be told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seconds: f64,
    /// Further numbers of the task, by name, such as `rewards/margins`; those of held-out examples
    /// begin with `eval_`.
    #[serde(flatten)]
    pub measures: BTreeMap<String, f64>,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The file, open for appending.
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Opens `path` and keeps the lines of the first `steps` steps, byte for byte: a run resumed
    /// from there writes the others again.
    pub fn open(path: &Path, steps: u64) -> Result<Self> {
        let mut text = Vec::new();
        each_line(path, |line, record| {
            if record.step <= steps {
                text.extend_from_slice(line);
                text.push(b'\n');
            }
        })?;
        files::write_atomic(path, &text)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Appends a step.
    pub fn push(&mut self, record: &StepRecord) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| Error::Data(format!("a step's record has no JSON: {error}")))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io("write", &self.path))
    }
}

/// All records of a metrics file; none when there is no file.
pub fn read(path: &Path) -> Result<Vec<StepRecord>> {
    let mut records = Vec::new();
    each_line(path, |_, record| records.push(record))?;
    Ok(records)
}

/// Calls `take` for every line and what it says. A line cut short by a crash ends the history.
fn each_line(path: &Path, mut take: impl FnMut(&[u8], StepRecord)) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let reader = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    for line in reader.split(b'\n') {
        let line = line.map_err(Error::io("read", path))?;
        match serde_json::from_slice(&line) {
            Ok(record) => take(&line, record),
            Err(_) => break,
        }
    }
    Ok(())
}
