//! `y = a + b`.
//!
//! Backward: `da = db = dy`, shared without a copy. Keeps nothing.

use super::check;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Result, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "add";

/// Sum of two variables of one shape.
pub fn add(tape: &mut Tape, a: &Var, b: &Var) -> Result<Var> {
    check::same_dtype(OP, a, &[("b", b)])?;
    check::shape(OP, "b", b.value(), a.shape())?;
    let value = match check::device(OP, &[("a", a.value()), ("b", b.value())])? {
        Device::Cpu => float_dispatch!(OP, a.dtype(), forward(a.value(), b.value()))?,
        Device::Cuda(gpu) => cuda::add::forward(&gpu, a.value(), b.value())?,
    };
    let (to_a, to_b) = (a.source(), b.source());
    tape.record(value, &[a, b], move |grad, walk| {
        walk.give(to_a, grad.clone())?;
        walk.give(to_b, grad)
    })
}

fn forward<E: Float>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut out = Buffer::<E>::stale(a.len());
    parallel::map2(&mut out, a.view(OP, "a")?, b.view(OP, "b")?, sum);
    Ok(Tensor::from_buffer(out, a.shape()))
}

multiversion! {
    fn sum<E: Float>(out: &mut [E], a: &[E], b: &[E]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = E::from_f32(a.to_f32() + b.to_f32());
        }
    }
}
