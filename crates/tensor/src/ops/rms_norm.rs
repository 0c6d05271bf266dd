//! RMSNorm (arXiv 1910.07467): `y = x·r·w`, `r = 1/√(mean(x²) + eps)` over the last dim.
//!
//! Backward, with `x̂ = x·r`: `dw = Σ_rows dy·x̂` and
//! `dx = r·(dy·w − x̂·mean(dy·w·x̂))`, added to the gradient that is there. Keeps x, w and r.

use rayon::prelude::*;

use super::check;
use crate::backward::{Backward, Weight};
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::tape::Source;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "rms_norm";

/// Norm over the last dimension of x `[.., C]`, weight `[C]`; with C a head dimension it norms
/// every head by itself.
pub fn rms_norm(tape: &mut Tape, x: &Var, weight: &Var, eps: f32) -> Result<Var> {
    let (rows, width) = check::rows_of(OP, "x", x.shape())?;
    check::same_dtype(OP, x, &[("the weight", weight)])?;
    check::shape(OP, "the weight", weight.value(), &[width])?;
    let (x_value, w_value) = (x.value().clone(), weight.value().clone());
    let (to_x, to_weight) = (x.source(), Weight::of(OP, weight));
    if let Device::Cuda(gpu) = check::device(OP, &[("x", &x_value), ("the weight", &w_value)])? {
        let (value, inverse) = cuda::rms_norm::forward(&gpu, &x_value, &w_value, rows, eps)?;
        return tape.record(value, &[x, weight], move |grad, walk| {
            let kept = (&x_value, &w_value, &inverse);
            cuda::rms_norm::backward(&gpu, &grad, kept, (to_x, &to_weight), walk)
        });
    }
    let (value, inverse) = float_dispatch!(OP, x.dtype(), forward(&x_value, &w_value, rows, eps))?;
    tape.record(value, &[x, weight], move |grad, walk| {
        let call = Call { x: x_value, weight: w_value, inverse, to_x, to_weight };
        float_dispatch!(OP, grad.dtype(), backward(call, &grad, walk))
    })
}

fn forward<E: Float>(
    x: &Tensor,
    weight: &Tensor,
    rows: usize,
    eps: f32,
) -> Result<(Tensor, Buffer<f32>)> {
    let width = weight.len();
    let (xs, ws): (&[E], &[E]) = (x.view(OP, "x")?, weight.view(OP, "the weight")?);
    let mut out = Buffer::<E>::stale(xs.len());
    let mut inverse = Buffer::<f32>::stale(rows);
    if width > 0 {
        let per = parallel::rows_per_chunk(width);
        out.par_chunks_mut(per * width)
            .zip(inverse.par_chunks_mut(per))
            .zip(xs.par_chunks(per * width))
            .for_each(|((out, inverse), x)| norm_rows(out, inverse, x, ws, eps));
    }
    Ok((Tensor::from_buffer(out, x.shape()), inverse))
}

struct Call {
    x: Tensor,
    weight: Tensor,
    inverse: Buffer<f32>,
    to_x: Source,
    to_weight: Weight,
}

fn backward<E: Float>(call: Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let width = call.weight.len();
    let (x, w): (&[E], &[E]) = (call.x.view(OP, "x")?, call.weight.view(OP, "the weight")?);
    let dy: &[E] = grad.view(OP, "the gradient")?;
    let per = parallel::rows_per_part(call.inverse.len());
    let mut parts = Buffer::<f32>::zeroed(call.inverse.len().div_ceil(per) * width);
    let run = |dx: &mut [E], add: bool| {
        if width > 0 {
            dx.par_chunks_mut(per * width)
                .zip(parts.par_chunks_mut(width))
                .zip(x.par_chunks(per * width).zip(dy.par_chunks(per * width)))
                .zip(call.inverse.par_chunks(per))
                .for_each(|(((dx, dw), (x, dy)), r)| norm_grad(dx, dw, x, dy, r, w, add));
        }
        Ok(())
    };
    walk.accumulate_always::<E>(call.to_x, call.x.shape(), run)?;
    walk.accumulate_f32(&call.to_weight, |sum, add| {
        parallel::sum_parts(&parts, sum, add);
        Ok(())
    })
}

multiversion! {
    fn norm_rows<E: Float>(out: &mut [E], inverse: &mut [f32], x: &[E], w: &[E], eps: f32) {
        let width = w.len();
        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((out, x), inverse) in rows.zip(inverse) {
            let r = 1.0 / (math::sum(x, |x| x * x) / width as f32 + eps).sqrt();
            *inverse = r;
            for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                *out = E::from_f32(x.to_f32() * r * w.to_f32());
            }
        }
    }
}

multiversion! {
    fn norm_grad<E: Float>(
        dx: &mut [E],
        dw: &mut [f32],
        x: &[E],
        dy: &[E],
        inverse: &[f32],
        w: &[E],
        add: bool,
    ) {
        let width = w.len();
        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width).zip(dy.chunks_exact(width)));
        for ((dx, (x, dy)), &r) in rows.zip(inverse) {
            let mean = math::sum3(x, dy, w, |x, dy, w| dy * w * (x * r)) / width as f32;
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy.to_f32() * (x.to_f32() * r);
            }
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                let old = if add { dx.to_f32() } else { 0.0 };
                let new = r * (dy.to_f32() * w.to_f32() - x.to_f32() * r * mean);
                *dx = E::from_f32(old + new);
            }
        }
    }
}
