//! Files that are either whole or absent: written beside, forced to disk, renamed.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Length and SHA-256 of a file, as manifests record them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Bytes.
    pub bytes: u64,
    /// SHA-256, lowercase hexadecimal.
    pub sha256: String,
}

/// Writes `bytes` to `path` so that a reader, or a crash, sees the old file or the new one.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::Io {
            action: "write",
            path: path.to_owned(),
            source: ErrorKind::InvalidFilename.into(),
        });
    };
    let (beside, mut file) =
        create_beside(parent, &name.to_string_lossy()).map_err(Error::io("write", path))?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, path));
    if let Err(error) = written {
        // The original error matters, not whether the remains could be removed.
        let _ = fs::remove_file(&beside);
        return Err(Error::io("write", path)(error));
    }
    sync_folder(parent)
}

/// Ends the names of files that are being written.
const TEMPORARY: &str = ".tmp";

/// A new file beside `name` that no other writer has, in this process or another.
fn create_beside(folder: &Path, name: &str) -> std::io::Result<(PathBuf, File)> {
    let mut attempt = 0u32;
    loop {
        let path = folder.join(format!(".{name}.{}-{attempt}{TEMPORARY}", std::process::id()));
        match File::create_new(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => attempt += 1,
            Err(error) => return Err(error),
            Ok(file) => return Ok((path, file)),
        }
    }
}

/// Removes files that killed writers left in a folder; nobody else may be writing there.
pub fn remove_temporary(folder: &Path) -> Result<()> {
    for path in read_folder(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') && name.ends_with(TEMPORARY) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Forces a folder's entries (names, not contents) to disk.
pub fn sync_folder(path: &Path) -> Result<()> {
    // `parent()` of a bare file name is the empty path.
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    if cfg!(unix) {
        File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("sync", path))?;
    }
    Ok(())
}

/// Forces every file below `path`, and every folder, to disk.
pub fn sync_tree(path: &Path) -> Result<()> {
    for entry in read_folder(path)? {
        if entry.is_dir() {
            sync_tree(&entry)?;
        } else {
            File::open(&entry).and_then(|f| f.sync_all()).map_err(Error::io("sync", &entry))?;
        }
    }
    sync_folder(path)
}

/// The paths in a folder, sorted by name.
pub fn read_folder(path: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(path)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>())
        .map_err(Error::io("read", path))?;
    entries.sort();
    Ok(entries)
}

/// Creates a folder and its parents.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Length and SHA-256 of a file, read in a stream.
pub fn fingerprint(path: &Path) -> Result<Fingerprint> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        let n = reader.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            return Ok(Fingerprint { bytes, sha256: hex(&hasher.finalize()) });
        }
        bytes += n as u64;
        hasher.update(&buffer[..n]);
    }
}

/// Lowercase hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
