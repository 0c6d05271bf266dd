//! Eq. 8–10: how important each selection block is to a token, read off the compressed branch.

use super::attend::log_sum_exp;
use super::nsa::{NsaInput, Place, check};
use super::{dot, vector};
use crate::{Dims, NsaSpec, Result};

/// The importance p_slc′ of every selection block to every (token, KV head): `[T, K, J]`, J the
/// selection blocks of the longest sequence. Blocks that begin after the token have 0.
pub fn importance(input: &NsaInput) -> Result<Vec<f64>> {
    let places = check(input)?;
    let longest = places.iter().map(|place| place.position + 1).max().unwrap_or(0);
    let blocks = input.spec.selection_blocks(longest);
    let mut scores = Vec::with_capacity(places.len() * input.dims.kv_heads * blocks);
    for (t, place) in places.iter().enumerate() {
        for g in 0..input.dims.kv_heads {
            let row = importance_of(input, t, place, g);
            scores.extend(row.iter().chain(std::iter::repeat(&0.0)).take(blocks));
        }
    }
    Ok(scores)
}

/// The importance of blocks 0..=c to token `t` and KV head `g`, c its own block.
/// Eq. 10: the sum over the query heads of the group.
pub(super) fn importance_of(input: &NsaInput, t: usize, place: &Place, g: usize) -> Vec<f64> {
    let blocks = place.position / input.spec.select_block + 1;
    let group = input.dims.group();
    let mut sum = vec![0.0; blocks];
    for h in g * group..(g + 1) * group {
        let p_cmp = compressed_probabilities(input, t, place, h);
        for (j, sum) in sum.iter_mut().enumerate() {
            *sum += overlap_sum(input.spec, &p_cmp, j);
        }
    }
    sum
}

/// Eq. 8: p_cmp, the softmax of head `h` over the compressed keys visible to token `t`.
fn compressed_probabilities(input: &NsaInput, t: usize, place: &Place, h: usize) -> Vec<f64> {
    let Dims { heads, kv_heads, key_dim, .. } = input.dims;
    let q = vector(input.q, t, heads, h, key_dim);
    let logits: Vec<f64> = place
        .compressed(input.spec)
        .map(|i| vector(input.k_cmp, i, kv_heads, h / input.dims.group(), key_dim))
        .map(|k| input.scale * dot(q, k))
        .collect();
    let lse = log_sum_exp(&logits);
    logits.iter().map(|s| (s - lse).exp()).collect()
}

/// Eq. 9, counted from 0 and read as the overlap it is meant to be: compressed block i owns the
/// chunks of d tokens i … i + l/d − 1, selection block j owns r·j … r·j + r − 1 with r = l'/d, and
/// the weight of i for j is the number of chunks they share.
fn overlap_sum(spec: &NsaSpec, p_cmp: &[f64], j: usize) -> f64 {
    let r = spec.select_block / spec.compress_stride;
    let s = spec.compress_block / spec.compress_stride;
    let mut sum = 0.0;
    for m in 0..r {
        for n in 0..s {
            // Blocks before the first or not yet visible count as 0.
            let i = (r * j + m).checked_sub(n);
            sum += i.and_then(|i| p_cmp.get(i)).copied().unwrap_or(0.0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the chunks that compressed block i and selection block j share, token by token.
    fn shared_chunks(spec: &NsaSpec, i: usize, j: usize) -> usize {
        let tokens = (i * spec.compress_stride..).take(spec.compress_block);
        tokens.filter(|t| t / spec.select_block == j).count() / spec.compress_stride
    }

    #[test]
    fn the_overlap_map_counts_shared_chunks() {
        for (l, d, block) in [(32, 16, 64), (16, 16, 16), (8, 2, 8), (12, 4, 24), (64, 16, 64)] {
            let spec = NsaSpec {
                compress_block: l,
                compress_stride: d,
                select_block: block,
                ..NsaSpec::default()
            };
            for i in 0..40 {
                let one_hot: Vec<f64> = (0..40).map(|n| f64::from(n == i)).collect();
                for j in 0..10 {
                    let expected = shared_chunks(&spec, i, j) as f64;
                    assert_eq!(overlap_sum(&spec, &one_hot, j), expected, "{spec:?} {i} {j}");
                }
            }
        }
    }

    #[test]
    fn the_papers_weights_are_1_2_2_2_1() {
        let spec = NsaSpec::default();
        let weight = |i| {
            let one_hot: Vec<f64> = (0..20).map(|n| f64::from(n == i)).collect();
            overlap_sum(&spec, &one_hot, 2)
        };
        assert_eq!((6..13).map(weight).collect::<Vec<_>>(), [0.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0]);
    }
}
