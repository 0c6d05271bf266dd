//! `x·Wᵀ`, the product of every layer: by `gemm`, or row by row where there are few rows.
//!
//! Few rows are what decoding has: one for each sequence that is being written. There the product
//! is bound by reading the weights, so they are read once for all rows, in their own storage
//! type, and every number of the output is one of [`math::dots`], whatever rows stand beside it: a
//! sequence's bits do not depend on the batch it is decoded in. `gemm` promises no such thing,
//! since its kernels, and with them the order of the sum, follow from the number of rows.

use rayon::prelude::*;

use crate::dtype::Float;
use crate::matmul::{Mat, matmul};
use crate::pool::Buffer;
use crate::{math, parallel};

/// Rows of x up to which a product is that of few rows: each row's bits are then its own.
pub const FEW_ROWS: usize = 32;

/// Rows of x that share one reading of a row of the weights; their sums stay in registers.
const BLOCK: usize = 4;

/// `out = x·Wᵀ` (`+= ` when `add`): x `[rows, inner]`, weight `[outer, inner]`.
pub(crate) fn project<E: Float>(
    out: &mut [f32],
    x: &[f32],
    weight: &[E],
    [rows, outer, inner]: [usize; 3],
    add: bool,
) {
    if rows > FEW_ROWS || inner == 0 {
        let weight = E::widen(weight);
        let (x, weight) = (Mat::new(x, rows, inner), Mat::new(&weight, outer, inner));
        return matmul(out, x, weight.t(), add);
    }
    few(out, x, weight, [rows, outer, inner], add);
}

fn few<E: Float>(
    out: &mut [f32],
    x: &[f32],
    weight: &[E],
    [rows, outer, inner]: [usize; 3],
    add: bool,
) {
    if out.is_empty() {
        return;
    }
    // Rows of the weights that make a piece: it takes a few microseconds, more than handing it to
    // a thread does, and stays in a core's cache while all rows of x pass over it.
    let per = 4 * parallel::rows_per_chunk(inner);
    // A piece's columns of the output, `[rows, columns]`, piece after piece.
    let mut pieces = Buffer::<f32>::stale(rows * outer);
    let work = pieces.par_chunks_mut(per * rows).zip(weight.par_chunks(per * inner));
    work.for_each(|(piece, weight)| dots(piece, x, weight, inner));
    for (first, piece) in (0..).step_by(per).zip(pieces.chunks(per * rows)) {
        let columns = piece.len() / rows;
        for (row, piece) in out.chunks_exact_mut(outer).zip(piece.chunks_exact(columns)) {
            let row = &mut row[first..first + columns];
            if add {
                parallel::add_into(row, piece);
            } else {
                row.copy_from_slice(piece);
            }
        }
    }
}

crate::simd::multiversion! {
    /// out `[rows, columns]` = x `[rows, inner]` · weight `[columns, inner]` transposed.
    fn dots<E: Float>(out: &mut [f32], x: &[f32], weight: &[E], inner: usize) {
        let columns = weight.len() / inner;
        for (out, x) in out.chunks_mut(BLOCK * columns).zip(x.chunks(BLOCK * inner)) {
            match x.len() / inner {
                4 => block::<E, 4>(out, x, weight, inner),
                3 => block::<E, 3>(out, x, weight, inner),
                2 => block::<E, 2>(out, x, weight, inner),
                _ => block::<E, 1>(out, x, weight, inner),
            }
        }
    }
}

#[inline(always)]
fn block<E: Float, const N: usize>(out: &mut [f32], x: &[f32], weight: &[E], inner: usize) {
    let columns = weight.len() / inner;
    let x: [&[f32]; N] = std::array::from_fn(|row| &x[row * inner..(row + 1) * inner]);
    for (column, weight) in weight.chunks_exact(inner).enumerate() {
        for (row, y) in math::dots(weight, x).into_iter().enumerate() {
            out[row * columns + column] = y;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed;
        (0..n)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect()
    }

    #[test]
    fn few_rows_agree_with_the_product_of_many() {
        let (outer, inner, all) = (301, 97, FEW_ROWS + 1);
        let (x, w) = (numbers(all * inner, 1), numbers(outer * inner, 2));
        let mut many = vec![0.0; all * outer];
        project(&mut many, &x, &w, [all, outer, inner], false);
        for rows in 0..=FEW_ROWS {
            let mut few = vec![1.0; rows * outer];
            project(&mut few, &x[..rows * inner], &w, [rows, outer, inner], true);
            for (few, many) in few.iter().zip(&many) {
                // Each sum has 97 terms below 1/4: 97·97/8 ulp of 1 bounds any order.
                assert!((few - 1.0 - many).abs() < 1e-4);
            }
        }
    }

    fn rows_stand_alone<E: Float>(weight: &[E], [outer, inner]: [usize; 2]) {
        let x = numbers(FEW_ROWS * inner, 1);
        let run = |from: usize, to: usize, add: bool| {
            let mut out = numbers(FEW_ROWS * outer, 3)[from * outer..to * outer].to_vec();
            let sizes = [to - from, outer, inner];
            project(&mut out, &x[from * inner..to * inner], weight, sizes, add);
            out
        };
        for add in [false, true] {
            let alone: Vec<f32> = (0..FEW_ROWS).flat_map(|i| run(i, i + 1, add)).collect();
            for rows in [1, 2, 3, 4, 5, 7, 8, 31, FEW_ROWS] {
                for from in [0, FEW_ROWS - rows] {
                    let beside = run(from, from + rows, add);
                    let same = alone[from * outer..][..rows * outer] == beside;
                    assert!(same, "{rows} rows of {outer}x{inner}, add {add}");
                }
            }
        }
    }

    /// Shapes with whole and broken vectors, one piece and several.
    #[test]
    fn a_row_has_the_same_bits_whatever_rows_stand_beside_it() {
        for sizes in [[301, 97], [5, 3], [1, 64], [700, 256], [64, 2050]] {
            let weight = numbers(sizes[0] * sizes[1], 2);
            rows_stand_alone(&weight, sizes);
            let weight: Vec<bf16> = weight.into_iter().map(bf16::from_f32).collect();
            rows_stand_alone(&weight, sizes);
        }
    }

    #[test]
    fn an_empty_inner_sum_is_zero_or_keeps_the_output() {
        let mut out = [7.0; 6];
        project::<f32>(&mut out, &[], &[], [2, 3, 0], true);
        assert_eq!(out, [7.0; 6]);
        project::<f32>(&mut out, &[], &[], [2, 3, 0], false);
        assert_eq!(out, [0.0; 6]);
    }

    /// `cargo test --release -p tercet-tensor few_rows_against_gemm -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn few_rows_against_gemm() {
        for [outer, inner] in [[1536, 576], [576, 1536], [49152, 576], [512, 256]] {
            let w = numbers(outer * inner, 2);
            for rows in [1, 4, 8, 16, 32, 64, 128] {
                let x = numbers(rows * inner, 1);
                let mut out = vec![0.0; rows * outer];
                let mut time = |f: &mut dyn FnMut(&mut [f32])| {
                    let mut best = f64::INFINITY;
                    for _ in 0..20 {
                        let start = std::time::Instant::now();
                        f(&mut out);
                        best = best.min(start.elapsed().as_secs_f64());
                    }
                    2e-9 * (rows * outer * inner) as f64 / best
                };
                let a = time(&mut |out| few(out, &x, &w, [rows, outer, inner], false));
                let (xm, wm) = (Mat::new(&x, rows, inner), Mat::new(&w, outer, inner));
                let b = time(&mut |out| matmul(out, xm, wm.t(), false));
                println!("{outer}x{inner}, {rows} rows: {a:.1} few, {b:.1} gemm, GFLOP/s");
            }
        }
    }
}
