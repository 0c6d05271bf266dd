//! The operator in float64, written to be read beside the equations of arXiv 2502.11089.
//!
//! One file, one step, in the order a query meets them: [`compress_forward`] (Eq. 7), `score`
//! (Eq. 8–10), `select` (Eq. 11–12), [`attend_forward`] (Eq. 1–2) and `gate` (Eq. 5).
//! Plain loops over plain vectors: this is what the fast code is measured against, so nothing
//! here is shared with it except the spec, the shapes and [`Mask`](crate::cpu::Mask).
//!
//! Two doors: [`nsa_forward`] takes ready compressed keys and values as [`crate::cpu`] does;
//! [`operator_forward`] starts from raw ones and φ.

mod attend;
mod compress;
mod decode;
mod gate;
mod nsa;
mod operator;
mod score;
mod select;

pub use attend::{AttendGrads, AttendInput, Attended, attend_backward, attend_forward};
pub use compress::{CompressInput, Phi, PhiGrads, compress_backward, compress_forward};
pub use decode::{Decoded, decode};
pub use nsa::{NsaGrads, NsaInput, NsaOutput, nsa_backward, nsa_forward, nsa_forward_chosen};
pub use operator::{OperatorGrads, OperatorInput, operator_backward, operator_forward};
pub use score::importance;
pub use select::select;

use std::ops::Range;

use crate::{Result, sequences};

/// The token range of each sequence; T is the last offset.
fn ranges(cu_seqlens: &[i32]) -> Result<Vec<Range<usize>>> {
    let tokens = cu_seqlens.last().map_or(0, |&last| last.max(0) as usize);
    sequences(cu_seqlens, tokens)
}

/// The vector of row `i` and head `h` in a `[rows, heads, dim]` slice.
fn vector(x: &[f64], i: usize, heads: usize, h: usize, dim: usize) -> &[f64] {
    &x[(i * heads + h) * dim..][..dim]
}

/// See [`vector`].
fn vector_mut(x: &mut [f64], i: usize, heads: usize, h: usize, dim: usize) -> &mut [f64] {
    &mut x[(i * heads + h) * dim..][..dim]
}

/// Σ aᵢ·bᵢ.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// y += a·x.
fn add_scaled(y: &mut [f64], a: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}
