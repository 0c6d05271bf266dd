//! Each expert's rows of x `[T·k, I]` times its weight `[O, I]`: `[T·k, O]`.

use crate::ops::ExpertPlan;
use crate::{Result, Tape, Var};

/// Each expert's rows of x `[T·k, I]` times its weight `[O, I]`: `[T·k, O]`.
pub fn expert_linear(tape: &mut Tape, x: &Var, weights: &[Var], plan: &ExpertPlan) -> Result<Var> {
    let _ = (tape, x, weights, plan);
    todo!()
}
