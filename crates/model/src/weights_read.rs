//! Reading safetensors, single or sharded with an index. Nothing in a file is believed before
//! it is checked against the file's size and the configuration's shapes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use tercet_tensor::{DType, Tensor};

use crate::config::ModelConfig;
use crate::layout::ParamSpec;
use crate::stored::{Part, Stored, is_buffer};
use crate::{Error, Result};

/// Largest header, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes read at a time; a multiple of every element size.
const READ: usize = 1 << 20;

/// The output matrix of every family; files of tied models may repeat it.
const HEAD: &str = "lm_head.weight";

/// One tensor of a file.
pub(crate) struct Entry {
    path: PathBuf,
    start: u64,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// All tensors of a model folder, by name.
pub(crate) struct WeightFiles {
    origin: PathBuf,
    entries: BTreeMap<String, Entry>,
}

impl WeightFiles {
    /// Reads the headers of `model.safetensors`, or of every shard of
    /// `model.safetensors.index.json`.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let mut entries = BTreeMap::new();
        if single.exists() {
            read_header(&single, &mut entries)?;
            return Ok(Self { origin: single, entries });
        }
        if !index.exists() {
            return Err(Error::file(
                dir,
                "holds neither model.safetensors nor model.safetensors.index.json",
            ));
        }
        let map = read_index(&index)?;
        let shards: std::collections::BTreeSet<_> = map.values().collect();
        for shard in shards {
            read_header(&dir.join(shard), &mut entries)?;
        }
        for (name, shard) in &map {
            let found = entries.get(name).is_some_and(|e| e.path == dir.join(shard));
            if !found {
                let reason = format!("tensor {name} is not in {shard}, where the index says it is");
                return Err(Error::file(&index, reason));
            }
        }
        if let Some(extra) = entries.keys().find(|name| !map.contains_key(*name)) {
            let reason = format!("tensor {extra} is in a shard but not in the index");
            return Err(Error::file(&index, reason));
        }
        Ok(Self { origin: index, entries })
    }

    /// The storage type a model of these files gets when none is asked for: bf16 when every
    /// tensor is, else f32, which holds every source exactly.
    pub fn natural_dtype(&self) -> DType {
        if self.entries.values().all(|e| e.dtype == Dtype::BF16) { DType::BF16 } else { DType::F32 }
    }

    /// Whether some file holds a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Reads the parameters in slot order. Missing, extra, misshapen and non-float tensors are
    /// errors that name the tensor.
    pub fn read(
        &self,
        config: &ModelConfig,
        specs: &[ParamSpec],
        dtype: DType,
    ) -> Result<Vec<Tensor>> {
        let stored: Vec<Stored> =
            specs.iter().map(|spec| self.resolve(Stored::of(config, &spec.name))).collect();
        for (spec, stored) in specs.iter().zip(&stored) {
            self.check(spec, stored)?;
        }
        self.refuse_extras(config, &stored)?;
        let read = |(spec, stored): (&ParamSpec, &Stored)| self.tensor(spec, stored, dtype);
        specs.par_iter().zip(&stored).map(read).collect()
    }

    /// GPT-2 files before transformers 4 leave `transformer.` out.
    fn resolve(&self, mut stored: Stored) -> Stored {
        if !self.entries.contains_key(&stored.name)
            && let Some(short) = stored.name.strip_prefix("transformer.")
            && self.entries.contains_key(short)
        {
            stored.name = short.to_owned();
        }
        stored
    }

    fn fail<T>(&self, reason: String) -> Result<T> {
        Err(Error::file(&self.origin, reason))
    }

    fn check(&self, spec: &ParamSpec, stored: &Stored) -> Result<()> {
        let Some(entry) = self.entries.get(&stored.name) else {
            return self.fail(format!("tensor {} is missing", stored.name));
        };
        let expected = stored.shape(&spec.shape);
        if entry.shape != expected {
            return self.fail(format!(
                "tensor {} has shape {:?}, but config.json asks for {expected:?}",
                stored.name, entry.shape
            ));
        }
        if !matches!(entry.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return self.fail(format!(
                "tensor {} is stored as {:?}; only F32, BF16 and F16 are read",
                stored.name, entry.dtype
            ));
        }
        Ok(())
    }

    fn refuse_extras(&self, config: &ModelConfig, stored: &[Stored]) -> Result<()> {
        let known: std::collections::HashSet<&str> =
            stored.iter().map(|s| s.name.as_str()).collect();
        for (name, entry) in &self.entries {
            if known.contains(name.as_str()) || is_buffer(config, name) {
                continue;
            }
            if name == HEAD && config.tie_word_embeddings {
                self.check_tied(entry, &stored[0].name)?;
                continue;
            }
            return self
                .fail(format!("tensor {name} does not belong to a model of this config.json"));
        }
        Ok(())
    }

    /// A repeated output matrix may be dropped only if it is the embedding.
    fn check_tied(&self, head: &Entry, embed: &str) -> Result<()> {
        let same = match self.entries.get(embed) {
            Some(e) if e.dtype == head.dtype && e.shape == head.shape => {
                read_bytes(e)? == read_bytes(head)?
            }
            _ => false,
        };
        if same {
            return Ok(());
        }
        self.fail(format!(
            "tensor {HEAD} differs from {embed}, but config.json says tie_word_embeddings"
        ))
    }

    fn tensor(&self, spec: &ParamSpec, stored: &Stored, dtype: DType) -> Result<Tensor> {
        let Some(entry) = self.entries.get(&stored.name) else {
            return self.fail(format!("tensor {} is missing", stored.name));
        };
        // Exact sources stay exact: bf16 → bf16 never passes through a rounding.
        if dtype == DType::BF16 {
            let values = read_values(entry, bf16::from_f32)?;
            return Ok(Tensor::from_bf16(take(values, stored, spec), &spec.shape)?);
        }
        let values = read_values(entry, |v| v)?;
        Ok(Tensor::from_f32(take(values, stored, spec), &spec.shape)?)
    }
}

/// The parameter's own numbers out of the file's tensor.
fn take<E: Copy>(values: Vec<E>, stored: &Stored, spec: &ParamSpec) -> Vec<E> {
    let third = |i: usize| values[i * spec.len()..(i + 1) * spec.len()].to_vec();
    let (columns, first) = match (stored.part, spec.shape.as_slice()) {
        (Part::Third(i), _) => return third(i),
        (Part::Transposed, &[out, _]) => (out, 0),
        (Part::TransposedThird(i), &[out, _]) => (3 * out, i * out),
        _ => return values,
    };
    let (out, inp) = (spec.shape[0], spec.shape[1]);
    (0..out * inp).map(|at| values[(at % inp) * columns + first + at / inp]).collect()
}

pub(crate) fn read_values<E>(entry: &Entry, convert: impl Fn(f32) -> E) -> Result<Vec<E>> {
    let count: usize = entry.shape.iter().product();
    let mut values = Vec::with_capacity(count);
    each_block(entry, |bytes| match entry.dtype {
        Dtype::F32 => {
            values.extend(bytes.as_chunks().0.iter().map(|&b| convert(f32::from_le_bytes(b))))
        }
        Dtype::BF16 => values
            .extend(bytes.as_chunks().0.iter().map(|&b| convert(bf16::from_le_bytes(b).to_f32()))),
        _ => values
            .extend(bytes.as_chunks().0.iter().map(|&b| convert(f16::from_le_bytes(b).to_f32()))),
    })?;
    Ok(values)
}

fn read_bytes(entry: &Entry) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    each_block(entry, |bytes| all.extend_from_slice(bytes))?;
    Ok(all)
}

/// Passes an entry's bytes in blocks of whole elements.
fn each_block(entry: &Entry, mut take: impl FnMut(&[u8])) -> Result<()> {
    let fail = |e| Error::io(&entry.path, e);
    let mut file = File::open(&entry.path).map_err(fail)?;
    file.seek(SeekFrom::Start(entry.start)).map_err(fail)?;
    let mut left = entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
    let mut block = vec![0u8; READ.min(left)];
    while left > 0 {
        let n = READ.min(left);
        file.read_exact(&mut block[..n]).map_err(fail)?;
        take(&block[..n]);
        left -= n;
    }
    Ok(())
}

/// Adds the tensors of one file to `entries`.
pub(crate) fn read_header(path: &Path, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
    let fail = |e| Error::io(path, e);
    let wrong = |reason: String| Error::file(path, reason);
    let mut file = File::open(path).map_err(fail)?;
    let size = file.metadata().map_err(fail)?.len();
    let mut length = [0u8; 8];
    if size < 8 {
        return Err(wrong(format!("is {size} bytes long, too short for a safetensors file")));
    }
    file.read_exact(&mut length).map_err(fail)?;
    let header = u64::from_le_bytes(length);
    if header > MAX_HEADER || header > size - 8 {
        return Err(wrong(format!(
            "promises a header of {header} bytes in a file of {size}; it is not a safetensors \
             file, or it is cut off"
        )));
    }
    let mut text = vec![0u8; header as usize];
    file.read_exact(&mut text).map_err(fail)?;
    let metadata: Metadata = serde_json::from_slice(&text)
        .map_err(|e| wrong(format!("has a safetensors header that is not valid: {e}")))?;
    let data = metadata.data_len() as u64;
    if 8 + header + data != size {
        return Err(wrong(format!(
            "holds {} bytes of tensors where its header promises {data}; the download may be \
             incomplete",
            size - 8 - header
        )));
    }
    for (name, info) in metadata.tensors() {
        let start = 8 + header + info.data_offsets.0 as u64;
        let entry =
            Entry { path: path.to_owned(), start, dtype: info.dtype, shape: info.shape.clone() };
        if entries.contains_key(&name) {
            return Err(wrong(format!("repeats tensor {name} of another shard")));
        }
        entries.insert(name, entry);
    }
    Ok(())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Tensor name → shard, every shard a plain file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::file(path, format!("is not a shard index: {e}")))?;
    for shard in index.weight_map.values() {
        let plain = !shard.is_empty()
            && !shard.contains(['/', '\\', ':', '\0'])
            && shard != "."
            && shard != "..";
        if !plain {
            let reason = format!("names the shard {shard:?}, which is outside the model's folder");
            return Err(Error::file(path, reason));
        }
    }
    Ok(index.weight_map)
}
