//! JSON lines as rows: one object a line, with the place it came from.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};

use super::discover::{Layout, SourceFile, discover};
use super::documents::{MAX_LINE, unpacked, unreadable};
use crate::error::{Error, Result};

/// One line of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The file, as messages and lists name it.
    pub file: String,
    /// Its line, counted from 1.
    pub line: u64,
    /// What stands there.
    pub object: Map<String, Value>,
}

/// Reads every row of the `.jsonl` files (also `.gz`, `.zst`) that names, folders and globs lead
/// to, files in the order of their names. Files of other kinds are an error when they are named
/// outright and passed over otherwise; a line that is no JSON object is an error.
pub fn read_rows(paths: &[String], stop: &AtomicBool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut passed_over: BTreeMap<String, u64> = BTreeMap::new();
    for file in discover(paths)?.files {
        if file.layout != Layout::JsonLines {
            if file.explicit {
                return Err(Error::Data(format!(
                    "{} is not a .jsonl file; expected one JSON object a line",
                    file.path.display()
                )));
            }
            *passed_over.entry(file.name.clone()).or_default() += 1;
            continue;
        }
        read_file(&file, &mut rows, stop)?;
    }
    if rows.is_empty() {
        let mut text = format!("{} holds no rows", paths.join(", "));
        if !passed_over.is_empty() {
            text += &format!("; {} files there are not .jsonl", passed_over.len());
        }
        return Err(Error::Data(text));
    }
    Ok(rows)
}

fn read_file(file: &SourceFile, rows: &mut Vec<Row>, stop: &AtomicBool) -> Result<()> {
    let mut reader = unpacked(file)?;
    let place = file.path.display().to_string();
    for number in 1.. {
        let mut line = Vec::new();
        let read = (&mut reader).take(MAX_LINE + 1).read_until(b'\n', &mut line);
        let read = read.map_err(|error| unreadable(file, error))?;
        if read == 0 {
            break;
        }
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let wrong = |problem: String| Error::Data(format!("{place}, line {number} {problem}"));
        if read as u64 > MAX_LINE {
            return Err(wrong(format!("is longer than {} MiB", MAX_LINE >> 20)));
        }
        let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&line);
        if line.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(Value::Object(object)) => {
                rows.push(Row { file: place.clone(), line: number, object })
            }
            Ok(_) => return Err(wrong("is JSON but not an object, {\"key\": …}".into())),
            Err(error) => return Err(wrong(format!("is not a JSON object: {error}"))),
        }
    }
    Ok(())
}
