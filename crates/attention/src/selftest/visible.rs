//! Which rows of the keys each token sees, by brute force from the definition.

use crate::cpu::Mask;

use super::case::Case;

/// Rows of the keys, by token and KV head `[T, K]`.
pub type Rows = Vec<Vec<usize>>;

/// Position in its sequence, the sequence's first row and first compressed row, by token.
fn places(case: &Case) -> Vec<(usize, usize, usize)> {
    let mut places = Vec::new();
    let mut first_block = 0;
    for s in case.sequences() {
        places.extend(s.clone().map(|t| (t - s.start, s.start, first_block)));
        first_block += case.spec.compressed_blocks(s.len());
    }
    places
}

/// What the branches cmp, slc, win see when the blocks `indices` are chosen.
pub fn visible(case: &Case, indices: &[i32]) -> [Rows; 3] {
    let spec = &case.spec;
    let mut rows = [const { Vec::new() }; 3];
    for (t, (p, start, first_block)) in places(case).into_iter().enumerate() {
        for g in 0..case.dims.kv_heads {
            let at = (t * case.dims.kv_heads + g) * spec.select_count;
            let chosen = &indices[at..at + spec.select_count];
            let ends = |i: &usize| i * spec.compress_stride + spec.compress_block;
            rows[0].push((0..).take_while(|i| ends(i) <= p + 1).map(|i| first_block + i).collect());
            let mine = |i: &usize| chosen.contains(&((i / spec.select_block) as i32));
            rows[1].push((0..=p).filter(mine).map(|i| start + i).collect());
            rows[2].push((0..=p).filter(|i| i + spec.window > p).map(|i| start + i).collect());
        }
    }
    rows
}

/// What dense or window attention sees.
pub fn visible_to(case: &Case, mask: Mask) -> Rows {
    let mut rows = Rows::new();
    for (p, start, _) in places(case) {
        let seen = |i: &usize| match mask {
            Mask::Causal => true,
            Mask::Window(w) => p - i < w,
        };
        let seen: Vec<usize> = (0..=p).filter(seen).map(|i| start + i).collect();
        rows.extend(std::iter::repeat_n(seen, case.dims.kv_heads));
    }
    rows
}
