//! Launches of `scale.cu`: see `ops/scale.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::{PIECES, at, at_mut, kernel, pieces, stale};
use crate::{DType, Error, Result, Tensor};

const SOURCE: Source = Source { name: "scale", text: include_str!("scale.cu"), headers: &[PIECES] };

/// `factor · x`.
pub(crate) fn forward(gpu: &Gpu, x: &Tensor, factor: f32) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    launch(gpu, x.dtype(), at(x)?, at(&out)?, factor, x.len())?;
    Ok(out)
}

/// `x *= factor`.
pub(crate) fn in_place(gpu: &Gpu, x: &mut Tensor, factor: f32) -> Result<()> {
    let to = at_mut(x)?;
    launch(gpu, x.dtype(), to, to, factor, x.len())
}

/// `x *= factor`, one f32 on the device that the host need not know.
pub(crate) fn in_place_by(gpu: &Gpu, x: &mut Tensor, factor: &Tensor) -> Result<()> {
    if factor.dtype() != DType::F32 || factor.len() != 1 {
        return Err(Error::shape("scale", "the factor", "one f32", factor.shape()));
    }
    let to = at_mut(x)?;
    let kernel = kernel(gpu, &SOURCE, "scale_by", x.dtype(), &[])?;
    let (grid, block) = pieces(x.len(), x.dtype());
    let args = Args::new().ptr(to).ptr(at(factor)?).len(x.len());
    // SAFETY: x holds `len` numbers of its type and the factor one f32.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}

fn launch(gpu: &Gpu, dtype: DType, x: u64, y: u64, factor: f32, len: usize) -> Result<()> {
    let kernel = kernel(gpu, &SOURCE, "scale", dtype, &[])?;
    let (grid, block) = pieces(len, dtype);
    let args = Args::new().ptr(x).ptr(y).f32(factor).len(len);
    // SAFETY: both hold `len` numbers of `dtype`.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}
