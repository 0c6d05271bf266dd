//! How much work each piece of the operator is.
//!
//! A (query, key) pair costs 2·D for its score and 2·V for its value, forward; backward it costs
//! the score again (2·D), dP and dV (2·V each), dQ and dK (2·D each). Softmax, masks and sums
//! are not counted, here or in anybody's figures.

use tercet_attention::{Dims, NsaSpec};

/// Pairs of one head that a causal mask lets through.
pub fn causal_pairs(tokens: usize) -> u64 {
    let t = tokens as u64;
    t * (t + 1) / 2
}

/// Pairs of one head inside the window.
pub fn window_pairs(tokens: usize, window: usize) -> u64 {
    (0..tokens).map(|p| window.min(p + 1) as u64).sum()
}

/// Pairs of one head with visible compressed keys.
pub fn compressed_pairs(tokens: usize, spec: &NsaSpec) -> u64 {
    (0..tokens).map(|p| spec.visible_compressed(p) as u64).sum()
}

/// Pairs of one head with the tokens of selected blocks, averaged over the groups: counted from
/// `indices` `[T, K, S]` themselves.
pub fn selected_pairs(indices: &[i32], tokens: usize, kv_heads: usize, spec: &NsaSpec) -> u64 {
    if tokens == 0 {
        return 0;
    }
    let per_token = indices.len() / tokens;
    let mut pairs = 0u64;
    for (p, chosen) in indices.chunks(per_token.max(1)).enumerate() {
        for &block in chosen.iter().filter(|&&b| b >= 0) {
            let start = block as usize * spec.select_block;
            pairs += (p + 1).saturating_sub(start).min(spec.select_block) as u64;
        }
    }
    pairs / kv_heads as u64
}

/// FLOPs of a forward pass over `pairs` pairs of every head.
pub fn forward(dims: Dims, pairs: u64) -> f64 {
    dims.heads as f64 * pairs as f64 * 2.0 * (dims.key_dim + dims.value_dim) as f64
}

/// FLOPs of a backward pass over `pairs` pairs of every head.
pub fn backward(dims: Dims, pairs: u64) -> f64 {
    dims.heads as f64 * pairs as f64 * (6 * dims.key_dim + 4 * dims.value_dim) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_agree_with_counting_them_one_by_one() {
        let spec = NsaSpec::default();
        assert_eq!(causal_pairs(3), 1 + 2 + 3);
        assert_eq!(window_pairs(4, 2), 1 + 2 + 2 + 2);
        assert_eq!(compressed_pairs(48, &spec), 16 + 2);
        // Token 0 reads itself; token 1 of another group reads both tokens of block 0.
        assert_eq!(selected_pairs(&[0, -1, 0, -1], 2, 1, &spec), 3);
    }
}
