//! What can go wrong between a model folder and a generated token.

use std::path::{Path, PathBuf};

/// Errors of this crate. Messages say what was wrong, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the model configuration breaks a rule.
    #[error("model config: {0}")]
    Config(String),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file was read but its content is not what its name promises.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A LoRA adapter, or what one was to be made of, does not fit.
    #[error("adapter: {0}")]
    Adapter(String),
    /// The tokenizer cannot be used, or refused a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template failed.
    #[error("chat template: {0}")]
    Chat(String),
    /// A request for text that cannot be met: sampling settings, or a prompt that does not fit.
    #[error("generate: {0}")]
    Generate(String),
    /// A batch whose parts do not fit each other or the model.
    #[error("batch: {0}")]
    Batch(String),
    /// The tensor layer refused an operation the model asked for.
    #[error(transparent)]
    Tensor(#[from] tercet_tensor::Error),
    /// The attention operator refused a call of the model.
    #[error(transparent)]
    Attention(#[from] tercet_attention::Error),
}

impl Error {
    /// Whether the user's input is at fault (exit code 2) and not this program (1).
    pub fn is_users(&self) -> bool {
        match self {
            Self::Tensor(error) => error.is_users(),
            Self::Attention(_) | Self::Batch(_) => false,
            _ => true,
        }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }
}

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;
