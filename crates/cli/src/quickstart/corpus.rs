//! The text the quickstart learns: Rust sources that are already on this machine.
//!
//! Building this binary has just made cargo fetch the crates of this repository's Cargo.lock. A
//! fixed list of them, at the locked versions, is the same text on every machine and needs no
//! download. They are copied into the run's folder so that the run stands on its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::error::user;
use crate::lock::{self, Package};

/// Crates that are written by hand, plainly, and needed on every platform. (Tables, generated
/// bindings and platform crates would teach a small model long lists of numbers.)
const CRATES: [&str; 33] = [
    "aho-corasick",
    "anyhow",
    "bytemuck",
    "clap_builder",
    "compact_str",
    "crossbeam-deque",
    "crossbeam-epoch",
    "crossbeam-utils",
    "fancy-regex",
    "flate2",
    "glob",
    "hashbrown",
    "indicatif",
    "itertools",
    "memchr",
    "minijinja",
    "nom",
    "once_cell",
    "plotters",
    "rand",
    "rayon",
    "rayon-core",
    "regex",
    "regex-automata",
    "ruzstd",
    "safetensors",
    "serde_core",
    "serde_json",
    "smallvec",
    "tempfile",
    "tokenizers",
    "toml",
    "winnow",
];

/// A file larger than this is a table or generated.
const LARGEST_FILE: u64 = 200 << 10;

/// Less text than this cannot train the quickstart's tokenizer and model.
const LEAST: u64 = 256 << 10;

/// The text that was found and copied.
pub struct Corpus {
    /// Folder with the copies.
    pub folder: PathBuf,
    /// Where it comes from, for people.
    pub origin: String,
    /// Files.
    pub files: usize,
    /// Bytes of text.
    pub bytes: u64,
}

/// Gathers the corpus into `folder`: the crates cargo fetched, else this repository's own
/// sources.
pub fn gather(folder: &Path) -> anyhow::Result<Corpus> {
    let registry = registry_sources();
    let wanted: Vec<Package> = lock::packages(lock::CARGO_LOCK)
        .into_iter()
        .filter(|p| p.registry && CRATES.contains(&p.name))
        .collect();
    let mut corpus = Corpus { folder: folder.into(), origin: String::new(), files: 0, bytes: 0 };
    let mut found = 0;
    for package in &wanted {
        let name = format!("{}-{}", package.name, package.version);
        let Some(source) = registry.iter().map(|r| r.join(&name)).find(|p| p.is_dir()) else {
            continue;
        };
        copy_sources(&source.join("src"), &folder.join(&name), &mut corpus)?;
        found += 1;
    }
    corpus.origin = format!("{found} of {} crates that cargo fetched to build this", wanted.len());
    if corpus.bytes < LEAST {
        copy_sources(&repository().join("crates"), &folder.join("tercet"), &mut corpus)?;
        corpus.origin = "this repository's own sources".into();
    }
    if corpus.bytes < LEAST {
        return Err(user(format!(
            "no Rust sources were found to learn from: cargo's registry ({}) does not hold the \
             crates of this build, and the repository is not at {}. Give some text of your own: \
             tercet quickstart --data PATH",
            if registry.is_empty() { "not found".into() } else { join(&registry) },
            repository().display()
        )));
    }
    Ok(corpus)
}

/// A file of a gathered corpus that is long enough to fill the model's context: the registry of
/// rayon's threads. None when the corpus is another one.
pub fn one_file(folder: &Path) -> Option<String> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let mut crates = entries.filter(|e| e.file_name().to_string_lossy().starts_with("rayon-core-"));
    fs::read_to_string(crates.next()?.path().join("registry.rs")).ok()
}

/// Folders such as `~/.cargo/registry/src/index.crates.io-…`, in sorted order.
fn registry_sources() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let user = std::env::var_os(if cfg!(windows) { "USERPROFILE" } else { "HOME" })?;
        Some(PathBuf::from(user).join(".cargo"))
    });
    let entries = home.and_then(|h| fs::read_dir(h.join("registry").join("src")).ok());
    let mut folders: Vec<PathBuf> =
        entries.into_iter().flatten().flatten().map(|e| e.path()).collect();
    folders.sort();
    folders
}

/// Where this binary was built from; it may be gone by now.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn join(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Copies the `.rs` files below `from` that are text and not too large, in sorted order. A
/// missing `from` holds none.
fn copy_sources(from: &Path, to: &Path, corpus: &mut Corpus) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let Some(name) = path.file_name() else { continue };
        // `symlink_metadata`: links are not followed, so a loop cannot trap us.
        let Ok(kind) = fs::symlink_metadata(&path) else { continue };
        if kind.is_dir() {
            copy_sources(&path, &to.join(name), corpus)?;
        } else if kind.is_file()
            && path.extension().is_some_and(|e| e == "rs")
            && kind.len() <= LARGEST_FILE
        {
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let copy = || {
                fs::create_dir_all(to)?;
                fs::write(to.join(name), &text)
            };
            copy().with_context(|| format!("cannot copy the corpus to {}", to.display()))?;
            corpus.files += 1;
            corpus.bytes += text.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_of_the_corpus_is_in_the_lock_file() {
        for name in CRATES {
            assert!(lock::version(name).is_some(), "{name} is no longer locked; drop it here");
        }
    }

    #[test]
    fn only_modest_rust_files_are_taken_and_the_repository_is_enough_text() {
        let to = tempfile::tempdir().unwrap();
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("a.rs"), "fn a() {}").unwrap();
        fs::write(from.path().join("b.txt"), "no").unwrap();
        fs::write(from.path().join("c.rs"), [0xff, 0xfe]).unwrap();
        fs::write(from.path().join("d.rs"), vec![b' '; LARGEST_FILE as usize + 1]).unwrap();
        let mut corpus =
            Corpus { folder: to.path().into(), origin: String::new(), files: 0, bytes: 0 };
        copy_sources(from.path(), &to.path().join("x"), &mut corpus).unwrap();
        assert_eq!((corpus.files, corpus.bytes), (1, 9));
        copy_sources(&repository().join("crates"), &to.path().join("y"), &mut corpus).unwrap();
        assert!(corpus.bytes >= LEAST, "{}", corpus.bytes);
    }
}
