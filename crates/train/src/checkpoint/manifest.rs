//! `manifest.json`: what a checkpoint consists of, down to the byte.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{self, Fingerprint};

/// The file whose presence commits a checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// Raised when a checkpoint's layout changes.
const FORMAT: u32 = 1;

/// Every file of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    step: u64,
    /// Path below the checkpoint with `/`, and what must be there.
    files: BTreeMap<String, Fingerprint>,
}

impl Manifest {
    /// Fingerprints every file below `folder`.
    pub fn of(folder: &Path, step: u64) -> Result<Self> {
        let mut names = Vec::new();
        list(folder, "", &mut names)?;
        let files: Vec<Result<(String, Fingerprint)>> = names
            .into_par_iter()
            .map(|name| files::fingerprint(&folder.join(&name)).map(|print| (name, print)))
            .collect();
        Ok(Self { format: FORMAT, step, files: files.into_iter().collect::<Result<_>>()? })
    }

    /// Writes the manifest into `folder`: from here on it is a checkpoint.
    pub fn commit(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Checkpoint(format!("the manifest has no JSON: {error}")))?;
        files::write_atomic(&folder.join(MANIFEST), &text)
    }
}

fn list(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    for path in files::read_folder(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            list(&path, &format!("{name}/"), names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

/// Checks that a checkpoint is complete: every file of its manifest there, with the right size
/// and SHA-256. The error says which file is not, and how.
pub fn verify(folder: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(folder.join(MANIFEST))
        .map_err(|error| format!("{MANIFEST} cannot be read: {error}"))?;
    let manifest: Manifest = serde_json::from_str(&text)
        .map_err(|error| format!("{MANIFEST} is not a manifest: {error}"))?;
    if manifest.format != FORMAT {
        let format = manifest.format;
        return Err(format!("is of format {format}; this program writes and reads {FORMAT}"));
    }
    manifest.files.par_iter().try_for_each(|(name, expected)| {
        // Paths of our own making, never out of the folder.
        if Path::new(name).components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
            return Err(format!("{MANIFEST} names `{name}`, which is outside the folder"));
        }
        let path = folder.join(name);
        let bytes = std::fs::metadata(&path).map_err(|error| format!("{name}: {error}"))?.len();
        if bytes != expected.bytes {
            return Err(format!("{name} has {bytes} bytes, expected {}", expected.bytes));
        }
        let found = files::fingerprint(&path).map_err(|error| error.to_string())?;
        if found == *expected { Ok(()) } else { Err(format!("{name} has another SHA-256")) }
    })
}
