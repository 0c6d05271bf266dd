//! What became of the rows: kept, cut, dropped, and why.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::json;

use crate::data::Row;
use crate::error::{Error, Result};
use crate::files;

/// Counts rows, and lists those that were cut or left out.
#[derive(Clone, Debug, Default)]
pub struct RowCount {
    /// Rows read.
    pub rows: usize,
    /// Rows in use.
    pub kept: usize,
    noted: Vec<Noted>,
}

#[derive(Clone, Debug)]
struct Noted {
    file: String,
    line: u64,
    dropped: bool,
    reason: String,
}

impl RowCount {
    /// Lists a row that was left out.
    pub fn drop(&mut self, row: &Row, reason: impl Into<String>) {
        self.note(row, true, reason.into());
    }

    /// Lists a row that lost its end.
    pub fn cut(&mut self, row: &Row, reason: impl Into<String>) {
        self.note(row, false, reason.into());
    }

    fn note(&mut self, row: &Row, dropped: bool, reason: String) {
        self.noted.push(Noted { file: row.file.clone(), line: row.line, dropped, reason });
    }

    /// Rows left out.
    pub fn dropped(&self) -> usize {
        self.noted.iter().filter(|noted| noted.dropped).count()
    }

    /// Rows that lost their end.
    pub fn truncated(&self) -> usize {
        self.noted.len() - self.dropped()
    }

    /// Writes one line a cut or dropped row: file, line, what happened, why.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = String::new();
        for noted in &self.noted {
            let what = if noted.dropped { "dropped" } else { "truncated" };
            let line = json!({ "file": noted.file, "line": noted.line, "was": what,
                               "reason": noted.reason });
            text += &format!("{line}\n");
        }
        files::write_atomic(path, text.as_bytes())
    }
}

impl fmt::Display for RowCount {
    /// `97 of 100 rows; dropped 3 (2 has an empty completion, 1 …); 5 truncated`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} rows", self.kept, self.rows)?;
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for noted in self.noted.iter().filter(|noted| noted.dropped) {
            *reasons.entry(&noted.reason).or_default() += 1;
        }
        if !reasons.is_empty() {
            let mut reasons: Vec<(&str, usize)> = reasons.into_iter().collect();
            reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            let mut listed: Vec<String> =
                reasons.iter().take(5).map(|(reason, n)| format!("{n} {reason}")).collect();
            if reasons.len() > 5 {
                listed.push(format!("{} more kinds in rows.jsonl", reasons.len() - 5));
            }
            write!(f, "; dropped {} ({})", self.dropped(), listed.join(", "))?;
        }
        match self.truncated() {
            0 => Ok(()),
            n => write!(f, "; truncated {n}"),
        }
    }
}

/// An error in the name of a row.
pub fn bad_row(row: &Row, reason: &str) -> Error {
    Error::Data(format!(
        "{}, line {} {reason}. Put it right, or set data.bad_rows = \"drop\" to leave such rows out",
        row.file, row.line
    ))
}
