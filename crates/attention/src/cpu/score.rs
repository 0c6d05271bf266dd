//! The compressed branch and, from the same probabilities, the importance of its blocks.
//!
//! Ranking needs each head's softmax normaliser before heads are summed (Eq. 8–10), which costs
//! other implementations a second q·K̃ pass. A tile here is a few queries, small enough that its
//! scores against *all* visible compressed keys stay in the second-level cache, so one pass gives
//! the branch's output, its log-sum-exp and the sum over heads; nothing larger is ever stored.

use super::attend::{PAGE, Rows, Scratch, Tile, fill, room, weigh_values};
use super::pages::Pages;
use super::select::{all_selected, select};
use super::simd::{Gemm, PAD, Scale, add_scaled, pad, softmax_row};
use crate::{Element, NsaSpec};

/// Scores that one tile may hold: half a megabyte, half of a usual second-level cache.
const TILE_SCORES: usize = 1 << 17;
/// Most query rows in a tile.
const TILE_ROWS: usize = 96;

/// Query rows of a tile when up to `blocks` compressed blocks are visible.
pub(super) fn tile_rows(blocks: usize) -> usize {
    (TILE_SCORES / blocks.next_multiple_of(PAGE).max(PAGE)).min(TILE_ROWS)
}

/// Attention of a loaded tile to all visible compressed blocks. Query i is at position
/// `first + i`. Leaves unnormalised probabilities in `scratch.s`, rows [`Probabilities::row`]
/// apart, and the branch's output ready for `finish`.
pub(super) fn attend_compressed_tile(
    pages: &Pages,
    spec: &NsaSpec,
    tile: &Tile,
    first: usize,
    scale: Scale,
    scratch: &mut Scratch,
) -> Probabilities {
    let (rows, heads, queries) = (tile.rows(), tile.heads.len(), tile.queries.len());
    let visible = |query: usize| spec.visible_compressed(first + query);
    let page_count = if queries == 0 { 0 } else { visible(queries - 1).div_ceil(pages.tokens) };
    let row = page_count * pages.width;
    room(&mut scratch.s, rows * row);
    let Scratch { q, s, max, sum, out, .. } = scratch;
    for page in 0..page_count {
        let q_width = q.len() / rows;
        Gemm {
            m: rows,
            n: pages.width,
            k: pages.key_dim,
            a: q,
            a_row: q_width,
            a_step: 1,
            b: pages.keys(page, tile.kv_head),
            b_row: pages.width,
            c_row: row,
            a_rows: None,
            c_rows: None,
            accumulate: false,
        }
        .run(&mut s[page * pages.width..]);
    }
    for (i, s) in s.chunks_exact_mut(row.max(1)).take(rows).enumerate() {
        let seen = visible(i / heads);
        s[seen..pad(seen)].fill(f32::NEG_INFINITY);
        s[pad(seen)..].fill(0.0);
        (max[i], sum[i * PAD]) = softmax_row(&mut s[..pad(seen)], scale);
    }
    for page in 0..page_count {
        let start = page * pages.tokens;
        scratch.visible.clear();
        for query in 0..queries {
            let to = visible(query).saturating_sub(start).min(pages.tokens) as u32;
            scratch.visible.resize(scratch.visible.len() + heads, (0, to));
        }
        let p = &s[page * pages.width..];
        weigh_values(pages, page, tile.kv_head, p, row, &scratch.visible, None, out);
    }
    Probabilities { row }
}

/// Where [`attend_compressed_tile`] left its probabilities.
#[derive(Clone, Copy)]
pub(super) struct Probabilities {
    /// Distance of rows.
    pub row: usize,
}

/// `importance += p / sum`: one head's share of Eq. 10. Heads are added in their order.
pub(super) fn add_head(importance: &mut [f32], p: &[f32], sum: f32) {
    if sum != 0.0 {
        add_scaled(&p[..importance.len()], 1.0 / sum, importance);
    }
}

/// Chooses the blocks of every query of a tile that holds whole groups; `indices(query)` is where
/// they go.
pub(super) fn select_tile<'a, E: Element>(
    spec: &NsaSpec,
    rows: &Rows<E>,
    tile: &Tile,
    probabilities: Probabilities,
    scratch: &mut Scratch,
    mut indices: impl FnMut(usize) -> &'a mut [i32],
) {
    let heads = tile.heads.len();
    for (i, query) in tile.queries.clone().enumerate() {
        let position = rows.position(query);
        let Scratch { s, sum, importance, best, .. } = scratch;
        let seen = if all_selected(spec, position) { 0 } else { spec.visible_compressed(position) };
        fill(importance, seen, 0.0);
        if seen > 0 {
            for row in i * heads..(i + 1) * heads {
                add_head(importance, &s[row * probabilities.row..], sum[row * PAD]);
            }
        }
        select(spec, position, importance, best, indices(query));
    }
}
