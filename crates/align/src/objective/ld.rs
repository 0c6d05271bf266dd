//! LD-DPO's weights of tokens (arXiv 2409.06411).

/// The weight of token `index` (from 0) of either answer of a pair: 1 up to the shorter answer's
/// length, `alpha` past it. The reference's log-probabilities take the same weights, so that
/// nothing is won or lost where the policy is the reference; with `alpha` 1 all weights are 1.
///
/// A gradient by a weighted sum reaches a token multiplied by the token's weight.
pub fn ld_weight(index: usize, chosen_tokens: usize, rejected_tokens: usize, alpha: f64) -> f64 {
    if index < chosen_tokens.min(rejected_tokens) { 1.0 } else { alpha }
}
