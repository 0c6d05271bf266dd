//! Eq. 5: o = Σ gᶜ·Oᶜ over the branches cmp, slc, win.

use super::{add_scaled, dot};

/// Blends the branches' outputs `[T, H, V]` by `gate` `[T, H, 3]`.
pub(super) fn forward(value_dim: usize, gate: &[f64], branches: [&[f64]; 3]) -> Vec<f64> {
    let mut out = vec![0.0; branches[0].len()];
    for (i, out) in out.chunks_mut(value_dim).enumerate() {
        for (c, branch) in branches.iter().enumerate() {
            add_scaled(out, gate[i * 3 + c], &branch[i * value_dim..][..value_dim]);
        }
    }
    out
}

/// Gradients of [`forward`]: of the gate, ⟨dO, Oᶜ⟩, and of each branch's output, gᶜ·dO.
pub(super) fn backward(
    value_dim: usize,
    gate: &[f64],
    branches: [&[f64]; 3],
    d_out: &[f64],
) -> (Vec<f64>, [Vec<f64>; 3]) {
    let mut d_gate = vec![0.0; gate.len()];
    let mut d_branches = branches.map(|branch| vec![0.0; branch.len()]);
    for (i, d_o) in d_out.chunks(value_dim).enumerate() {
        for c in 0..3 {
            d_gate[i * 3 + c] = dot(d_o, &branches[c][i * value_dim..][..value_dim]);
            add_scaled(&mut d_branches[c][i * value_dim..][..value_dim], gate[i * 3 + c], d_o);
        }
    }
    (d_gate, d_branches)
}
