//! Keys that supervised tuning and alignment share: a model that exists, rows, and how to train.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tercet_model::LoraConfig;

use super::check::{real, within};
use super::{Precision, ScheduleKind, TrainConfig};
use crate::error::{Error, Result};

/// `[model]` of a tuning run: what is tuned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TuneModel {
    /// A Hugging Face folder; its weights are where the run starts from.
    pub path: PathBuf,
    /// An adapter folder in PEFT's format to go on with; the weights of `path` stay as they are.
    pub adapter: Option<PathBuf>,
}

/// What to do with a row that cannot be used: malformed, or without what its task needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadRow {
    /// Stop before training and say which row, and why.
    #[default]
    Error,
    /// Leave it out, count it and list it in `rows.jsonl`.
    Drop,
}

/// `[data]` of a tuning run: JSON lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RowsConfig {
    /// `.jsonl` files (also `.gz`, `.zst`), folders and globs.
    pub paths: Vec<String>,
    /// Files whose rows are held out; with them `validation` has no effect.
    pub validation_paths: Vec<String>,
    /// Share of the rows held out for evaluation, chosen by the hash of their tokens; 0 for none.
    pub validation: f64,
    /// Longest example in tokens; longer ones lose their end, and are counted.
    pub context: usize,
    /// Rows that cannot be used.
    pub bad_rows: BadRow,
}

impl Default for RowsConfig {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            validation_paths: Vec::new(),
            validation: 0.0,
            context: 1024,
            bad_rows: BadRow::Error,
        }
    }
}

/// `[train]` of a tuning run. Examples are packed without padding and never see each other, so
/// how many go through the model at once changes memory, speed and rounding, nothing else (but for
/// which numbers an adapter's dropout leaves out).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TuneTrain {
    /// Passes over the rows. Give this or `steps`.
    pub epochs: Option<u64>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Examples (rows, or pairs) of one optimizer step.
    pub batch: usize,
    /// Tokens that go through the model at once, at most; an example longer than that goes alone.
    pub micro_tokens: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Final learning rate as a share of the peak.
    pub final_lr: f64,
    /// Shape of the learning rate after the warm-up.
    pub schedule: ScheduleKind,
    /// Steps in which the rate rises from zero to the peak.
    pub warmup: u64,
    /// Share of all steps in which `wsd` decays, at the end.
    pub decay: f64,
    /// Decoupled weight decay of matrices; vectors (norms, biases) have none.
    pub weight_decay: f64,
    /// Decay rates of the two moments of AdamW.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip: f64,
    /// Storage type of weights and activations.
    pub dtype: Precision,
    /// Decides the order of the rows, adapters' first weights, dropout and samples.
    pub seed: u64,
    /// Compute each layer again in the backward pass instead of keeping its activations.
    pub recompute: bool,
    /// Steps between evaluations on the held-out rows; 0 for only one at the end.
    pub eval_every: u64,
    /// Steps in a row without a finite loss and gradient after which the run stops.
    pub nan_patience: usize,
    /// Loss or gradient norm this many standard deviations above its mean of the last 128 steps
    /// is logged as an outlier; 0 for never.
    pub outlier_z: f64,
}

impl Default for TuneTrain {
    fn default() -> Self {
        Self {
            epochs: None,
            steps: None,
            batch: 32,
            micro_tokens: 8192,
            lr: 1e-5,
            final_lr: 0.0,
            schedule: ScheduleKind::Cosine,
            warmup: 10,
            decay: 0.2,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip: 1.0,
            dtype: Precision::F32,
            seed: 0,
            recompute: false,
            eval_every: 50,
            nan_patience: 10,
            outlier_z: 5.0,
        }
    }
}

impl TuneTrain {
    /// Steps of a run over `rows` examples; an epoch's last step takes what is left.
    pub fn steps(&self, rows: usize) -> u64 {
        let from_epochs = |epochs: u64| self.total(rows, epochs).div_ceil(self.batch as u64);
        self.steps.or(self.epochs.map(from_epochs)).unwrap_or(0)
    }

    /// Examples of the whole run.
    pub fn examples(&self, rows: usize) -> u64 {
        match (self.steps, self.epochs) {
            (Some(steps), _) => steps.saturating_mul(self.batch as u64),
            (None, epochs) => self.total(rows, epochs.unwrap_or(0)),
        }
    }

    fn total(&self, rows: usize, epochs: u64) -> u64 {
        epochs.saturating_mul(rows as u64)
    }

    /// What the loop reads of it.
    pub fn loop_config(&self) -> TrainConfig {
        TrainConfig {
            lr: self.lr,
            final_lr: self.final_lr,
            schedule: self.schedule,
            warmup: self.warmup,
            decay: self.decay,
            weight_decay: self.weight_decay,
            betas: self.betas,
            eps: self.eps,
            clip: self.clip,
            dtype: self.dtype,
            seed: self.seed,
            recompute: self.recompute,
            eval_every: self.eval_every,
            sample_every: 0,
            nan_patience: self.nan_patience,
            outlier_z: self.outlier_z,
            steps: Some(1),
            ..TrainConfig::default()
        }
    }

    /// What needs less memory, for when it ran out.
    pub fn advice(&self) -> String {
        let mut keys = vec![format!("train.micro_tokens below {}", self.micro_tokens)];
        if !self.recompute {
            keys.push("train.recompute = true".into());
        }
        if self.dtype == Precision::F32 {
            keys.push("train.dtype = \"bf16\"".into());
        }
        format!("What needs less: {}, or a [lora] section", keys.join(", or "))
    }

    /// Checks everything that needs no file.
    pub fn check(&self) -> Result<()> {
        match (self.epochs, self.steps) {
            (None, None) => {
                return Err(Error::config(
                    "train.epochs",
                    "is missing: how long to train (or train.steps)",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(Error::config(
                    "train.steps",
                    "and train.epochs both say how long to train; keep one of the two",
                ));
            }
            (Some(epochs), None) => within("train.epochs", epochs, 1, 1 << 20, "")?,
            (None, Some(steps)) => within("train.steps", steps, 1, 1 << 40, "")?,
        }
        within("train.batch", self.batch as u64, 1, 1 << 20, "")?;
        within("train.micro_tokens", self.micro_tokens as u64, 1, 1 << 30, "")?;
        super::check::check_optimiser(&self.loop_config())
    }
}

impl TuneModel {
    /// Refuses an empty path.
    pub fn check(&self) -> Result<()> {
        let empty = |path: &PathBuf| path.as_os_str().is_empty();
        if empty(&self.path) {
            return Err(Error::config(
                "model.path",
                "is missing: the Hugging Face folder to tune (`tercet convert` makes one of a GGUF)",
            ));
        }
        if self.adapter.as_ref().is_some_and(empty) {
            return Err(Error::config("model.adapter", "is empty; leave it out for none"));
        }
        Ok(())
    }
}

/// Checks `[lora]` as far as that needs no model.
pub fn check_lora(lora: Option<&LoraConfig>) -> Result<()> {
    let Some(lora) = lora else { return Ok(()) };
    lora.validate().map_err(|error| Error::config("lora", format!("cannot be used: {error}")))
}

impl RowsConfig {
    /// Checks everything that needs no file.
    pub fn check(&self) -> Result<()> {
        if self.paths.is_empty() || self.paths.iter().any(String::is_empty) {
            return Err(Error::config(
                "data.paths",
                "is empty or holds an empty name; expected files such as [\"rows.jsonl\"]",
            ));
        }
        real("data.validation", self.validation, 0.0, 0.9)?;
        within("data.context", self.context as u64, 2, 1 << 24, "")
    }
}
