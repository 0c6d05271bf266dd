//! Loops over all threads, cut at places that depend on the shapes alone.

use rayon::prelude::*;

use crate::dtype::Float;
use crate::pool::Buffer;

/// Elements of one piece of an elementwise loop: small enough to balance, large enough that
/// handing it to a thread costs nothing.
pub(crate) const CHUNK: usize = 1 << 14;

/// `f(out_piece, x_piece)` over pieces of equal place in both.
pub(crate) fn map<A: Sync, B: Send>(
    out: &mut [B],
    x: &[A],
    f: impl Fn(&mut [B], &[A]) + Sync + Send,
) {
    debug_assert_eq!(out.len(), x.len());
    if out.len() <= CHUNK {
        return f(out, x);
    }
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(o, x)| f(o, x));
}

/// `f(piece)` over pieces of `x`.
pub(crate) fn update<A: Send>(x: &mut [A], f: impl Fn(&mut [A]) + Sync + Send) {
    if x.len() <= CHUNK {
        return f(x);
    }
    x.par_chunks_mut(CHUNK).for_each(f);
}

/// `f(out_piece, a_piece, b_piece)`.
pub(crate) fn map2<A: Sync, B: Sync, C: Send>(
    out: &mut [C],
    a: &[A],
    b: &[B],
    f: impl Fn(&mut [C], &[A], &[B]) + Sync + Send,
) {
    debug_assert!(out.len() == a.len() && out.len() == b.len());
    if out.len() <= CHUNK {
        return f(out, a, b);
    }
    out.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(o, (a, b))| f(o, a, b));
}

/// Rows of `width` elements that make one piece.
pub(crate) fn rows_per_chunk(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// `f(first_row, rows)` over groups of whole rows of `width` elements.
pub(crate) fn rows<A: Send>(
    out: &mut [A],
    width: usize,
    f: impl Fn(usize, &mut [A]) + Sync + Send,
) {
    if out.is_empty() || width == 0 {
        return;
    }
    let per = rows_per_chunk(width);
    if out.len() <= per * width {
        return f(0, out);
    }
    out.par_chunks_mut(per * width).enumerate().for_each(|(i, rows)| f(i * per, rows));
}

/// Rows that share one partial sum when `count` rows are reduced: at most 64 partial sums, so
/// that adding them up stays cheap, and at least 32 rows each.
pub(crate) fn rows_per_part(count: usize) -> usize {
    count.div_ceil(64).max(32)
}

/// Column sums over `count` rows: `f(first_row, rows, part)` adds the rows into `part`
/// (`width` zeros); the parts are then added in order into `out` (on top of what it holds when
/// `add`).
pub(crate) fn column_sums(
    count: usize,
    width: usize,
    out: &mut [f32],
    add: bool,
    f: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync + Send,
) {
    let per = rows_per_part(count);
    let mut parts = Buffer::<f32>::zeroed(count.div_ceil(per) * width);
    if width > 0 {
        parts
            .par_chunks_mut(width)
            .enumerate()
            .for_each(|(i, part)| f(i * per..((i + 1) * per).min(count), part));
    }
    sum_parts(&parts, out, add);
}

/// Adds consecutive parts of `out.len()` numbers in order into `out`.
pub(crate) fn sum_parts(parts: &[f32], out: &mut [f32], add: bool) {
    if !add {
        out.fill(0.0);
    }
    if !out.is_empty() {
        parts.chunks_exact(out.len()).for_each(|part| add_into(out, part));
    }
}

/// `out += x`.
pub(crate) fn add_into(out: &mut [f32], x: &[f32]) {
    add_wide(out, x);
}

crate::simd::multiversion! {
    /// `out += x`, x of any storage type.
    pub(crate) fn add_wide<E: Float>(out: &mut [f32], x: &[E]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o += x.to_f32();
        }
    }
}
