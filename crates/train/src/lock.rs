//! One run per folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::files;

/// Holds a run folder; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Creates the folder when needed and takes its lock, or says who holds it.
    pub fn take(folder: &Path) -> Result<Self> {
        files::create_folder(folder)?;
        let path = folder.join(".lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(folder, file)),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
        let note = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| write!(file, "{}", std::process::id()));
        note.map_err(Error::io("write", &path))?;
        Ok(Self { _file: file })
    }
    /// Says who holds a folder, if anybody does; changes nothing.
    pub fn check(folder: &Path) -> Result<()> {
        match File::open(folder.join(".lock")) {
            Ok(file) => match file.try_lock_shared() {
                Err(TryLockError::WouldBlock) => Err(held(folder, file)),
                _ => Ok(()),
            },
            Err(_) => Ok(()),
        }
    }
}

fn held(folder: &Path, mut file: File) -> Error {
    let mut holder = String::new();
    // Who it is only makes the message better.
    let _ = file.read_to_string(&mut holder);
    let holder = match holder.trim() {
        "" => String::new(),
        id => format!(" (process {id})"),
    };
    Error::Locked { path: folder.to_owned(), holder }
}
