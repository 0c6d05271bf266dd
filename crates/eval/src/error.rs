//! What can go wrong between a task file and a score.

use std::path::{Path, PathBuf};

/// Errors of this crate. Messages say what was wrong, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file was read, but is not what is wanted of it.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A row of a task's data does not give what the task asks of it.
    #[error("task {task}, row {row} (counted from 0): {reason}")]
    Row {
        /// The task's name.
        task: String,
        /// The row.
        row: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// What was asked for cannot be done with this model.
    #[error("{0}")]
    Ask(String),
    /// The model refused a call.
    #[error(transparent)]
    Model(#[from] tercet_model::Error),
}

impl Error {
    /// Whether the user's input is at fault (exit code 2) and not this program (1).
    pub fn is_users(&self) -> bool {
        match self {
            Self::Model(error) => error.is_users(),
            _ => true,
        }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }
}

impl From<tercet_tensor::Error> for Error {
    fn from(error: tercet_tensor::Error) -> Self {
        Self::Model(error.into())
    }
}

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;
