//! The rows of a task: objects of a JSON array, or one object a line.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Data larger than this is no benchmark.
const LARGEST: u64 = 1 << 32;

/// One row.
pub(crate) type Row = Map<String, Value>;

/// Reads all files, one after the other.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for path in paths {
        let io = |source| Error::Io { path: path.clone(), source };
        if std::fs::metadata(path).map_err(io)?.len() > LARGEST {
            return Err(Error::file(path, "is larger than 4 GiB; split it"));
        }
        let bytes = std::fs::read(path).map_err(io)?;
        rows.extend(parse(path, &bytes)?);
    }
    Ok(rows)
}

/// Names of all columns, whichever row has them.
pub(crate) fn columns(rows: &[Row]) -> HashSet<String> {
    rows.iter().flat_map(|row| row.keys().cloned()).collect()
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Row>> {
    let array = bytes.trim_ascii_start().first() == Some(&b'[');
    let wrong = |at: usize, what: &str| Error::file(path, format!("row {at}: {what}"));
    let values: Vec<Value> = if array {
        serde_json::from_slice(bytes).map_err(|e| Error::file(path, e.to_string()))?
    } else {
        let stream = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
        let value = |(at, value): (usize, serde_json::Result<Value>)| {
            value.map_err(|e| wrong(at, &e.to_string()))
        };
        stream.enumerate().map(value).collect::<Result<_>>()?
    };
    let row = |(at, value)| match value {
        Value::Object(row) => Ok(row),
        _ => Err(wrong(at, "is no object; expected {\"column\": value, …}")),
    };
    values.into_iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_and_lines_give_the_same_rows() {
        let path = Path::new("x.json");
        let lines = parse(path, b"{\"a\": 1}\n\n{\"b\": \"x\"}\n").unwrap();
        let array = parse(path, b" [{\"a\": 1}, {\"b\": \"x\"}]").unwrap();
        assert_eq!(lines, array);
        assert_eq!(columns(&lines), HashSet::from(["a".into(), "b".into()]));
        assert!(parse(path, b"").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_row_is_named_by_its_place() {
        let path = Path::new("x.json");
        for (bytes, part) in [
            (&b"{\"a\": 1}\n7"[..], "row 1: is no object"),
            (b"{\"a\": 1}\n{\"a\":", "row 1: EOF"),
            (b"[{}, []]", "row 1"),
            (b"[{}", "EOF"),
            (b"\xff\xfe", "row 0"),
        ] {
            let error = parse(path, bytes).unwrap_err();
            assert!(error.to_string().contains(part) && error.is_users(), "{error}");
        }
    }
}
