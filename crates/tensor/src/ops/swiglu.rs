//! `silu(gate) · up`, same shapes.

use crate::{Result, Tape, Var};

/// `silu(gate) · up`, same shapes.
pub fn swiglu(tape: &mut Tape, gate: &Var, up: &Var) -> Result<Var> {
    let _ = (tape, gate, up);
    todo!()
}
