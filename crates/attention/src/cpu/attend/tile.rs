//! Tiles of query rows, and the working memory of the thread that owns one.

use std::cell::Cell;
use std::ops::Range;

use super::super::disjoint::Disjoint;
use super::super::simd::{PAD, pad, sum_lanes};
use crate::{Dims, Element};

/// The queries of one sequence.
#[derive(Clone, Copy)]
pub(in super::super) struct Rows<'a, E> {
    /// Queries `[T, H, D]`.
    pub q: &'a [E],
    /// Heads and dimensions.
    pub dims: Dims,
    /// Softmax scale.
    pub scale: f32,
    /// Row of `q` (and of the outputs) that holds the sequence's first query.
    pub token: usize,
    /// That query's position in its sequence; above 0 when a cache holds the tokens before.
    pub position: usize,
}

/// Some positions × some heads of one KV head; row i is position `i / heads.len()`, head
/// `i % heads.len()`.
#[derive(Clone, Debug)]
pub(in super::super) struct Tile {
    /// KV head.
    pub kv_head: usize,
    /// Heads inside the group.
    pub heads: Range<usize>,
    /// Queries, counted from the first of [`Rows`].
    pub queries: Range<usize>,
}

impl Tile {
    /// Rows of the tile.
    pub fn rows(&self) -> usize {
        self.heads.len() * self.queries.len()
    }
}

impl<E: Element> Rows<'_, E> {
    /// Position in the sequence of a query counted from the first.
    pub fn position(&self, query: usize) -> usize {
        self.position + query
    }

    /// Index into a `[T, H]` layout of a tile's row.
    pub fn index(&self, tile: &Tile, row: usize) -> usize {
        let (query, head) = (row / tile.heads.len(), row % tile.heads.len());
        let head = tile.kv_head * self.dims.group() + tile.heads.start + head;
        (self.token + tile.queries.start + query) * self.dims.heads + head
    }
}

/// Tiles of about `rows` rows that cover `queries` queries of every KV head, whole groups each.
pub(in super::super) fn tiles(dims: Dims, queries: usize, rows: usize) -> Vec<Tile> {
    let step = (rows / dims.group()).max(1);
    (0..dims.kv_heads)
        .flat_map(|kv_head| {
            (0..queries).step_by(step).map(move |first| Tile {
                kv_head,
                heads: 0..dims.group(),
                queries: first..(first + step).min(queries),
            })
        })
        .collect()
}

/// Working memory of one thread.
#[derive(Default)]
pub(in super::super) struct Scratch {
    /// Queries, `[rows, pad(D)]`.
    pub q: Vec<f32>,
    /// Scores, then probabilities.
    pub s: Vec<f32>,
    /// Backward: dP, then dS.
    pub d_s: Vec<f32>,
    /// Backward: dO times gate, `[rows, pad(V)]`.
    pub d_o: Vec<f32>,
    /// Running maxima of raw scores, `[rows]`.
    pub max: Vec<f32>,
    /// Running sums, `[rows, PAD]`.
    pub sum: Vec<f32>,
    /// Outputs before division, `[rows, pad(V)]`.
    pub out: Vec<f32>,
    /// Visible columns of each row of a score tile.
    pub visible: Vec<(u32, u32)>,
    /// Rows that a block's queries occupy.
    pub rows: Vec<u32>,
    /// (block, query) pairs of a tile.
    pub pairs: Vec<(u32, u32)>,
    /// Importance of each compressed block, summed over the group.
    pub importance: Vec<f32>,
    /// The best blocks so far, with their scores.
    pub best: Vec<(f32, u32)>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

impl Scratch {
    /// Lends this thread's memory.
    pub fn with<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
        let mut scratch = SCRATCH.take();
        let result = work(&mut scratch);
        SCRATCH.set(scratch);
        result
    }

    /// Loads a tile's queries and clears its state.
    pub fn start<E: Element>(&mut self, rows: &Rows<E>, tile: &Tile) {
        let count = tile.rows();
        load_rows(&mut self.q, rows, tile);
        fill(&mut self.max, count, f32::NEG_INFINITY);
        fill(&mut self.sum, count * PAD, 0.0);
        fill(&mut self.out, count * pad(rows.dims.value_dim), 0.0);
    }

    /// Divides by the sums and writes outputs and natural-log sums of exponentials. A row that
    /// saw nothing gives 0 and −∞.
    pub fn finish<E: Element, O: Element>(
        &mut self,
        rows: &Rows<E>,
        tile: &Tile,
        out: &Disjoint<O>,
        lse: &Disjoint<f64>,
    ) {
        let value_dim = rows.dims.value_dim;
        for row in 0..tile.rows() {
            let at = rows.index(tile, row);
            let sum = sum_lanes(&self.sum[row * PAD..(row + 1) * PAD]);
            let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
            // SAFETY: each (token, head) belongs to exactly one tile.
            let (target, lse) = unsafe { (out.row(at * value_dim, value_dim), lse.row(at, 1)) };
            let source = &self.out[row * pad(value_dim)..][..value_dim];
            for (y, x) in target.iter_mut().zip(source) {
                *y = O::from_f32(x * inverse);
            }
            lse[0] = match sum {
                0.0 => f64::NEG_INFINITY,
                _ => f64::from(rows.scale) * f64::from(self.max[row]) + f64::from(sum).ln(),
            };
        }
    }
}

/// Resizes without keeping, all elements `value`.
pub(in super::super) fn fill<T: Copy>(buffer: &mut Vec<T>, len: usize, value: T) {
    buffer.clear();
    buffer.resize(len, value);
}

/// Makes room for `len` elements whose values do not matter.
pub(in super::super) fn room(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Copies a tile's queries into `[rows, pad(D)]`.
fn load_rows<E: Element>(buffer: &mut Vec<f32>, rows: &Rows<E>, tile: &Tile) {
    let dim = rows.dims.key_dim;
    fill(buffer, tile.rows() * pad(dim), 0.0);
    for (row, target) in buffer.chunks_exact_mut(pad(dim)).enumerate() {
        let at = rows.index(tile, row) * dim;
        for (y, x) in target.iter_mut().zip(&rows.q[at..at + dim]) {
            *y = x.to_f32();
        }
    }
}
