//! The main loop: a tile of queries against every page it can see.

use super::super::pages::Pages;
use super::super::simd::{Gemm, Online, Scale};
use super::Visible;
use super::tile::{Scratch, Tile, room};

/// Adds every visible page of keys and values to the tile's running softmax. Query i of the tile
/// is at position `first + i`.
pub(in super::super) fn attend_tile(
    pages: &Pages,
    visible: Visible,
    tile: &Tile,
    first: usize,
    scale: Scale,
    scratch: &mut Scratch,
) {
    let (width, rows, heads) = (pages.width, tile.rows(), tile.heads.len());
    if rows == 0 {
        return;
    }
    let (from, _) = visible.range(first);
    let (_, to) = visible.range(first + tile.queries.len() - 1);
    room(&mut scratch.s, rows * width);
    for page in from / pages.tokens..to.div_ceil(pages.tokens) {
        let start = page * pages.tokens;
        scratch.visible.clear();
        for query in 0..tile.queries.len() {
            let (from, to) = visible.range(first + query);
            let clip = |x: usize| x.saturating_sub(start).min(pages.tokens) as u32;
            scratch.visible.resize(scratch.visible.len() + heads, (clip(from), clip(to)));
        }
        let Scratch { q, s, max, sum, out, visible, .. } = scratch;
        let q_width = q.len() / rows;
        Gemm {
            m: rows,
            n: width,
            k: pages.key_dim,
            a: q,
            a_row: q_width,
            a_step: 1,
            b: pages.keys(page, tile.kv_head),
            b_row: width,
            c_row: width,
            a_rows: None,
            c_rows: None,
            accumulate: false,
        }
        .run(s);
        Online { width, visible, rows: None, out_width: pages.value_width, scale }
            .run(s, max, sum, out);
        weigh_values(pages, page, tile.kv_head, s, width, visible, None, out);
    }
}

/// `out += P·V` of one page; `p` has rows `p_row` apart, `visible` says which columns may count.
#[allow(clippy::too_many_arguments)] // one product and its two row lists
pub(in super::super) fn weigh_values(
    pages: &Pages,
    page: usize,
    kv_head: usize,
    p: &[f32],
    p_row: usize,
    visible: &[(u32, u32)],
    out_rows: Option<&[u32]>,
    out: &mut [f32],
) {
    let values = pages.values(page, kv_head);
    let product = Gemm {
        m: visible.len(),
        n: pages.value_width,
        k: pages.tokens,
        a: p,
        a_row: p_row,
        a_step: 1,
        b: values,
        b_row: pages.value_width,
        c_row: pages.value_width,
        a_rows: None,
        c_rows: out_rows,
        accumulate: true,
    };
    if !pages.non_finite(page) {
        return product.run(out);
    }
    // 0 · NaN is NaN: hidden columns must not be multiplied at all.
    for (i, &(from, to)) in visible.iter().enumerate() {
        if from < to {
            let row = [out_rows.map_or(i as u32, |rows| rows[i])];
            Gemm {
                m: 1,
                k: (to - from) as usize,
                a: &p[i * p_row + from as usize..],
                b: &values[from as usize * pages.value_width..],
                c_rows: Some(&row),
                ..product
            }
            .run(out);
        }
    }
}
