//! Weighted sum of the experts' rows y `[T·k, C]` back into tokens, weights `[T, k]`: `[T, C]`.

use crate::ops::ExpertPlan;
use crate::{Result, Tape, Var};

/// Weighted sum of the experts' rows y `[T·k, C]` back into tokens, weights `[T, k]`: `[T, C]`.
pub fn scatter_rows(tape: &mut Tape, y: &Var, weights: &Var, plan: &ExpertPlan) -> Result<Var> {
    let _ = (tape, y, weights, plan);
    todo!()
}
