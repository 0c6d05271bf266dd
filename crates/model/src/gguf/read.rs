//! The container: metadata, tensor directory, and bytes of one tensor.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::dequant::Quant;
use crate::{Error, Result};

const MAX_ENTRIES: u64 = 1 << 16;
const MAX_STRING: u64 = 1 << 24;
const MAX_ARRAY: u64 = 1 << 22;
const MAX_DIMS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Count(u64),
    Negative(i64),
    Real(f64),
    Flag(bool),
    Text(String),
    List(Vec<Value>),
}

fn as_text(value: &Value) -> Option<&str> {
    match value {
        Value::Text(text) => Some(text),
        _ => None,
    }
}

/// Where one tensor stands.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Row-major shape: the file's dimensions reversed.
    pub shape: Vec<usize>,
    pub quant: Quant,
    start: u64,
    bytes: usize,
}

/// An opened file.
pub(super) struct Gguf {
    pub path: PathBuf,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Entry>,
}

impl Gguf {
    /// Reads and checks everything but the tensors' numbers.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
        let mut reader = Reader { path, input: BufReader::new(file), at: 0, size };
        if &reader.bytes::<4>()? != b"GGUF" {
            return reader.fail("does not begin with \"GGUF\"; it is not a GGUF file");
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return reader.fail(format!(
                "is GGUF version {version}; versions 2 and 3 (little-endian) are read"
            ));
        }
        let tensor_count = reader.limited("tensors", MAX_ENTRIES)?;
        let entry_count = reader.limited("metadata entries", MAX_ENTRIES)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entry_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, true)?;
            if metadata.insert(key.clone(), value).is_some() {
                return reader.fail(format!("repeats the metadata key {key:?}"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Count(n)) if n.is_power_of_two() && *n <= MAX_ALIGNMENT => *n,
            Some(other) => {
                return reader.fail(format!(
                    "has general.alignment {other:?}; expected a power of two up to {MAX_ALIGNMENT}"
                ));
            }
        };
        let mut listed = Vec::new();
        for _ in 0..tensor_count {
            listed.push(reader.tensor_info(alignment)?);
        }
        let data = reader.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, mut entry) in listed {
            let end = data.checked_add(entry.start).and_then(|s| s.checked_add(entry.bytes as u64));
            if end.is_none_or(|end| end > size) {
                return reader.fail(format!(
                    "places tensor {name} beyond its end; the file is cut off or false"
                ));
            }
            entry.start += data;
            if tensors.insert(name.clone(), entry).is_some() {
                return reader.fail(format!("repeats tensor {name}"));
            }
        }
        Ok(Self { path: path.to_owned(), metadata, tensors })
    }

    pub fn fail<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Error::file(&self.path, reason))
    }

    /// The numbers of one tensor.
    pub fn read(&self, entry: &Entry) -> Result<Vec<f32>> {
        let fail = |e| Error::io(&self.path, e);
        let mut file = File::open(&self.path).map_err(fail)?;
        file.seek(SeekFrom::Start(entry.start)).map_err(fail)?;
        let mut bytes = vec![0u8; entry.bytes];
        file.read_exact(&mut bytes).map_err(fail)?;
        Ok(entry.quant.dequantise(&bytes))
    }

    fn get<T>(
        &self,
        key: &str,
        what: &str,
        pick: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match pick(value) {
            Some(found) => Ok(Some(found)),
            None => self.fail(format!("has a {key} that is not {what}")),
        }
    }

    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number", |v| match v {
            Value::Count(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    pub fn real(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |v| match v {
            Value::Real(x) => Some(*x),
            Value::Count(n) => Some(*n as f64),
            _ => None,
        })
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |v| match v {
            Value::Flag(f) => Some(*f),
            _ => None,
        })
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        self.get(key, "a text", |v| match v {
            Value::Text(t) => Some(t.clone()),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let texts: Option<Vec<&str>> = match value {
            Value::List(list) => list.iter().map(as_text).collect(),
            _ => None,
        };
        match texts {
            Some(texts) => Ok(Some(texts)),
            None => self.fail(format!("has a {key} that is not a list of texts")),
        }
    }

    /// A list of whole numbers; negative ones are refused.
    pub fn counts(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.get(key, "a list of whole numbers", |v| match v {
            Value::List(list) => list
                .iter()
                .map(|v| match v {
                    Value::Count(n) => Some(*n),
                    _ => None,
                })
                .collect(),
            _ => None,
        })
    }

    pub fn need<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        match value {
            Some(value) => Ok(value),
            None => self.fail(format!("lacks the metadata {key}")),
        }
    }
}

/// Reads forward and never past the file's end.
struct Reader<'p> {
    path: &'p Path,
    input: BufReader<File>,
    at: u64,
    size: u64,
}

impl Reader<'_> {
    fn fail<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Error::file(self.path, reason))
    }

    /// Refuses to go on when the file has fewer than `bytes` left.
    fn left(&self, bytes: u64) -> Result<()> {
        if bytes > self.size - self.at {
            return self.fail(format!(
                "ends at byte {} in the middle of its header; the file is cut off or false",
                self.size
            ));
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.left(N as u64)?;
        let mut bytes = [0u8; N];
        self.input.read_exact(&mut bytes).map_err(|e| Error::io(self.path, e))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn limited(&mut self, what: &str, most: u64) -> Result<u64> {
        let count = self.u64()?;
        if count > most {
            return self.fail(format!("claims {count} {what}; at most {most} are read"));
        }
        Ok(count)
    }

    fn text(&mut self) -> Result<String> {
        let length = self.limited("bytes of one text", MAX_STRING)?;
        self.left(length)?;
        let mut bytes = vec![0u8; length as usize];
        self.input.read_exact(&mut bytes).map_err(|e| Error::io(self.path, e))?;
        self.at += length;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => self.fail(format!("has a text before byte {} that is not UTF-8", self.at)),
        }
    }

    fn value(&mut self, kind: u32, lists: bool) -> Result<Value> {
        let signed = |n: i64| match u64::try_from(n) {
            Ok(n) => Value::Count(n),
            Err(_) => Value::Negative(n),
        };
        Ok(match kind {
            0 => Value::Count(u64::from(u8::from_le_bytes(self.bytes()?))),
            1 => signed(i64::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Count(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => signed(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Count(u64::from(self.u32()?)),
            5 => signed(i64::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Real(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Flag(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if lists => {
                let kind = self.u32()?;
                let count = self.limited("items in one list", MAX_ARRAY)?;
                // Every item takes at least one byte, so the list cannot outgrow the file.
                self.left(count)?;
                let mut items = Vec::new();
                for _ in 0..count {
                    items.push(self.value(kind, false)?);
                }
                Value::List(items)
            }
            10 => Value::Count(self.u64()?),
            11 => signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Real(f64::from_le_bytes(self.bytes()?)),
            9 => return self.fail("has a list of lists, which is not read"),
            other => return self.fail(format!("has a metadata value of unknown type {other}")),
        })
    }

    fn tensor_info(&mut self, alignment: u64) -> Result<(String, Entry)> {
        let name = self.text()?;
        let dims = self.u32()?;
        if dims == 0 || dims > MAX_DIMS {
            return self.fail(format!("gives tensor {name} {dims} dimensions; expected 1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.u64()?);
        }
        let kind = self.u32()?;
        let start = self.u64()?;
        let Some(quant) = Quant::from_id(kind) else {
            return self.fail(format!(
                "stores tensor {name} as ggml type {kind}; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K \
                 and Q6_K are read"
            ));
        };
        let row = shape[0];
        if !row.is_multiple_of(quant.block_len() as u64) {
            return self.fail(format!(
                "gives tensor {name} rows of {row} numbers, not whole blocks of {}",
                quant.block_len()
            ));
        }
        let bytes = shape
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .map(|n| n / quant.block_len() as u64)
            .and_then(|blocks| blocks.checked_mul(quant.block_bytes() as u64))
            .filter(|&bytes| bytes > 0 && bytes <= self.size)
            .and_then(|bytes| usize::try_from(bytes).ok());
        let Some(bytes) = bytes else {
            return self.fail(format!(
                "gives tensor {name} the shape {shape:?}, which does not fit in the file"
            ));
        };
        if !start.is_multiple_of(alignment) {
            return self.fail(format!(
                "places tensor {name} at {start}, not at a multiple of {alignment}"
            ));
        }
        let shape = shape.into_iter().rev().map(|d| d as usize).collect();
        Ok((name, Entry { shape, quant, start, bytes }))
    }
}
