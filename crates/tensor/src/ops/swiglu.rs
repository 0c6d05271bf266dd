//! SwiGLU: `y = silu(gate) · up`, `silu(g) = g·σ(g)` (arXiv 2002.05202).
//!
//! Backward, with `s = σ(g)`: `d_up = dy · g·s`, in place of dy, and
//! `d_gate = dy · up · s·(1 + g·(1 − s))`. Keeps gate and up.

use rayon::prelude::*;

use super::check;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "swiglu";

/// Gated activation of two variables of one shape.
pub fn swiglu(tape: &mut Tape, gate: &Var, up: &Var) -> Result<Var> {
    check::same_dtype(OP, gate, &[("up", up)])?;
    check::shape(OP, "up", up.value(), gate.shape())?;
    let value = match check::device(OP, &[("gate", gate.value()), ("up", up.value())])? {
        Device::Cpu => float_dispatch!(OP, gate.dtype(), forward(gate.value(), up.value()))?,
        Device::Cuda(gpu) => cuda::pointwise::swiglu(&gpu, gate.value(), up.value())?,
    };
    let (kept_gate, kept_up) = (gate.value().clone(), up.value().clone());
    let (to_gate, to_up) = (gate.source(), up.source());
    tape.record(value, &[gate, up], move |mut grad, walk| {
        let (dtype, device) = (kept_gate.dtype(), kept_gate.device());
        let d_gate = match device {
            Device::Cpu => float_dispatch!(OP, dtype, backward(&mut grad, &kept_gate, &kept_up))?,
            Device::Cuda(gpu) => {
                cuda::pointwise::swiglu_grad(&gpu, &mut grad, &kept_gate, &kept_up)?
            }
        };
        drop((kept_gate, kept_up));
        walk.give(to_gate, d_gate)?;
        walk.give(to_up, grad)
    })
}

fn forward<E: Float>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let mut out = Buffer::<E>::stale(gate.len());
    parallel::map2(&mut out, gate.view(OP, "gate")?, up.view(OP, "up")?, swiglu_slice);
    Ok(Tensor::from_buffer(out, gate.shape()))
}

/// Turns `grad` into the gradient of up; returns that of gate.
fn backward<E: Float>(grad: &mut Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let mut d_gate = Buffer::<E>::stale(gate.len());
    let grad: &mut [E] = grad.view_mut(OP, "the gradient")?;
    let (gates, ups) = (gate.view(OP, "gate")?, up.view(OP, "up")?);
    const CHUNK: usize = parallel::CHUNK;
    d_gate
        .par_chunks_mut(CHUNK)
        .zip(grad.par_chunks_mut(CHUNK))
        .zip(gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)))
        .for_each(|((d_gate, grad), (gate, up))| swiglu_grad(d_gate, grad, gate, up));
    Ok(Tensor::from_buffer(d_gate, gate.shape()))
}

multiversion! {
    fn swiglu_slice<E: Float>(out: &mut [E], gate: &[E], up: &[E]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.to_f32();
            *out = E::from_f32(gate * math::sigmoid(gate) * up.to_f32());
        }
    }
}

multiversion! {
    fn swiglu_grad<E: Float>(d_gate: &mut [E], grad: &mut [E], gate: &[E], up: &[E]) {
        let outputs = d_gate.iter_mut().zip(grad);
        for ((d_gate, grad), (gate, up)) in outputs.zip(gate.iter().zip(up)) {
            let (d, g) = (grad.to_f32(), gate.to_f32());
            let s = math::sigmoid(g);
            *d_gate = E::from_f32(d * up.to_f32() * s * (1.0 + g * (1.0 - s)));
            *grad = E::from_f32(d * g * s);
        }
    }
}
