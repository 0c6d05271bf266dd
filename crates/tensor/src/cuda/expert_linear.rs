//! Products of `ops/expert_linear.rs`: one for each expert that has rows.

use tercet_cuda::{Gpu, Matmul, Number};

use super::{at, number, stale};
use crate::backward::{Backward, Weight};
use crate::tape::Source as To;
use crate::{Result, Tensor};

/// Experts with rows, and the rows.
fn segments(offsets: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let all = offsets.windows(2).enumerate().map(|(e, w)| (e, w[0], w[1] - w[0]));
    all.filter(|&(_, _, count)| count > 0)
}

/// Rows x `[T·k, I]` times the weight `[O, I]` of their expert.
pub(crate) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    weights: &[Tensor],
    offsets: &[usize],
    [outer, inner]: [usize; 2],
) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), &[x.shape()[0], outer])?;
    let (from, to, bytes) = (at(x)?, at(&out)?, x.dtype().bytes());
    for (e, first, count) in segments(offsets) {
        let x = from + (first * inner * bytes) as u64;
        let y = to + (first * outer * bytes) as u64;
        let sizes = [count, outer, inner];
        let product = Matmul::new(sizes, number(out.dtype()), x, at(&weights[e])?, y);
        // SAFETY: the rows of the expert lie inside x and out, and the weight is [O, I].
        unsafe { gpu.matmul(&Matmul { trans_b: true, ..product })? };
    }
    Ok(out)
}

/// Gives x and the weights their gradients.
pub(crate) fn backward(
    gpu: &Gpu,
    grad: &Tensor,
    (x, weights, offsets): (&Tensor, &[Tensor], &[usize]),
    [outer, inner]: [usize; 2],
    (to_x, to_weights): (To, &[Weight]),
    walk: &mut Backward,
) -> Result<()> {
    let (dy, from, bytes) = (at(grad)?, at(x)?, x.dtype().bytes());
    let number = number(x.dtype());
    for (e, rows) in offsets.windows(2).enumerate() {
        walk.accumulate_f32_cuda(gpu, &to_weights[e], |sum, add| {
            let dy = dy + (rows[0] * outer * bytes) as u64;
            let x = from + (rows[0] * inner * bytes) as u64;
            let product = Matmul::new([outer, inner, rows[1] - rows[0]], number, dy, x, sum);
            let product = Matmul { trans_a: true, output: Number::F32, add, ..product };
            // SAFETY: the rows of the expert lie inside x and the gradient; sum is [O, I].
            Ok(unsafe { gpu.matmul(&product) }?)
        })?;
    }
    walk.accumulate_cuda(gpu, to_x, x.dtype(), x.shape(), |sum, add| {
        for (e, first, count) in segments(offsets) {
            let dy = dy + (first * outer * bytes) as u64;
            let sum = sum + (first * inner * bytes) as u64;
            let sizes = [count, inner, outer];
            let product = Matmul::new(sizes, number, dy, at(&weights[e])?, sum);
            // SAFETY: as above.
            unsafe { gpu.matmul(&Matmul { add, ..product })? };
        }
        Ok(())
    })
}
