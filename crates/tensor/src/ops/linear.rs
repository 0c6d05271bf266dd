//! `y = x·Wᵀ + b`, weights in the Hugging Face layout `[O, I]`.
//!
//! Backward: `dx = dy·W`, `dW = dyᵀ·x`, `db = Σ_t dy`. Products add straight into the gradient
//! that is there. Keeps x and W, both shared, not copied.
//!
//! Where gradients are kept apart by groups of rows ([`crate::Grads::by_group`]), dW and db are made
//! for each group from its own rows: as many multiplications, and a sum that no other group's
//! rows can change.

use super::check;
use crate::backward::{Backward, Weight};
use crate::dtype::{Float, float_dispatch};
use crate::matmul::{Mat, matmul};
use crate::pool::Buffer;
use crate::project::project;
use crate::tape::Source;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "linear";

/// Affine map of the last dimension: x `[.., I]`, weight `[O, I]`, bias `[O]` gives `[.., O]`.
pub fn linear(tape: &mut Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    let (rows, inner) = check::rows_of(OP, "x", x.shape())?;
    let [outer, weight_inner] = check::dims(OP, "the weight", weight.value(), "[O, I]")?;
    check::same_dtype(OP, x, &[("the weight", weight)])?;
    if weight_inner != inner {
        let expected = format!("[O, {inner}] to fit x of shape {:?}", x.shape());
        return Err(Error::shape(OP, "the weight", expected, weight.shape()));
    }
    if let Some(bias) = bias {
        check::same_dtype(OP, x, &[("the bias", bias)])?;
        check::shape(OP, "the bias", bias.value(), &[outer])?;
    }
    let sizes = [rows, outer, inner];
    let (x_value, w_value) = (x.value().clone(), weight.value().clone());
    let bias_value = bias.map(Var::value);
    let mut places = vec![("x", &x_value), ("the weight", &w_value)];
    places.extend(bias_value.map(|b| ("the bias", b)));
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outer;
    }
    let value = match check::device(OP, &places)? {
        Device::Cpu => {
            float_dispatch!(OP, x.dtype(), forward(&x_value, &w_value, bias_value, sizes, &shape))?
        }
        Device::Cuda(gpu) => {
            cuda::linear::forward(&gpu, &x_value, &w_value, bias_value, sizes, &shape)?
        }
    };

    let mut inputs = vec![x, weight];
    inputs.extend(bias);
    let (to_x, to_weight, to_bias) =
        (x.source(), Weight::of(OP, weight), bias.map(|b| Weight::of(OP, b)));
    tape.record(value, &inputs, move |grad, walk| {
        let dtype = grad.dtype();
        if let Device::Cuda(gpu) = grad.device() {
            let call = cuda::linear::Call {
                x: &x_value,
                weight: &w_value,
                to_x,
                to_weight: &to_weight,
                to_bias: to_bias.as_ref(),
                sizes,
            };
            return cuda::linear::backward(&gpu, &call, &grad, walk);
        }
        let call = Call { x: x_value, weight: w_value, to_x, to_weight, to_bias, sizes };
        float_dispatch!(OP, dtype, backward(call, &grad, walk))
    })
}

fn forward<E: Float>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sizes: [usize; 3],
    shape: &[usize],
) -> Result<Tensor> {
    let [rows, outer, _] = sizes;
    let wide = E::widen(x.view(OP, "x")?);
    let weight: &[E] = weight.view(OP, "the weight")?;
    let bias: Option<&[E]> = bias.map(|b| b.view(OP, "the bias")).transpose()?;
    let mut out = Buffer::<E>::stale(rows * outer);
    E::write(&mut out, false, |out| {
        if let Some(bias) = bias {
            parallel::rows(out, outer, |_, rows| {
                rows.chunks_exact_mut(outer)
                    .for_each(|row| crate::tensor::convert_slice(row, bias));
            });
        }
        project(out, &wide, weight, sizes, bias.is_some());
    });
    Ok(Tensor::from_buffer(out, shape))
}

/// What the backward pass needs of one call.
struct Call {
    x: Tensor,
    weight: Tensor,
    to_x: Source,
    to_weight: Weight,
    to_bias: Option<Weight>,
    sizes: [usize; 3],
}

fn backward<E: Float>(call: Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let [rows, outer, inner] = call.sizes;
    let grad = E::widen(grad.view(OP, "the gradient")?);
    let dy = Mat::new(&grad, rows, outer);
    if call.to_weight.wants_grad() {
        let x = E::widen(call.x.view(OP, "x")?);
        walk.accumulate_rows(&call.to_weight, rows, |sum, range, add| {
            let dy = &grad[range.start * outer..range.end * outer];
            let x = &x[range.start * inner..range.end * inner];
            let rows = range.len();
            matmul(sum, Mat::new(dy, rows, outer).t(), Mat::new(x, rows, inner), add);
        })?;
    }
    if let Some(to_bias) = &call.to_bias {
        walk.accumulate_rows(to_bias, rows, |sum, range, add| {
            let grad = &grad[range.start * outer..range.end * outer];
            parallel::column_sums(range.len(), outer, sum, add, |range, part| {
                for row in grad[range.start * outer..range.end * outer].chunks_exact(outer) {
                    parallel::add_into(part, row);
                }
            });
        })?;
    }
    let shape = call.x.shape().to_vec();
    drop(call.x);
    walk.accumulate::<E>(call.to_x, &shape, |sum, add| {
        let weight = E::widen(call.weight.view(OP, "the weight")?);
        E::write(sum, add, |sum| matmul(sum, dy, Mat::new(&weight, outer, inner), add));
        Ok(())
    })
}
