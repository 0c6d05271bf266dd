//! Text ⇄ token ids: a `tokenizer.json` and what stands beside it.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::chat::ChatTemplate;
use crate::text_stream::TextStream;
use crate::token_bytes::{self, TokenBytes};
use crate::{Error, Result};

/// Files of a model folder that belong to its text and not to its weights.
const COMPANIONS: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "chat_template.json",
];

/// A tokenizer whose ids are known to be one-to-one.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    size: usize,
    chat: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, and its chat template if there is one.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let mut tokenizer =
            Self::from_bytes(&bytes).map_err(|e| Error::file(&path, e.to_string()))?;
        tokenizer.chat = chat_template(dir)?;
        Ok(tokenizer)
    }

    /// Reads the content of a `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let wrong =
            |e: &dyn std::fmt::Display| Error::Tokenizer(format!("is not a tokenizer.json: {e}"));
        // The tokenizers library panics on some text that is not JSON, so that is found out first.
        serde_json::from_slice::<Value>(bytes).map_err(|e| wrong(&e))?;
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|e| wrong(&e))?;
        let size = check_ids(&inner)?;
        Ok(Self { inner, size, chat: None })
    }

    /// One more than the largest id: the rows an embedding needs at least.
    pub fn vocab_size(&self) -> usize {
        self.size
    }

    /// Refuses a tokenizer that makes ids a model of `vocab_size` rows does not have.
    pub fn check_fits(&self, vocab_size: usize) -> Result<()> {
        if self.size <= vocab_size {
            return Ok(());
        }
        Err(Error::Tokenizer(format!(
            "has ids up to {}, but the model's vocab_size is {vocab_size}; set vocab_size to at \
             least {} or use the model's own tokenizer",
            self.size - 1,
            self.size
        )))
    }

    /// The ids of a text; `special` lets the tokenizer add its own marks, such as a first token.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, special))
            .map_err(|e| Error::Tokenizer(format!("cannot encode the text: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text, each with the byte of `text` where its token begins; marks that the
    /// tokenizer adds itself (`special`) begin where they stand.
    pub fn encode_at(&self, text: &str, special: bool) -> Result<Vec<(u32, usize)>> {
        let encoding = guarded(|| self.inner.encode(text, special))
            .map_err(|e| Error::Tokenizer(format!("cannot encode the text: {e}")))?;
        let starts = encoding.get_offsets().iter().map(|&(start, _)| start);
        Ok(encoding.get_ids().iter().copied().zip(starts).collect())
    }

    /// The text of ids, special tokens left out. Ids without a token add nothing.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true))
            .map_err(|e| Error::Tokenizer(format!("cannot decode the tokens: {e}")))
    }

    /// As [`Tokenizer::decode`], special tokens written out.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, false))
            .map_err(|e| Error::Tokenizer(format!("cannot decode the tokens: {e}")))
    }

    /// Decodes one id at a time into correct UTF-8.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self, false)
    }

    /// As [`Tokenizer::stream`], special tokens written out.
    pub fn stream_all(&self) -> TextStream<'_> {
        TextStream::new(self, true)
    }

    /// The bytes that each id stands for, `[vocab_size]`; see [`TokenBytes`].
    pub fn token_bytes(&self) -> Vec<TokenBytes> {
        token_bytes::of(&self.inner, self.size)
    }

    /// The id of a token, written exactly.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// How conversations become one text, if the model was trained on them.
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }
}

/// Runs a call of the tokenizers library. With a nonsensical `tokenizer.json` (an empty pattern to
/// replace, say) it panics inside; its state is only read here, so going on is sound.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err("the rules in tokenizer.json contradict themselves".into()))
}

/// Copies the tokenizer and the files around it from one model folder to another.
pub fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANIONS {
        let source = from.join(name);
        if source.is_file() {
            let target = to.join(name);
            std::fs::copy(&source, &target).map_err(|e| Error::io(&target, e))?;
            let synced = std::fs::File::open(&target).and_then(|file| file.sync_all());
            synced.map_err(|e| Error::io(&target, e))?;
        }
    }
    Ok(())
}

/// Checks that no two tokens share an id, which a tampered file would use to swap meanings
/// unseen; returns one more than the largest id.
fn check_ids(inner: &tokenizers::Tokenizer) -> Result<usize> {
    let vocab = inner.get_vocab(true);
    if vocab.is_empty() {
        return Err(Error::Tokenizer("has no tokens".into()));
    }
    let mut tokens: HashMap<u32, &str> = HashMap::with_capacity(vocab.len());
    let mut clash: Option<(u32, [&str; 2])> = None;
    for (token, &id) in &vocab {
        if let Some(other) = tokens.insert(id, token) {
            let mut pair = [other, token.as_str()];
            pair.sort_unstable();
            clash = clash.map_or(Some((id, pair)), |old| Some(old.min((id, pair))));
        }
    }
    if let Some((id, [a, b])) = clash {
        return Err(Error::Tokenizer(format!(
            "gives id {id} to both {a:?} and {b:?}; every token needs an id of its own"
        )));
    }
    Ok(tokens.keys().max().map_or(0, |&id| id as usize + 1))
}

/// The chat template: `chat_template.jinja`, or the `chat_template` of `tokenizer_config.json`.
fn chat_template(dir: &Path) -> Result<Option<ChatTemplate>> {
    let path = dir.join("tokenizer_config.json");
    let config = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice::<Map<String, Value>>(&bytes)
            .map_err(|e| Error::file(&path, format!("is not a JSON object: {e}")))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Map::new(),
        Err(e) => return Err(Error::io(&path, e)),
    };
    let file = dir.join("chat_template.jinja");
    let source = match std::fs::read_to_string(&file) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => named_template(&config),
        Err(e) => return Err(Error::io(&file, e)),
    };
    let Some(source) = source else { return Ok(None) };
    let special = config.iter().filter(|(key, _)| key.ends_with("_token")).filter_map(special);
    ChatTemplate::new(source, special.collect()).map(Some)
}

/// A template, or the one called "default" in a list of named ones.
fn named_template(config: &Map<String, Value>) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(source) => Some(source.clone()),
        Value::Array(list) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    }
}

/// `"bos_token": "<s>"`, or the same inside an object with a `content`.
fn special((key, value): (&String, &Value)) -> Option<(String, String)> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    Some((key.clone(), text.to_owned()))
}
