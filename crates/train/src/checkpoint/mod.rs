//! Checkpoints: a Hugging Face folder and a `state/` beside the weights, committed as one.
//!
//! Written into a folder beside, every file and folder forced to disk, renamed, the parent forced
//! to disk, and last the `manifest.json` with size and SHA-256 of every file. A crash at any
//! moment leaves the previous checkpoint; a folder without a manifest, or with a file that is not
//! what the manifest says, is no checkpoint.

mod manifest;
mod state;

use std::fs;
use std::path::{Path, PathBuf};

use manifest::{MANIFEST, Manifest, verify};
use serde_json::{Map, Value};
pub use state::{RunState, differing_key};
use tercet_model::Model;
use tercet_tensor::AdamWState;

use crate::error::{Error, Result};
use crate::files;

/// Prefix of folders that are being written.
const TEMPORARY: &str = ".writing-";
/// Prefix of checkpoints; the number of steps follows.
const STEP: &str = "step-";

/// Everything a checkpoint holds.
pub struct Snapshot<'a> {
    /// Shape and weights. Of a model with an active adapter the adapter alone is written.
    pub model: &'a Model,
    /// The folder of the weights that an adapter stands beside.
    pub base: &'a str,
    /// Further fields of the adapter's configuration.
    pub notes: &'a Map<String, Value>,
    /// Moments, master weights, update count.
    pub optimizer: &'a AdamWState,
    /// Step, data position, guard.
    pub run: &'a RunState,
    /// What the run was asked to do, as TOML.
    pub config: &'a str,
    /// Tokenizer and generation files of the model folder: name and content.
    pub sidecars: &'a [(String, Vec<u8>)],
}

/// What a checkpoint holds besides the weights.
pub struct State {
    /// Moments, master weights, update count.
    pub optimizer: AdamWState,
    /// Step, data position, guard.
    pub run: RunState,
}

/// Newest complete checkpoint of a folder, and what is wrong with newer ones that are not.
#[derive(Debug, Default)]
pub struct Newest {
    /// The checkpoint, if there is one.
    pub path: Option<PathBuf>,
    /// Committed folders that are damaged: their names and what is wrong.
    pub damaged: Vec<String>,
}

/// Commits a checkpoint below `folder` and then removes complete ones beyond the newest `keep`.
/// Returns its path.
pub fn save(folder: &Path, keep: usize, snapshot: &Snapshot) -> Result<PathBuf> {
    files::create_folder(folder)?;
    let name = format!("{STEP}{:08}", snapshot.run.step);
    let beside = folder.join(format!("{TEMPORARY}{name}"));
    remove(&beside)?;
    let written = write(&beside, snapshot);
    let manifest = match written {
        Ok(manifest) => manifest,
        Err(error) => {
            // A full disk gets its space back; the error that matters is the first.
            let _ = fs::remove_dir_all(&beside);
            return Err(error);
        }
    };
    let target = folder.join(&name);
    // Only a damaged checkpoint of this step can be in the way.
    remove(&target)?;
    fs::rename(&beside, &target).map_err(Error::io("create", &target))?;
    files::sync_folder(folder)?;
    manifest.commit(&target)?;
    prune(folder, keep)?;
    Ok(target)
}

/// Writes all files but the manifest and forces them to disk.
fn write(beside: &Path, snapshot: &Snapshot) -> Result<Manifest> {
    let state = beside.join("state");
    files::create_folder(&state)?;
    let model = snapshot.model;
    let saved = match model.active_adapter().and_then(|name| model.adapter(name)) {
        Some(adapter) => adapter.save_noted(beside, snapshot.base, snapshot.notes),
        None => model.save(beside),
    };
    saved.map_err(|error| match error {
        tercet_model::Error::Io { path, source } => Error::Io { action: "write", path, source },
        other => other.into(),
    })?;
    for (name, content) in snapshot.sidecars {
        let path = beside.join(name);
        fs::write(&path, content).map_err(Error::io("write", &path))?;
    }
    state::write(&state, snapshot)?;
    files::sync_tree(beside)?;
    Manifest::of(beside, snapshot.run.step)
}

/// The newest complete checkpoint below `folder`, every file of it verified.
pub fn newest(folder: &Path) -> Result<Newest> {
    let mut newest = Newest::default();
    for path in committed(folder)?.into_iter().rev() {
        match verify(&path) {
            Ok(()) => {
                newest.path = Some(path);
                break;
            }
            Err(problem) => newest.damaged.push(format!("{}: {problem}", path.display())),
        }
    }
    Ok(newest)
}

/// Removes what killed writers left: folders never renamed, or renamed but never committed. The
/// caller holds the run's lock.
pub fn remove_stale(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for path in files::read_folder(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let uncommitted = name.starts_with(STEP) && !path.join(MANIFEST).exists();
        if name.starts_with(TEMPORARY) || uncommitted {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Refuses a checkpoint that was written under another configuration (TOML), naming the key.
pub fn check_config(path: &Path, config: &str) -> Result<()> {
    match state::differing_key(&path.join("state"), config)? {
        None => Ok(()),
        Some(problem) => Err(Error::Checkpoint(format!("{} {problem}", path.display()))),
    }
}

/// Key of the examples that a verified checkpoint was trained on, and its step.
pub fn data_key(path: &Path) -> Result<(String, u64)> {
    let run = state::read_run(&path.join("state"))?;
    Ok((run.data_key, run.step))
}

/// Reads what a verified checkpoint holds besides its weights, which `model` has already.
pub fn load_state(path: &Path, model: &Model) -> Result<State> {
    let state = path.join("state");
    let run = state::read_run(&state)?;
    let optimizer = state::read_optimizer(&state, model, run.updates)?;
    Ok(State { optimizer, run })
}

/// Folders with a manifest, oldest first.
fn committed(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut steps: Vec<(u64, PathBuf)> = files::read_folder(folder)?
        .into_iter()
        .filter(|path| path.join(MANIFEST).exists())
        .filter_map(|path| {
            let step = path.file_name()?.to_str()?.strip_prefix(STEP)?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    steps.sort();
    Ok(steps.into_iter().map(|(_, path)| path).collect())
}

fn prune(folder: &Path, keep: usize) -> Result<()> {
    let committed = committed(folder)?;
    for path in &committed[..committed.len().saturating_sub(keep)] {
        // The manifest goes first: what is half removed is no checkpoint.
        let manifest = path.join(MANIFEST);
        fs::remove_file(&manifest).map_err(Error::io("remove", &manifest))?;
        remove(path)?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
    }
    Ok(())
}
