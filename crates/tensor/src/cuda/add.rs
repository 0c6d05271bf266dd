//! Launches of `add.cu`: see `ops/add.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::{PIECES, at, at_mut, kernel, pieces, stale};
use crate::{DType, Error, Result, Tensor};

const SOURCE: Source = Source { name: "add", text: include_str!("add.cu"), headers: &[PIECES] };

/// `a + b`, of one shape and storage type.
pub(crate) fn forward(gpu: &Gpu, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = stale(gpu, a.dtype(), a.shape())?;
    launch(gpu, a.dtype(), [at(a)?, at(b)?, at(&out)?], a.len())?;
    Ok(out)
}

/// `a += b`.
pub(crate) fn in_place(gpu: &Gpu, a: &mut Tensor, b: &Tensor) -> Result<()> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        let expected = format!("{} {:?}", a.dtype(), a.shape());
        return Err(Error::shape("backward", "a gradient", expected, b.shape()));
    }
    let sum = at_mut(a)?;
    launch(gpu, a.dtype(), [sum, at(b)?, sum], a.len())
}

fn launch(gpu: &Gpu, dtype: DType, [a, b, y]: [u64; 3], len: usize) -> Result<()> {
    let kernel = kernel(gpu, &SOURCE, "add", dtype, &[])?;
    let (grid, block) = pieces(len, dtype);
    let args = Args::new().ptr(a).ptr(b).ptr(y).len(len);
    // SAFETY: all three hold `len` numbers of `dtype`.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}
