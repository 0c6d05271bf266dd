//! Compiled kernels in a folder.
//!
//! An entry is named by the fingerprint of everything that went into it and begins with that
//! fingerprint and its payload's, so that a damaged or renamed file is never taken for the real
//! one. Files are written beside and renamed: readers and other writers see all or nothing.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const MAGIC: &[u8; 16] = b"tercet kernel 1\n";
const HEADER: usize = MAGIC.len() + 32 + 32;

/// The largest entry that is read: a damaged length must not fill the memory.
const LARGEST: u64 = 256 << 20;

/// Fingerprint of all that decides what a kernel compiles to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key([u8; 32]);

impl Key {
    /// Of parts in order; each is preceded by its length, so that parts cannot flow together.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Key {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }

    fn file_name(&self, name: &str) -> String {
        let hex: String = self.0[..16].iter().map(|b| format!("{b:02x}")).collect();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
        format!("{}-{hex}.cubin", name.chars().map(plain).collect::<String>())
    }
}

fn path(folder: &Path, name: &str, key: &Key) -> PathBuf {
    folder.join(key.file_name(name))
}

/// The payload of an entry, when there is one and it is whole.
pub(crate) fn read(folder: &Path, name: &str, key: &Key) -> Option<Vec<u8>> {
    let file = std::fs::File::open(path(folder, name, key)).ok()?;
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes).ok()?;
    let (header, payload) = bytes.split_at_checked(HEADER)?;
    let (magic, rest) = header.split_at(MAGIC.len());
    let (held, sum) = rest.split_at(32);
    let whole = magic == MAGIC && held == key.0 && sum == Sha256::digest(payload).as_slice();
    whole.then(|| payload.to_vec())
}

/// Writes an entry; the error says what to do.
pub(crate) fn write(folder: &Path, name: &str, key: &Key, payload: &[u8]) -> Result<(), String> {
    let attempt = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(MAGIC)?;
        file.write_all(&key.0)?;
        file.write_all(Sha256::digest(payload).as_slice())?;
        file.write_all(payload)?;
        file.as_file().sync_all()?;
        file.persist(path(folder, name, key)).map_err(|e| e.error)?;
        Ok(())
    };
    attempt().map_err(|e| {
        format!(
            "compiled kernels cannot be kept in {}: {e}; they are compiled anew each time (TERCET_CACHE names another folder)",
            folder.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_back_only_under_its_own_key_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("not/made/yet");
        let key = Key::of([b"a".as_slice(), b"bc"]);
        assert_ne!(key, Key::of([b"ab".as_slice(), b"c"]));
        assert_eq!(read(&folder, "k", &key), None);
        write(&folder, "k", &key, b"payload").unwrap();
        assert_eq!(read(&folder, "k", &key).as_deref(), Some(b"payload".as_slice()));

        // A file of another key under this name.
        let other = Key::of([b"other".as_slice()]);
        write(&folder, "k", &other, b"foreign").unwrap();
        std::fs::copy(path(&folder, "k", &other), path(&folder, "k", &key)).unwrap();
        assert_eq!(read(&folder, "k", &key), None);

        write(&folder, "k", &key, b"payload").unwrap();
        let whole = std::fs::read(path(&folder, "k", &key)).unwrap();
        for cut in [0, 1, HEADER - 1, HEADER, whole.len() - 1] {
            std::fs::write(path(&folder, "k", &key), &whole[..cut]).unwrap();
            assert_eq!(read(&folder, "k", &key), None, "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(path(&folder, "k", &key), bad).unwrap();
            assert_eq!(read(&folder, "k", &key), None, "flipped at {at}");
        }
        write(&folder, "k", &key, b"payload").unwrap();
        assert_eq!(read(&folder, "k", &key).as_deref(), Some(b"payload".as_slice()));
        let left: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "nothing is left beside the entries");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "in the way").unwrap();
        let error = write(&file, "k", &Key::of([]), b"x").unwrap_err();
        assert!(error.contains(&file.display().to_string()), "{error}");
    }

    #[test]
    fn writers_at_once_leave_a_whole_entry_at_every_moment() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let key = Key::of([b"same".as_slice()]);
        let payload = vec![7u8; 300_000];
        write(folder, "k", &key, &payload).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        write(folder, "k", &key, &payload).unwrap();
                        assert!(read(folder, "k", &key).as_deref() == Some(&payload[..]));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
    }
}
