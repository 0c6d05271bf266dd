//! Launches of `dropout.cu`: see `ops/dropout.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::{PIECES, at, at_mut, kernel, pieces, stale};
use crate::ops::Mask;
use crate::{DType, Result, Tensor};

const SOURCE: Source =
    Source { name: "dropout", text: include_str!("dropout.cu"), headers: &[PIECES] };

/// `x·m/(1 − p)`.
pub(crate) fn forward(gpu: &Gpu, x: &Tensor, mask: Mask) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    launch(gpu, x.dtype(), [at(x)?, at(&out)?], mask, x.len())?;
    Ok(out)
}

/// The same, over x.
pub(crate) fn in_place(gpu: &Gpu, x: &mut Tensor, mask: Mask) -> Result<()> {
    let to = at_mut(x)?;
    launch(gpu, x.dtype(), [to, to], mask, x.len())
}

fn launch(gpu: &Gpu, dtype: DType, [x, y]: [u64; 2], mask: Mask, len: usize) -> Result<()> {
    let kernel = kernel(gpu, &SOURCE, "dropout", dtype, &[])?;
    let (grid, block) = pieces(len, dtype);
    let args = Args::new().ptr(x).ptr(y).ptr(mask.start);
    let args = args.u32(mask.dropped_below).f32(mask.factor).len(len);
    // SAFETY: both hold `len` numbers of `dtype`.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}
