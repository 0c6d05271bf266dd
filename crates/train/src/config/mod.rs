//! One run, declared: a TOML file and `key=value` overrides become a checked [`RunConfig`].
//!
//! Every key is a field of one of the structs below, with its meaning and default beside it.
//! A key that is none of them is an error that suggests the nearest one.

mod check;
mod keys;
mod load;
mod model;
mod tune;

use std::path::PathBuf;

pub use check::{real, within};
pub use load::{Sections, to_toml};
pub use model::{FromData, ModelSource};
use serde::{Deserialize, Serialize};
pub use tune::{BadRow, RowsConfig, TuneModel, TuneTrain, check_lora};

/// Everything that decides a training run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// `output`: the folder that receives checkpoints, logs and the curve.
    pub output: PathBuf,
    /// `[model]`: what is trained.
    pub model: ModelSource,
    /// `[data]`: what it is trained on.
    pub data: DataConfig,
    /// `[train]`: how.
    pub train: TrainConfig,
    /// `[checkpoint]`: what is kept.
    pub checkpoint: CheckpointConfig,
}

/// `[data]`: the text, its tokenizer and the split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Files, folders and globs; relative ones start at the current folder.
    pub paths: Vec<String>,
    /// The field of a `.jsonl` line that holds its text.
    pub text_field: String,
    /// Read at most this many bytes of text, taking files in an order that depends on their
    /// names only; all when absent.
    pub max_bytes: Option<u64>,
    /// A `tokenizer.json`, or a folder with one. Give this or `vocab_size`.
    pub tokenizer: Option<PathBuf>,
    /// Train a byte-level BPE tokenizer with this many tokens on the text itself.
    pub vocab_size: Option<usize>,
    /// Special tokens of the trained tokenizer besides `<|endoftext|>`.
    pub special_tokens: Vec<String>,
    /// Share of the documents held out for evaluation, chosen by the hash of their text; 0 for
    /// none.
    pub validation: f64,
    /// Longest sequence in tokens; longer documents are split.
    pub context: usize,
    /// Folder of the tokenized shards, which runs may share; `OUTPUT/tokens` when absent.
    pub cache: Option<PathBuf>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            text_field: "text".into(),
            max_bytes: None,
            tokenizer: None,
            vocab_size: None,
            special_tokens: Vec::new(),
            validation: 0.01,
            context: 2048,
            cache: None,
        }
    }
}

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the final rate.
    Cosine,
    /// Warm-up, stable, decay: flat, then a straight line to the final rate.
    Wsd,
}

/// Storage type of weights and activations; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// bfloat16, with f32 master weights in the optimizer.
    Bf16,
}

/// `[train]`: length, optimizer, and what is watched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps. Give this or `tokens`.
    pub steps: Option<u64>,
    /// Training tokens; rounded up to whole steps.
    pub tokens: Option<u64>,
    /// Tokens in one optimizer step.
    pub batch_tokens: usize,
    /// Parts that a step's tokens are worked through in, one after the other; more parts need
    /// less memory.
    pub accumulation: usize,
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
    /// Decides initial weights, data order and samples.
    pub seed: u64,
    /// Compute each layer again in the backward pass instead of keeping its activations.
    pub recompute: bool,
    /// Steps between evaluations on the held-out documents; 0 for only one at the end.
    pub eval_every: u64,
    /// Batches of `batch_tokens / accumulation` tokens in one evaluation, always the same ones.
    pub eval_batches: usize,
    /// Steps between text samples; 0 for none.
    pub sample_every: u64,
    /// What a sample continues; empty starts a new document.
    pub sample_prompt: String,
    /// Longest sample in tokens.
    pub sample_tokens: usize,
    /// Steps in a row without a finite loss and gradient after which the run stops.
    pub nan_patience: usize,
    /// Loss or gradient norm this many standard deviations above its mean of the last 128 steps
    /// is logged as an outlier; 0 for never.
    pub outlier_z: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: None,
            tokens: None,
            batch_tokens: 8192,
            accumulation: 1,
            lr: 1e-3,
            final_lr: 0.1,
            schedule: ScheduleKind::Cosine,
            warmup: 100,
            decay: 0.2,
            weight_decay: 0.1,
            betas: [0.9, 0.95],
            eps: 1e-8,
            clip: 1.0,
            dtype: Precision::F32,
            seed: 0,
            recompute: false,
            eval_every: 200,
            eval_batches: 8,
            sample_every: 0,
            sample_prompt: String::new(),
            sample_tokens: 128,
            nan_patience: 10,
            outlier_z: 5.0,
        }
    }
}

/// `[checkpoint]`: how often, and how many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; one is always written at the end. 0 for only that.
    pub every: u64,
    /// Newest checkpoints kept.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 500, keep: 2 }
    }
}

impl RunConfig {
    /// Optimizer steps of the whole run.
    pub fn steps(&self) -> u64 {
        let from_tokens = |tokens: u64| tokens.div_ceil(self.train.batch_tokens as u64);
        self.train.steps.or(self.train.tokens.map(from_tokens)).unwrap_or(0)
    }

    /// Tokens that go through the model at once.
    pub fn micro_tokens(&self) -> usize {
        self.train.batch_tokens / self.train.accumulation
    }

    /// Folder of the tokenized shards.
    pub fn cache(&self) -> PathBuf {
        self.data.cache.clone().unwrap_or_else(|| self.output.join("tokens"))
    }
}
