//! φ: blocks of l tokens become one key or value each (Eq. 7).

use crate::{Element, NsaSpec, Result};

/// The parameters of φ for keys (C = D) or values (C = V).
#[derive(Clone, Copy)]
pub enum Phi<'a, E> {
    /// Average of the block.
    Mean,
    /// `flatten(x + pe) · weight`.
    Linear {
        /// `[K, l·C, C]`.
        weight: &'a [E],
        /// `[K, l, C]`, added to the block's tokens.
        pe: &'a [E],
    },
    /// `gelu(flatten(x + pe) · weight1 + bias1) · weight2 + bias2`, exact GELU.
    Mlp {
        /// `[K, l·C, M]`.
        weight1: &'a [E],
        /// `[K, M]`.
        bias1: &'a [E],
        /// `[K, M, C]`.
        weight2: &'a [E],
        /// `[K, C]`.
        bias2: &'a [E],
        /// `[K, l, C]`.
        pe: &'a [E],
        /// Hidden width M.
        hidden: usize,
    },
}

/// Gradients of [`Phi`]'s parameters, f32, same layouts; overwritten.
pub enum PhiGrads<'a> {
    /// No parameters.
    Mean,
    /// See [`Phi::Linear`].
    Linear { weight: &'a mut [f32], pe: &'a mut [f32] },
    /// See [`Phi::Mlp`].
    Mlp {
        weight1: &'a mut [f32],
        bias1: &'a mut [f32],
        weight2: &'a mut [f32],
        bias2: &'a mut [f32],
        pe: &'a mut [f32],
    },
}

/// Inputs of compression.
#[derive(Clone, Copy)]
pub struct CompressInput<'a, E> {
    /// Block and stride.
    pub spec: &'a NsaSpec,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// KV heads (K).
    pub kv_heads: usize,
    /// C: D for keys, V for values.
    pub dim: usize,
    /// `[T, K, C]`.
    pub x: &'a [E],
    /// Parameters of φ.
    pub phi: Phi<'a, E>,
}

/// Writes `out` `[N, K, C]`, sequences concatenated (see [`crate::cu_compressed`]).
pub fn compress_forward<E: Element>(input: &CompressInput<E>, out: &mut [E]) -> Result<()> {
    let _ = (input, out);
    todo!()
}

/// From `d_out` `[N, K, C]`: `d_x` `[T, K, C]` (overwritten) and the parameters' gradients.
pub fn compress_backward<E: Element>(
    input: &CompressInput<E>,
    d_out: &[E],
    d_x: &mut [E],
    d_phi: PhiGrads,
) -> Result<()> {
    let _ = (input, d_out, d_x, d_phi);
    todo!()
}
