//! The operator's pieces one at a time, for benchmarks and tests: the work that
//! [`super::nsa_forward`] and [`super::nsa_backward`] do, each in its own call.

use super::attend::{AttendGrads, Branch, Grads, Outputs, Upstream, Visible, attend, attend_grads};
use super::gate;
use super::select;
use super::selected;
use super::{NsaInput, Slice};
use crate::Result;
use crate::shape::check_len;

fn outputs(input: &NsaInput, out: Slice, lse: Slice) -> Result<Outputs> {
    input.check()?;
    input.check_rows("out", out)?;
    input.check_lse("lse", lse)?;
    Ok(Outputs { branch: Some(out), lse: Some(lse), blend: None })
}

/// The compressed branch: `out` `[T, H, V]`, `lse` f32 `[T, H]`.
pub fn compressed(input: &NsaInput, out: Slice, lse: Slice) -> Result<()> {
    let to = outputs(input, out, lse)?;
    attend(&input.cmp(), Visible::Compressed(&input.batch.spec), to)
}

/// Scores and choice, from the compressed branch's `lse`: `indices` i32 `[T, K, S]`.
pub fn select(input: &NsaInput, lse: Slice, indices: Slice) -> Result<()> {
    input.check()?;
    input.check_lse("lse", lse)?;
    input.check_indices(indices)?;
    select::select(&input.cmp(), &input.batch.spec, lse, indices)
}

/// The selected branch, from any `indices` `[T, K, S]`: entries that are none of their query's
/// blocks, and repeated ones, are passed over.
pub fn selected(input: &NsaInput, indices: Slice, out: Slice, lse: Slice) -> Result<()> {
    let to = outputs(input, out, lse)?;
    input.check_indices(indices)?;
    selected::selected(&input.slc(), &input.batch.spec, indices, to)
}

/// The window branch.
pub fn window(input: &NsaInput, out: Slice, lse: Slice) -> Result<()> {
    let to = outputs(input, out, lse)?;
    attend(&input.win(), input.window(), to)
}

/// Blends the outputs of cmp, slc, win into `out` `[T, H, V]`.
pub fn gate(input: &NsaInput, outs: [Slice; 3], out: Slice) -> Result<()> {
    input.check()?;
    input.check_rows("out", out)?;
    outs.into_iter().try_for_each(|branch| input.check_rows("a branch", branch))?;
    let rows = input.batch.tokens() * input.plan.dims.heads;
    gate::gate(input.plan, input.gate, outs, out, rows)
}

/// The gates' backward: `d_gate` `[T, H, 3]` and each branch's softmax correction, `deltas` f32
/// `[3, T, H]`.
pub fn gate_backward(
    input: &NsaInput,
    outs: [Slice; 3],
    d_out: Slice,
    d_gate: Slice,
    deltas: Slice,
) -> Result<()> {
    input.check()?;
    input.check_rows("d_out", d_out)?;
    outs.into_iter().try_for_each(|branch| input.check_rows("a branch", branch))?;
    let (tokens, heads) = (input.batch.tokens(), input.plan.dims.heads);
    check_len("d_gate", d_gate.len(), &[('n', input.gate.len())])?;
    check_len("deltas", deltas.len(), &[('3', 3), ('T', tokens), ('H', heads)])?;
    let rows = tokens * heads;
    gate::gate_backward(input.plan, input.gate, outs, d_out, d_gate, deltas.ptr(), rows)
}

/// What a branch's backward gets: the gradient of the operator's output `[T, H, V]`, the branch's
/// log-sum-exps and Δ, f32 `[T, H]`.
#[derive(Clone, Copy)]
pub struct Above {
    /// Gradient of the operator's output.
    pub d_out: Slice,
    /// The branch's log-sum-exps.
    pub lse: Slice,
    /// Its Δ.
    pub delta: Slice,
}

fn above(
    input: &NsaInput,
    branch: &Branch,
    index: usize,
    above: Above,
    grads: AttendGrads,
) -> Result<(Upstream, Grads)> {
    input.check()?;
    input.check_rows("d_out", above.d_out)?;
    input.check_lse("lse", above.lse)?;
    input.check_lse("delta", above.delta)?;
    let AttendGrads { q, k, v } = grads;
    for (name, got, like) in [("d_q", q, branch.q), ("d_k", k, branch.k), ("d_v", v, branch.v)] {
        check_len(name, got.len(), &[('n', like.len())])?;
    }
    let gate = Some((input.gate, index));
    let up = Upstream { d_out: above.d_out, gate, lse: above.lse, delta: above.delta.ptr() };
    Ok((up, Grads { q, sum: 0, first: true, last: true, k, v }))
}

/// The compressed branch's backward.
pub fn compressed_backward(input: &NsaInput, from: Above, grads: AttendGrads) -> Result<()> {
    let (up, grads) = above(input, &input.cmp(), 0, from, grads)?;
    let visible = Visible::Compressed(&input.batch.spec);
    attend_grads(&input.cmp(), visible, input.batch.blocks, up, grads)
}

/// The selected branch's backward, from the `indices` of its forward.
pub fn selected_backward(
    input: &NsaInput,
    indices: Slice,
    from: Above,
    grads: AttendGrads,
) -> Result<()> {
    let (up, grads) = above(input, &input.slc(), 1, from, grads)?;
    input.check_indices(indices)?;
    selected::selected_grads(&input.slc(), &input.batch.spec, indices, up, grads)
}

/// The window branch's backward.
pub fn window_backward(input: &NsaInput, from: Above, grads: AttendGrads) -> Result<()> {
    let (up, grads) = above(input, &input.win(), 2, from, grads)?;
    attend_grads(&input.win(), input.window(), input.batch.tokens(), up, grads)
}
