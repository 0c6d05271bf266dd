//! Native sparse attention: the three branches, gated: `[T, H, V]`.

use crate::{NsaSpec, Result, Tape, Var};

/// Inputs of [`attention_nsa`]; sharing K/V between branches is passing the same variable twice.
#[derive(Clone, Debug)]
pub struct NsaVars {
    /// Queries `[T, H, D]`.
    pub q: Var,
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: Var,
    /// Compressed values `[N, K, V]`.
    pub v_cmp: Var,
    /// Keys of the selected branch `[T, K, D]`.
    pub k_slc: Var,
    /// Values of the selected branch `[T, K, V]`.
    pub v_slc: Var,
    /// Keys of the window branch `[T, K, D]`.
    pub k_win: Var,
    /// Values of the window branch `[T, K, V]`.
    pub v_win: Var,
    /// Gates after the sigmoid `[T, H, 3]`: cmp, slc, win.
    pub gate: Var,
}

/// Native sparse attention: the three branches, gated: `[T, H, V]`.
pub fn attention_nsa(
    tape: &mut Tape,
    inputs: &NsaVars,
    spec: &NsaSpec,
    cu_seqlens: &[i32],
) -> Result<Var> {
    let _ = (tape, inputs, spec, cu_seqlens);
    todo!()
}
