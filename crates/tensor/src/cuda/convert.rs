//! Launches of `convert.cu`: see [`Tensor::to_dtype`].

use tercet_cuda::{Args, Source};

use super::{at, kernel, stale};
use crate::{DType, Device, Error, Result, Tensor};

const SOURCE: Source = Source::new("convert", include_str!("convert.cu"));

/// Threads of a block, and the numbers each converts.
const THREADS: u32 = 256;
const EACH: usize = 8;

/// An f32 or bf16 tensor on a device in the other storage type.
pub(crate) fn convert(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let Device::Cuda(gpu) = x.device() else {
        return Err(Error::device("to_dtype", "the tensor", &x.device(), &Device::Cpu));
    };
    let entry = if dtype == DType::BF16 { "to_bf16" } else { "to_f32" };
    let out = stale(&gpu, dtype, x.shape())?;
    let kernel = kernel(&gpu, &SOURCE, entry, DType::F32, &[])?;
    let blocks = x.len().div_ceil(THREADS as usize * EACH) as u32;
    let args = Args::new().ptr(at(x)?).ptr(at(&out)?).len(x.len());
    // SAFETY: both hold `len` numbers, of the types that the entry names.
    unsafe { kernel.launch([blocks, 1, 1], [THREADS, 1, 1], 0, args)? };
    Ok(out)
}
