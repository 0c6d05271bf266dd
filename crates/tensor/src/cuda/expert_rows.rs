//! Launches of `gather_rows.cu` and `scatter_rows.cu`: see `ops/gather_rows.rs` and
//! `ops/scatter_rows.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::cut::{threads, vector};
use super::{GATHERS, at, kernel, stale};
use crate::ops::ExpertPlan;
use crate::{DType, Result, Tensor};

const GATHER: Source =
    Source { name: "gather_rows", text: include_str!("gather_rows.cu"), headers: &[GATHERS] };
const SCATTER: Source =
    Source { name: "scatter_rows", text: include_str!("scatter_rows.cu"), headers: &[GATHERS] };

/// Launches with a warp for each of `tokens`, or a thread for each vector of one's row.
fn launch(
    gpu: &Gpu,
    (source, entry): (&Source, &str),
    dtype: DType,
    [tokens, width]: [usize; 2],
    warps: bool,
    args: Args,
) -> Result<()> {
    if tokens * width == 0 {
        return Ok(());
    }
    let vector = vector(width, dtype);
    let defines = [("WIDTH", width.to_string()), ("VEC", vector.to_string())];
    let kernel = kernel(gpu, source, entry, dtype, &defines)?;
    let (grid, block) = threads(tokens * if warps { 32 } else { width / vector });
    // SAFETY: the callers pass what the entries take; a plan names rows and tokens that exist.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}

/// x `[T, C]` for every row of the plan.
pub(crate) fn gather(gpu: &Gpu, x: &Tensor, plan: &ExpertPlan) -> Result<Tensor> {
    let &[tokens, width] = x.shape() else {
        return Err(crate::Error::shape("gather_rows", "x", "[T, C]", x.shape()));
    };
    let out = stale(gpu, x.dtype(), &[plan.rows(), width])?;
    let args = Args::new().ptr(at(x)?).ptr(plan.on_cuda()?.rows()).ptr(at(&out)?);
    let args = args.len(tokens).i32(plan.top_k() as i32);
    launch(gpu, (&GATHER, "gather_rows_forward"), x.dtype(), [tokens, width], false, args)?;
    Ok(out)
}

/// `sum` `[T, C]`, stored like the gradient `[T·k, C]`, gets the sum of each token's rows, on top
/// of what it holds when `add`.
pub(crate) fn gather_grad(
    gpu: &Gpu,
    (sum, add): (u64, bool),
    grad: &Tensor,
    plan: &ExpertPlan,
) -> Result<()> {
    let (tokens, width) = (plan.tokens(), grad.len() / plan.rows().max(1));
    let args = Args::new().ptr(at(grad)?).ptr(plan.on_cuda()?.rows()).ptr(sum);
    let args = args.len(tokens).i32(plan.top_k() as i32).i32(add.into());
    launch(gpu, (&GATHER, "gather_rows_backward"), grad.dtype(), [tokens, width], false, args)
}

/// Rows x `[T·k, C]` weighted and added up by token.
pub(crate) fn scatter(
    gpu: &Gpu,
    x: &Tensor,
    weights: &Tensor,
    plan: &ExpertPlan,
) -> Result<Tensor> {
    let &[_, width] = x.shape() else {
        return Err(crate::Error::shape("scatter_rows", "x", "[T·k, C]", x.shape()));
    };
    let out = stale(gpu, x.dtype(), &[plan.tokens(), width])?;
    let args = Args::new().ptr(at(x)?).ptr(at(weights)?).ptr(plan.on_cuda()?.rows());
    let args = args.ptr(at(&out)?).len(plan.tokens()).i32(plan.top_k() as i32);
    let sizes = [plan.tokens(), width];
    launch(gpu, (&SCATTER, "scatter_rows_forward"), x.dtype(), sizes, false, args)?;
    Ok(out)
}

/// The gradients of x and of the weights.
pub(crate) fn scatter_grad(
    gpu: &Gpu,
    grad: &Tensor,
    (x, weights): (&Tensor, &Tensor),
    plan: &ExpertPlan,
) -> Result<(Tensor, Tensor)> {
    let d_x = stale(gpu, x.dtype(), x.shape())?;
    if x.is_empty() {
        let zeros = Tensor::zeros_on(&x.device(), weights.dtype(), weights.shape())?;
        return Ok((d_x, zeros));
    }
    let d_weights = stale(gpu, weights.dtype(), weights.shape())?;
    let args = Args::new().ptr(at(grad)?).ptr(at(x)?).ptr(at(weights)?);
    let args = args.ptr(plan.on_cuda()?.rows()).ptr(at(&d_x)?).ptr(at(&d_weights)?);
    let args = args.len(plan.tokens()).i32(plan.top_k() as i32);
    let sizes = [plan.tokens(), x.len() / plan.rows()];
    launch(gpu, (&SCATTER, "scatter_rows_backward"), x.dtype(), sizes, true, args)?;
    Ok((d_x, d_weights))
}
