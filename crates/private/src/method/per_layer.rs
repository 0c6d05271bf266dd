//! A threshold for each adapter, `C/√G` of G of them (He et al. 2023; the √G as in fastDP), so that
//! the sensitivity of the whole is C.

use super::Layout;
use crate::Result;
use crate::mechanism::clip::Blocks;

/// A block for each adapter, A and its Bs together.
///
/// # Errors
/// As [`Blocks::by_pair`].
pub fn blocks(layout: &Layout) -> Result<Blocks> {
    Blocks::by_pair(layout.sizes.clone(), &layout.pairs)
}

/// Thresholds of `blocks` blocks that are C together.
pub fn bounds(threshold: f64, blocks: usize) -> Vec<f64> {
    vec![threshold / (blocks as f64).sqrt(); blocks]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_thresholds_together_are_the_one_that_was_asked_for() {
        let bounds = bounds(0.3, 7);
        assert!((bounds.iter().map(|c| c * c).sum::<f64>().sqrt() / 0.3 - 1.0).abs() < 1e-15);
    }
}
