//! Rotates x `[T, H, D]` at `positions` (I32 `[T]`), halves convention of Hugging Face.

use crate::{Result, RopeTable, Tape, Tensor, Var};

/// Rotates x `[T, H, D]` at `positions` (I32 `[T]`), halves convention of Hugging Face.
pub fn rope(tape: &mut Tape, x: &Var, positions: &Tensor, table: &RopeTable) -> Result<Var> {
    let _ = (tape, x, positions, table);
    todo!()
}
