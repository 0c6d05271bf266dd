//! Which blocks a query reads: forced ones first, then the best by importance (Eq. 9–11).

use crate::{Error, NsaSpec, Result};

/// Chooses blocks for one (token, KV head): `importance` holds the compressed blocks' probability
/// summed over the group, visible ones only; `out` `[S]` gets block indices ascending, −1 padded.
///
/// Forced blocks count among the `select_count`; the rest go by score descending, lower index on
/// ties; a NaN score ranks last.
pub(super) fn select(
    spec: &NsaSpec,
    position: usize,
    importance: &[f32],
    best: &mut Vec<(f32, u32)>,
    out: &mut [i32],
) {
    let current = position / spec.select_block;
    out.fill(-1);
    if all_selected(spec, position) {
        for (j, slot) in out.iter_mut().enumerate().take(current + 1) {
            *slot = j as i32;
        }
        return;
    }
    // current ≥ select_count ≥ initial + local, so the forced blocks are distinct.
    let initial = spec.select_initial;
    let local = current + 1 - spec.select_local;
    let free = spec.select_count - initial - spec.select_local;
    best.clear();
    if free > 0 {
        for block in initial..local {
            let score = block_score(spec, importance, block);
            let score = if score.is_nan() { f32::NEG_INFINITY } else { score };
            if best.len() == free {
                // Strictly better only: on a tie the lower index, seen first, stays.
                if score <= best[free - 1].0 {
                    continue;
                }
                best.pop();
            }
            let at = best.partition_point(|&(other, _)| other >= score);
            best.insert(at, (score, block as u32));
        }
    }
    let chosen = best.iter().map(|&(_, block)| block as usize);
    for (slot, block) in out.iter_mut().zip((0..initial).chain(chosen).chain(local..=current)) {
        *slot = block as i32;
    }
    out[initial..initial + best.len()].sort_unstable();
}

/// Whether a query at `position` has no more blocks than it may select.
pub(super) fn all_selected(spec: &NsaSpec, position: usize) -> bool {
    position / spec.select_block < spec.select_count
}

/// Eq. 9 in 0-based terms: Σ over m < l'/d and n < l/d of p[r·j + m − n], hidden blocks counting 0.
/// The offset o = m − n occurs as often as a selection block shares chunks with a compressed one.
fn block_score(spec: &NsaSpec, importance: &[f32], block: usize) -> f32 {
    let r = (spec.select_block / spec.compress_stride) as isize;
    let s = (spec.compress_block / spec.compress_stride) as isize;
    let first = block as isize * r;
    let mut score = 0.0;
    for offset in 1 - s..r {
        let Ok(i) = usize::try_from(first + offset) else { continue };
        let Some(&p) = importance.get(i) else { break };
        let shared = (r - offset.max(0)).min(s + offset.min(0)).min(r).min(s);
        score += shared as f32 * p;
    }
    score
}

/// For each KV head and block, the queries that chose it, ascending: what dK and dV gather by.
pub(super) struct Inverse {
    blocks: usize,
    /// `[K, blocks + 1]` into `queries`.
    starts: Vec<usize>,
    queries: Vec<u32>,
}

impl Inverse {
    /// From `indices` `[t, K, S]` of one sequence of t tokens and `blocks` blocks. Lists that
    /// [`select`] cannot have made are refused.
    pub fn new(indices: &[i32], kv_heads: usize, spec: &NsaSpec, blocks: usize) -> Result<Self> {
        let chosen = || indices.chunks_exact(spec.select_count).enumerate();
        for (row, list) in chosen() {
            let current = row / kv_heads / spec.select_block;
            let (blocks, padding) = list.split_at(spec.select_count.min(current + 1));
            let ascending = blocks.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = blocks.iter().all(|&block| (0..=current as i32).contains(&block));
            if !ascending || !inside || padding.iter().any(|&block| block != -1) {
                return Err(Error::Indices(format!(
                    "token {} of its sequence, KV head {}: {list:?} is not {} ascending blocks \
                     of 0..={current} and then -1",
                    row / kv_heads,
                    row % kv_heads,
                    blocks.len(),
                )));
            }
        }
        let mut starts = vec![0usize; kv_heads * (blocks + 1)];
        for (row, list) in chosen() {
            for &block in list.iter().filter(|&&block| block >= 0) {
                starts[(row % kv_heads) * (blocks + 1) + block as usize] += 1;
            }
        }
        let mut total = 0;
        for start in &mut starts {
            total += std::mem::replace(start, total);
        }
        let mut queries = vec![0; total];
        let mut next = starts.clone();
        for (row, list) in chosen() {
            for &block in list.iter().filter(|&&block| block >= 0) {
                let slot = &mut next[(row % kv_heads) * (blocks + 1) + block as usize];
                queries[*slot] = (row / kv_heads) as u32;
                *slot += 1;
            }
        }
        Ok(Self { blocks, starts, queries })
    }

    /// The queries of one head that chose a block.
    pub fn queries(&self, head: usize, block: usize) -> &[u32] {
        let at = head * (self.blocks + 1) + block;
        &self.queries[self.starts[at]..self.starts[at + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(spec: &NsaSpec, position: usize, importance: &[f32]) -> Vec<i32> {
        let mut out = vec![9; spec.select_count];
        select(spec, position, importance, &mut Vec::new(), &mut out);
        out
    }

    #[test]
    fn the_default_overlap_is_1_2_2_2_1() {
        let spec = NsaSpec::default();
        for (i, weight) in [(6, 0.0), (7, 1.0), (8, 2.0), (9, 2.0), (10, 2.0), (11, 1.0), (12, 0.0)]
        {
            let mut p = vec![0.0; 40];
            p[i] = 1.0;
            assert_eq!(block_score(&spec, &p, 2), weight, "compressed block {i}");
        }
    }

    #[test]
    fn overlap_counts_equal_the_double_sum() {
        for (l, d, select_block) in
            [(32, 16, 64), (16, 16, 16), (32, 8, 32), (64, 16, 64), (8, 4, 32)]
        {
            let spec = NsaSpec {
                compress_block: l,
                compress_stride: d,
                select_block,
                ..NsaSpec::default()
            };
            let p: Vec<f32> = (0..50).map(|i| 1.0 + i as f32).collect();
            for block in 0..8 {
                let (r, s) = ((select_block / d) as i64, (l / d) as i64);
                let mut want = 0.0;
                for m in 0..r {
                    for n in 0..s {
                        let i = block as i64 * r + m - n;
                        want += if (0..50).contains(&i) { p[i as usize] } else { 0.0 };
                    }
                }
                assert_eq!(
                    block_score(&spec, &p, block),
                    want,
                    "{l}/{d}/{select_block} block {block}"
                );
            }
        }
    }

    #[test]
    fn ties_take_the_lower_index_and_nan_ranks_last() {
        let spec = NsaSpec {
            compress_block: 4,
            compress_stride: 4,
            select_block: 4,
            select_count: 5,
            ..NsaSpec::default()
        };
        assert_eq!(choose(&spec, 39, &[0.1; 10]), [0, 1, 2, 8, 9]);
        let mut p = [0.1; 10];
        p[5] = 0.2;
        p[1] = f32::NAN;
        assert_eq!(choose(&spec, 39, &p), [0, 2, 5, 8, 9]);
        assert_eq!(choose(&spec, 39, &[f32::NAN; 10]), [0, 1, 2, 8, 9]);
        assert_eq!(choose(&spec, 9, &[0.1; 2]), [0, 1, 2, -1, -1]);
    }

    #[test]
    fn the_inverse_lists_every_choice_once_in_order() {
        let spec = NsaSpec { select_block: 1, select_count: 2, ..NsaSpec::default() };
        let indices = [0, -1, 0, -1, 0, 1, 0, 1, 1, 2, 0, 2];
        let inverse = Inverse::new(&indices, 2, &spec, 3).unwrap();
        assert_eq!(inverse.queries(0, 0), [0, 1]);
        assert_eq!(inverse.queries(0, 1), [1, 2]);
        assert_eq!(inverse.queries(0, 2), [2]);
        assert_eq!(inverse.queries(1, 0), [0, 1, 2]);
        assert_eq!(inverse.queries(1, 1), [1]);
    }
}
