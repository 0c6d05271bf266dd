//! The whole operator: compressed, selected and window branches, gated.

use crate::{Dims, Element, NsaSpec, Result};

/// Inputs of the operator. Compressed keys and values are ready-made (see `compress`), so that
/// a model may put a position encoding between; sharing K/V between branches is passing the
/// same slice twice.
#[derive(Clone, Copy)]
pub struct NsaInput<'a, E> {
    /// Blocks, counts and window.
    pub spec: &'a NsaSpec,
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[T, H, D]`.
    pub q: &'a [E],
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: &'a [E],
    /// Compressed values `[N, K, V]`.
    pub v_cmp: &'a [E],
    /// Keys of the selected branch `[T, K, D]`.
    pub k_slc: &'a [E],
    /// Values of the selected branch `[T, K, V]`.
    pub v_slc: &'a [E],
    /// Keys of the window branch `[T, K, D]`.
    pub k_win: &'a [E],
    /// Values of the window branch `[T, K, V]`.
    pub v_win: &'a [E],
    /// Gates after the sigmoid `[T, H, 3]`: cmp, slc, win.
    pub gate: &'a [E],
}

/// What the backward pass needs of the forward pass.
pub struct NsaSaved {
    /// Output of the compressed branch `[T, H, V]`.
    pub out_cmp: Vec<f32>,
    /// Output of the selected branch `[T, H, V]`.
    pub out_slc: Vec<f32>,
    /// Output of the window branch `[T, H, V]`.
    pub out_win: Vec<f32>,
    /// Natural-log sums of exponentials `[T, H]`; −∞ where nothing is visible.
    pub lse_cmp: Vec<f32>,
    /// See `lse_cmp`.
    pub lse_slc: Vec<f32>,
    /// See `lse_cmp`.
    pub lse_win: Vec<f32>,
    /// Selected blocks `[T, K, S]`, ascending, −1 padded.
    pub indices: Vec<i32>,
}

/// Where the gradients go; layouts of [`NsaInput`], overwritten.
pub struct NsaGrads<'a, E> {
    /// `[T, H, D]`.
    pub q: &'a mut [E],
    /// `[N, K, D]`.
    pub k_cmp: &'a mut [E],
    /// `[N, K, V]`.
    pub v_cmp: &'a mut [E],
    /// `[T, K, D]`.
    pub k_slc: &'a mut [E],
    /// `[T, K, V]`.
    pub v_slc: &'a mut [E],
    /// `[T, K, D]`.
    pub k_win: &'a mut [E],
    /// `[T, K, V]`.
    pub v_win: &'a mut [E],
    /// `[T, H, 3]`.
    pub gate: &'a mut [E],
}

/// Writes `out` `[T, H, V]`; returns what [`nsa_backward`] needs.
pub fn nsa_forward<E: Element>(input: &NsaInput<E>, out: &mut [E]) -> Result<NsaSaved> {
    let _ = (input, out);
    todo!()
}

/// Gradients from `d_out` `[T, H, V]`. No gradient flows through the choice of blocks.
pub fn nsa_backward<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    d_out: &[E],
    grads: NsaGrads<E>,
) -> Result<()> {
    let _ = (input, saved, d_out, grads);
    todo!()
}
