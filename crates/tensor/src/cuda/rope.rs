//! Launches of `rope.cu`: see `ops/rope.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::cut::{threads, vector};
use super::{at, at_mut, kernel, stale};
use crate::{Result, RopeTable, Tensor};

const SOURCE: Source = Source::new("rope", include_str!("rope.cu"));

/// Heads that share an angle's sine and cosine, where there are tokens enough to fill the device.
const HEADS: usize = 8;

/// Threads that fill a multiprocessor.
const FULL: usize = 2048;

/// x `[T, H, D]` turned by the angles of `positions`.
pub(crate) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    positions: &Tensor,
    table: &RopeTable,
) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    launch(gpu, x, at(x)?, at(&out)?, positions, table, 1.0)?;
    Ok(out)
}

/// Turns the gradient back.
pub(crate) fn backward(
    gpu: &Gpu,
    grad: &mut Tensor,
    positions: &Tensor,
    table: &RopeTable,
) -> Result<()> {
    let d = at_mut(grad)?;
    launch(gpu, grad, d, d, positions, table, -1.0)
}

fn launch(
    gpu: &Gpu,
    like: &Tensor,
    from: u64,
    to: u64,
    positions: &Tensor,
    table: &RopeTable,
    sign: f32,
) -> Result<()> {
    let &[tokens, heads, dim] = like.shape() else {
        return Err(crate::Error::shape("rope", "x", "[T, H, D]", like.shape()));
    };
    if like.is_empty() {
        return Ok(());
    }
    let (half, dtype) = (dim / 2, like.dtype());
    let vector = vector(half, dtype);
    let count = tokens * (half / vector);
    let spare = heads * count / (gpu.multiprocessors() as usize * FULL);
    let per = spare.clamp(1, heads.min(HEADS));
    let defines = [("HALF", half.to_string()), ("VEC", vector.to_string())];
    let kernel = kernel(gpu, &SOURCE, "rope", dtype, &defines)?;
    let ([blocks, ..], block) = threads(count);
    let grid = [blocks, heads.div_ceil(per) as u32, 1];
    let args = Args::new().ptr(from).ptr(to).ptr(at(positions)?).ptr(table.inv_freq_on(gpu)?);
    let args = args.f32(table.attention_factor()).f32(sign);
    let args = args.len(tokens).i32(heads as i32).i32(per as i32);
    // SAFETY: both places hold tokens·heads·dim numbers; there is a position for every token and
    // a frequency for every pair.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}
