//! Which files a run reads: folders, globs and names become one sorted list.
//!
//! A file's *name* here is its path below the folder it was found in, with `/` on every system.
//! Order and choice depend on names and contents only, so a corpus that is moved to another
//! place stays the same corpus.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::read_folder;

/// Extensions that a folder is searched for. A file named outright, or matched by a glob, may
/// have any.
const TEXT: [&str; 64] = [
    "adoc", "asm", "bash", "bib", "c", "cc", "cfg", "clj", "cmake", "cpp", "cs", "css", "csv",
    "cu", "cuh", "cxx", "dart", "diff", "el", "ex", "fs", "go", "h", "hpp", "hs", "html", "ini",
    "ipynb", "java", "jl", "js", "json", "kt", "lean", "lua", "m", "md", "ml", "nim", "pas",
    "patch", "php", "pl", "proto", "ps1", "py", "r", "rb", "rs", "rst", "scala", "sh", "sql",
    "svg", "swift", "tex", "text", "toml", "ts", "tsx", "txt", "xml", "yaml", "yml",
];

/// How a file's bytes hold documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The whole file is one document.
    Text,
    /// Each line is a JSON object with a text field.
    JsonLines,
}

/// How a file's bytes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, one or more members.
    Gzip,
    /// Zstandard, one or more frames.
    Zstd,
}

/// One file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it is called, wherever it is.
    pub name: String,
    /// Whether it was named outright and not found by a search: then a file that cannot be used
    /// is an error and not a counted skip.
    pub explicit: bool,
    /// How it holds documents.
    pub layout: Layout,
    /// How it is packed.
    pub compression: Compression,
    /// Its size on disk.
    pub bytes: u64,
}

/// The files found, and how many a folder search passed over for their extension.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Sorted by name.
    pub files: Vec<SourceFile>,
    /// Files of unknown extension.
    pub other_extension: u64,
}

/// Resolves names, folders and globs. A file reached twice counts once. Hidden files and folders
/// below a searched folder are passed over, and links to folders are not followed.
pub fn discover(patterns: &[String]) -> Result<Found> {
    let mut found = Found::default();
    let mut seen = HashSet::new();
    for pattern in patterns {
        let path = Path::new(pattern);
        if path.is_dir() {
            search(path, path, &mut found, &mut seen)?;
        } else if path.exists() || !pattern.contains(['*', '?', '[']) {
            let root = path.parent().unwrap_or(path);
            add(path, root, true, &mut found, &mut seen)?;
        } else {
            expand(pattern, &mut found, &mut seen)?;
        }
    }
    found.files.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    Ok(found)
}

/// Keeps files up to about `max_bytes` of disk size, in the order of a hash of their names: a
/// fair sample of the corpus that is the same on every machine.
pub fn limit(files: &mut Vec<SourceFile>, max_bytes: u64) {
    let digest = |file: &SourceFile| <[u8; 32]>::from(Sha256::digest(file.name.as_bytes()));
    files.sort_by_cached_key(|file| (digest(file), file.path.clone()));
    let mut total = 0u64;
    files.retain(|file| {
        let keep = total.saturating_add(file.bytes) <= max_bytes;
        total = if keep { total + file.bytes } else { total };
        keep
    });
    files.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
}

/// A glob: files that match are taken, folders that match are searched.
fn expand(pattern: &str, found: &mut Found, seen: &mut HashSet<PathBuf>) -> Result<()> {
    let refuse = |problem: String| Error::config("data.paths", problem);
    let paths = glob::glob(pattern)
        .map_err(|error| refuse(format!("holds `{pattern}`, not a valid glob: {error}")))?;
    let root = literal_prefix(pattern);
    let mut any = false;
    for path in paths {
        let path = path.map_err(|error| {
            let path = error.path().to_owned();
            Error::io("read", &path)(error.into())
        })?;
        any = true;
        if path.is_dir() {
            // `**/*` matches folders as well as the files in them; a search takes only known
            // extensions, and what the glob itself matches stays.
            if !pattern.ends_with("**/*") {
                search(&path, &root, found, seen)?;
            }
        } else {
            add(&path, &root, false, found, seen)?;
        }
    }
    if any { Ok(()) } else { Err(refuse(format!("holds `{pattern}`, which matches no file"))) }
}

/// The folder part of a glob before its first wildcard.
fn literal_prefix(pattern: &str) -> PathBuf {
    let wildcard = pattern.find(['*', '?', '[']).unwrap_or(pattern.len());
    let end = pattern[..wildcard].rfind(std::path::is_separator).map_or(0, |i| i + 1);
    PathBuf::from(&pattern[..end])
}

/// Every file below `folder` with a known extension.
fn search(
    folder: &Path,
    root: &Path,
    found: &mut Found,
    seen: &mut HashSet<PathBuf>,
) -> Result<()> {
    for path in read_folder(folder)? {
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        let link = path.is_symlink();
        if hidden || (link && path.is_dir()) {
            continue;
        }
        if path.is_dir() {
            search(&path, root, found, seen)?;
        } else if kind(&path).0 {
            add(&path, root, false, found, seen)?;
        } else {
            found.other_extension += 1;
        }
    }
    Ok(())
}

fn add(
    path: &Path,
    root: &Path,
    explicit: bool,
    found: &mut Found,
    seen: &mut HashSet<PathBuf>,
) -> Result<()> {
    let real = fs::canonicalize(path).map_err(Error::io("read", path))?;
    let metadata = fs::metadata(&real).map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        if explicit {
            return Err(Error::Data(format!("{} is not a regular file", path.display())));
        }
        return Ok(());
    }
    if seen.insert(real) {
        let below = path.strip_prefix(root).unwrap_or(path);
        let parts: Vec<_> = below.iter().map(|part| part.to_string_lossy()).collect();
        let (_, layout, compression) = kind(path);
        found.files.push(SourceFile {
            path: path.to_owned(),
            name: parts.join("/"),
            explicit,
            layout,
            compression,
            bytes: metadata.len(),
        });
    }
    Ok(())
}

/// Whether the extension is a known one, and what it says about the file.
fn kind(path: &Path) -> (bool, Layout, Compression) {
    let lower = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut parts: Vec<&str> = lower.split('.').skip(1).collect();
    let compression = match parts.last() {
        Some(&"gz") => Compression::Gzip,
        Some(&"zst") => Compression::Zstd,
        _ => Compression::None,
    };
    if compression != Compression::None {
        parts.pop();
    }
    match parts.last() {
        Some(&("jsonl" | "ndjson")) => (true, Layout::JsonLines, compression),
        Some(extension) => (TEXT.contains(extension), Layout::Text, compression),
        // `book.gz` says nothing about what is inside; text is the only guess.
        None => (compression != Compression::None, Layout::Text, compression),
    }
}
