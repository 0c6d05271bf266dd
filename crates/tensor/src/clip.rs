//! Clipping by the global norm of all gradients.

use crate::{Grads, Result};

/// `√Σ g²` over all gradients, summed in f64 in a fixed order.
pub fn global_norm(grads: &Grads) -> Result<f64> {
    let _ = grads;
    todo!()
}

/// What gradients of norm `norm` must be multiplied by to be at most `max_norm` long: 1 when
/// they already are.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    let _ = (norm, max_norm);
    todo!()
}
