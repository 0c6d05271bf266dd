//! LayerNorm (arXiv 1607.06450): `y = x̂·w + b`, `x̂ = (x − mean)·r`, `r = 1/√(var + eps)` over
//! the last dim, var without Bessel's correction.
//!
//! Backward: `db = Σ_rows dy`, `dw = Σ_rows dy·x̂`, and with `g = dy·w`:
//! `dx = r·(g − mean(g) − x̂·mean(g·x̂))`, added to the gradient that is there. Keeps x, w, the
//! means and r.

use rayon::prelude::*;

use super::check;
use crate::backward::{Backward, Weight};
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::tape::Source;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "layer_norm";

/// Norm over the last dimension of x `[.., C]`, weight and bias `[C]`.
pub fn layer_norm(tape: &mut Tape, x: &Var, weight: &Var, bias: &Var, eps: f32) -> Result<Var> {
    let (rows, width) = check::rows_of(OP, "x", x.shape())?;
    check::same_dtype(OP, x, &[("the weight", weight), ("the bias", bias)])?;
    check::shape(OP, "the weight", weight.value(), &[width])?;
    check::shape(OP, "the bias", bias.value(), &[width])?;
    let (x_value, w_value, b_value) = (x.value().clone(), weight.value().clone(), bias.value());
    let (to_x, to_weight, to_bias) = (x.source(), Weight::of(OP, weight), Weight::of(OP, bias));
    let places = [("x", &x_value), ("the weight", &w_value), ("the bias", b_value)];
    if let Device::Cuda(gpu) = check::device(OP, &places)? {
        let (value, moments) =
            cuda::layer_norm::forward(&gpu, &x_value, &w_value, b_value, rows, eps)?;
        return tape.record(value, &[x, weight, bias], move |grad, walk| {
            let kept = (&x_value, &w_value, &moments);
            cuda::layer_norm::backward(&gpu, &grad, kept, (to_x, &to_weight, &to_bias), walk)
        });
    }
    let (value, moments) =
        float_dispatch!(OP, x.dtype(), forward(&x_value, &w_value, b_value, rows, eps))?;
    tape.record(value, &[x, weight, bias], move |grad, walk| {
        let call = Call { x: x_value, weight: w_value, moments, to_x, to_weight, to_bias };
        float_dispatch!(OP, grad.dtype(), backward(call, &grad, walk))
    })
}

/// Returns the output and, for each row, its mean and r.
fn forward<E: Float>(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    rows: usize,
    eps: f32,
) -> Result<(Tensor, Buffer<f32>)> {
    let width = weight.len();
    let (w, b): (&[E], &[E]) = (weight.view(OP, "the weight")?, bias.view(OP, "the bias")?);
    let xs: &[E] = x.view(OP, "x")?;
    let mut out = Buffer::<E>::stale(xs.len());
    let mut moments = Buffer::<f32>::stale(2 * rows);
    if width > 0 {
        let per = parallel::rows_per_chunk(width);
        out.par_chunks_mut(per * width)
            .zip(moments.par_chunks_mut(2 * per))
            .zip(xs.par_chunks(per * width))
            .for_each(|((out, moments), x)| norm_rows(out, moments, x, w, b, eps));
    }
    Ok((Tensor::from_buffer(out, x.shape()), moments))
}

struct Call {
    x: Tensor,
    weight: Tensor,
    moments: Buffer<f32>,
    to_x: Source,
    to_weight: Weight,
    to_bias: Weight,
}

fn backward<E: Float>(call: Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let width = call.weight.len();
    let (x, w): (&[E], &[E]) = (call.x.view(OP, "x")?, call.weight.view(OP, "the weight")?);
    let dy: &[E] = grad.view(OP, "the gradient")?;
    let rows = call.moments.len() / 2;
    let per = parallel::rows_per_part(rows);
    let mut dw_parts = Buffer::<f32>::zeroed(rows.div_ceil(per) * width);
    let mut db_parts = Buffer::<f32>::zeroed(rows.div_ceil(per) * width);
    let run = |dx: &mut [E], add: bool| {
        if width > 0 {
            dx.par_chunks_mut(per * width)
                .zip(dw_parts.par_chunks_mut(width).zip(db_parts.par_chunks_mut(width)))
                .zip(x.par_chunks(per * width).zip(dy.par_chunks(per * width)))
                .zip(call.moments.par_chunks(2 * per))
                .for_each(|(((dx, (dw, db)), (x, dy)), moments)| {
                    norm_grad(dx, dw, x, dy, moments, w, add);
                    dy.chunks_exact(width).for_each(|row| parallel::add_wide(db, row));
                });
        }
        Ok(())
    };
    walk.accumulate_always::<E>(call.to_x, call.x.shape(), run)?;
    for (to, parts) in [(&call.to_weight, &dw_parts), (&call.to_bias, &db_parts)] {
        walk.accumulate_f32(to, |sum, add| {
            parallel::sum_parts(parts, sum, add);
            Ok(())
        })?;
    }
    Ok(())
}

multiversion! {
    fn norm_rows<E: Float>(
        out: &mut [E],
        moments: &mut [f32],
        x: &[E],
        w: &[E],
        b: &[E],
        eps: f32,
    ) {
        let width = w.len();
        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((out, x), moments) in rows.zip(moments.chunks_exact_mut(2)) {
            let mean = math::sum(x, |x| x) / width as f32;
            let variance = math::sum(x, |x| (x - mean) * (x - mean)) / width as f32;
            let r = 1.0 / (variance + eps).sqrt();
            (moments[0], moments[1]) = (mean, r);
            for (((out, x), w), b) in out.iter_mut().zip(x).zip(w).zip(b) {
                *out = E::from_f32((x.to_f32() - mean) * r * w.to_f32() + b.to_f32());
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
        moments: &[f32],
        w: &[E],
        add: bool,
    ) {
        let width = w.len();
        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width).zip(dy.chunks_exact(width)));
        for ((dx, (x, dy)), moments) in rows.zip(moments.chunks_exact(2)) {
            let (mean, r) = (moments[0], moments[1]);
            let mean_g = math::dot(dy, w) / width as f32;
            let along = math::sum3(x, dy, w, |x, dy, w| dy * w * ((x - mean) * r)) / width as f32;
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy.to_f32() * ((x.to_f32() - mean) * r);
            }
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                let old = if add { dx.to_f32() } else { 0.0 };
                let normed = (x.to_f32() - mean) * r;
                let new = r * (dy.to_f32() * w.to_f32() - mean_g - normed * along);
                *dx = E::from_f32(old + new);
            }
        }
    }
}
