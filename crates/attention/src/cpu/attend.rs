//! Masked softmax attention: one main loop, three masks.

use crate::{Dims, Element, Result};

/// Which keys a query at position p of its sequence sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Keys 0..=p: ordinary full attention.
    Causal,
    /// The last w keys, p itself included.
    Window(usize),
}

/// Inputs of dense or window attention.
#[derive(Clone, Copy)]
pub struct AttendInput<'a, E> {
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[T, H, D]`.
    pub q: &'a [E],
    /// Keys `[T, K, D]`.
    pub k: &'a [E],
    /// Values `[T, K, V]`.
    pub v: &'a [E],
}

/// Where the gradients of [`attend_backward`] go; overwritten.
pub struct AttendGrads<'a, E> {
    /// `[T, H, D]`.
    pub q: &'a mut [E],
    /// `[T, K, D]`.
    pub k: &'a mut [E],
    /// `[T, K, V]`.
    pub v: &'a mut [E],
}

/// Writes `out` `[T, H, V]` and the natural-log sum of exponentials `lse` `[T, H]`.
pub fn attend_forward<E: Element>(
    input: &AttendInput<E>,
    mask: Mask,
    out: &mut [E],
    lse: &mut [f32],
) -> Result<()> {
    let _ = (input, mask, out, lse);
    todo!()
}

/// Gradients of [`attend_forward`] from its outputs and `d_out` `[T, H, V]`.
pub fn attend_backward<E: Element>(
    input: &AttendInput<E>,
    mask: Mask,
    out: &[E],
    lse: &[f32],
    d_out: &[E],
    grads: AttendGrads<E>,
) -> Result<()> {
    let _ = (input, mask, out, lse, d_out, grads);
    todo!()
}
