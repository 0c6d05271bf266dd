//! `y = 1 / (1 + e⁻ˣ)`.
//!
//! Backward: `dx = dy · y · (1 − y)`, in place of dy. Keeps y.

use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "sigmoid";

/// The logistic function of every element.
pub fn sigmoid(tape: &mut Tape, x: &Var) -> Result<Var> {
    let value = match x.value().device() {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x.value()))?,
        Device::Cuda(gpu) => cuda::pointwise::sigmoid(&gpu, x.value())?,
    };
    let (y, to_x) = (value.clone(), x.source());
    tape.record(value, &[x], move |mut grad, walk| {
        match y.device() {
            Device::Cpu => float_dispatch!(OP, y.dtype(), backward(&mut grad, &y))?,
            Device::Cuda(gpu) => cuda::pointwise::sigmoid_grad(&gpu, &mut grad, &y)?,
        }
        walk.give(to_x, grad)
    })
}

fn forward<E: Float>(x: &Tensor) -> Result<Tensor> {
    let mut out = Buffer::<E>::stale(x.len());
    parallel::map(&mut out, x.view(OP, "x")?, sigmoid_slice);
    Ok(Tensor::from_buffer(out, x.shape()))
}

fn backward<E: Float>(grad: &mut Tensor, y: &Tensor) -> Result<()> {
    parallel::map(grad.view_mut::<E>(OP, "the gradient")?, y.view(OP, "y")?, sigmoid_grad);
    Ok(())
}

multiversion! {
    fn sigmoid_slice<E: Float>(out: &mut [E], x: &[E]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = E::from_f32(math::sigmoid(x.to_f32()));
        }
    }
}

multiversion! {
    fn sigmoid_grad<E: Float>(grad: &mut [E], y: &[E]) {
        for (grad, y) in grad.iter_mut().zip(y) {
            let y = y.to_f32();
            *grad = E::from_f32(grad.to_f32() * y * (1.0 - y));
        }
    }
}
