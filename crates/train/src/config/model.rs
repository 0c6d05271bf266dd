//! `[model]`: a new architecture, or a folder to continue from.

use std::path::PathBuf;

use tercet_model::{ModelConfig, MoeConfig};
use tercet_tensor::NsaSpec;
use toml::{Table, Value};

use super::keys::{keys_of, unknown};
use super::load::refusal;
use crate::error::{Error, Result};

/// Stands for a vocabulary that is not known yet, when a configuration is checked before its
/// tokenizer is trained: larger than any that can be asked for.
const UNKNOWN_VOCAB: usize = 1 << 24;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// `model.path`: a Hugging Face folder whose weights (and tokenizer) are continued from.
    Folder(PathBuf),
    /// All other keys: the architecture of a new model, as in [`ModelConfig`]. `vocab_size`, the
    /// begin and end tokens and `max_position_embeddings` follow from the data when left out.
    New(Table),
}

/// What a new model takes over from its data.
#[derive(Clone, Copy, Debug)]
pub struct FromData {
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
    /// Longest sequence.
    pub context: usize,
    /// Token that begins a document.
    pub bos: u32,
    /// Token that ends a document.
    pub eos: u32,
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

    /// Checks what can be checked before the data is read: the size of a tokenizer that exists
    /// already is not known here.
    pub(super) fn check(&self, vocab_size: Option<usize>, context: usize) -> Result<()> {
        let Self::New(table) = self else { return Ok(()) };
        let named = table.get("vocab_size").and_then(Value::as_integer);
        let named = named.and_then(|size| usize::try_from(size).ok());
        let vocab_size = vocab_size.or(named).unwrap_or(UNKNOWN_VOCAB);
        self.config(&FromData { vocab_size, context, bos: 0, eos: 0 })?;
        Ok(())
    }

    /// The architecture; that of a folder is read from its `config.json`.
    pub fn config(&self, data: &FromData) -> Result<ModelConfig> {
        let config = match self {
            Self::Folder(path) => tercet_model::load_config(path)?.0,
            Self::New(table) => new_config(table, data)?,
        };
        for (key, has, needs, what) in [
            ("vocab_size", config.vocab_size, data.vocab_size, "tokens of the tokenizer"),
            (
                "max_position_embeddings",
                config.max_position_embeddings,
                data.context,
                "of data.context",
            ),
        ] {
            if has < needs {
                let problem = format!("= {has} is less than the {needs} {what}");
                return Err(Error::config(format!("model.{key}"), problem));
            }
        }
        Ok(config)
    }
}

/// A new architecture with what it leaves out taken from the data.
fn new_config(table: &Table, data: &FromData) -> Result<ModelConfig> {
    known_keys(table, "model", keys_of::<ModelConfig>())?;
    for (name, known) in [("nsa", keys_of::<NsaSpec>()), ("moe", keys_of::<MoeConfig>())] {
        if let Some(Value::Table(inner)) = table.get(name) {
            known_keys(inner, &format!("model.{name}"), known)?;
        }
    }
    let mut table = table.clone();
    for (key, value) in [
        ("vocab_size", data.vocab_size),
        ("max_position_embeddings", data.context),
        ("bos_token_id", data.bos as usize),
        ("eos_token_id", data.eos as usize),
    ] {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        table.entry(key).or_insert(Value::Integer(value));
    }
    table.try_into::<ModelConfig>().map_err(|error| {
        let text = error.message();
        let Some(rule) = text.strip_prefix("model config: ") else {
            return refusal("model", &error);
        };
        // A rule about one field begins with its name.
        match rule.split_once(' ') {
            Some((word, rest)) if keys_of::<ModelConfig>().contains(&word) => {
                Error::config(format!("model.{word}"), rest)
            }
            _ => Error::config("model", format!("is refused: {rule}")),
        }
    })
}

/// Refuses the first key that a section does not know.
pub(super) fn known_keys(table: &Table, section: &str, known: &[&str]) -> Result<()> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(Error::config(format!("{section}.{key}"), unknown(key, section, known))),
    }
}
