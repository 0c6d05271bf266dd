//! Launches of `norm.cu`: see [`crate::clip::global_norm`].

use tercet_cuda::{Args, Gpu, Label, Source};

use super::{SLOTS, SPAN, at, kernel};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source { name: "norm", text: include_str!("norm.cu"), headers: &[SLOTS] };

/// Words of a row of the table: address, length, first block.
const ROW: usize = 3;

/// `Σ g²` of f32 tensors on one device.
pub(crate) fn squared(gpu: &Gpu, gradients: &[&Tensor]) -> Result<f64> {
    let mut table = Vec::with_capacity(gradients.len() * ROW);
    let mut blocks = 0u64;
    for gradient in gradients.iter().filter(|g| !g.is_empty()) {
        table.extend([at(gradient)?, gradient.len() as u64, blocks]);
        blocks += gradient.len().div_ceil(SPAN) as u64;
    }
    if blocks == 0 {
        return Ok(0.0);
    }
    let slots = table.len() / ROW;
    let table = gpu.upload(&table)?;
    let parts = gpu.alloc_for(blocks as usize * 8, Label::new("partial sums"))?;
    let sum = gpu.alloc(8)?;
    let squares = kernel(gpu, &SOURCE, "squares", DType::F32, &[])?;
    let total = kernel(gpu, &SOURCE, "total", DType::F32, &[])?;
    let args = Args::new().ptr(table.ptr()).i32(slots as i32).ptr(parts.ptr());
    let last = Args::new().ptr(parts.ptr()).ptr(sum.ptr()).i64(blocks as i64);
    // SAFETY: the table's rows are live tensors; `parts` holds a number a block.
    unsafe {
        squares.launch([blocks as u32, 1, 1], [256, 1, 1], 0, args)?;
        total.launch([1, 1, 1], [1024, 1, 1], 0, last)?;
    }
    let mut host = [0f64];
    sum.download(&mut host)?;
    Ok(host[0])
}
