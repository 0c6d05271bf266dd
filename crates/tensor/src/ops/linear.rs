//! `x · Wᵀ + b`: x `[T, I]`, weight `[O, I]` (the Hugging Face layout), bias `[O]`: `[T, O]`.

use crate::{Result, Tape, Var};

/// `x · Wᵀ + b`: x `[T, I]`, weight `[O, I]` (the Hugging Face layout), bias `[O]`: `[T, O]`.
pub fn linear(tape: &mut Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    let _ = (tape, x, weight, bias);
    todo!()
}
