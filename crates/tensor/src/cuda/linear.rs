//! Products of `ops/linear.rs` by cuBLASLt; f32 sums, added to what is there in f32 and rounded
//! once.

use tercet_cuda::{Gpu, Matmul, Number};

use super::sum_parts::column_sums;
use super::{at, group_product, number, stale};
use crate::backward::{Apart, Backward, Weight};
use crate::tape::Source;
use crate::{DType, Result, Tensor};

/// x `[rows, inner]` times the transpose of weight `[outer, inner]`, plus the bias.
pub(crate) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [rows, outer, inner]: [usize; 3],
    shape: &[usize],
) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), shape)?;
    let sizes = [rows, outer, inner];
    let mut product = Matmul::new(sizes, number(x.dtype()), at(x)?, at(weight)?, at(&out)?);
    product.trans_b = true;
    product.bias = bias.map(at).transpose()?.unwrap_or(0);
    // SAFETY: the op has checked the shapes.
    unsafe { gpu.matmul(&product)? };
    Ok(out)
}

/// x `[rows, inner]` times the transpose of weight `[outer, inner]`, in f32.
pub(crate) fn wide(gpu: &Gpu, x: &Tensor, weight: &Tensor, sizes: [usize; 3]) -> Result<Tensor> {
    let out = stale(gpu, DType::F32, &sizes[..2])?;
    let product = Matmul::new(sizes, number(x.dtype()), at(x)?, at(weight)?, at(&out)?);
    let product = Matmul { trans_b: true, output: Number::F32, ..product };
    // SAFETY: the op has checked the shapes.
    unsafe { gpu.matmul(&product)? };
    Ok(out)
}

/// What the backward pass needs of one call.
pub(crate) struct Call<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) weight: &'a Tensor,
    pub(crate) to_x: Source,
    pub(crate) to_weight: &'a Weight,
    pub(crate) to_bias: Option<&'a Weight>,
    pub(crate) sizes: [usize; 3],
}

/// Gives every input its gradient.
pub(crate) fn backward(gpu: &Gpu, call: &Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let [rows, outer, inner] = call.sizes;
    let (dtype, dy) = (grad.dtype(), at(grad)?);
    let bytes = dtype.bytes() as u64;
    let narrow = outer.min(inner) <= group_product::NARROW;
    let groups = match narrow {
        true => walk.groups_cuda(gpu, call.to_weight, rows)?,
        false => None,
    };
    if let Some(Apart { sums, groups, add }) = groups {
        let places = (dy, at(call.x)?, sums);
        group_product::launch(gpu, dtype, places, &groups, [outer, inner], add)?;
    } else {
        walk.accumulate_rows_cuda(gpu, call.to_weight, rows, |sum, range, add| {
            let first = range.start as u64 * bytes;
            let (dy, x) = (dy + first * outer as u64, at(call.x)? + first * inner as u64);
            weight_gradient(gpu, dtype, dy, x, sum, [range.len(), outer, inner], add)
        })?;
    }
    if let Some(to_bias) = call.to_bias {
        walk.accumulate_rows_cuda(gpu, to_bias, rows, |sum, range, add| {
            let dy = dy + range.start as u64 * bytes * outer as u64;
            column_sums(gpu, dtype, dy, sum, [range.len(), outer], add)
        })?;
    }
    walk.accumulate_cuda(gpu, call.to_x, dtype, call.x.shape(), |sum, add| {
        let weight = at(call.weight)?;
        let mut product = Matmul::new([rows, inner, outer], number(dtype), dy, weight, sum);
        product.add = add;
        // SAFETY: dy is [rows, outer], the weight [outer, inner], the sum like x.
        Ok(unsafe { gpu.matmul(&product) }?)
    })
}

/// `sum (+)= dyᵀ·x` in f32: dy `[rows, outer]`, x `[rows, inner]`, sum `[outer, inner]`.
pub(crate) fn weight_gradient(
    gpu: &Gpu,
    dtype: crate::DType,
    dy: u64,
    x: u64,
    sum: u64,
    [rows, outer, inner]: [usize; 3],
    add: bool,
) -> Result<()> {
    let mut product = Matmul::new([outer, inner, rows], number(dtype), dy, x, sum);
    product.trans_a = true;
    product.output = tercet_cuda::Number::F32;
    product.add = add;
    // SAFETY: the sizes are the callers' promise.
    Ok(unsafe { gpu.matmul(&product) }?)
}
