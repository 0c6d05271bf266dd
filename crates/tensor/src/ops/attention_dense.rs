//! Softmax attention of q `[T, H, D]`, k `[T, K, D]`, v `[T, K, V]` under a mask: `[T, H, V]`.

use crate::{Mask, Result, Tape, Var};

/// Softmax attention of q `[T, H, D]`, k `[T, K, D]`, v `[T, K, V]` under a mask: `[T, H, V]`.
pub fn attention_dense(
    tape: &mut Tape,
    q: &Var,
    k: &Var,
    v: &Var,
    cu_seqlens: &[i32],
    mask: Mask,
) -> Result<Var> {
    let _ = (tape, q, k, v, cu_seqlens, mask);
    todo!()
}
