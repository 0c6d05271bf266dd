//! A byte-level BPE tokenizer trained on the corpus itself.
//!
//! All 256 bytes are tokens, so every text can be written and none is unknown. Training is
//! deterministic: the same text, size and special tokens give the same file.

use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::data::Corpus;
use crate::error::{Error, Result};
use crate::files;

/// The token that begins and ends documents.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Text looked at by default, in bytes: enough for any vocabulary up to about 64k tokens.
pub const SAMPLE_BYTES: u64 = 32 << 20;

/// Text that a run looks at for its own tokenizer, in bytes: 4 KiB a token, so that a small
/// vocabulary is not waited for, from 8 MiB to [`SAMPLE_BYTES`].
pub fn sample_bytes(vocab_size: usize) -> u64 {
    (4096 * vocab_size as u64).clamp(8 << 20, SAMPLE_BYTES)
}

/// Trains a tokenizer with `vocab_size` tokens: `<|endoftext|>`, the further `special` ones, 256
/// bytes, and merges. At most about `sample_bytes` of the corpus are looked at, spread evenly.
/// Returns the text of a `tokenizer.json`.
pub fn train(
    corpus: &Corpus,
    vocab_size: usize,
    special: &[String],
    sample_bytes: u64,
) -> Result<String> {
    let failed = |error: tokenizers::Error| Error::Tokenizer(format!("training failed: {error}"));
    let names: Vec<&str> =
        std::iter::once(END_OF_TEXT).chain(special.iter().map(String::as_str)).collect();
    let smallest = 256 + names.len();
    if vocab_size < smallest {
        return Err(Error::Tokenizer(format!(
            "a vocabulary of {vocab_size} tokens cannot hold the 256 bytes and {} special \
             token(s); use at least {smallest}",
            names.len()
        )));
    }
    if let Some((i, name)) =
        names.iter().enumerate().find(|(i, name)| name.is_empty() || names[..*i].contains(name))
    {
        return Err(Error::Tokenizer(format!("special token {i} (`{name}`) is empty or a repeat")));
    }
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(names.iter().map(|name| AddedToken::from(*name, true)).collect())
        .build();
    let mut trainer = TrainerWrapper::from(trainer);
    let mut tokenizer = Tokenizer::new(BPE::default());
    let byte_level = ByteLevel::new(false, true, true);
    // Asked for special tokens, it begins a text the way documents begin in training.
    let begin = TemplateProcessing::builder()
        .try_single(format!("{END_OF_TEXT} $A"))
        .map_err(|error| failed(error.into()))?
        .special_tokens(vec![(END_OF_TEXT, 0)])
        .build()
        .map_err(|error| failed(error.into()))?;
    tokenizer
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(begin))
        .with_decoder(Some(byte_level));

    let mut problem = None;
    let mut reader = corpus.documents();
    let (mut seen, mut taken) = (0u64, 0u64);
    let sample = std::iter::from_fn(|| {
        loop {
            let text = match reader.next() {
                Ok(text) => text?,
                Err(error) => {
                    problem = Some(error);
                    return None;
                }
            };
            seen += text.len() as u64;
            // Takes a document whenever the share taken so far is behind the share wanted.
            let wanted = u128::from(sample_bytes) * u128::from(seen);
            if u128::from(taken) * u128::from(corpus.bytes) < wanted {
                taken += text.len() as u64;
                return Some(text);
            }
        }
    });
    tokenizer.train(&mut trainer, sample).map_err(failed)?;
    if let Some(error) = problem {
        return Err(error);
    }
    let size = tokenizer.get_vocab_size(true);
    if size < vocab_size {
        return Err(Error::Tokenizer(format!(
            "the text supports only {size} tokens, fewer than the {vocab_size} asked for; lower \
             the vocabulary size to {size} or add text"
        )));
    }
    tokenizer.to_string(true).map_err(failed)
}

/// Writes the text of a `tokenizer.json` so that it is whole or absent.
pub fn save(json: &str, path: &Path) -> Result<()> {
    files::write_atomic(path, json.as_bytes())
}
