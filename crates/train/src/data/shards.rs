//! The tokenized corpus on disk: written once, checked and memory-mapped afterwards.
//!
//! One folder per content key: `tokens-00000.bin`… (little-endian ids, 2 bytes each when the
//! vocabulary allows), `index.bin` (a record per document) and `manifest.json` with the size and
//! SHA-256 of each, written last. A folder that is not exactly what its manifest says is built
//! again.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{self, Fingerprint};

/// Raised whenever the same text would give other files.
pub const FORMAT: u32 = 1;
/// Bytes after which a new token file is begun.
const SHARD_BYTES: u64 = 256 << 20;
/// Bytes of one record of `index.bin`: hash (8) and length (4).
const RECORD: usize = 12;

/// One document's place.
#[derive(Clone, Copy, Debug)]
struct Document {
    shard: u32,
    /// First token's index in the shard.
    start: u64,
    tokens: u32,
    hash: u64,
}

/// What a shard folder should hold.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    key: String,
    /// Bytes per token.
    width: u32,
    /// Documents in each token file.
    documents: Vec<u64>,
    /// Token files, then `index.bin`.
    files: Vec<(String, Fingerprint)>,
}

/// A tokenized corpus, memory-mapped.
pub struct Shards {
    maps: Vec<Mmap>,
    width: usize,
    documents: Vec<Document>,
}

impl Shards {
    /// Documents.
    pub fn len(&self) -> usize {
        self.documents.len()
    }

    /// Whether there is no document; a committed corpus always has one.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// Tokens of a document, those that mark its start and end included.
    pub fn tokens_of(&self, document: usize) -> usize {
        self.documents[document].tokens as usize
    }

    /// First 8 bytes of the SHA-256 of a document's text.
    pub fn hash_of(&self, document: usize) -> u64 {
        self.documents[document].hash
    }

    /// Appends tokens `from..to` of a document to `out`.
    pub fn read(&self, document: usize, from: usize, to: usize, out: &mut Vec<i32>) {
        let Document { shard, start, tokens, .. } = self.documents[document];
        assert!(from <= to && to <= tokens as usize, "tokens {from}..{to} of {tokens}");
        let at = |token: usize| (start as usize + token) * self.width;
        let bytes = &self.maps[shard as usize][at(from)..at(to)];
        match self.width {
            2 => out
                .extend(bytes.as_chunks::<2>().0.iter().map(|b| i32::from(u16::from_le_bytes(*b)))),
            _ => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b))),
        }
    }

    /// Opens the folder of `key` when it is whole. `None` when it is absent; an error's text when
    /// it is there and must not be trusted.
    pub fn open(folder: &Path, key: &str) -> Result<Option<Self>, String> {
        let Ok(text) = fs::read_to_string(folder.join("manifest.json")) else { return Ok(None) };
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        if manifest.format != FORMAT || manifest.key != key {
            return Err("the manifest is for other content".into());
        }
        let width = manifest.width as usize;
        if !matches!(width, 2 | 4) || manifest.files.len() != manifest.documents.len() + 1 {
            return Err("the manifest contradicts itself".into());
        }
        manifest.files.par_iter().try_for_each(|(name, expected)| {
            // A name is one of ours, never a path out of the folder.
            if name.contains(['/', '\\']) {
                return Err(format!("the manifest names {name}"));
            }
            let found = files::fingerprint(&folder.join(name)).map_err(|e| e.to_string())?;
            if found == *expected { Ok(()) } else { Err(format!("{name} is not what was written")) }
        })?;
        let maps = manifest.files[..manifest.documents.len()]
            .iter()
            .map(|(name, _)| map(&folder.join(name)).map_err(|e| e.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let index = fs::read(folder.join("index.bin")).map_err(|e| e.to_string())?;
        let documents = locate(&index, &manifest.documents);
        let fits = |d: &Document| {
            (d.start + u64::from(d.tokens)) * width as u64 <= maps[d.shard as usize].len() as u64
        };
        if documents.len() * RECORD != index.len() || !documents.iter().all(fits) {
            return Err("index.bin does not fit the token files".into());
        }
        Ok(Some(Self { maps, width, documents }))
    }
}

fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the file was committed by a rename and is never written again; only somebody else
    // truncating it could invalidate the map, as with every memory-mapped file.
    unsafe { Mmap::map(&file) }
}

/// Places of all documents from the records and the number of documents in each shard.
fn locate(index: &[u8], shards: &[u64]) -> Vec<Document> {
    let mut records = index.as_chunks::<RECORD>().0.iter();
    let mut documents = Vec::with_capacity(records.len());
    for (shard, &count) in shards.iter().enumerate() {
        let mut start = 0;
        for record in records.by_ref().take(usize::try_from(count).unwrap_or(usize::MAX)) {
            let [h0, h1, h2, h3, h4, h5, h6, h7, t0, t1, t2, t3] = *record;
            let hash = u64::from_le_bytes([h0, h1, h2, h3, h4, h5, h6, h7]);
            let tokens = u32::from_le_bytes([t0, t1, t2, t3]);
            documents.push(Document { shard: shard as u32, start, tokens, hash });
            start += u64::from(tokens);
        }
    }
    documents
}

/// Writes a shard folder beside its place and moves it there when it is whole.
pub struct ShardWriter {
    target: PathBuf,
    beside: PathBuf,
    key: String,
    width: usize,
    current: Option<BufWriter<File>>,
    current_bytes: u64,
    documents: Vec<u64>,
    index: BufWriter<File>,
}

impl ShardWriter {
    /// Begins `CACHE/KEY`; ids are below `vocab`.
    pub fn begin(cache: &Path, key: &str, vocab: usize) -> Result<Self> {
        let beside = cache.join(format!("{TEMPORARY}{}-{key}", std::process::id()));
        files::create_folder(&beside)?;
        let index = create(&beside.join("index.bin"))?;
        let width = if vocab <= 1 << 16 { 2 } else { 4 };
        Ok(Self {
            target: cache.join(key),
            beside,
            key: key.to_owned(),
            width,
            current: None,
            current_bytes: 0,
            documents: Vec::new(),
            index,
        })
    }

    /// Appends a document.
    pub fn push(&mut self, hash: u64, tokens: &[u32]) -> Result<()> {
        if self.current.is_none() || self.current_bytes >= SHARD_BYTES {
            self.end_shard()?;
            let name = token_file(self.documents.len());
            self.current = Some(create(&self.beside.join(name))?);
            self.current_bytes = 0;
            self.documents.push(0);
        }
        let bytes: Vec<u8> = match self.width {
            2 => tokens.iter().flat_map(|&t| (t as u16).to_le_bytes()).collect(),
            _ => tokens.iter().flat_map(|&t| t.to_le_bytes()).collect(),
        };
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&hash.to_le_bytes());
        record[8..].copy_from_slice(&(tokens.len() as u32).to_le_bytes());
        let write = Error::io("write", &self.beside);
        let shard = self.current.as_mut().map_or(Ok(()), |file| file.write_all(&bytes));
        shard.and_then(|()| self.index.write_all(&record)).map_err(write)?;
        self.current_bytes += bytes.len() as u64;
        if let Some(count) = self.documents.last_mut() {
            *count += 1;
        }
        Ok(())
    }

    fn end_shard(&mut self) -> Result<()> {
        let Some(mut file) = self.current.take() else { return Ok(()) };
        file.flush()
            .and_then(|()| file.get_ref().sync_all())
            .map_err(Error::io("write", &self.beside))
    }

    /// Forces everything to disk and moves it to its place, replacing what is there.
    pub fn commit(mut self) -> Result<()> {
        self.end_shard()?;
        let index = self.index.flush().and_then(|()| self.index.get_ref().sync_all());
        index.map_err(Error::io("write", &self.beside))?;
        let mut names: Vec<String> = (0..self.documents.len()).map(token_file).collect();
        names.push("index.bin".into());
        let prints: Vec<Result<Fingerprint>> =
            names.par_iter().map(|name| files::fingerprint(&self.beside.join(name))).collect();
        let prints = prints.into_iter().collect::<Result<Vec<_>>>()?;
        let manifest = Manifest {
            format: FORMAT,
            key: self.key.clone(),
            width: self.width as u32,
            documents: self.documents.clone(),
            files: names.into_iter().zip(prints).collect(),
        };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::Data(e.to_string()))?;
        files::write_atomic(&self.beside.join("manifest.json"), &text)?;
        if self.target.exists() {
            fs::remove_dir_all(&self.target).map_err(Error::io("replace", &self.target))?;
        }
        fs::rename(&self.beside, &self.target).map_err(Error::io("create", &self.target))?;
        files::sync_folder(self.target.parent().unwrap_or(Path::new(".")))
    }
}

impl Drop for ShardWriter {
    /// A writer that did not commit gives the disk its space back.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.beside);
    }
}

/// Prefix of folders that are being written.
const TEMPORARY: &str = ".writing-";

/// Removes what interrupted writers left in a cache folder; the caller holds its lock.
pub fn remove_stale(cache: &Path) -> Result<()> {
    for path in files::read_folder(cache)? {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY)) {
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

fn token_file(shard: usize) -> String {
    format!("tokens-{shard:05}.bin")
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    Ok(BufWriter::with_capacity(1 << 18, File::create(path).map_err(Error::io("write", path))?))
}
