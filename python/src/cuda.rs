//! Devices and what is kept on them between calls.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use tercet_attention::cuda::{Batch, Gpu, NsaBatch, Number, Plan, Slice};
use tercet_attention::{Dims, NsaSpec};

use crate::call::no_kernels;
use crate::dlpack::{DType, Tensor};
use crate::error::value_error;

/// Sequence offsets kept on each stream; a model's layers share theirs.
const KEPT: usize = 32;

/// Offsets on the device, by what they were made of.
type Kept<T> = Vec<(Vec<i32>, Arc<T>)>;

/// One stream of one device.
#[derive(Clone)]
pub struct Stream {
    gpu: Gpu,
    batches: Arc<Mutex<Kept<Batch>>>,
    nsa_batches: Arc<Mutex<Kept<NsaBatch>>>,
}

/// All streams that were used, and the folder of compiled kernels.
#[derive(Default)]
struct Streams {
    open: HashMap<(usize, u64), Stream>,
    cache: Option<PathBuf>,
}

static STREAMS: Mutex<Option<Streams>> = Mutex::new(None);

/// A lock whose data is consistent between statements, so that a panic elsewhere spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with_streams<T>(f: impl FnOnce(&mut Streams) -> T) -> T {
    f(lock(&STREAMS).get_or_insert_default())
}

/// Keeps compiled kernels in `folder`; `None` for not at all.
#[pyfunction]
#[pyo3(signature = (folder))]
pub fn use_cache(folder: Option<PathBuf>) {
    with_streams(|streams| {
        for stream in streams.open.values() {
            stream.gpu.use_cache(folder.clone());
        }
        streams.cache = folder;
    });
}

/// Bytes in use, their peak, and bytes taken from the device, by all of its streams.
#[pyfunction]
pub fn memory(ordinal: usize) -> PyResult<(u64, u64, u64)> {
    let (mut used, mut peak, mut reserved) = (0, 0, 0);
    for stream in streams_of(ordinal) {
        let memory = stream.gpu.memory_use().map_err(|e| value_error(e.into()))?;
        used += memory.used;
        peak += memory.peak;
        reserved += memory.reserved;
    }
    Ok((used, peak, reserved))
}

/// Starts the peak of `memory` anew and gives kept memory back to the device.
#[pyfunction]
pub fn reset_memory(ordinal: usize) -> PyResult<()> {
    for stream in streams_of(ordinal) {
        stream.gpu.trim().map_err(|e| value_error(e.into()))?;
        stream.gpu.reset_peak();
    }
    Ok(())
}

/// Why the folder of compiled kernels could not be used, once.
#[pyfunction]
pub fn cache_warning() -> Option<String> {
    let streams: Vec<Stream> = with_streams(|streams| streams.open.values().cloned().collect());
    streams.iter().find_map(|stream| stream.gpu.cache_warning())
}

fn streams_of(ordinal: usize) -> Vec<Stream> {
    with_streams(|streams| {
        let of = streams.open.iter().filter(|((device, _), _)| *device == ordinal);
        of.map(|(_, stream)| stream.clone()).collect()
    })
}

impl Stream {
    /// The stream at the address `raw`, which PyTorch made on device `ordinal`.
    pub fn get(ordinal: usize, raw: u64) -> PyResult<Self> {
        with_streams(|streams| {
            if let Some(stream) = streams.open.get(&(ordinal, raw)) {
                return Ok(stream.clone());
            }
            let sibling = streams.open.iter().find(|((device, _), _)| *device == ordinal);
            // SAFETY: `torch.cuda.current_stream().cuda_stream` is a stream of the device's
            // primary context, and PyTorch keeps its streams for ever.
            let gpu = unsafe {
                match sibling {
                    Some((_, stream)) => stream.gpu.with_stream(raw),
                    None => Gpu::on_stream(ordinal, raw),
                }
            }
            .map_err(|error| value_error(error.into()))?;
            gpu.use_cache(streams.cache.clone());
            let stream = Stream { gpu, batches: Arc::default(), nsa_batches: Arc::default() };
            streams.open.insert((ordinal, raw), stream.clone());
            Ok(stream)
        })
    }

    /// The kernels for these dims and the storage type of `like`.
    pub fn plan(&self, dims: Dims, like: &Tensor) -> PyResult<Plan> {
        let number = match like.dtype() {
            DType::F32 => Number::F32,
            DType::Bf16 => Number::BF16,
            DType::F16 => Number::F16,
            DType::F64 | DType::I32 => return Err(no_kernels(like)),
        };
        Plan::new(&self.gpu, dims, number).map_err(value_error)
    }

    /// Sequence offsets on the device.
    pub fn batch(&self, cu_seqlens: &[i32]) -> PyResult<Arc<Batch>> {
        keep(&self.batches, cu_seqlens.to_vec(), || Batch::new(&self.gpu, cu_seqlens))
    }

    /// Sequence and block offsets on the device.
    pub fn nsa_batch(&self, spec: &NsaSpec, cu_seqlens: &[i32]) -> PyResult<Arc<NsaBatch>> {
        let numbers = [
            spec.compress_block,
            spec.compress_stride,
            spec.select_block,
            spec.select_count,
            spec.select_initial,
            spec.select_local,
            spec.window,
        ];
        // A window may be larger than i32; beyond every sequence it makes no difference.
        let mut key: Vec<i32> =
            numbers.iter().map(|&n| i32::try_from(n).unwrap_or(i32::MAX)).collect();
        key.extend_from_slice(cu_seqlens);
        keep(&self.nsa_batches, key, || NsaBatch::new(&self.gpu, spec, cu_seqlens))
    }
}

/// What `key` was made into before, or `make()`; the least recently used goes.
fn keep<T>(
    kept: &Mutex<Kept<T>>,
    key: Vec<i32>,
    make: impl FnOnce() -> tercet_attention::Result<T>,
) -> PyResult<Arc<T>> {
    let mut kept = lock(kept);
    if let Some(at) = kept.iter().position(|(known, _)| *known == key) {
        let entry = kept.remove(at);
        let found = entry.1.clone();
        kept.push(entry);
        return Ok(found);
    }
    let made = Arc::new(make().map_err(value_error)?);
    if kept.len() == KEPT {
        kept.remove(0);
    }
    kept.push((key, made.clone()));
    Ok(made)
}

/// A tensor's memory for the kernels.
pub fn slice(tensor: &Tensor) -> Slice {
    // SAFETY: the capsule holds the memory for the length of the call, and PyTorch reuses memory
    // freed after it only for work that its stream, which is ours, does later.
    unsafe { Slice::new(tensor.address() as u64, tensor.len()) }
}
