//! The run's tokenizer: documents to ids, with the tokens that mark their start and end.

use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};
use tercet_model::Tokenizer;

use crate::error::{Error, Result};
use crate::tokenizer_train::END_OF_TEXT;

/// Names under which tokenizers keep their end-of-text token, looked for in this order when
/// nothing says which it is.
const KNOWN_ENDS: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"];

/// A tokenizer and its document marks.
pub struct Vocabulary {
    /// For prompts and samples.
    tokenizer: Tokenizer,
    /// For documents, in which a special token that is spelled out is text like any other.
    encoder: tokenizers::Tokenizer,
    json: String,
    bos: u32,
    eos: u32,
}

impl Vocabulary {
    /// From the text of a `tokenizer.json`. `marks` are the ids that begin and end a document
    /// where a model's configuration names them; otherwise a known end-of-text token does both.
    pub fn new(json: String, marks: (Option<u32>, Option<u32>)) -> Result<Self> {
        let tokenizer = Tokenizer::from_bytes(json.as_bytes())?;
        let unusable = |error: tokenizers::Error| Error::Tokenizer(error.to_string());
        let mut encoder: tokenizers::Tokenizer = json.parse().map_err(unusable)?;
        encoder.set_encode_special_tokens(true);
        encoder.with_truncation(None).map_err(unusable)?.with_padding(None);
        let known = || KNOWN_ENDS.iter().find_map(|name| tokenizer.token_id(name));
        let Some(eos) = marks.1.or_else(known) else {
            return Err(Error::Tokenizer(format!(
                "has no token that ends a text; looked for {}",
                KNOWN_ENDS.join(", ")
            )));
        };
        let bos = marks.0.unwrap_or(eos);
        if let Some(id) = [bos, eos].iter().find(|&&id| id as usize >= tokenizer.vocab_size()) {
            return Err(Error::Tokenizer(format!(
                "the model begins or ends texts with token {id}, but the tokenizer has only {}",
                tokenizer.vocab_size()
            )));
        }
        Ok(Self { tokenizer, encoder, json, bos, eos })
    }

    /// Reads a `tokenizer.json`, or the one in a folder.
    pub fn load(path: &Path, marks: (Option<u32>, Option<u32>)) -> Result<Self> {
        let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let json = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let place = |text: String| Error::Tokenizer(format!("{}: {text}", path.display()));
        Self::new(json, marks).map_err(|error| match error {
            Error::Tokenizer(text) => place(text),
            Error::Model(error) => place(error.to_string()),
            other => other,
        })
    }

    /// Ids lie below this.
    pub fn size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// The token that begins a document.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The token that ends a document.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// For prompts and samples.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// SHA-256 of everything that decides which ids a text becomes.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(self.bos.to_le_bytes());
        hasher.update(self.eos.to_le_bytes());
        hasher.update(self.json.as_bytes());
        hasher.finalize().into()
    }

    /// `begin, ids of the text, end`.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .encoder
            .encode_fast(text, false)
            .map_err(|error| Error::Tokenizer(format!("could not encode a document: {error}")))?;
        let ids = encoding.get_ids();
        let mut document = Vec::with_capacity(ids.len() + 2);
        document.push(self.bos);
        document.extend_from_slice(ids);
        document.push(self.eos);
        Ok(document)
    }

    /// `begin` and the ids of a prompt.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = vec![self.bos];
        ids.extend(self.tokenizer.encode(text, false)?);
        Ok(ids)
    }

    /// The files that make a model folder one that other programs can read text with.
    pub fn files(&self, context: usize) -> Vec<(String, Vec<u8>)> {
        let token = |id| self.tokenizer.token(id).unwrap_or_default();
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token(self.bos),
            "eos_token": token(self.eos),
            "model_max_length": context,
        });
        let generation = json!({ "bos_token_id": self.bos, "eos_token_id": self.eos });
        vec![
            ("tokenizer.json".into(), self.json.clone().into_bytes()),
            ("tokenizer_config.json".into(), format!("{config:#}\n").into_bytes()),
            ("generation_config.json".into(), format!("{generation:#}\n").into_bytes()),
        ]
    }
}
