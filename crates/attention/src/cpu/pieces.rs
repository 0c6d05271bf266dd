//! The operator's pieces one at a time, for benchmarks: exactly the work that [`super::nsa_forward`]
//! and [`super::nsa_backward`] do, each in its own call.

use super::attend::{AttendGrads, narrow};
use super::gate::blend;
use super::nsa::{
    Branch, NsaInput, NsaSaved, branch_backward, compressed_branch, gate_backward, selected_branch,
    window_branch,
};
use crate::{Element, Result};

/// The compressed branch alone, no ranking.
pub fn cmp_forward<E: Element>(input: &NsaInput<E>) -> Result<NsaSaved> {
    compressed_branch(input, false)
}

/// The compressed branch with scoring and selection, which reuse its probabilities: what ranking
/// costs is this less [`cmp_forward`].
pub fn cmp_score_select_forward<E: Element>(input: &NsaInput<E>) -> Result<NsaSaved> {
    compressed_branch(input, true)
}

/// The selected branch, from the indices in `saved`.
pub fn slc_forward<E: Element>(input: &NsaInput<E>, saved: &mut NsaSaved) -> Result<()> {
    selected_branch(input, saved)
}

/// The window branch.
pub fn win_forward<E: Element>(input: &NsaInput<E>, saved: &mut NsaSaved) -> Result<()> {
    window_branch(input, saved)
}

/// Blends the three branches in `saved` into `out` `[T, H, V]`.
pub fn gate_forward<E: Element>(input: &NsaInput<E>, saved: &NsaSaved, out: &mut [E]) {
    let branches = [&saved.out_cmp[..], &saved.out_slc, &saved.out_win];
    blend(input.gate, branches, input.dims.value_dim, out);
}

/// The gates' backward: `d_gate` `[T, H, 3]`; returns each branch's softmax correction Δ `[T, H]`.
pub fn gate_backward_piece<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    d_out: &[E],
    d_gate: &mut [E],
) -> [Vec<f32>; 3] {
    gate_backward(input, saved, d_out, d_gate)
}

/// The compressed branch's backward from its Δ and the gradient of the operator's output.
pub fn cmp_backward<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    delta: &[f32],
    d_out: &[E],
    grads: AttendGrads<E>,
) -> Result<()> {
    one(input, Branch::Cmp, saved, delta, d_out, grads)
}

/// The selected branch's backward; see [`cmp_backward`].
pub fn slc_backward<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    delta: &[f32],
    d_out: &[E],
    grads: AttendGrads<E>,
) -> Result<()> {
    one(input, Branch::Slc, saved, delta, d_out, grads)
}

/// The window branch's backward; see [`cmp_backward`].
pub fn win_backward<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    delta: &[f32],
    d_out: &[E],
    grads: AttendGrads<E>,
) -> Result<()> {
    one(input, Branch::Win, saved, delta, d_out, grads)
}

fn one<E: Element>(
    input: &NsaInput<E>,
    branch: Branch,
    saved: &NsaSaved,
    delta: &[f32],
    d_out: &[E],
    grads: AttendGrads<E>,
) -> Result<()> {
    let mut d_q = vec![0.0; input.q.len()];
    branch_backward(input, branch, (saved, delta, d_out), &mut d_q, grads.k, grads.v)?;
    narrow(&d_q, grads.q);
    Ok(())
}
