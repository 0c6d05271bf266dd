//! The text of a run, read once from end to end before anything is built on it.
//!
//! The first reading finds every problem (and names the file), counts what is passed over, and
//! fingerprints the text; later readings must find the same text again.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::discover::{self, SourceFile};
use super::documents::{Documents, Unusable};
use crate::config::DataConfig;
use crate::error::{Error, Result};

/// Shortest limit of a section: long files are cut into documents of at most this many bytes…
const MIN_SECTION: usize = 64 << 10;
/// …or, for long contexts, this many bytes per token of context: several contexts in any
/// language.
const SECTION_BYTES_PER_TOKEN: usize = 16;
/// Names listed for each reason to pass over a file.
const EXAMPLES: usize = 3;

/// Files that were found and not used, by reason. Nothing is left out silently.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Found in a folder, with an extension that is not known to be text.
    pub other_extension: u64,
    /// Without any text.
    pub empty: u64,
    /// With a zero byte in it.
    pub binary: u64,
    /// Not UTF-8.
    pub not_utf8: u64,
    /// The first few binary or non-UTF-8 ones.
    pub examples: Vec<String>,
}

impl fmt::Display for Skipped {
    /// `2 binary, 1 not UTF-8 (a.rs, b.rs, c.txt)`; empty when nothing was skipped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = [
            (self.other_extension, "of other kinds"),
            (self.empty, "empty"),
            (self.binary, "binary"),
            (self.not_utf8, "not UTF-8"),
        ]
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        f.write_str(&parts.join(", "))?;
        if !self.examples.is_empty() {
            write!(f, " (such as {})", self.examples.join(", "))?;
        }
        Ok(())
    }
}

/// The usable files of a run and what is in them.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<(SourceFile, [u8; 32])>,
    text_field: String,
    section: usize,
    /// Bytes of text, unpacked.
    pub bytes: u64,
    /// Documents.
    pub documents: u64,
    /// SHA-256 over the names and texts of all files.
    pub digest: [u8; 32],
    /// What was passed over.
    pub skipped: Skipped,
}

/// What one file holds.
struct Content {
    digest: [u8; 32],
    bytes: u64,
    documents: u64,
}

impl Corpus {
    /// Finds and reads everything `data` names, in parallel.
    pub fn scan(data: &DataConfig, stop: &AtomicBool) -> Result<Self> {
        if data.paths.is_empty() {
            return Err(Error::config(
                "data.paths",
                "is empty; expected files, folders or globs, such as [\"books/**/*.txt\"]",
            ));
        }
        let found = discover::discover(&data.paths)?;
        let mut files = found.files;
        if let Some(max_bytes) = data.max_bytes {
            discover::limit(&mut files, max_bytes);
        }
        let section = MIN_SECTION.max(SECTION_BYTES_PER_TOKEN * data.context);
        let contents: Vec<Result<Content, Unusable>> = files
            .par_iter()
            .map(|file| read_through(file, &data.text_field, section, stop))
            .collect();
        let mut corpus = Self {
            files: Vec::new(),
            text_field: data.text_field.clone(),
            section,
            bytes: 0,
            documents: 0,
            digest: [0; 32],
            skipped: Skipped { other_extension: found.other_extension, ..Skipped::default() },
        };
        let mut hasher = Sha256::new();
        for (file, content) in files.into_iter().zip(contents) {
            match content {
                Ok(content) => {
                    hasher.update((file.name.len() as u64).to_le_bytes());
                    hasher.update(file.name.as_bytes());
                    hasher.update(content.digest);
                    corpus.bytes += content.bytes;
                    corpus.documents += content.documents;
                    corpus.files.push((file, content.digest));
                }
                Err(reason) => corpus.pass_over(&file, reason)?,
            }
        }
        corpus.digest = hasher.finalize().into();
        if corpus.documents == 0 {
            let mut text = format!("{} holds no text", data.paths.join(", "));
            if corpus.skipped != Skipped::default() {
                text += &format!("; files passed over: {}", corpus.skipped);
            } else if data.max_bytes.is_some() {
                text += " that fits data.max_bytes";
            }
            return Err(Error::Data(text));
        }
        Ok(corpus)
    }

    /// Counts a file that cannot be used, or refuses the run when it was asked for by name.
    fn pass_over(&mut self, file: &SourceFile, reason: Unusable) -> Result<()> {
        let skipped = &mut self.skipped;
        let (count, what) = match reason {
            Unusable::Fatal(error) => return Err(error),
            Unusable::Empty => (&mut skipped.empty, "is empty".to_owned()),
            Unusable::Binary => (&mut skipped.binary, "is not text (it holds a zero byte)".into()),
            Unusable::NotUtf8(offset) => {
                let what = format!("is not UTF-8 (first at byte {offset}); convert it first");
                (&mut skipped.not_utf8, what)
            }
        };
        if file.explicit {
            return Err(Error::Data(format!("{} {what}", file.path.display())));
        }
        *count += 1;
        if !matches!(reason, Unusable::Empty) && skipped.examples.len() < EXAMPLES {
            skipped.examples.push(file.name.clone());
        }
        Ok(())
    }

    /// Files in use.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// All documents, in order.
    pub fn documents(&self) -> Reader<'_> {
        Reader { corpus: self, next: 0, open: None }
    }
}

/// Reads one file to its end.
fn read_through(
    file: &SourceFile,
    text_field: &str,
    section: usize,
    stop: &AtomicBool,
) -> Result<Content, Unusable> {
    let mut documents = Documents::open(file, text_field, section).map_err(Unusable::Fatal)?;
    let mut hasher = Sha256::new();
    let mut content = Content { digest: [0; 32], bytes: 0, documents: 0 };
    while let Some(text) = documents.next()? {
        if stop.load(Ordering::Relaxed) {
            return Err(Unusable::Fatal(Error::Interrupted));
        }
        absorb(&mut hasher, &text);
        content.bytes += text.len() as u64;
        content.documents += 1;
    }
    if content.documents == 0 {
        return Err(Unusable::Empty);
    }
    content.digest = hasher.finalize().into();
    Ok(content)
}

/// The length goes first, so that moving a boundary changes the digest.
fn absorb(hasher: &mut Sha256, text: &str) {
    hasher.update((text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

/// The documents of a corpus, one after the other.
pub struct Reader<'a> {
    corpus: &'a Corpus,
    next: usize,
    open: Option<(Documents<'a>, Sha256)>,
}

impl Reader<'_> {
    /// The next document; an error when a file is not what it was at the first reading.
    pub fn next(&mut self) -> Result<Option<String>> {
        loop {
            if self.open.is_none() {
                let Some((file, _)) = self.corpus.files.get(self.next) else { return Ok(None) };
                let documents =
                    Documents::open(file, &self.corpus.text_field, self.corpus.section)?;
                self.open = Some((documents, Sha256::new()));
                self.next += 1;
            }
            let Some((documents, hasher)) = &mut self.open else { continue };
            let (file, digest) = &self.corpus.files[self.next - 1];
            let changed = || {
                let path = file.path.display();
                Error::Data(format!("{path} changed while it was being read; start again"))
            };
            match documents.next() {
                Ok(Some(text)) => {
                    absorb(hasher, &text);
                    return Ok(Some(text));
                }
                Ok(None) if hasher.clone().finalize()[..] == digest[..] => self.open = None,
                Err(Unusable::Fatal(error)) => return Err(error),
                Ok(None) | Err(_) => return Err(changed()),
            }
        }
    }
}
