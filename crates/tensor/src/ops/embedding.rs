//! `y[t] = table[ids[t]]`.
//!
//! Backward: `d_table[v] = Σ dy[t]` over the tokens t with `ids[t] = v`, in token order. Keeps
//! the ids.

use rayon::prelude::*;

use super::check;
use crate::backward::Weight;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "embedding";

/// Rows of `table` `[V, C]` picked by `ids` (i32 `[T]`, each in `0..V`): `[T, C]`.
pub fn embedding(tape: &mut Tape, table: &Var, ids: &Tensor) -> Result<Var> {
    let [vocab, width] = check::dims(OP, "the table", table.value(), "[V, C]")?;
    let [_] = check::dims(OP, "ids", ids, "[T]")?;
    let outside = |ids: &[i32]| ids.iter().position(|&id| id < 0 || id as usize >= vocab);
    let known = check::known(OP, "ids", ids)?;
    if let Some((ids, at)) = known.and_then(|ids| Some((ids, outside(ids)?))) {
        let text = format!("id {} at position {at} is outside 0..{vocab}", ids[at]);
        return Err(Error::value(OP, text));
    }
    if let Device::Cuda(gpu) = check::device(OP, &[("the table", table.value()), ("ids", ids)])? {
        let value = cuda::embedding::forward(&gpu, table.value(), ids, width)?;
        let (weight, ids) = (Weight::of(OP, table), ids.clone());
        return tape.record(value, &[table], move |grad, walk| {
            walk.accumulate_f32_cuda(&gpu, &weight, |sum, add| {
                cuda::embedding::backward(&gpu, (sum, add), &ids, &grad, [vocab, width])
            })
        });
    }
    let rows = ids.view_i32(OP, "ids")?;
    let value = float_dispatch!(OP, table.dtype(), forward(table.value(), rows, width))?;
    let (weight, ids) = (Weight::of(OP, table), ids.clone());
    tape.record(value, &[table], move |grad, walk| {
        walk.accumulate_f32(&weight, |sum, add| {
            let ids = ids.view_i32(OP, "ids")?;
            float_dispatch!(OP, grad.dtype(), backward(sum, add, ids, &grad, width))
        })
    })
}

fn forward<E: Float>(table: &Tensor, ids: &[i32], width: usize) -> Result<Tensor> {
    let table: &[E] = table.view(OP, "the table")?;
    let mut out = Buffer::<E>::stale(ids.len() * width);
    parallel::rows(&mut out, width, |first, rows| {
        for (row, &id) in rows.chunks_exact_mut(width).zip(&ids[first..]) {
            row.copy_from_slice(&table[id as usize * width..][..width]);
        }
    });
    Ok(Tensor::from_buffer(out, &[ids.len(), width]))
}

/// Each piece of the table takes its own tokens, so that no two threads add to one row.
fn backward<E: Float>(
    sum: &mut [f32],
    add: bool,
    ids: &[i32],
    grad: &Tensor,
    width: usize,
) -> Result<()> {
    if width == 0 {
        return Ok(());
    }
    let grad: &[E] = grad.view(OP, "the gradient")?;
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids[t as usize]);
    let per = parallel::rows_per_chunk(width);
    sum.par_chunks_mut(per * width).enumerate().for_each(|(i, rows)| {
        if !add {
            rows.fill(0.0);
        }
        let first = i * per;
        let start = order.partition_point(|&t| (ids[t as usize] as usize) < first);
        let end = order.partition_point(|&t| (ids[t as usize] as usize) < first + per);
        for &t in &order[start..end] {
            let row = ids[t as usize] as usize - first;
            let row = &mut rows[row * width..][..width];
            parallel::add_wide(row, &grad[t as usize * width..][..width]);
        }
    });
    Ok(())
}
