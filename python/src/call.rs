//! What the operators' arguments have in common.

use pyo3::prelude::*;
use tercet_attention::{Compressor, Dims, NsaSpec};

use crate::dlpack::{DType, Device, Tensor, refuse};
use crate::error::value_error;

/// `Spec` as Python sends it: l, d, l', n, initial, local, window.
pub type SpecNumbers = [usize; 7];

/// The spec of these numbers, checked.
pub fn spec(numbers: SpecNumbers) -> PyResult<NsaSpec> {
    let [l, d, select_block, select_count, select_initial, select_local, window] = numbers;
    let spec = NsaSpec {
        compress_block: l,
        compress_stride: d,
        select_block,
        select_count,
        select_initial,
        select_local,
        window,
        compressor: Compressor::default(),
    };
    spec.validate().map_err(|rule| value_error(rule.into()))?;
    Ok(spec)
}

/// Softmax scale, checked.
pub fn scale(value: f64) -> PyResult<f32> {
    let scale = value as f32;
    if scale > 0.0 && scale.is_finite() {
        return Ok(scale);
    }
    Err(refuse("scale", format!("{value} is not a positive, finite float32")))
}

/// Heads and dimensions from the shapes of `q` `[T, H, D]` and `v` `[T, K, V]`; also T.
pub fn dims(q: &Tensor, v: &Tensor) -> PyResult<(usize, Dims)> {
    let [tokens, heads, key_dim] = q.dims("[T, H, D]")?;
    let [_, kv_heads, value_dim] = v.dims("[T, K, V]")?;
    let dims = Dims { heads, kv_heads, key_dim, value_dim };
    dims.validate().map_err(value_error)?;
    Ok((tokens, dims))
}

/// Sequence offsets: `given`, or `batch` sequences of equal length.
pub fn offsets(
    given: Option<&Bound<PyAny>>,
    batch: usize,
    tokens: usize,
    of: &str,
) -> PyResult<Vec<i32>> {
    let last = i32::try_from(tokens)
        .map_err(|_| refuse(of, format!("{tokens} tokens, expected at most {}", i32::MAX)))?;
    let Some(given) = given else {
        if batch == 0 || !tokens.is_multiple_of(batch) {
            let message = format!("{tokens} tokens are not {batch} sequences of one length");
            return Err(refuse(of, message));
        }
        let step = last / batch as i32;
        return Ok((0..=batch as i32).map(|i| i * step).collect());
    };
    let tensor = Tensor::read("cu_seqlens", given)?;
    tensor.expect(Device::Cpu, DType::I32, "every list of offsets")?;
    tensor.dims::<1>("[B + 1]")?;
    let offsets = tensor.slice::<i32>()?.to_vec();
    tercet_attention::sequences(&offsets, tokens).map_err(value_error)?;
    Ok(offsets)
}

/// The type in which sums of exponentials are kept between forward and backward.
pub fn sums(device: Device) -> DType {
    match device {
        Device::Cpu => DType::F64,
        Device::Cuda(_) => DType::F32,
    }
}

/// Refuses what the CPU has no kernels for, and what this build cannot reach.
pub fn no_kernels(tensor: &Tensor) -> PyErr {
    match tensor.device() {
        Device::Cpu => refuse(
            tensor.name(),
            format!(
                "dtype {} has no CPU kernels, expected float32 or bfloat16",
                tensor.dtype().name()
            ),
        ),
        Device::Cuda(_) => {
            let dtype = tensor.dtype().name();
            let known = "float32, bfloat16 or float16";
            refuse(tensor.name(), format!("dtype {dtype} has no CUDA kernels, expected {known}"))
        }
    }
}

/// Runs `$body` with `$E` the storage type of `$tensor`, which lies on the CPU.
macro_rules! with_cpu_type {
    ($tensor:expr, $E:ident => $body:expr) => {
        match $tensor.dtype() {
            $crate::dlpack::DType::F32 => {
                type $E = f32;
                $body
            }
            $crate::dlpack::DType::Bf16 => {
                type $E = half::bf16;
                $body
            }
            _ => Err($crate::call::no_kernels($tensor)),
        }
    };
}
pub(crate) use with_cpu_type;
