//! Text to shards, once: in parallel, in order, and only when the shards are not there already.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::corpus::{Corpus, Reader};
use super::shards::{self, ShardWriter, Shards};
use crate::error::{Error, Result};
use crate::files;
use crate::tokenizer::Vocabulary;

/// Text tokenized at once, in bytes: enough documents to keep all threads busy.
const BLOCK: usize = 4 << 20;

/// A tokenized corpus and how it came about.
pub struct Tokenised {
    /// The documents.
    pub shards: Shards,
    /// SHA-256 of the text, tokenizer and format, in hexadecimal.
    pub key: String,
    /// Whether shards of an earlier run were used.
    pub cached: bool,
    /// Why shards that were there had to be built again.
    pub rebuilt: Option<String>,
}

/// Opens the shards of `corpus` below `cache`, or builds them. `progress` hears the bytes of text
/// done so far; `wait` is called once when another run is building in the same folder.
pub fn tokenise(
    corpus: &Corpus,
    vocabulary: &Vocabulary,
    cache: &Path,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
    wait: &mut dyn FnMut(),
) -> Result<Tokenised> {
    let key = key(corpus, vocabulary);
    files::create_folder(cache)?;
    let _lock = lock(cache, wait)?;
    let folder = cache.join(&key);
    let rebuilt = match Shards::open(&folder, &key) {
        Ok(Some(shards)) => return Ok(Tokenised { shards, key, cached: true, rebuilt: None }),
        Ok(None) => None,
        Err(reason) => Some(reason),
    };
    shards::remove_stale(cache)?;
    let mut writer = ShardWriter::begin(cache, &key, vocabulary.size())?;
    let mut reader = corpus.documents();
    let mut block = read_block(&mut reader)?;
    let mut done = 0;
    while !block.is_empty() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        // The next block is read while this one is tokenized.
        let (encoded, next) = rayon::join(
            || block.par_iter().map(|text| vocabulary.encode_document(text)).collect::<Vec<_>>(),
            || read_block(&mut reader),
        );
        for (text, tokens) in block.iter().zip(encoded) {
            writer.push(content_hash(text), &tokens?)?;
            done += text.len() as u64;
        }
        progress(done);
        block = next?;
    }
    writer.commit()?;
    match Shards::open(&folder, &key) {
        Ok(Some(shards)) => Ok(Tokenised { shards, key, cached: false, rebuilt }),
        Ok(None) | Err(_) => Err(Error::Data(format!(
            "the tokens written to {} read back differently; check the disk",
            folder.display()
        ))),
    }
}

/// Everything the shards depend on.
fn key(corpus: &Corpus, vocabulary: &Vocabulary) -> String {
    let mut hasher = Sha256::new();
    hasher.update(shards::FORMAT.to_le_bytes());
    hasher.update(corpus.digest);
    hasher.update(vocabulary.digest());
    files::hex(&hasher.finalize())
}

/// First 8 bytes of the SHA-256 of a document.
fn content_hash(text: &str) -> u64 {
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().take(8).fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}

/// Documents of about [`BLOCK`] bytes in all; none at the end.
fn read_block(reader: &mut Reader) -> Result<Vec<String>> {
    let (mut block, mut bytes) = (Vec::new(), 0);
    while bytes < BLOCK {
        let Some(text) = reader.next()? else { break };
        bytes += text.len();
        block.push(text);
    }
    Ok(block)
}

/// Waits for the cache folder's lock; it ends with the returned file.
fn lock(cache: &Path, wait: &mut dyn FnMut()) -> Result<File> {
    let path = cache.join(".lock");
    let file = File::create(&path).map_err(Error::io("write", &path))?;
    if file.try_lock().is_err() {
        wait();
        file.lock().map_err(Error::io("lock", &path))?;
    }
    Ok(file)
}
