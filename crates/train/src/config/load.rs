//! From a TOML file and `key=value` overrides to a [`RunConfig`].

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::keys::{keys_of, unknown};
use super::model::known_keys;
use super::{CheckpointConfig, DataConfig, ModelSource, RunConfig, TrainConfig};
use crate::error::{Error, Result};

/// Keys and sections at the top of a run file.
const SECTIONS: [&str; 5] = ["output", "model", "data", "train", "checkpoint"];

/// A run file with its overrides applied, taken apart section by section.
pub struct Sections(Table);

impl Sections {
    /// Reads a run file and applies `key=value` overrides (dotted keys, TOML values; a value that
    /// is not TOML is taken as text). `known` are the keys and sections it may have at its top.
    pub fn load(path: &Path, overrides: &[String], known: &[&str]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let table = text.parse::<Table>().map_err(|error| Error::ConfigFile {
            path: path.to_owned(),
            problem: error.to_string().trim_end().to_owned(),
        })?;
        Self::from_table(table, overrides, known)
    }

    /// Like [`load`](Self::load), from TOML text.
    pub fn parse(text: &str, overrides: &[String], known: &[&str]) -> Result<Self> {
        let table = text
            .parse::<Table>()
            .map_err(|e| Error::config("(text)", e.to_string().trim_end().to_owned()))?;
        Self::from_table(table, overrides, known)
    }

    fn from_table(mut table: Table, overrides: &[String], known: &[&str]) -> Result<Self> {
        for text in overrides {
            apply_override(&mut table, text)?;
        }
        match table.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(Self(table)),
            Some(key) => Err(Error::config(key, unknown(key, "", known))),
        }
    }

    /// The run's folder, `output`.
    pub fn output(&mut self) -> Result<PathBuf> {
        match self.0.remove("output") {
            Some(Value::String(text)) if !text.is_empty() => Ok(PathBuf::from(text)),
            Some(other) => {
                Err(Error::config("output", format!("is {other}; expected a folder name")))
            }
            None => Err(Error::config("output", "is missing: the folder for this run's files")),
        }
    }

    /// A section; one that is absent is what an empty one would be.
    pub fn take<T: for<'de> Deserialize<'de>>(&mut self, name: &str) -> Result<T> {
        from_section(take_section(&mut self.0, name)?, name)
    }

    /// A section that may be absent.
    pub fn take_if_there<T: for<'de> Deserialize<'de>>(&mut self, name: &str) -> Result<Option<T>> {
        if self.0.contains_key(name) { self.take(name).map(Some) } else { Ok(None) }
    }
}

impl RunConfig {
    /// Reads a run file, applies `key=value` overrides (dotted keys, TOML values; a value that is
    /// not TOML is taken as text) and checks the result.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::load(path, overrides, &SECTIONS)?)
    }

    /// Like [`load`](Self::load), from TOML text.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::parse(text, overrides, &SECTIONS)?)
    }

    fn from_sections(mut sections: Sections) -> Result<Self> {
        let config = Self {
            output: sections.output()?,
            model: ModelSource::from_table(take_section(&mut sections.0, "model")?)?,
            data: sections.take::<DataConfig>("data")?,
            train: sections.take::<TrainConfig>("train")?,
            checkpoint: sections.take::<CheckpointConfig>("checkpoint")?,
        };
        config.check()?;
        Ok(config)
    }

    /// The whole configuration as TOML, defaults included; [`parse`](Self::parse) reads it back.
    pub fn to_toml(&self) -> String {
        let mut table = Table::new();
        table.insert("output".into(), Value::String(self.output.to_string_lossy().into_owned()));
        table.insert("model".into(), Value::Table(self.model.to_table()));
        // A struct of numbers, strings and lists always has a TOML form.
        for (name, value) in [
            ("data", Value::try_from(&self.data)),
            ("train", Value::try_from(&self.train)),
            ("checkpoint", Value::try_from(&self.checkpoint)),
        ] {
            if let Ok(value) = value {
                table.insert(name.into(), value);
            }
        }
        table.to_string()
    }
}

/// Sets one dotted key.
fn apply_override(table: &mut Table, text: &str) -> Result<()> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(Error::config(
            text,
            "is not an override; expected key=value, such as train.lr=3e-4",
        ));
    };
    let (key, value) = (key.trim(), value.trim());
    let parsed = format!("value = {value}").parse::<Table>().ok();
    let value = parsed
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    if last.is_empty() || parts.iter().any(|part| part.is_empty()) {
        return Err(Error::config(key, "is not a dotted key, such as train.lr"));
    }
    let mut here = table;
    for part in parts {
        let entry = here.entry(part).or_insert_with(|| Value::Table(Table::new()));
        here = entry
            .as_table_mut()
            .ok_or_else(|| Error::config(key, format!("cannot be set: `{part}` is a value")))?;
    }
    here.insert(last.to_owned(), value);
    Ok(())
}

/// Takes a section's table out of the file; an absent one is empty.
fn take_section(table: &mut Table, name: &str) -> Result<Table> {
    match table.remove(name) {
        None => Ok(Table::new()),
        Some(Value::Table(section)) => Ok(section),
        Some(other) => {
            Err(Error::config(name, format!("is {other}; expected a section, [{name}]")))
        }
    }
}

/// Turns a section's table into its struct, with errors that name the dotted key.
fn from_section<T: for<'de> Deserialize<'de>>(table: Table, name: &str) -> Result<T> {
    known_keys(&table, name, keys_of::<T>())?;
    table.try_into::<T>().map_err(|error| refusal(name, &error))
}

/// An error of the deserializer, with the dotted key in front. The key is not a field of the
/// error; its text ends with "in `key`".
pub(super) fn refusal(section: &str, error: &toml::de::Error) -> Error {
    let text = error.to_string();
    let key = text.trim_end().rsplit_once("in `").and_then(|(_, key)| key.strip_suffix('`'));
    let key = key.map_or(section.to_owned(), |key| format!("{section}.{key}"));
    Error::config(key, format!("is refused: {}", error.message()))
}

/// A whole configuration as TOML, defaults included.
pub fn to_toml<T: serde::Serialize>(config: &T) -> Result<String> {
    toml::to_string(config)
        .map_err(|error| Error::config("(whole)", format!("has no TOML form: {error}")))
}
