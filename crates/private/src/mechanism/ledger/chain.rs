//! The ledger's file: lines that hold their own hash and that of the line before.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::mechanism::key::hex;
use crate::{Error, Result};

/// No line is longer.
const MOST_LINE: u64 = 1 << 16;

pub(super) fn changed(line: usize, problem: &str) -> String {
    format!(
        "was changed: line {line} {problem}. Bring it back from a copy; what was spent is not known"
    )
}

/// Opens with the system's lock, which ends with the process, however it ends.
pub(super) fn locked(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).append(true).open(path);
    let file = file.map_err(Error::io("open", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Ledger {
            path: path.into(),
            problem: "is held by another process; two runs must not spend from one".into(),
        }),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
    }
}

/// Every line that has its end, and the bytes up to there.
pub(super) fn lines(path: &Path, file: &File) -> Result<(Vec<String>, u64)> {
    let mut reader = BufReader::new(file);
    let (mut lines, mut whole) = (Vec::new(), 0);
    loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(MOST_LINE).read_until(b'\n', &mut line);
        let read = read.map_err(Error::io("read", path))? as u64;
        if line.pop() != Some(b'\n') {
            if read == MOST_LINE {
                let problem = changed(lines.len() + 1, "has no end");
                return Err(Error::Ledger { path: path.into(), problem });
            }
            return Ok((lines, whole));
        }
        whole += read;
        let line = String::from_utf8(line).map_err(|_| Error::Ledger {
            path: path.into(),
            problem: changed(lines.len() + 1, "is no text"),
        })?;
        lines.push(line);
    }
}

const SEAL: &str = ",\"hash\":\"";

/// A line with its hash at its end, and the hash.
pub(super) fn sealed(line: &impl Serialize) -> Result<(String, String)> {
    let text = serde_json::to_string(line).map_err(|error| Error::Step(error.to_string()))?;
    let hash = hex(&Sha256::digest(&text));
    Ok((format!("{}{SEAL}{hash}\"}}\n", &text[..text.len() - 1]), hash))
}

/// A line whose own hash is right and which follows `previous`, and its hash.
pub(super) fn opened<L: for<'a> Deserialize<'a> + Previous>(
    line: &str,
    previous: &str,
) -> Result<(L, String), String> {
    let split =
        line.rsplit_once(SEAL).and_then(|(body, rest)| Some((body, rest.strip_suffix("\"}")?)));
    let Some((body, hash)) = split else { return Err("has no hash".into()) };
    let body = format!("{body}}}");
    if hex(&Sha256::digest(&body)) != hash {
        return Err("does not have the hash it says".into());
    }
    let parsed: L =
        serde_json::from_str(&body).map_err(|error| format!("is not understood ({error})"))?;
    if parsed.previous() != previous {
        return Err("does not follow the line before it".into());
    }
    Ok((parsed, hash.to_owned()))
}

/// The hash that a line says the one before it has.
pub(super) trait Previous {
    fn previous(&self) -> &str;
}

pub(super) fn sync_folder(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))?;
    }
    Ok(())
}
