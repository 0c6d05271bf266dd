//! What can go wrong on the way from a config file to a trained model.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::{Precision, RunConfig};

/// Errors of this crate. Messages say what was wrong, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key of the run's configuration, in the file or on the command line.
    #[error("config: `{key}` {problem}")]
    Config {
        /// The dotted key.
        key: String,
        /// What is wrong with it, worded to follow the key.
        problem: String,
    },
    /// The configuration file cannot be read as TOML.
    #[error("config {}: {problem}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file or folder could not be read or written.
    #[error("could not {action} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// What was attempted, such as `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The training text cannot be used.
    #[error("data: {0}")]
    Data(String),
    /// A tokenizer cannot be trained, read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A checkpoint or run folder cannot be used.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// Another process is using the folder.
    #[error(
        "{} is in use by another run{holder}; wait for it, or choose another `output`",
        path.display()
    )]
    Locked {
        /// The folder.
        path: PathBuf,
        /// ` (process 123)` when known, else empty.
        holder: String,
    },
    /// Too many steps in a row had a loss or gradient that is not finite.
    #[error(
        "training diverged: {skipped} steps in a row had a loss or gradient that is not finite; \
         the last was step {step}: {place}. Lower train.lr, lengthen train.warmup or look at the \
         data there; the last checkpoint is kept"
    )]
    Diverged {
        /// Steps skipped in a row.
        skipped: usize,
        /// The last of them, counted from 1.
        step: u64,
        /// Where the first value that is not finite was found.
        place: String,
    },
    /// The device's memory does not hold the run.
    #[error("{reason}. {advice}; `tercet plan --device cuda` foretells what a run needs")]
    OutOfMemory {
        /// What was asked, what is free, the largest tensors.
        reason: String,
        /// The keys that need less.
        advice: String,
    },
    /// The stop flag was raised before training began; nothing was lost.
    #[error("interrupted while preparing the data; nothing was lost")]
    Interrupted,
    /// What should not have happened: our fault.
    #[error("{0}")]
    Fault(String),
    /// The model refused.
    #[error(transparent)]
    Model(#[from] tercet_model::Error),
    /// The tensor layer refused.
    #[error(transparent)]
    Tensor(#[from] tercet_tensor::Error),
}

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the user's input or machine is at fault (exit code 2) and not this program (1).
    pub fn is_users(&self) -> bool {
        match self {
            Self::Model(error) => error.is_users(),
            Self::Tensor(error) => error.is_users(),
            Self::Fault(_) => false,
            _ => true,
        }
    }

    /// The same error with the keys that help, when memory ran out.
    pub fn with_advice(self, config: &RunConfig) -> Self {
        self.advised(|| advice(config))
    }

    /// As [`Error::with_advice`], with advice of another kind of run.
    pub fn advised(self, advice: impl FnOnce() -> String) -> Self {
        let (Self::Tensor(error) | Self::Model(tercet_model::Error::Tensor(error))) = &self else {
            return self;
        };
        if !error.is_out_of_memory() {
            return self;
        }
        Self::OutOfMemory { reason: error.to_string(), advice: advice() }
    }

    /// A refused key; `problem` is worded to follow it.
    pub fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }

    /// For `map_err`: the action and the path around an I/O error.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// What makes a run smaller, the cheapest first.
fn advice(config: &RunConfig) -> String {
    let (train, context) = (&config.train, config.data.context);
    let mut keys = Vec::new();
    if !train.recompute {
        keys.push("train.recompute = true".to_owned());
    }
    let parts = train.batch_tokens / context.max(1);
    if train.accumulation < parts {
        // The next number of parts that divides the batch.
        let more = (train.accumulation + 1..=parts).find(|n| train.batch_tokens.is_multiple_of(*n));
        keys.extend(more.map(|more| format!("train.accumulation = {more}")));
    }
    if train.dtype == Precision::F32 {
        keys.push("train.dtype = \"bf16\"".to_owned());
    }
    keys.push(format!("a data.context below {context}"));
    format!("What needs less: {}", keys.join(", or "))
}

/// What to do about the I/O errors a training run meets most.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            ". Free some space or choose another folder, then run again with --resume; complete \
             checkpoints are untouched"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            ". Choose a folder that you may write to"
        }
        _ => "",
    }
}
