//! `y = factor · x`.
//!
//! Backward: `dx = factor · dy`, in place. Keeps nothing.

use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Result, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "scale";

/// Multiplies every element by `factor`.
pub fn scale(tape: &mut Tape, x: &Var, factor: f32) -> Result<Var> {
    let value = match x.value().device() {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x.value(), factor))?,
        Device::Cuda(gpu) => cuda::scale::forward(&gpu, x.value(), factor)?,
    };
    let (to_x, dtype) = (x.source(), x.dtype());
    tape.record(value, &[x], move |mut grad, walk| {
        match grad.device() {
            Device::Cpu => float_dispatch!(OP, dtype, backward(&mut grad, factor))?,
            Device::Cuda(gpu) => cuda::scale::in_place(&gpu, &mut grad, factor)?,
        }
        walk.give(to_x, grad)
    })
}

fn forward<E: Float>(x: &Tensor, factor: f32) -> Result<Tensor> {
    let mut out = Buffer::<E>::stale(x.len());
    parallel::map(&mut out, x.view(OP, "x")?, |out, x| multiply(out, x, factor));
    Ok(Tensor::from_buffer(out, x.shape()))
}

fn backward<E: Float>(grad: &mut Tensor, factor: f32) -> Result<()> {
    scale_in_place(grad.view_mut::<E>(OP, "the gradient")?, factor);
    Ok(())
}

/// `x *= factor`.
pub(crate) fn scale_in_place<E: Float>(x: &mut [E], factor: f32) {
    parallel::update(x, |x| multiply_in_place(x, factor));
}

multiversion! {
    fn multiply<E: Float>(out: &mut [E], x: &[E], factor: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = E::from_f32(x.to_f32() * factor);
        }
    }
}

multiversion! {
    fn multiply_in_place<E: Float>(x: &mut [E], factor: f32) {
        for x in x {
            *x = E::from_f32(x.to_f32() * factor);
        }
    }
}
