//! Clipping by the global norm of all gradients.

use rayon::prelude::*;

use crate::simd::multiversion;
use crate::{Device, Error, Grads, Result, Tensor, cuda, parallel};

/// `√Σ g²` over all gradients, summed in f64 in a fixed order.
pub fn global_norm(grads: &Grads) -> Result<f64> {
    let mut total = 0.0;
    if let Some(Device::Cuda(gpu)) = grads.iter().flatten().next().map(Tensor::device) {
        let all: Vec<&Tensor> = grads.iter().flatten().collect();
        let device = Device::Cuda(gpu.clone());
        if let Some(other) = all.iter().find(|g| g.device() != device) {
            return Err(Error::device("clip", "a gradient", &device, &other.device()));
        }
        return Ok(cuda::norm::squared(&gpu, &all)?.sqrt());
    }
    for gradient in grads.iter().flatten() {
        let pieces = gradient.as_f32()?.par_chunks(parallel::CHUNK).map(sum_of_squares);
        total += pieces.collect::<Vec<f64>>().into_iter().sum::<f64>();
    }
    Ok(total.sqrt())
}

/// What gradients of norm `norm` must be multiplied by to be at most `max_norm` long: 1 when
/// they already are, `max_norm / (norm + 10⁻⁶)` otherwise, as in PyTorch. A norm that is not a
/// number stays one, so that it cannot pass for harmless.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    let factor = max_norm / (norm + 1e-6);
    if factor >= 1.0 { 1.0 } else { factor as f32 }
}

multiversion! {
    fn sum_of_squares(x: &[f32]) -> f64 {
        const LANES: usize = 16;
        let mut lanes = [0f64; LANES];
        let (full, rest) = x.as_chunks::<LANES>();
        for x in full {
            for i in 0..LANES {
                lanes[i] += f64::from(x[i]) * f64::from(x[i]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*x) * f64::from(*x);
        }
        lanes.iter().sum()
    }
}
