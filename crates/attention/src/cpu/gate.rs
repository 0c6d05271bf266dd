//! Blending the branches: o = Σ_c g_c · o_c (Eq. 5), and what its backward gives for free.

use rayon::prelude::*;

use super::simd::dot;
use crate::Element;

/// Rows (token, head) per task.
const ROWS: usize = 1024;

/// `out` `[rows, V]` from gates `[rows, 3]` and the branches' outputs `[rows, V]`.
pub(super) fn blend<E: Element>(
    gate: &[E],
    branches: [&[f32]; 3],
    value_dim: usize,
    out: &mut [E],
) {
    out.par_chunks_mut(ROWS * value_dim).enumerate().for_each(|(chunk, out)| {
        for (i, out) in out.chunks_exact_mut(value_dim).enumerate() {
            let row = chunk * ROWS + i;
            let [a, b, c] = [0, 1, 2].map(|branch| gate[row * 3 + branch].to_f32());
            let [x, y, z] = branches.map(|branch| &branch[row * value_dim..][..value_dim]);
            for (j, out) in out.iter_mut().enumerate() {
                *out = E::from_f32(a * x[j] + b * y[j] + c * z[j]);
            }
        }
    });
}

/// From `d_out` `[rows, V]`: `d_gate` `[rows, 3]` = ⟨dO, O_c⟩, and Δ_c = g_c · ⟨dO, O_c⟩, the
/// softmax correction that each branch's backward needs.
pub(super) fn blend_backward<E: Element>(
    gate: &[E],
    branches: [&[f32]; 3],
    value_dim: usize,
    d_out: &[E],
    d_gate: &mut [E],
) -> [Vec<f32>; 3] {
    let rows = gate.len() / 3;
    let mut deltas = [0; 3].map(|_| vec![0.0f32; rows]);
    let [d0, d1, d2] = &mut deltas;
    d_gate
        .par_chunks_mut(ROWS * 3)
        .zip(d0.par_chunks_mut(ROWS).zip(d1.par_chunks_mut(ROWS)).zip(d2.par_chunks_mut(ROWS)))
        .enumerate()
        .for_each(|(chunk, (d_gate, ((d0, d1), d2)))| {
            let mut wide = vec![0.0; value_dim];
            for i in 0..d0.len() {
                let row = chunk * ROWS + i;
                let at = row * value_dim..(row + 1) * value_dim;
                for (y, x) in wide.iter_mut().zip(&d_out[at.clone()]) {
                    *y = x.to_f32();
                }
                for (c, delta) in [&mut *d0, &mut *d1, &mut *d2].into_iter().enumerate() {
                    let product = dot(&wide, &branches[c][at.clone()]);
                    d_gate[i * 3 + c] = E::from_f32(product);
                    delta[i] = gate[row * 3 + c].to_f32() * product;
                }
            }
        });
    deltas
}
