//! The run's tokenizer: documents to ids, with the tokens that mark their start and end.

use std::path::Path;

use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::tokenizer_train::END_OF_TEXT;

/// Names under which tokenizers keep their end-of-text token, looked for in this order when
/// nothing says which it is.
const KNOWN_ENDS: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"];

/// A tokenizer and its document marks.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    json: String,
    bos: u32,
    eos: u32,
}

impl Vocabulary {
    /// From the text of a `tokenizer.json`. `marks` are the ids that begin and end a document
    /// where a model's configuration names them; otherwise a known end-of-text token does both.
    pub fn new(json: String, marks: (Option<u32>, Option<u32>)) -> Result<Self> {
        let mut tokenizer: Tokenizer = json
            .parse()
            .map_err(|error| Error::Tokenizer(format!("not a usable tokenizer.json: {error}")))?;
        // A document that spells a special token out is text like any other.
        tokenizer.set_encode_special_tokens(true);
        tokenizer
            .with_truncation(None)
            .map_err(|error| Error::Tokenizer(error.to_string()))?
            .with_padding(None);
        let eos = marks.1.or_else(|| KNOWN_ENDS.iter().find_map(|name| tokenizer.token_to_id(name)));
        let Some(eos) = eos else {
            return Err(Error::Tokenizer(format!(
                "has no token that ends a text; looked for {}",
                KNOWN_ENDS.join(", ")
            )));
        };
        let vocabulary = Self { tokenizer, json, bos: marks.0.unwrap_or(eos), eos };
        for id in [vocabulary.bos, eos] {
            if id as usize >= vocabulary.size() {
                return Err(Error::Tokenizer(format!(
                    "the model's begin or end token is {id}, but there are only {} tokens",
                    vocabulary.size()
                )));
            }
        }
        Ok(vocabulary)
    }

    /// Reads a `tokenizer.json`, or the one in a folder.
    pub fn load(path: &Path, marks: (Option<u32>, Option<u32>)) -> Result<Self> {
        let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let json = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Self::new(json, marks).map_err(|error| match error {
            Error::Tokenizer(text) => Error::Tokenizer(format!("{}: {text}", path.display())),
            other => other,
        })
    }

    /// Ids lie below this.
    pub fn size(&self) -> usize {
        // Not the number of tokens: ids may have gaps.
        self.tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The token that begins a document.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The token that ends a document.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The text of its `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
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
            .tokenizer
            .encode_fast(text, false)
            .map_err(|error| Error::Tokenizer(format!("could not encode a document: {error}")))?;
        let ids = encoding.get_ids();
        let mut document = Vec::with_capacity(ids.len() + 2);
        document.push(self.bos);
        document.extend_from_slice(ids);
        document.push(self.eos);
        Ok(document)
    }
}
