//! `y[r] = W_e·x[r]`, e the expert that row r belongs to.
//!
//! Backward: `dx[r] = W_eᵀ·dy[r]`, `dW_e = Σ_{r of e} dy[r]·x[r]ᵀ`; an expert without rows gets
//! a gradient of zeros. Keeps x and the weights, shared.

use super::check;
use crate::backward::{Backward, Weight};
use crate::dtype::{Float, float_dispatch};
use crate::matmul::{Mat, matmul};
use crate::ops::ExpertPlan;
use crate::pool::Buffer;
use crate::project::project;
use crate::tape::Source;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda};

const OP: &str = "expert_linear";

/// Rows x `[T·k, I]`, sorted by expert as in `plan`, times their expert's weight (`[O, I]` each,
/// E of them): `[T·k, O]`.
pub fn expert_linear(tape: &mut Tape, x: &Var, weights: &[Var], plan: &ExpertPlan) -> Result<Var> {
    let [_, inner] = check::dims(OP, "x", x.value(), "[T·k, I]")?;
    check::shape(OP, "x", x.value(), &[plan.rows(), inner])?;
    let experts = plan.offsets().len() - 1;
    let Some(first) = weights.first().filter(|_| weights.len() == experts) else {
        let text = format!("{} weights were given for {experts} experts", weights.len());
        return Err(Error::value(OP, text));
    };
    let [outer, _] = check::dims(OP, "a weight", first.value(), "[O, I]")?;
    for weight in weights {
        check::same_dtype(OP, x, &[("a weight", weight)])?;
        check::shape(OP, "a weight", weight.value(), &[outer, inner])?;
    }
    let call = Call {
        x: x.value().clone(),
        weights: weights.iter().map(|w| w.value().clone()).collect(),
        plan: plan.clone(),
        to_x: x.source(),
        to_weights: weights.iter().map(|w| Weight::of(OP, w)).collect(),
        sizes: [outer, inner],
    };
    let places: Vec<_> = call.weights.iter().map(|weight| ("a weight", weight)).collect();
    let device = check::device(OP, &[&[("x", &call.x)], &places[..]].concat())?;
    plan.check(OP, &device)?;
    let value = match &device {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(&call))?,
        Device::Cuda(gpu) => {
            let Call { x, weights, plan, sizes, .. } = &call;
            cuda::expert_linear::forward(gpu, x, weights, plan.offsets(), *sizes)?
        }
    };
    let inputs: Vec<&Var> = std::iter::once(x).chain(weights).collect();
    tape.record(value, &inputs, move |grad, walk| match &device {
        Device::Cpu => float_dispatch!(OP, grad.dtype(), backward(&call, &grad, walk)),
        Device::Cuda(gpu) => {
            let kept = (&call.x, &call.weights[..], call.plan.offsets());
            let to = (call.to_x, &call.to_weights[..]);
            cuda::expert_linear::backward(gpu, &grad, kept, call.sizes, to, walk)
        }
    })
}

struct Call {
    x: Tensor,
    weights: Vec<Tensor>,
    plan: ExpertPlan,
    to_x: Source,
    to_weights: Vec<Weight>,
    sizes: [usize; 2],
}

impl Call {
    /// Each expert's number and rows; with `all`, those without rows too.
    fn segments(&self, all: bool) -> impl Iterator<Item = (usize, usize, usize)> {
        let ranges = self.plan.offsets().windows(2).enumerate();
        ranges.map(|(e, w)| (e, w[0], w[1])).filter(move |&(_, from, to)| all || to > from)
    }
}

fn forward<E: Float>(call: &Call) -> Result<Tensor> {
    let [outer, inner] = call.sizes;
    let x = E::widen(call.x.view(OP, "x")?);
    let mut out = Buffer::<E>::stale(call.plan.rows() * outer);
    let mut result: Result<()> = Ok(());
    E::write(&mut out, false, |out| {
        result = call.segments(false).try_for_each(|(e, from, to)| {
            let weight: &[E] = call.weights[e].view(OP, "a weight")?;
            let (x, out) = (&x[from * inner..to * inner], &mut out[from * outer..to * outer]);
            project(out, x, weight, [to - from, outer, inner], false);
            Ok(())
        });
    });
    result?;
    Ok(Tensor::from_buffer(out, &[call.plan.rows(), outer]))
}

fn backward<E: Float>(call: &Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let [outer, inner] = call.sizes;
    let x = E::widen(call.x.view(OP, "x")?);
    let grad = E::widen(grad.view(OP, "the gradient")?);
    for (e, from, to) in call.segments(true) {
        walk.accumulate_f32(&call.to_weights[e], |sum, add| {
            let dy = Mat::new(&grad[from * outer..to * outer], to - from, outer);
            let x = Mat::new(&x[from * inner..to * inner], to - from, inner);
            matmul(sum, dy.t(), x, add);
            Ok(())
        })?;
    }
    walk.accumulate::<E>(call.to_x, call.x.shape(), |sum, add| {
        let mut result: Result<()> = Ok(());
        E::write(sum, add, |sum| {
            result = call.segments(false).try_for_each(|(e, from, to)| {
                let weight = E::widen(call.weights[e].view(OP, "a weight")?);
                let dy = Mat::new(&grad[from * outer..to * outer], to - from, outer);
                let sum = &mut sum[from * inner..to * inner];
                matmul(sum, dy, Mat::new(&weight, outer, inner), add);
                Ok(())
            });
        });
        result
    })
}
