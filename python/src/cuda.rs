//! Devices and what is kept on them between calls.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use tercet_attention::cuda::{Batch, Gpu, NsaBatch, Number, Plan, Slice};
use tercet_attention::{Dims, NsaSpec};

use crate::call::no_kernels;
use crate::dlpack::{DType, Tensor};
use crate::error::value_error;

/// Sequence offsets kept for each device; a model's layers share theirs.
const KEPT: usize = 256;

/// Offsets on the device, by what they were made of.
type Kept<T> = Vec<(Vec<i32>, Arc<T>)>;

/// One device. Offsets are made on a stream of its own and waited for, so that any stream may read
/// them, one that is being captured included.
struct Device {
    home: Gpu,
    streams: HashMap<u64, Gpu>,
    batches: Kept<Batch>,
    nsa_batches: Kept<NsaBatch>,
    /// Whether a graph of PyTorch's was captured here.
    captured: bool,
}

/// All devices that were used, and the folder of compiled kernels.
#[derive(Default)]
struct Devices {
    open: HashMap<usize, Device>,
    cache: Option<PathBuf>,
}

static DEVICES: Mutex<Option<Devices>> = Mutex::new(None);

/// One stream of one device.
pub struct Stream {
    ordinal: usize,
    gpu: Gpu,
}

/// The devices; what they hold is consistent between statements, so that a panic spoils nothing.
fn with_devices<T>(f: impl FnOnce(&mut Devices) -> T) -> T {
    f(DEVICES.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

/// Keeps compiled kernels in `folder`; `None` for not at all.
#[pyfunction]
#[pyo3(signature = (folder))]
pub fn use_cache(folder: Option<PathBuf>) {
    with_devices(|devices| {
        for device in devices.open.values() {
            device.home.use_cache(folder.clone());
        }
        devices.cache = folder;
    });
}

/// Bytes in use, their peak, and bytes taken from the device, by all of its streams.
#[pyfunction]
pub fn memory(ordinal: usize) -> PyResult<(u64, u64, u64)> {
    let (mut used, mut peak, mut reserved) = (0, 0, 0);
    for gpu in streams_of(ordinal) {
        let memory = gpu.memory_use().map_err(|e| value_error(e.into()))?;
        used += memory.used;
        peak += memory.peak;
        reserved += memory.reserved;
    }
    Ok((used, peak, reserved))
}

/// Starts the peak of `memory` anew and gives kept memory back to the device.
#[pyfunction]
pub fn reset_memory(ordinal: usize) -> PyResult<()> {
    for gpu in streams_of(ordinal) {
        gpu.trim().map_err(|e| value_error(e.into()))?;
        gpu.reset_peak();
    }
    Ok(())
}

/// Says that PyTorch captures a graph on the device.
#[pyfunction]
pub fn capturing(ordinal: usize) -> PyResult<()> {
    with_devices(|devices| devices.device(ordinal).map(|device| device.captured = true))
}

/// Why the folder of compiled kernels could not be used, once.
#[pyfunction]
pub fn cache_warning() -> Option<String> {
    with_devices(|devices| devices.open.values().find_map(|device| device.home.cache_warning()))
}

fn streams_of(ordinal: usize) -> Vec<Gpu> {
    with_devices(|devices| {
        let device = devices.open.get(&ordinal);
        device.map_or(Vec::new(), |device| {
            device.streams.values().chain([&device.home]).cloned().collect()
        })
    })
}

impl Devices {
    fn device(&mut self, ordinal: usize) -> PyResult<&mut Device> {
        let cache = &self.cache;
        match self.open.entry(ordinal) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(new) => {
                let home = Gpu::open(ordinal).map_err(|error| value_error(error.into()))?;
                home.use_cache(cache.clone());
                let (streams, batches, nsa_batches) = Default::default();
                let captured = false;
                Ok(new.insert(Device { home, streams, batches, nsa_batches, captured }))
            }
        }
    }
}

impl Stream {
    /// The stream at the address `raw`, which PyTorch made on device `ordinal`.
    pub fn get(ordinal: usize, raw: u64) -> PyResult<Self> {
        with_devices(|devices| {
            let device = devices.device(ordinal)?;
            let gpu = match device.streams.get(&raw) {
                Some(gpu) => gpu.clone(),
                None => {
                    // SAFETY: `torch.cuda.current_stream().cuda_stream` is a stream of the device's
                    // primary context, and PyTorch keeps its streams for ever.
                    let gpu = unsafe { device.home.with_stream(raw) }
                        .map_err(|error| value_error(error.into()))?;
                    device.streams.insert(raw, gpu.clone());
                    gpu
                }
            };
            Ok(Stream { ordinal, gpu })
        })
    }

    /// The kernels for these dims and the storage type of `like`.
    pub fn plan(&self, dims: Dims, like: &Tensor) -> PyResult<Plan> {
        match like.dtype() {
            DType::F64 | DType::I32 => Err(no_kernels(like)),
            dtype => self.plan_of(dims, dtype),
        }
    }

    /// The kernels for these dims and a storage type.
    pub fn plan_of(&self, dims: Dims, dtype: DType) -> PyResult<Plan> {
        let number = match dtype {
            DType::Bf16 => Number::BF16,
            DType::F16 => Number::F16,
            DType::F32 | DType::F64 | DType::I32 => Number::F32,
        };
        Plan::new(&self.gpu, dims, number).map_err(value_error)
    }

    /// Sequence offsets on the device.
    pub fn batch(&self, cu_seqlens: &[i32]) -> PyResult<Arc<Batch>> {
        with_devices(|devices| {
            let device = devices.device(self.ordinal)?;
            let make = |home: &Gpu| Batch::new(home, cu_seqlens);
            keep(device, |device| &mut device.batches, cu_seqlens.to_vec(), make)
        })
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
        with_devices(|devices| {
            let device = devices.device(self.ordinal)?;
            let make = |home: &Gpu| NsaBatch::new(home, spec, cu_seqlens);
            keep(device, |device| &mut device.nsa_batches, key, make)
        })
    }
}

/// What `key` was made into before, or `make()`. When there are too many the older half goes, after
/// all streams have come to an end; where a graph of PyTorch's may read them, they stay for ever.
fn keep<T>(
    device: &mut Device,
    kept: impl Fn(&mut Device) -> &mut Kept<T>,
    key: Vec<i32>,
    make: impl FnOnce(&Gpu) -> tercet_attention::Result<T>,
) -> PyResult<Arc<T>> {
    let known = kept(device);
    if let Some(at) = known.iter().position(|(known, _)| *known == key) {
        let entry = known.remove(at);
        let found = entry.1.clone();
        known.push(entry);
        return Ok(found);
    }
    let full = known.len() == KEPT;
    let made = Arc::new(make(&device.home).map_err(value_error)?);
    let wait = |gpu: &Gpu| gpu.synchronize().map_err(|error| value_error(error.into()));
    wait(&device.home)?;
    if full && !device.captured {
        device.streams.values().try_for_each(wait)?;
    }
    let captured = device.captured;
    let known = kept(device);
    if full {
        let old = known.drain(..KEPT / 2).map(|(_, old)| old);
        if captured { old.for_each(std::mem::forget) } else { drop(old) }
    }
    known.push((key, made.clone()));
    Ok(made)
}

/// A tensor's memory for the kernels.
pub fn slice(tensor: &Tensor) -> Slice {
    // SAFETY: the capsule holds the memory for the length of the call, and PyTorch reuses memory
    // freed after it only for work that its stream, which is ours, does later.
    unsafe { Slice::new(tensor.address() as u64, tensor.len()) }
}
