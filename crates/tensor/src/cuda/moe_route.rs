//! Launches of `moe_route.cu`: see `ops/moe_route.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::expert_plan::PlanOnCuda;
use super::sum_parts::column_sums;
use super::{at, kernel, stale};
use crate::ops::ExpertPlan;
use crate::{DType, Error, Result, Tensor};

const SOURCE: Source = Source::new("moe_route", include_str!("moe_route.cu"));

/// Threads of a block, a warp a token.
const THREADS: usize = 128;

/// Experts whose probabilities a warp can hold and mark.
const MOST_EXPERTS: usize = 2048;

/// What the router keeps for its backward.
pub(crate) struct Routed {
    /// `[T, E]`, f32.
    p: Tensor,
    /// `[E]`, f32: how often each was chosen, over the even share.
    load: Tensor,
    plan: ExpertPlan,
    normalise: bool,
}

fn grid(tokens: usize) -> ([u32; 3], [u32; 3]) {
    ([tokens.div_ceil(THREADS / 32) as u32, 1, 1], [THREADS as u32, 1, 1])
}

/// The weights `[T, k]` of logits `[T, E]`, the load-balance loss, the plan, and what the
/// backward needs.
pub(crate) fn forward(
    gpu: &Gpu,
    logits: &Tensor,
    [tokens, count, top_k]: [usize; 3],
    normalise: bool,
) -> Result<(Tensor, Tensor, ExpertPlan, Routed)> {
    if count > MOST_EXPERTS {
        let text = format!("{count} experts; on a GPU there may be {MOST_EXPERTS}");
        return Err(Error::value("moe_route", text));
    }
    let weights = stale(gpu, logits.dtype(), &[tokens, top_k])?;
    let experts = stale(gpu, DType::I32, &[tokens, top_k])?;
    let p = stale(gpu, DType::F32, &[tokens, count])?;
    let defines = [("EXPERTS", count.to_string())];
    let choose = kernel(gpu, &SOURCE, "moe_route_forward", logits.dtype(), &defines)?;
    let args = Args::new().ptr(at(logits)?).ptr(at(&p)?).ptr(at(&experts)?).ptr(at(&weights)?);
    let args = args.len(tokens).i32(top_k as i32).i32(normalise.into());
    let (blocks, block) = grid(tokens);
    // SAFETY: the shapes are those that the kernel writes.
    unsafe { choose.launch(blocks, block, 0, args)? };

    let places = PlanOnCuda::new(gpu, experts, count)?;
    let sums = gpu.alloc(count * size_of::<f32>())?;
    column_sums(gpu, DType::F32, at(&p)?, sums.ptr(), [tokens, count], false)?;
    let (load, balance) = (stale(gpu, DType::F32, &[count])?, stale(gpu, DType::F32, &[])?);
    let even = kernel(gpu, &SOURCE, "moe_route_balance", DType::F32, &defines)?;
    let args = Args::new().ptr(sums.ptr()).ptr(places.starts()).ptr(at(&load)?);
    let args = args.ptr(at(&balance)?).len(tokens).len(tokens * top_k);
    // SAFETY: all lists have an entry for every expert.
    unsafe { even.launch([1, 1, 1], [32, 1, 1], 0, args)? };

    let plan = ExpertPlan::on_device(places, top_k)?;
    Ok((weights, balance, plan.clone(), Routed { p, load, plan, normalise }))
}

/// Gradient of the logits, stored as `dtype`, from those of the weights and of the balance loss.
pub(crate) fn backward(
    gpu: &Gpu,
    routed: &Routed,
    dtype: DType,
    [d_weights, d_balance]: [Option<Tensor>; 2],
) -> Result<Tensor> {
    let Routed { p, load, plan, normalise } = routed;
    let out = stale(gpu, dtype, p.shape())?;
    let or_null = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Ok(0), at);
    let defines = [("EXPERTS", load.len().to_string())];
    let kernel = kernel(gpu, &SOURCE, "moe_route_backward", dtype, &defines)?;
    let args = Args::new().ptr(at(p)?).ptr(at(load)?).ptr(at(plan.on_cuda()?.experts())?);
    let args = args.ptr(or_null(&d_weights)?).ptr(or_null(&d_balance)?).ptr(at(&out)?);
    let args = args.len(plan.tokens()).i32(plan.top_k() as i32).i32((*normalise).into());
    let (blocks, block) = grid(plan.tokens());
    // SAFETY: the shapes are those of the forward.
    unsafe { kernel.launch(blocks, block, 0, args)? };
    Ok(out)
}
