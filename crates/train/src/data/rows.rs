//! JSON lines as rows: one object a line, with the place it came from.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
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
            Ok(Line::Object(object)) => {
                rows.push(Row { file: place.clone(), line: number, object })
            }
            Ok(Line::Repeated(key)) => {
                return Err(wrong(format!(
                    "has the key {key:?} twice; which of the two is meant is anybody's guess"
                )));
            }
            Ok(Line::Other) => {
                return Err(wrong("is JSON but not an object, {\"key\": …}".into()));
            }
            Err(error) => return Err(wrong(format!("is not a JSON object: {error}"))),
        }
    }
    Ok(())
}

/// What a line holds. JSON's own map would take the last of two values of a key in silence.
enum Line {
    Object(Map<String, Value>),
    Repeated(String),
    Other,
}

impl<'de> Deserialize<'de> for Line {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(LineVisitor)
    }
}

struct LineVisitor;

impl<'de> Visitor<'de> for LineVisitor {
    type Value = Line;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Line, A::Error> {
        let (mut object, mut repeated) = (Map::new(), None);
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            if object.insert(key.clone(), value).is_some() {
                repeated.get_or_insert(key);
            }
        }
        Ok(repeated.map_or(Line::Object(object), Line::Repeated))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Line, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Line::Other)
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<Line, E> {
        Ok(Line::Other)
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<Line, E> {
        Ok(Line::Other)
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<Line, E> {
        Ok(Line::Other)
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<Line, E> {
        Ok(Line::Other)
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<Line, E> {
        Ok(Line::Other)
    }

    fn visit_unit<E>(self) -> std::result::Result<Line, E> {
        Ok(Line::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_stands_twice_and_a_line_of_something_else_are_seen() {
        let line = |text: &str| serde_json::from_str::<Line>(text);
        assert!(matches!(line(r#"{"a": 1, "b": {"a": 2}}"#), Ok(Line::Object(o)) if o.len() == 2));
        // As it is meant, not as it is written.
        let twice = r#"{"who": "p1", "text": "", "\u0077ho": "p2"}"#;
        assert!(matches!(line(twice), Ok(Line::Repeated(key)) if key == "who"));
        for other in ["null", "true", "1", "-1", "1.5", "\"a\"", "[]", "[{\"a\": [1]}, 2]"] {
            assert!(matches!(line(other), Ok(Line::Other)), "{other}");
        }
        for broken in ["", "{", "[1,", "{\"a\"}", "nul", "{} {}", "[1] 2"] {
            assert!(line(broken).is_err(), "{broken}");
        }
    }
}
