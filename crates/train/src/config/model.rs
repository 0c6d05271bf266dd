//! `[model]`: a new architecture, or a folder to continue from.

use std::path::PathBuf;

use toml::{Table, Value};

use crate::error::{Error, Result};

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// `model.path`: a Hugging Face folder whose weights (and tokenizer) are continued from.
    Folder(PathBuf),
    /// All other keys: the architecture of a new model.
    New(Table),
}

impl ModelSource {
    pub(super) fn from_table(mut table: Table) -> Result<Self> {
        let Some(path) = table.remove("path") else { return Ok(Self::New(table)) };
        if let Some(key) = table.keys().next() {
            return Err(Error::config(
                format!("model.{key}"),
                "cannot be set beside model.path: the folder decides the architecture",
            ));
        }
        match path {
            Value::String(text) if !text.is_empty() => Ok(Self::Folder(PathBuf::from(text))),
            other => {
                Err(Error::config("model.path", format!("is {other}; expected a folder name")))
            }
        }
    }

    pub(super) fn to_table(&self) -> Table {
        match self {
            Self::Folder(path) => {
                let text = path.to_string_lossy().into_owned();
                Table::from_iter([("path".to_owned(), Value::String(text))])
            }
            Self::New(table) => table.clone(),
        }
    }

    /// Whether the run continues from a folder.
    pub fn is_folder(&self) -> bool {
        matches!(self, Self::Folder(_))
    }
}
