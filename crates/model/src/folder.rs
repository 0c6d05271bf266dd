//! Files and folders that appear whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::{Error, Result};

/// Fills a new folder beside `out`, then renames it to `out`, which must not exist or be empty.
/// On an error nothing is left behind.
pub fn create<T>(out: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let occupied = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::io(out, e)),
    };
    if occupied {
        return Err(Error::file(out, "is not empty; name a new folder"));
    }
    let parent = parent(out);
    std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
    let mut builder = tempfile::Builder::new();
    public(&mut builder, 0o777);
    let temp = builder.prefix(".tercet-").tempdir_in(parent).map_err(|e| Error::io(parent, e))?;
    let made = fill(temp.path())?;
    sync(temp.path())?;
    // Renaming replaces an empty folder on Unix; elsewhere it has to go first.
    if out.exists() {
        std::fs::remove_dir(out).map_err(|e| Error::io(out, e))?;
    }
    std::fs::rename(temp.path(), out).map_err(|e| Error::io(out, e))?;
    // Its old name is gone: there is nothing to remove.
    let _ = temp.keep();
    sync(parent)?;
    Ok(made)
}

/// Writes a file beside `path`, flushes it to the disk, then renames it to `path`.
pub(crate) fn write(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut builder = tempfile::Builder::new();
        public(&mut builder, 0o666);
        let file = builder.prefix(".tercet-").tempfile_in(parent(path))?;
        let mut buffer = BufWriter::with_capacity(1 << 20, file.as_file());
        fill(&mut buffer)?;
        buffer.flush()?;
        drop(buffer);
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(|e| Error::io(path, e))
}

/// Writes a file whole: beside, synced, renamed.
///
/// # Errors
/// [`Error::Io`].
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write(path, |out| out.write_all(text.as_bytes()))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Temporary files are private by default; these become the user's own files, for which the
/// umask decides.
#[cfg(unix)]
fn public(builder: &mut tempfile::Builder, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(std::fs::Permissions::from_mode(mode));
}

#[cfg(not(unix))]
fn public(_: &mut tempfile::Builder, _: u32) {}

/// Makes the names in a folder durable, where the system has a way to.
fn sync(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, e))?;
    }
    Ok(())
}
