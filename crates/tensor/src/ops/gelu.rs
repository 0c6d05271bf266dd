//! GELU.

use crate::{Result, Tape, Var};

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))`: GPT-2.
    Tanh,
    /// `x/2 · (1 + erf(x/√2))`.
    Exact,
}

/// GELU.
pub fn gelu(tape: &mut Tape, x: &Var, kind: Gelu) -> Result<Var> {
    let _ = (tape, x, kind);
    todo!()
}
