//! A file as a stream of documents.
//!
//! Memory stays bounded whatever the file: text is handed out in *sections* of limited length,
//! cut after a line where possible, and each section counts as a document of its own.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use super::discover::{Compression, Layout, SourceFile};
use super::zstd::Frames;
use crate::error::{Error, Result};

/// Longest line of a `.jsonl` file.
pub const MAX_LINE: u64 = 256 << 20;

/// Why a file cannot be used.
#[derive(Debug)]
pub enum Unusable {
    /// It holds no text at all.
    Empty,
    /// It holds a zero byte, as text never does.
    Binary,
    /// It is not UTF-8; the byte offset of the first error.
    NotUtf8(u64),
    /// It stops the run, however it was found.
    Fatal(Error),
}

/// The documents of one file, in order.
pub struct Documents<'a> {
    file: &'a SourceFile,
    text_field: &'a str,
    limit: usize,
    reader: Box<dyn BufRead + Send>,
    /// Text read; what comes before `at` is handed out already.
    pending: Vec<u8>,
    at: usize,
    /// Offset of `pending[at]` in the (unpacked) file.
    offset: u64,
    /// Lines read, for messages.
    line: u64,
    ended: bool,
}

impl<'a> Documents<'a> {
    /// Opens a file. `limit` is the longest section in bytes, at least 4.
    pub fn open(file: &'a SourceFile, text_field: &'a str, limit: usize) -> Result<Self> {
        let reader = unpacked(file)?;
        Ok(Self {
            file,
            text_field,
            limit: limit.max(4),
            reader,
            pending: Vec::new(),
            at: 0,
            offset: 0,
            line: 0,
            ended: false,
        })
    }

    /// The next document, or `None` at the end.
    pub fn next(&mut self) -> Result<Option<String>, Unusable> {
        match self.file.layout {
            Layout::Text => self.next_section(true),
            Layout::JsonLines => self.next_in_line(),
        }
    }

    /// Fills `pending` from the reader when asked to, then hands out its next section.
    fn next_section(&mut self, fill: bool) -> Result<Option<String>, Unusable> {
        if fill && !self.ended {
            self.fill()?;
            if self.offset == 0 && self.pending.starts_with(b"\xEF\xBB\xBF") {
                self.at = 3;
                self.offset = 3;
                self.fill()?;
            }
        }
        let left = &self.pending[self.at..];
        if left.is_empty() {
            return Ok(None);
        }
        let section = &left[..cut(left, self.limit)];
        if section.contains(&0) {
            return Err(Unusable::Binary);
        }
        let text = std::str::from_utf8(section)
            .map_err(|error| Unusable::NotUtf8(self.offset + error.valid_up_to() as u64))?
            .to_owned();
        self.at += text.len();
        self.offset += text.len() as u64;
        Ok(Some(text))
    }

    /// Reads until more than a section is pending, or the file ends.
    fn fill(&mut self) -> Result<(), Unusable> {
        self.pending.drain(..self.at);
        self.at = 0;
        let missing = (self.limit + 1).saturating_sub(self.pending.len()) as u64;
        let read = (&mut self.reader).take(missing).read_to_end(&mut self.pending);
        let read = read.map_err(|e| self.fatal(e))?;
        self.ended = (read as u64) < missing;
        Ok(())
    }

    fn next_in_line(&mut self) -> Result<Option<String>, Unusable> {
        loop {
            // What is left of a line longer than a section comes first.
            if let Some(section) = self.next_section(false)? {
                return Ok(Some(section));
            }
            let mut line = Vec::new();
            let read = (&mut self.reader).take(MAX_LINE + 1).read_until(b'\n', &mut line);
            let read = read.map_err(|e| self.fatal(e))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            if read as u64 > MAX_LINE {
                return Err(self.bad_line(format!("is longer than {} MiB", MAX_LINE >> 20)));
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            self.pending = self.text_of(&line)?.into_bytes();
            self.at = 0;
        }
    }

    /// The text field of one line.
    fn text_of(&self, line: &[u8]) -> Result<String, Unusable> {
        let value: serde_json::Value = serde_json::from_slice(line)
            .map_err(|error| self.bad_line(format!("is not a JSON object: {error}")))?;
        match value.get(self.text_field) {
            // A zero byte is legal in JSON, and stays out of the way of the check for binaries.
            Some(serde_json::Value::String(text)) => Ok(text.replace('\0', "")),
            Some(other) => {
                let kind = match other {
                    serde_json::Value::Null => "null",
                    serde_json::Value::Bool(_) => "a boolean",
                    serde_json::Value::Number(_) => "a number",
                    serde_json::Value::Array(_) => "a list",
                    _ => "an object",
                };
                let field = self.text_field;
                Err(self.bad_line(format!("has {kind} in `{field}`; expected a string")))
            }
            None => {
                let fields: Vec<&str> = value
                    .as_object()
                    .map(|object| object.keys().map(String::as_str).take(8).collect())
                    .unwrap_or_default();
                Err(self.bad_line(format!(
                    "has no field `{}` (it has: {}); set data.text_field",
                    self.text_field,
                    fields.join(", ")
                )))
            }
        }
    }

    fn bad_line(&self, problem: String) -> Unusable {
        let path = self.file.path.display();
        Unusable::Fatal(Error::Data(format!("{path}, line {} {problem}", self.line)))
    }

    fn fatal(&self, error: io::Error) -> Unusable {
        Unusable::Fatal(unreadable(self.file, error))
    }
}

/// A file's bytes, unpacked as its name says.
pub fn unpacked(file: &SourceFile) -> Result<Box<dyn BufRead + Send>> {
    let raw = File::open(&file.path).map_err(Error::io("read", &file.path))?;
    let raw = BufReader::with_capacity(1 << 18, raw);
    Ok(match file.compression {
        Compression::None => Box::new(raw),
        Compression::Gzip => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(raw))),
        Compression::Zstd => Box::new(BufReader::new(Frames::new(raw))),
    })
}

/// What went wrong while a file was read: its packing, or the disk.
pub fn unreadable(file: &SourceFile, error: io::Error) -> Error {
    let packed = file.compression != Compression::None;
    let damaged = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
    );
    if packed && damaged {
        let path = file.path.display();
        return Error::Data(format!(
            "{path} is damaged or cut short, or not what its name says: {error}"
        ));
    }
    Error::io("read", &file.path)(error)
}

/// Where a section of at most `limit` bytes ends: everything when it fits, else after the last
/// line that ends in the second half, else between two characters.
fn cut(text: &[u8], limit: usize) -> usize {
    if text.len() <= limit {
        return text.len();
    }
    let half = limit / 2;
    if let Some(at) = text[half..limit].iter().rposition(|&byte| byte == b'\n') {
        return half + at + 1;
    }
    let continues = |byte: u8| byte & 0xC0 == 0x80;
    // Not finding one within a character's length means this is not UTF-8, which is found next.
    (limit.saturating_sub(3)..=limit).rev().find(|&i| i > 0 && !continues(text[i])).unwrap_or(limit)
}
