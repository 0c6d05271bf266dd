//! Copies of rows on a device; see `rows.rs`.

use std::ops::Range;

use tercet_cuda::Gpu;

use super::{at, stale};
use crate::{Error, Result, Tensor};

/// A copy of these elements.
pub(crate) fn rows(
    gpu: &Gpu,
    x: &Tensor,
    elements: Range<usize>,
    shape: &[usize],
) -> Result<Tensor> {
    let size = x.dtype().bytes();
    let out = stale(gpu, x.dtype(), shape)?;
    let from = at(x)? + (elements.start * size) as u64;
    // SAFETY: the elements lie inside x, as the caller has checked, and out is as long and new.
    unsafe { gpu.copy(at(&out)?, from, elements.len() * size)? };
    Ok(out)
}

/// The elements of `a`, then those of `b`.
pub(crate) fn append_rows(gpu: &Gpu, a: &Tensor, b: &Tensor, shape: &[usize]) -> Result<Tensor> {
    if a.dtype() != b.dtype() {
        let (expected, got) = (a.dtype().name(), b.dtype());
        return Err(Error::DType { op: "rows", what: "the rows", expected, got });
    }
    let size = a.dtype().bytes();
    let out = stale(gpu, a.dtype(), shape)?;
    let second = at(&out)? + (a.len() * size) as u64;
    // SAFETY: out is new and holds the elements of both.
    unsafe {
        gpu.copy(at(&out)?, at(a)?, a.len() * size)?;
        gpu.copy(second, at(b)?, b.len() * size)?;
    }
    Ok(out)
}
