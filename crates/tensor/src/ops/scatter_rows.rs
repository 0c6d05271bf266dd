//! `y[t] = Σ_j w[t, j] · x[row of (t, j)]`: what the experts made of a token, weighted.
//!
//! Backward: `dx[r] = w(r)·dy[token of r]`, `dw[t, j] = ⟨dy[t], x[row of (t, j)]⟩`. Keeps x, the
//! weights and the plan.

use super::check;
use crate::backward::Backward;
use crate::dtype::{Float, float_dispatch};
use crate::ops::ExpertPlan;
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::tape::Source;
use crate::tensor::convert_slice;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "scatter_rows";

/// Rows x `[T·k, C]` back into their tokens with `weights` `[T, k]`: `[T, C]`.
pub fn scatter_rows(tape: &mut Tape, x: &Var, weights: &Var, plan: &ExpertPlan) -> Result<Var> {
    let [_, width] = check::dims(OP, "x", x.value(), "[T·k, C]")?;
    check::same_dtype(OP, x, &[("the weights", weights)])?;
    check::shape(OP, "x", x.value(), &[plan.rows(), width])?;
    check::shape(OP, "the weights", weights.value(), &[plan.tokens(), plan.top_k()])?;
    let call = Call {
        x: x.value().clone(),
        weights: weights.value().clone(),
        plan: plan.clone(),
        to_x: x.source(),
        to_weights: weights.source(),
    };
    let device = check::device(OP, &[("x", &call.x), ("the weights", &call.weights)])?;
    plan.check(OP, &device)?;
    let value = match &device {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(&call))?,
        Device::Cuda(gpu) => cuda::expert_rows::scatter(gpu, &call.x, &call.weights, plan)?,
    };
    tape.record(value, &[x, weights], move |grad, walk| match &device {
        Device::Cpu => float_dispatch!(OP, grad.dtype(), backward(&call, &grad, walk)),
        Device::Cuda(gpu) => {
            let kept = (&call.x, &call.weights);
            let (d_x, d_weights) = cuda::expert_rows::scatter_grad(gpu, &grad, kept, &call.plan)?;
            walk.give(call.to_weights, d_weights)?;
            walk.give(call.to_x, d_x)
        }
    })
}

struct Call {
    x: Tensor,
    weights: Tensor,
    plan: ExpertPlan,
    to_x: Source,
    to_weights: Source,
}

fn forward<E: Float>(call: &Call) -> Result<Tensor> {
    let Call { x, weights, plan, .. } = call;
    let width = x.shape()[1];
    let (xs, ws): (&[E], &[E]) = (x.view(OP, "x")?, weights.view(OP, "the weights")?);
    let places = plan.on_cpu()?;
    let mut out = Buffer::<E>::stale(plan.tokens() * width);
    parallel::rows(&mut out, width, |first, rows| {
        let mut total = vec![0.0; width];
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let token = first + i;
            total.fill(0.0);
            for (from, w) in places.rows_of_token(token).zip(&ws[token * plan.top_k()..]) {
                add_scaled(&mut total, &xs[from * width..][..width], w.to_f32());
            }
            convert_slice(row, &total);
        }
    });
    Ok(Tensor::from_buffer(out, &[plan.tokens(), width]))
}

fn backward<E: Float>(call: &Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let Call { x, weights, plan, .. } = call;
    let width = x.shape()[1];
    let (xs, ws): (&[E], &[E]) = (x.view(OP, "x")?, weights.view(OP, "the weights")?);
    let grad: &[E] = grad.view(OP, "the gradient")?;
    let places = plan.on_cpu()?;

    let mut d_weights = Buffer::<E>::stale(ws.len());
    parallel::rows(&mut d_weights, plan.top_k(), |first, rows| {
        for (i, d) in rows.chunks_exact_mut(plan.top_k()).enumerate() {
            let dy = &grad[(first + i) * width..][..width];
            for (d, from) in d.iter_mut().zip(places.rows_of_token(first + i)) {
                *d = E::from_f32(product(dy, &xs[from * width..][..width]));
            }
        }
    });
    let mut d_x = Buffer::<E>::stale(xs.len());
    parallel::rows(&mut d_x, width, |first, rows| {
        for (i, dx) in rows.chunks_exact_mut(width).enumerate() {
            let (token, w) = (places.token_of_row(first + i), ws[places.pair_of_row(first + i)]);
            scaled(dx, &grad[token * width..][..width], w.to_f32());
        }
    });
    walk.give(call.to_weights, Tensor::from_buffer(d_weights, weights.shape()))?;
    walk.give(call.to_x, Tensor::from_buffer(d_x, x.shape()))
}

multiversion! {
    fn add_scaled<E: Float>(out: &mut [f32], x: &[E], factor: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out += factor * x.to_f32();
        }
    }
}

multiversion! {
    fn scaled<E: Float>(out: &mut [E], x: &[E], factor: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = E::from_f32(factor * x.to_f32());
        }
    }
}

multiversion! {
    fn product<E: Float>(a: &[E], b: &[E]) -> f32 {
        math::dot(a, b)
    }
}
