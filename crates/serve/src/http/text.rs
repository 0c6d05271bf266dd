//! What the front knows of a model: its text, its names, its habits.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tercet_model::{Error, GenerationConfig, ModelConfig, Sampling, TokenBytes, Tokenizer};

use super::backend::Backend;
use super::constraint::Grammars;
use super::error::{ApiError, ApiResult};

/// A model that is served.
pub struct Served {
    /// What writes.
    pub engine: Arc<dyn Backend>,
    /// The base model's name; adapters go by their own.
    pub name: String,
    /// Its text.
    pub text: Text,
    /// Whether its attention selects blocks, so that there is something to show of what it read.
    pub sparse: bool,
    /// Seconds since 1970 when serving began.
    pub created: u64,
    /// Answers that a stop text ended: the engine, which knows no text, counts them as cancelled.
    pub ended_by_text: AtomicU64,
}

/// How a model's text becomes tokens and back.
pub struct Text {
    /// The tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// What each token stands for, `[tokens]`.
    pub bytes: Vec<TokenBytes>,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// Rows of the model's vocabulary.
    pub vocab: usize,
    /// The content of `tokenizer_config.json`.
    pub config: Map<String, Value>,
    /// How the model's makers choose tokens, over OpenAI's defaults.
    pub sampling: Sampling,
    /// Made when the first grammar is asked for.
    pub(super) grammars: OnceLock<Result<Grammars, String>>,
}

impl Text {
    /// Reads the text side of a model folder.
    pub fn load(dir: &Path, model: &ModelConfig) -> Result<Self, Error> {
        let tokenizer = Tokenizer::load(dir)?;
        tokenizer.check_fits(model.vocab_size)?;
        let path = dir.join("tokenizer_config.json");
        let config = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::File { path, reason: format!("is not a JSON object: {e}") })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(source) => return Err(Error::Io { path, source }),
        };
        let habits = GenerationConfig::load(dir)?;
        let ends = habits.eos_token_ids.clone().unwrap_or_else(|| model.eos_token_ids.clone());
        let text = Self::new(tokenizer, ends, model.vocab_size);
        let sampling = habits.apply(text.sampling.clone());
        sampling.validate()?;
        Ok(Self { config, sampling, ..text })
    }

    /// The text side of a tokenizer, with OpenAI's defaults.
    pub fn new(tokenizer: Tokenizer, ends: Vec<u32>, vocab: usize) -> Self {
        // Where OpenAI documents none, `seed` and `max_tokens` are set by each request.
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
        Self {
            bytes: tokenizer.token_bytes(),
            tokenizer,
            ends,
            vocab,
            config: Map::new(),
            sampling,
            grammars: OnceLock::new(),
        }
    }

    /// A token as text; bytes that are no text on their own become `bytes:\xe6`, as in OpenAI's
    /// API, so that no two tokens look the same.
    pub fn token(&self, id: u32) -> String {
        let Some(token) = self.bytes.get(id as usize).filter(|t| !t.bytes.is_empty()) else {
            return format!("token_id:{id}");
        };
        match std::str::from_utf8(&token.bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let hex = token.bytes.iter().map(|b| format!("\\x{b:02x}"));
                format!("bytes:{}", hex.collect::<String>())
            }
        }
    }

    /// A special token's text by its role, such as `eos_token`.
    pub fn special(&self, role: &str) -> Option<String> {
        let value = self.config.get(role)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some(text.to_owned())
    }
}

impl Served {
    /// A model that is served from now on.
    pub fn new(engine: Arc<dyn Backend>, name: String, text: Text, sparse: bool) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let created = now.map_or(0, |d| d.as_secs());
        Self { engine, name, text, sparse, created, ended_by_text: AtomicU64::new(0) }
    }

    /// The names that requests may use: the base model's, then the adapters'.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![self.name.clone()];
        names.extend(self.engine.adapters());
        names
    }

    /// The adapter that a model's name means; `None` is the base model.
    pub fn adapter(&self, name: Option<&str>) -> ApiResult<Option<String>> {
        match name {
            None => Ok(None),
            Some(name) if name == self.name => Ok(None),
            Some(name) => {
                let names = self.names();
                let known = names.iter().skip(1).find(|n| *n == name).cloned();
                known.map(Some).ok_or_else(|| ApiError::no_model(name, &names))
            }
        }
    }
}
