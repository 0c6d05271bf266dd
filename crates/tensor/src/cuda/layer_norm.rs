//! Launches of `layer_norm.cu`: see `ops/layer_norm.rs`.

use tercet_cuda::{Args, Buffer, Gpu, Source};

use super::cut::Cut;
use super::sum_parts::sum_parts;
use super::{ROWS, at, kernel, stale};
use crate::backward::{Backward, Weight};
use crate::tape::Source as To;
use crate::{Result, Tensor};

const SOURCE: Source =
    Source { name: "layer_norm", text: include_str!("layer_norm.cu"), headers: &[ROWS] };

/// The normed rows of x, and for each its mean and r, f32.
pub(crate) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    rows: usize,
    eps: f32,
) -> Result<(Tensor, Buffer)> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    let moments = gpu.alloc(2 * rows * size_of::<f32>())?;
    if !x.is_empty() {
        let cut = Cut::forward(weight.len(), x.dtype());
        let kernel = kernel(gpu, &SOURCE, "layer_norm_forward", x.dtype(), &cut.defines())?;
        let args = Args::new().ptr(at(x)?).ptr(at(weight)?).ptr(at(bias)?).ptr(at(&out)?);
        let args = args.ptr(moments.ptr()).len(rows).f32(eps);
        // SAFETY: x and out hold `rows` rows of the weight's length, `moments` two numbers a row.
        unsafe { kernel.launch(cut.grid(rows), cut.block(), 0, args)? };
    }
    Ok((out, moments))
}

/// Gives x, the weight and the bias their gradients.
pub(crate) fn backward(
    gpu: &Gpu,
    grad: &Tensor,
    (x, weight, moments): (&Tensor, &Tensor, &Buffer),
    (to_x, to_weight, to_bias): (To, &Weight, &Weight),
    walk: &mut Backward,
) -> Result<()> {
    let (rows, width) = (moments.bytes() / (2 * size_of::<f32>()), weight.len());
    let cut = Cut::backward(width.max(1), x.dtype());
    let (count, per) = cut.parts(gpu, rows);
    let bytes = count * width * size_of::<f32>();
    let (dw_parts, db_parts) = (gpu.alloc(bytes)?, gpu.alloc(bytes)?);
    walk.accumulate_always_cuda(gpu, to_x, x.dtype(), x.shape(), |dx, add| {
        if x.is_empty() {
            return Ok(());
        }
        let kernel = kernel(gpu, &SOURCE, "layer_norm_backward", x.dtype(), &cut.defines())?;
        let args = Args::new().ptr(at(x)?).ptr(at(grad)?).ptr(at(weight)?).ptr(moments.ptr());
        let args = args.ptr(dx).ptr(dw_parts.ptr()).ptr(db_parts.ptr());
        let args = args.len(rows).len(per).i32(add.into());
        // SAFETY: x, the gradient and dx hold `rows` rows of `width`, both parts `count` of them.
        Ok(unsafe { kernel.launch([count as u32, 1, 1], cut.block(), 0, args) }?)
    })?;
    for (to, parts) in [(to_weight, &dw_parts), (to_bias, &db_parts)] {
        walk.accumulate_f32_cuda(gpu, to, |sum, add| {
            sum_parts(gpu, parts.ptr(), sum, [count, width], add)
        })?;
    }
    Ok(())
}
