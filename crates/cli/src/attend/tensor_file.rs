//! Reading a safetensors file one tensor at a time: the file itself is never in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Context;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::error::user;

/// The largest header that safetensors readers take.
const LARGEST_HEADER: u64 = 100_000_000;

/// Bytes read at a time; a multiple of every element size.
const CHUNK: usize = 1 << 20;

/// An open safetensors file whose header has been checked against its length.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Where the first tensor starts.
    data_start: u64,
}

impl TensorFile {
    /// Opens the file and checks that the header describes exactly the bytes that follow it.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let bad = |what: String| user(format!("{shown} is not a safetensors file: {what}"));
        let cannot = || format!("cannot read {shown}");
        let mut file = File::open(path).with_context(cannot)?;
        let found = file.metadata().with_context(cannot)?;
        if !found.is_file() {
            return Err(bad("it is not a file".into()));
        }
        let length = found.len();
        if length < 8 {
            return Err(bad(format!("it has {length} bytes, too few for the header's length")));
        }
        let mut size = [0; 8];
        file.read_exact(&mut size).with_context(cannot)?;
        let size = u64::from_le_bytes(size);
        if size > LARGEST_HEADER {
            return Err(bad(format!(
                "it says that its header has {size} bytes; the most is {LARGEST_HEADER}"
            )));
        }
        if size > length - 8 {
            return Err(bad(format!(
                "its header should have {size} bytes, but the file ends after {}; is it truncated?",
                length - 8
            )));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).with_context(cannot)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| bad(format!("in its header, {e}")))?;
        let data_start = 8 + size;
        let (expected, data) = (metadata.data_len() as u64, length - data_start);
        if expected != data {
            let hint = if data < expected { "; is it truncated?" } else { "" };
            return Err(bad(format!(
                "its header describes {expected} bytes of tensors, but {data} follow it{hint}"
            )));
        }
        Ok(Self { path: path.to_owned(), file, metadata, data_start })
    }

    /// The file's name for messages.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// An entry of the file's metadata.
    pub fn entry(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The tensors' dtypes and shapes by name.
    pub fn tensors(&self) -> BTreeMap<String, (Dtype, Vec<usize>)> {
        let info = self.metadata.tensors();
        info.into_iter().map(|(name, t)| (name, (t.dtype, t.shape.clone()))).collect()
    }

    /// Reads a tensor, turning each element into a `T`; `f` gets the element's index and value and
    /// may refuse it. Floats arrive as f64 of exactly their value, integers too.
    pub fn read<T>(
        &self,
        name: &str,
        mut f: impl FnMut(usize, f64) -> anyhow::Result<T>,
    ) -> anyhow::Result<Vec<T>> {
        let info = self.metadata.info(name).expect("the caller has seen the tensor");
        let widen: fn(&[u8]) -> f64 = match info.dtype {
            Dtype::F64 => |b| f64::from_le_bytes(word(b)),
            Dtype::F32 => |b| f64::from(f32::from_le_bytes(word(b))),
            Dtype::F16 => |b| f16::from_le_bytes(word(b)).to_f64(),
            Dtype::BF16 => |b| bf16::from_le_bytes(word(b)).to_f64(),
            Dtype::I32 => |b| f64::from(i32::from_le_bytes(word(b))),
            // Beyond 2^53 the value is rounded; the callers' ranges end far below.
            Dtype::I64 => |b| i64::from_le_bytes(word(b)) as f64,
            other => return Err(user(format!("{}: {name} is {other:?}", self.name()))),
        };
        let size = info.dtype.bitsize() / 8;
        let (start, end) = info.data_offsets;
        let cannot = || format!("cannot read {name} of {}", self.name());
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.data_start + start as u64)).with_context(cannot)?;
        let mut values = Vec::with_capacity((end - start) / size);
        let mut buffer = vec![0; CHUNK.min(end - start)];
        let mut left = end - start;
        while left > 0 {
            let part = &mut buffer[..left.min(CHUNK)];
            file.read_exact(part).with_context(cannot)?;
            for element in part.chunks_exact(size) {
                values.push(f(values.len(), widen(element))?);
            }
            left -= part.len();
        }
        Ok(values)
    }
}

/// The bytes as an array; the caller cuts them to size.
fn word<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut word = [0; N];
    word.copy_from_slice(bytes);
    word
}
