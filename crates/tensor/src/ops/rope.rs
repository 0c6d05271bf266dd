//! Rotary position embedding (arXiv 2104.09864), halves convention of Hugging Face: with a the
//! first half of a head, b the second, and angle `φ_i = position · inv_freq_i`,
//! `a' = a·cos φ − b·sin φ`, `b' = b·cos φ + a·sin φ`, both times the table's attention factor.
//!
//! Backward: the same rotation by −φ, in place of dy. Keeps the positions.

use std::sync::Arc;

use super::check;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::rope_table::Angles;
use crate::simd::multiversion;
use crate::{Device, Error, Result, RopeTable, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "rope";

/// Rotates every head of x `[T, H, D]` at its token's position (i32 `[T]`, not negative); D is
/// the table's.
pub fn rope(tape: &mut Tape, x: &Var, positions: &Tensor, table: &RopeTable) -> Result<Var> {
    let [tokens, heads, dim] = check::dims(OP, "x", x.value(), "[T, H, D]")?;
    if dim != table.dim() {
        let expected = format!("[T, H, {}], the dimension of the rope table", table.dim());
        return Err(Error::shape(OP, "x", expected, x.shape()));
    }
    check::shape(OP, "positions", positions, &[tokens])?;
    let known = check::known(OP, "positions", positions)?;
    if let Some((list, at)) = known.and_then(|l| Some((l, l.iter().position(|&p| p < 0)?))) {
        let text = format!("position {} of token {at} is negative", list[at]);
        return Err(Error::value(OP, text));
    }
    if let Device::Cuda(gpu) = check::device(OP, &[("x", x.value()), ("positions", positions)])? {
        let value = cuda::rope::forward(&gpu, x.value(), positions, table)?;
        let (to_x, positions, table) = (x.source(), positions.clone(), table.clone());
        return tape.record(value, &[x], move |mut grad, walk| {
            cuda::rope::backward(&gpu, &mut grad, &positions, &table)?;
            walk.give(to_x, grad)
        });
    }
    let list = positions.view_i32(OP, "positions")?;
    let turn = Turn { angles: table.angles(list), positions: positions.clone(), heads, dim };
    let value = float_dispatch!(OP, x.dtype(), forward(x.value(), &turn))?;
    let to_x = x.source();
    tape.record(value, &[x], move |mut grad, walk| {
        float_dispatch!(OP, grad.dtype(), backward(&mut grad, &turn))?;
        walk.give(to_x, grad)
    })
}

/// One rotation of all tokens.
struct Turn {
    angles: Arc<Angles>,
    positions: Tensor,
    heads: usize,
    dim: usize,
}

impl Turn {
    /// Rotates tokens `first..` in place by ±φ.
    fn run<E: Float>(&self, first: usize, rows: &mut [E], positions: &[i32], sign: f32) {
        let half = self.dim / 2;
        for (i, row) in rows.chunks_exact_mut(self.heads * self.dim).enumerate() {
            let token = first + i;
            let at = if self.angles.by_position { positions[token] as usize } else { token };
            let (cos, sin) = (&self.angles.cos[at * half..], &self.angles.sin[at * half..]);
            rotate(row, &cos[..half], &sin[..half], sign);
        }
    }
}

fn forward<E: Float>(x: &Tensor, turn: &Turn) -> Result<Tensor> {
    let xs: &[E] = x.view(OP, "x")?;
    let positions = turn.positions.view_i32(OP, "positions")?;
    let mut out = Buffer::<E>::stale(xs.len());
    let width = turn.heads * turn.dim;
    parallel::rows(&mut out, width, |first, rows| {
        rows.copy_from_slice(&xs[first * width..][..rows.len()]);
        turn.run(first, rows, positions, 1.0);
    });
    Ok(Tensor::from_buffer(out, x.shape()))
}

fn backward<E: Float>(grad: &mut Tensor, turn: &Turn) -> Result<()> {
    let positions = turn.positions.view_i32(OP, "positions")?;
    let grad: &mut [E] = grad.view_mut(OP, "the gradient")?;
    parallel::rows(grad, turn.heads * turn.dim, |first, rows| {
        turn.run(first, rows, positions, -1.0);
    });
    Ok(())
}

multiversion! {
    /// Rotates the heads of one token.
    fn rotate<E: Float>(row: &mut [E], cos: &[f32], sin: &[f32], sign: f32) {
        for head in row.chunks_exact_mut(2 * cos.len()) {
            let (a, b) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let (x, y, sin) = (a.to_f32(), b.to_f32(), sign * sin);
                *a = E::from_f32(x * cos - y * sin);
                *b = E::from_f32(y * cos + x * sin);
            }
        }
    }
}
