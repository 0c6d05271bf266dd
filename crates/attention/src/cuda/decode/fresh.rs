//! The first chunk of a prompt: its queries see nothing but the chunk, so the forward pass of
//! training attends, many queries to a tile, where the rows of a step would each walk through the
//! caches for themselves.

use tercet_cuda::Label;

use super::super::{
    AttendInput, Batch, NsaBatch, NsaInput, Plan, Slice, attend_forward, nsa_forward_choosing,
};
use super::cache::NsaStep;
use crate::cpu::Mask;
use crate::{NsaSpec, Result};

/// Fewest tokens that fill a tile.
pub(super) const FRESH: usize = 128;

/// Writes the output `[c, H, V]` of c tokens that begin a sequence and, when asked for, their
/// blocks, i32 `[c, K, S]`; shapes are checked.
pub(super) fn nsa(
    (plan, spec): (&Plan, &NsaSpec),
    (step, count): (&NsaStep, usize),
    out: Slice,
    indices: Option<Slice>,
) -> Result<()> {
    let batch = NsaBatch::new(plan.gpu(), spec, &[0, count as i32])?;
    let NsaStep { scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate } = *step;
    let batch = &batch;
    let input = NsaInput { plan, batch, scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
    nsa_forward_choosing(&input, out, indices)
}

/// As [`nsa`], for dense and window attention.
pub(super) fn dense(
    (plan, mask): (&Plan, Mask),
    (scale, count): (f32, usize),
    [q, k, v]: [Slice; 3],
    out: Slice,
) -> Result<()> {
    let batch = Batch::new(plan.gpu(), &[0, count as i32])?;
    let shape = [count, plan.dims().heads];
    let lse =
        plan.gpu().alloc_for(shape[0] * shape[1] * 4, Label::shaped("log-sum-exps", &shape))?;
    let input = AttendInput { plan, batch: &batch, scale, q, k, v };
    attend_forward(&input, mask, out, Slice::whole(&lse, 4))
}
