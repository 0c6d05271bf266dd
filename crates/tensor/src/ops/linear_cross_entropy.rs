//! Mean cross-entropy of the logits `x · Wᵀ` (x `[T, C]`, weight `[vocab, C]`) against `targets` (I32 `[T]`, −100 ignored): a scalar f32.

use crate::{Result, Tape, Tensor, Var};

/// Mean cross-entropy of the logits `x · Wᵀ` (x `[T, C]`, weight `[vocab, C]`) against `targets` (I32 `[T]`, −100 ignored): a scalar f32.
pub fn linear_cross_entropy(
    tape: &mut Tape,
    x: &Var,
    weight: &Var,
    targets: &Tensor,
) -> Result<Var> {
    let _ = (tape, x, weight, targets);
    todo!()
}
