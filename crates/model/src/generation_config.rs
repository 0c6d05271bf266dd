//! `generation_config.json`: what a model's makers suggest for writing text.

use std::path::Path;

use serde::Deserialize;

use crate::config::OneOrMany;
use crate::sampling::Sampling;
use crate::{Error, Result};

/// The fields of `generation_config.json` that we follow; all may be absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text; they replace those of `config.json`.
    pub eos_token_ids: Option<Vec<u32>>,
    /// False asks for the most probable token always.
    pub do_sample: Option<bool>,
    /// See [`Sampling::temperature`].
    pub temperature: Option<f32>,
    /// See [`Sampling::top_k`].
    pub top_k: Option<usize>,
    /// See [`Sampling::top_p`].
    pub top_p: Option<f32>,
    /// See [`Sampling::min_p`].
    pub min_p: Option<f32>,
    /// See [`Sampling::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
}

#[derive(Deserialize)]
struct Raw {
    eos_token_id: Option<OneOrMany>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the file of a model folder; nothing when there is none.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("generation_config.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let raw: Raw = serde_json::from_slice(&bytes)
            .map_err(|e| Error::file(&path, format!("is not a generation config: {e}")))?;
        Ok(Self {
            eos_token_ids: raw.eos_token_id.map(Vec::from),
            do_sample: raw.do_sample,
            temperature: raw.temperature,
            top_k: raw.top_k,
            top_p: raw.top_p,
            min_p: raw.min_p,
            repetition_penalty: raw.repetition_penalty,
        })
    }

    /// `base` with what the file suggests.
    pub fn apply(&self, base: Sampling) -> Sampling {
        let temperature = match self.do_sample {
            Some(false) => 0.0,
            _ => self.temperature.unwrap_or(base.temperature),
        };
        Sampling {
            temperature,
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            ..base
        }
    }
}
