//! Blocks of tokens become one row each: x `[T, K, C]` to `[N, K, C]`.

use crate::{NsaSpec, Result, Tape, Var};

/// The parameters of φ, in the layouts of [`tercet_attention::cpu::Phi`].
#[derive(Clone, Debug)]
pub enum Phi {
    /// Average of the block; no parameters.
    Mean,
    /// One matrix per KV head.
    Linear {
        /// `[K, l·C, C]`.
        weight: Var,
        /// `[K, l, C]`.
        pe: Var,
    },
    /// Two layers with a GELU (exact) between.
    Mlp {
        /// `[K, l·C, M]`.
        weight1: Var,
        /// `[K, M]`.
        bias1: Var,
        /// `[K, M, C]`.
        weight2: Var,
        /// `[K, C]`.
        bias2: Var,
        /// `[K, l, C]`.
        pe: Var,
    },
}

/// Blocks of tokens become one row each: x `[T, K, C]` to `[N, K, C]`.
pub fn compress(
    tape: &mut Tape,
    x: &Var,
    phi: &Phi,
    spec: &NsaSpec,
    cu_seqlens: &[i32],
) -> Result<Var> {
    let _ = (tape, x, phi, spec, cu_seqlens);
    todo!()
}
