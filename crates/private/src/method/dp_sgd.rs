//! DP-SGD (Abadi et al. 2016): one threshold C for the whole gradient, `min(1, C/n)`.

use super::Layout;
use crate::Result;
use crate::mechanism::clip::Blocks;

/// The threshold when none is given: norms of LoRA gradients of a mean loss are of that order.
pub const THRESHOLD: f64 = 0.1;

/// One block of everything.
///
/// # Errors
/// As [`Blocks::flat`].
pub fn blocks(layout: &Layout) -> Result<Blocks> {
    Blocks::flat(layout.sizes.clone())
}
