//! The rules a configuration keeps; every refusal names the key, its value and the rule.

use super::{CheckpointConfig, DataConfig, RunConfig, TrainConfig};
use crate::error::{Error, Result};

/// Bounds past which a number is a slip, not a plan.
const MAX_CONTEXT: usize = 1 << 24;
const MAX_BATCH: usize = 1 << 30;
const MAX_STEPS: u64 = 1 << 40;
const MAX_VOCAB: usize = 1 << 24;
/// 256 bytes and `<|endoftext|>`.
pub const MIN_VOCAB: usize = 257;

impl RunConfig {
    /// Checks everything that needs no file.
    pub(super) fn check(&self) -> Result<()> {
        check_data(&self.data)?;
        check_train(&self.train)?;
        if self.micro_tokens() < self.data.context {
            return Err(Error::config(
                "train.batch_tokens",
                format!(
                    "= {} in {} part(s) leaves {} tokens at once, less than data.context = {}",
                    self.train.batch_tokens,
                    self.train.accumulation,
                    self.micro_tokens(),
                    self.data.context
                ),
            ));
        }
        self.model.check(self.data.vocab_size, self.data.context)?;
        within("train.tokens", self.steps(), 1, MAX_STEPS, "steps")?;
        self.checkpoint.check()?;
        if self.data.tokenizer.is_none()
            && self.data.vocab_size.is_none()
            && !self.model.is_folder()
        {
            return Err(Error::config(
                "data.tokenizer",
                "is missing: name a tokenizer.json, or set data.vocab_size to train one",
            ));
        }
        Ok(())
    }
}

impl CheckpointConfig {
    /// Checks the number kept.
    pub fn check(&self) -> Result<()> {
        within("checkpoint.keep", self.keep as u64, 1, 1 << 20, "")
    }
}

fn check_data(data: &DataConfig) -> Result<()> {
    if data.paths.iter().any(String::is_empty) {
        return Err(Error::config("data.paths", "holds an empty name"));
    }
    if data.text_field.is_empty() {
        return Err(Error::config(
            "data.text_field",
            "is empty; expected a field such as \"text\"",
        ));
    }
    if data.max_bytes == Some(0) {
        return Err(Error::config("data.max_bytes", "= 0 leaves no text; leave it out for all"));
    }
    if data.tokenizer.is_some() && data.vocab_size.is_some() {
        return Err(Error::config(
            "data.vocab_size",
            "trains a tokenizer, but data.tokenizer names one; keep one of the two",
        ));
    }
    if let Some(size) = data.vocab_size {
        let least = MIN_VOCAB + data.special_tokens.len();
        within("data.vocab_size", size as u64, least as u64, MAX_VOCAB as u64, "")?;
    }
    real("data.validation", data.validation, 0.0, 0.9)?;
    within("data.context", data.context as u64, 2, MAX_CONTEXT as u64, "")
}

fn check_train(train: &TrainConfig) -> Result<()> {
    match (train.steps, train.tokens) {
        (None, None) => {
            return Err(Error::config(
                "train.steps",
                "is missing: how long to train (or train.tokens)",
            ));
        }
        (Some(_), Some(_)) => {
            return Err(Error::config(
                "train.tokens",
                "and train.steps both say how long to train; keep one of the two",
            ));
        }
        (Some(steps), None) => within("train.steps", steps, 1, MAX_STEPS, "")?,
        (None, Some(tokens)) => within("train.tokens", tokens, 1, i64::MAX as u64, "")?,
    }
    within("train.batch_tokens", train.batch_tokens as u64, 2, MAX_BATCH as u64, "")?;
    within("train.accumulation", train.accumulation as u64, 1, train.batch_tokens as u64, "")?;
    if !train.batch_tokens.is_multiple_of(train.accumulation) {
        return Err(Error::config(
            "train.accumulation",
            format!(
                "= {} does not divide train.batch_tokens = {}",
                train.accumulation, train.batch_tokens
            ),
        ));
    }
    check_optimiser(train)?;
    within("train.eval_batches", train.eval_batches as u64, 1, 1 << 30, "")?;
    within("train.sample_tokens", train.sample_tokens as u64, 1, MAX_CONTEXT as u64, "")
}

/// What every kind of training asks of its optimizer.
pub(super) fn check_optimiser(train: &TrainConfig) -> Result<()> {
    if !(train.lr > 0.0 && train.lr <= 10.0) {
        return Err(Error::config(
            "train.lr",
            format!("= {} is outside (0, 10]; 3e-4 is a usual start", train.lr),
        ));
    }
    real("train.final_lr", train.final_lr, 0.0, 1.0)?;
    within("train.warmup", train.warmup, 0, MAX_STEPS, "")?;
    real("train.decay", train.decay, 0.0, 1.0)?;
    real("train.weight_decay", train.weight_decay, 0.0, 10.0)?;
    for beta in train.betas {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::config("train.betas", format!("holds {beta}, outside [0, 1)")));
        }
    }
    if !(train.eps > 0.0 && train.eps <= 1.0) {
        return Err(Error::config("train.eps", format!("= {} is outside (0, 1]", train.eps)));
    }
    real("train.clip", train.clip, 0.0, 1e6)?;
    within("train.nan_patience", train.nan_patience as u64, 1, 1 << 30, "")?;
    within("train.seed", train.seed, 0, i64::MAX as u64, "")?;
    real("train.outlier_z", train.outlier_z, 0.0, 1e6)
}

/// Refuses a whole number outside its range, with its `unit`.
pub fn within(key: &str, value: u64, least: u64, most: u64, unit: &str) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
    Err(Error::config(key, format!("= {value}{unit} is outside {least}..={most}")))
}

/// Refuses a real number outside its range, NaN too.
pub fn real(key: &str, value: f64, least: f64, most: f64) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::config(key, format!("= {value} is outside {least}..={most}")))
}
