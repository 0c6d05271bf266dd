//! Tokens x `[T, C]` laid out for their experts: `[T·k, C]`.

use crate::ops::ExpertPlan;
use crate::{Result, Tape, Var};

/// Tokens x `[T, C]` laid out for their experts: `[T·k, C]`.
pub fn gather_rows(tape: &mut Tape, x: &Var, plan: &ExpertPlan) -> Result<Var> {
    let _ = (tape, x, plan);
    todo!()
}
