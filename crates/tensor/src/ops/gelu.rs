//! GELU: `y = x · Φ(x)` (arXiv 1606.08415), exact or by the tanh formula of GPT-2.
//!
//! Backward, in place of dy; keeps x:
//! * exact: `dx = dy · (Φ(x) + x·φ(x))`, φ the normal density;
//! * tanh: with `u = √(2/π)(x + 0.044715 x³)`, `½(1 + tanh u) = σ(2u) = s`, so `y = x·s` and
//!   `dx = dy · (s + 2x·s(1 − s)·u′)`.

use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "gelu";

/// `2√(2/π)`.
const TWO_SQRT_2_PI: f32 = 1.595_769;
/// `1/√(2π)`.
const DENSITY: f32 = 0.398_942_3;
const CUBIC: f32 = 0.044_715;

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))`: GPT-2's.
    Tanh,
    /// `x/2 · (1 + erf(x/√2))`.
    Exact,
}

/// GELU of every element.
pub fn gelu(tape: &mut Tape, x: &Var, kind: Gelu) -> Result<Var> {
    let value = match x.value().device() {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x.value(), kind))?,
        Device::Cuda(gpu) => cuda::pointwise::gelu(&gpu, x.value(), kind)?,
    };
    let (kept, to_x) = (x.value().clone(), x.source());
    tape.record(value, &[x], move |mut grad, walk| {
        match kept.device() {
            Device::Cpu => float_dispatch!(OP, kept.dtype(), backward(&mut grad, &kept, kind))?,
            Device::Cuda(gpu) => cuda::pointwise::gelu_grad(&gpu, &mut grad, &kept, kind)?,
        }
        drop(kept);
        walk.give(to_x, grad)
    })
}

fn forward<E: Float>(x: &Tensor, kind: Gelu) -> Result<Tensor> {
    let mut out = Buffer::<E>::stale(x.len());
    let f = match kind {
        Gelu::Tanh => tanh_slice,
        Gelu::Exact => exact_slice,
    };
    parallel::map(&mut out, x.view(OP, "x")?, f);
    Ok(Tensor::from_buffer(out, x.shape()))
}

fn backward<E: Float>(grad: &mut Tensor, x: &Tensor, kind: Gelu) -> Result<()> {
    let f = match kind {
        Gelu::Tanh => tanh_grad,
        Gelu::Exact => exact_grad,
    };
    parallel::map(grad.view_mut::<E>(OP, "the gradient")?, x.view(OP, "x")?, f);
    Ok(())
}

multiversion! {
    fn tanh_slice<E: Float>(out: &mut [E], x: &[E]) {
        for (out, x) in out.iter_mut().zip(x) {
            let x = x.to_f32();
            let two_u = TWO_SQRT_2_PI * (x + CUBIC * x * x * x);
            *out = E::from_f32(x * math::sigmoid(two_u));
        }
    }
}

multiversion! {
    fn tanh_grad<E: Float>(grad: &mut [E], x: &[E]) {
        for (grad, x) in grad.iter_mut().zip(x) {
            let x = x.to_f32();
            let s = math::sigmoid(TWO_SQRT_2_PI * (x + CUBIC * x * x * x));
            let slope = TWO_SQRT_2_PI * (1.0 + 3.0 * CUBIC * x * x);
            *grad = E::from_f32(grad.to_f32() * (s + x * s * (1.0 - s) * slope));
        }
    }
}

multiversion! {
    fn exact_slice<E: Float>(out: &mut [E], x: &[E]) {
        for (out, x) in out.iter_mut().zip(x) {
            let x = x.to_f32();
            *out = E::from_f32(x * math::normal_cdf(x));
        }
    }
}

multiversion! {
    fn exact_grad<E: Float>(grad: &mut [E], x: &[E]) {
        for (grad, x) in grad.iter_mut().zip(x) {
            let x = x.to_f32();
            let density = DENSITY * math::exp(-0.5 * x * x);
            *grad = E::from_f32(grad.to_f32() * (math::normal_cdf(x) + x * density));
        }
    }
}
