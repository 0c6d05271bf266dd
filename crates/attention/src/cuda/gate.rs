//! Blending the branches, and what its backward gives for free.

use tercet_cuda::Args;

use super::hopper;
use super::plain;
use super::{Plan, Slice};
use crate::Result;

/// Warps of a block; each takes one row.
const WARPS: usize = 8;

fn launch(plan: &Plan, entry: &str, rows: usize, args: Args) -> Result<()> {
    let kernel = plain::flat_kernel(plan, &plain::GATE, entry)?;
    let args = args.len(rows).i32(plain::int(plan.dims.value_dim));
    // SAFETY: the callers below pass the entry's arguments; lengths were checked and addresses
    // are the caller's promise.
    unsafe { plain::launch(&kernel, rows.div_ceil(WARPS), 32 * WARPS as u32, 0, args) }
}

/// `out` `[rows, V]` from gates `[rows, 3]` and the branches' outputs `[rows, V]`.
pub(super) fn gate(
    plan: &Plan,
    gate: Slice,
    branches: [Slice; 3],
    out: Slice,
    rows: usize,
) -> Result<()> {
    let [cmp, slc, win] = branches.map(Slice::ptr);
    let args = Args::new().ptr(gate.ptr()).ptr(cmp).ptr(slc).ptr(win).ptr(out.ptr());
    launch(plan, "gate", rows, args)
}

/// From `d_out` `[rows, V]`: `d_gate` `[rows, 3]` and, f32 `[3, rows]` at `delta`, each branch's Δ.
pub(super) fn gate_backward(
    plan: &Plan,
    gate: Slice,
    branches: [Slice; 3],
    d_out: Slice,
    d_gate: Slice,
    delta: u64,
    rows: usize,
) -> Result<()> {
    let [cmp, slc, win] = branches.map(Slice::ptr);
    if hopper::attend_backward::corrects(plan, &branches, d_out) {
        let to = (d_gate.ptr(), delta);
        let branches = [cmp, slc, win];
        return hopper::attend_backward::corrections(plan, gate.ptr(), branches, d_out, to, rows);
    }
    let args = Args::new().ptr(gate.ptr()).ptr(cmp).ptr(slc).ptr(win);
    let args = args.ptr(d_out.ptr()).ptr(d_gate.ptr()).ptr(delta);
    launch(plan, "gate_backward", rows, args)
}

/// Δ = ⟨dO, O⟩ `[rows]`, f32, of attention without gates.
pub(super) fn correction(
    plan: &Plan,
    out: Slice,
    d_out: Slice,
    delta: u64,
    rows: usize,
) -> Result<()> {
    if hopper::attend_backward::corrects(plan, &[out], d_out) {
        let branches = [out.ptr(), 0, 0];
        return hopper::attend_backward::corrections(plan, 0, branches, d_out, (0, delta), rows);
    }
    let args = Args::new().ptr(out.ptr()).ptr(d_out.ptr()).ptr(delta);
    launch(plan, "correction", rows, args)
}
