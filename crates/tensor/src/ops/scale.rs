//! `factor · x`.

use crate::{Result, Tape, Var};

/// `factor · x`.
pub fn scale(tape: &mut Tape, x: &Var, factor: f32) -> Result<Var> {
    let _ = (tape, x, factor);
    todo!()
}

pub(crate) fn scale_in_place(x: &mut [f32], factor: f32) {
    let _ = (x, factor);
    todo!()
}
