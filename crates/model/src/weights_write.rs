//! Writing safetensors, in one file or in shards with an index. The same model gives the same
//! bytes, and those of Hugging Face's own writer.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use tercet_tensor::{DType, Tensor};

use crate::config::ModelConfig;
use crate::params::Params;
use crate::stored::{Part, Stored};
use crate::{Error, Result, folder};

/// Largest shard in bytes unless a caller says otherwise.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// One tensor of the file: its shape there, and the parameters it is made of.
pub(crate) struct Entry<'a> {
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub parts: Vec<(Part, &'a Tensor)>,
}

/// Writes `model.safetensors`, or shards of at most `shard_bytes` and their index.
pub(crate) fn write(
    dir: &Path,
    config: &ModelConfig,
    params: &Params,
    shard_bytes: u64,
) -> Result<()> {
    // Sorted by name, which fixes the shards.
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    for (spec, tensor) in params.specs().iter().zip(params.tensors()) {
        let stored = Stored::of(config, &spec.name);
        let shape = stored.shape(&spec.shape);
        let entry = entries.entry(stored.name).or_insert_with(|| Entry {
            shape,
            dtype: tensor.dtype(),
            parts: Vec::new(),
        });
        entry.parts.push((stored.part, tensor));
    }
    let total: u64 = entries.values().map(|e| e.data_len() as u64).sum();
    if total <= shard_bytes {
        return write_file(&dir.join("model.safetensors"), entries.iter());
    }

    let mut shards: Vec<Vec<(&String, &Entry)>> = Vec::new();
    let mut room = 0u64;
    for (name, entry) in &entries {
        let bytes = entry.data_len() as u64;
        if shards.is_empty() || bytes > room {
            shards.push(Vec::new());
            room = shard_bytes;
        }
        room = room.saturating_sub(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push((name, entry));
        }
    }
    let mut map = BTreeMap::new();
    let count = shards.len();
    for (i, shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        map.extend(shard.iter().map(|(name, _)| ((*name).clone(), file.clone())));
        write_file(&dir.join(&file), shard.into_iter())?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    folder::write_text(&dir.join("model.safetensors.index.json"), &format!("{index:#}\n"))
}

/// Writes one file: the header's length, the header, the numbers. A header of one storage type
/// is sorted by name, as the safetensors library sorts it.
pub(crate) fn write_file<'a>(
    path: &Path,
    entries: impl Iterator<Item = (&'a String, &'a Entry<'a>)> + Clone,
) -> Result<()> {
    let mut end = 0;
    let infos = entries.clone().map(|(name, entry)| {
        let start = end;
        end += entry.data_len();
        let dtype = if entry.dtype == DType::BF16 { Dtype::BF16 } else { Dtype::F32 };
        let shape = entry.shape.clone();
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    // The key that transformers looks for.
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let unwritable = |e: &dyn std::fmt::Display| Error::file(path, format!("has no header: {e}"));
    let metadata = Metadata::new(Some(about), infos.collect()).map_err(|e| unwritable(&e))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| unwritable(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    folder::write(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, entry) in entries {
            out.write_all(&entry.bytes())?;
        }
        Ok(())
    })
}

impl Entry<'_> {
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }

    fn bytes(&self) -> Vec<u8> {
        if let [(Part::Whole, tensor)] = self.parts[..] {
            return little_endian(tensor);
        }
        let mut bytes = vec![0u8; self.data_len()];
        for &(part, tensor) in &self.parts {
            let source = little_endian(tensor);
            place(&mut bytes, &source, part, tensor.shape(), self.dtype.bytes());
        }
        bytes
    }
}

fn little_endian(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0u8; tensor.len() * tensor.dtype().bytes()];
    if let Ok(values) = tensor.as_bf16() {
        for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *to = value.to_le_bytes();
        }
    } else if let Ok(values) = tensor.as_f32() {
        for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *to = value.to_le_bytes();
        }
    }
    bytes
}

/// Puts a parameter where it stands in the file's tensor; the reverse of reading.
fn place(bytes: &mut [u8], source: &[u8], part: Part, shape: &[usize], width: usize) {
    let (columns, first) = match (part, shape) {
        (Part::Third(i), _) => {
            let at = i * source.len();
            return bytes[at..at + source.len()].copy_from_slice(source);
        }
        (Part::Transposed, &[out, _]) => (out, 0),
        (Part::TransposedThird(i), &[out, _]) => (3 * out, i * out),
        _ => return bytes.copy_from_slice(source),
    };
    let inp = shape[1];
    for (at, value) in source.chunks_exact(width).enumerate() {
        let to = ((at % inp) * columns + first + at / inp) * width;
        bytes[to..to + width].copy_from_slice(value);
    }
}
