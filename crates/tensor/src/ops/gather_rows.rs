//! `y[r] = x[token of row r]`: tokens laid out for their experts.
//!
//! Backward: `dx[t] = Σ_j dy[row of (t, j)]`, in the order of the choices. Keeps the plan.

use super::check;
use crate::backward::Backward;
use crate::dtype::{Float, float_dispatch};
use crate::ops::ExpertPlan;
use crate::pool::Buffer;
use crate::tape::Source;
use crate::tensor::convert_slice;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "gather_rows";

/// Tokens x `[T, C]`, each once for every expert that it chose, sorted by expert: `[T·k, C]`.
pub fn gather_rows(tape: &mut Tape, x: &Var, plan: &ExpertPlan) -> Result<Var> {
    let [tokens, _] = check::dims(OP, "x", x.value(), "[T, C]")?;
    if tokens != plan.tokens() {
        let expected = format!("[{}, C], the tokens of the plan", plan.tokens());
        return Err(Error::shape(OP, "x", expected, x.shape()));
    }
    let device = x.value().device();
    plan.check(OP, &device)?;
    let value = match &device {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x.value(), plan))?,
        Device::Cuda(gpu) => cuda::expert_rows::gather(gpu, x.value(), plan)?,
    };
    let (to_x, plan) = (x.source(), plan.clone());
    tape.record(value, &[x], move |grad, walk| match &device {
        Device::Cpu => float_dispatch!(OP, grad.dtype(), backward(&grad, &plan, to_x, walk)),
        Device::Cuda(gpu) => {
            let shape = [plan.tokens(), grad.shape()[1]];
            walk.accumulate_cuda(gpu, to_x, grad.dtype(), &shape, |sum, add| {
                cuda::expert_rows::gather_grad(gpu, (sum, add), &grad, &plan)
            })
        }
    })
}

fn forward<E: Float>(x: &Tensor, plan: &ExpertPlan) -> Result<Tensor> {
    let width = x.shape()[1];
    let xs: &[E] = x.view(OP, "x")?;
    let (places, rows) = (plan.on_cpu()?, plan.rows());
    let mut out = Buffer::<E>::stale(rows * width);
    parallel::rows(&mut out, width, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            row.copy_from_slice(&xs[places.token_of_row(first + i) * width..][..width]);
        }
    });
    Ok(Tensor::from_buffer(out, &[rows, width]))
}

fn backward<E: Float>(
    grad: &Tensor,
    plan: &ExpertPlan,
    to_x: Source,
    walk: &mut Backward,
) -> Result<()> {
    let width = grad.shape()[1];
    let grad: &[E] = grad.view(OP, "the gradient")?;
    let places = plan.on_cpu()?;
    walk.accumulate::<E>(to_x, &[plan.tokens(), width], |sum, add| {
        parallel::rows(sum, width, |first, rows| {
            let mut total = vec![0.0; width];
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                total.fill(0.0);
                if add {
                    parallel::add_wide(&mut total, row);
                }
                for from in places.rows_of_token(first + i) {
                    parallel::add_wide(&mut total, &grad[from * width..][..width]);
                }
                convert_slice(row, &total);
            }
        });
        Ok(())
    })
}
