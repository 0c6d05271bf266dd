//! Rows of `table` `[V, C]` picked by `ids` (I32 `[T]`): `[T, C]`.

use crate::{Result, Tape, Tensor, Var};

/// Rows of `table` `[V, C]` picked by `ids` (I32 `[T]`): `[T, C]`.
pub fn embedding(tape: &mut Tape, table: &Var, ids: &Tensor) -> Result<Var> {
    let _ = (tape, table, ids);
    todo!()
}
