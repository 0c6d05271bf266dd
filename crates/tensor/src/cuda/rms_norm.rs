//! Launches of `rms_norm.cu`: see `ops/rms_norm.rs`.

use tercet_cuda::{Args, Buffer, Gpu, Source};

use super::cut::Cut;
use super::sum_parts::sum_parts;
use super::{ROWS, at, kernel, stale};
use crate::backward::{Backward, Weight};
use crate::tape::Source as To;
use crate::{Result, Tensor};

const SOURCE: Source =
    Source { name: "rms_norm", text: include_str!("rms_norm.cu"), headers: &[ROWS] };

/// The normed rows of x, and for each its r, f32.
pub(crate) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    rows: usize,
    eps: f32,
) -> Result<(Tensor, Buffer)> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    let inverse = gpu.alloc(rows * size_of::<f32>())?;
    if !x.is_empty() {
        let cut = Cut::forward(weight.len(), x.dtype());
        let kernel = kernel(gpu, &SOURCE, "rms_norm_forward", x.dtype(), &cut.defines())?;
        let args = Args::new().ptr(at(x)?).ptr(at(weight)?).ptr(at(&out)?).ptr(inverse.ptr());
        // SAFETY: x and out hold `rows` rows of the weight's length, `inverse` a number a row.
        unsafe { kernel.launch(cut.grid(rows), cut.block(), 0, args.len(rows).f32(eps))? };
    }
    Ok((out, inverse))
}

/// Gives x and the weight their gradients.
pub(crate) fn backward(
    gpu: &Gpu,
    grad: &Tensor,
    (x, weight, inverse): (&Tensor, &Tensor, &Buffer),
    (to_x, to_weight): (To, &Weight),
    walk: &mut Backward,
) -> Result<()> {
    let (rows, width) = (inverse.bytes() / size_of::<f32>(), weight.len());
    let cut = Cut::backward(width.max(1), x.dtype());
    let (count, per) = cut.parts(gpu, rows);
    let parts = gpu.alloc(count * width * size_of::<f32>())?;
    walk.accumulate_always_cuda(gpu, to_x, x.dtype(), x.shape(), |dx, add| {
        if x.is_empty() {
            return Ok(());
        }
        let kernel = kernel(gpu, &SOURCE, "rms_norm_backward", x.dtype(), &cut.defines())?;
        let args = Args::new().ptr(at(x)?).ptr(at(grad)?).ptr(at(weight)?).ptr(inverse.ptr());
        let args = args.ptr(dx).ptr(parts.ptr()).len(rows).len(per).i32(add.into());
        // SAFETY: x, the gradient and dx hold `rows` rows of `width`, `parts` `count` of them.
        Ok(unsafe { kernel.launch([count as u32, 1, 1], cut.block(), 0, args) }?)
    })?;
    walk.accumulate_f32_cuda(gpu, to_weight, |sum, add| {
        sum_parts(gpu, parts.ptr(), sum, [count, width], add)
    })
}
