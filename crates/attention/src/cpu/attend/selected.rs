//! Attention to selected blocks: neighbouring queries share each block they chose.
//!
//! A tile's (block, query) pairs are sorted by block; each block is multiplied once with the
//! gathered rows of all queries that chose it, so its keys are read from memory once a tile.

use super::super::pages::Pages;
use super::super::simd::{Gemm, Online, Scale};
use super::forward::weigh_values;
use super::tile::{Scratch, Tile, room};

/// Query rows in a tile of the selected branch: more neighbours share more blocks.
pub(in super::super) const SELECTED_ROWS: usize = 512;

/// Adds every chosen block to the tile's running softmax. `chosen(query)` lists the blocks of a
/// query of the tile, −1 padded; query i is at position `first + i`. A page of `pages` is a block.
pub(in super::super) fn attend_selected_tile<'a>(
    pages: &Pages,
    chosen: impl Fn(usize) -> &'a [i32],
    tile: &Tile,
    first: usize,
    scale: Scale,
    scratch: &mut Scratch,
) {
    let (width, heads) = (pages.width, tile.heads.len() as u32);
    let Scratch { q, s, max, sum, out, visible, rows, pairs, .. } = scratch;
    pairs.clear();
    for query in 0..tile.queries.len() {
        let blocks = chosen(query).iter().filter(|&&block| block >= 0);
        pairs.extend(blocks.map(|&block| (block as u32, query as u32)));
    }
    pairs.sort_unstable();
    if tile.rows() == 0 {
        return;
    }
    let q_width = q.len() / tile.rows();
    for group in pairs.chunk_by(|a, b| a.0 == b.0) {
        let page = group[0].0 as usize;
        let start = page * pages.tokens;
        rows.clear();
        visible.clear();
        for &(_, query) in group {
            // Only the query's own block is cut by causality.
            let to = (first + query as usize + 1).saturating_sub(start).min(pages.tokens) as u32;
            rows.extend(query * heads..(query + 1) * heads);
            visible.resize(rows.len(), (0, to));
        }
        room(s, rows.len() * width);
        Gemm {
            m: rows.len(),
            n: width,
            k: pages.key_dim,
            a: q,
            a_row: q_width,
            a_step: 1,
            b: pages.keys(page, tile.kv_head),
            b_row: width,
            c_row: width,
            a_rows: Some(rows),
            c_rows: None,
            accumulate: false,
        }
        .run(s);
        Online { width, visible, rows: Some(rows), out_width: pages.value_width, scale }
            .run(s, max, sum, out);
        weigh_values(pages, page, tile.kv_head, s, width, visible, Some(rows), out);
    }
}
