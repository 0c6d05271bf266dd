//! Softmax attention under a causal or window mask, by `tercet_attention`:
//! `out = softmax(q·kᵀ/√D + mask)·v`, every sequence by itself.
//!
//! Keeps q, k, v, the output and the log-sum-exp `[T, H]`.

use tercet_attention::Dims;
use tercet_attention::cpu::{AttendGrads, AttendInput, Mask, attend_backward, attend_forward};

use super::check;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda};

const OP: &str = "attention_dense";

/// Attention of q `[T, H, D]` to k `[T, K, D]` and v `[T, K, V]`: `[T, H, V]`. `cu_seqlens` are
/// the B+1 offsets of the sequences, from 0 to T; H is a multiple of K; the scale is 1/√D.
pub fn attention_dense(
    tape: &mut Tape,
    q: &Var,
    k: &Var,
    v: &Var,
    cu_seqlens: &[i32],
    mask: Mask,
) -> Result<Var> {
    let [tokens, heads, key_dim] = check::dims(OP, "q", q.value(), "[T, H, D]")?;
    let [_, kv_heads, value_dim] = check::dims(OP, "v", v.value(), "[T, K, V]")?;
    check::same_dtype(OP, q, &[("k", k), ("v", v)])?;
    check::shape(OP, "k", k.value(), &[tokens, kv_heads, key_dim])?;
    check::shape(OP, "v", v.value(), &[tokens, kv_heads, value_dim])?;
    check::offsets(OP, cu_seqlens, tokens)?;
    let dims = Dims { heads, kv_heads, key_dim, value_dim };
    let sources = [q.source(), k.source(), v.source()];
    let values = [q.value(), k.value(), v.value()];
    if let Device::Cuda(gpu) =
        check::device(OP, &[("q", values[0]), ("k", values[1]), ("v", values[2])])?
    {
        let values = values.map(Tensor::clone);
        let (out, call) = cuda::attention::Dense::forward(&gpu, dims, values, cu_seqlens, mask)?;
        let kept_out = out.clone();
        return tape.record(out, &[q, k, v], move |grad, walk| {
            let grads = call.backward(&kept_out, &grad)?;
            drop((call, kept_out, grad));
            sources.into_iter().zip(grads).try_for_each(|(to, grad)| walk.give(to, grad))
        });
    }
    let call = Call {
        q: q.value().clone(),
        k: k.value().clone(),
        v: v.value().clone(),
        dims,
        cu_seqlens: cu_seqlens.to_vec(),
        mask,
    };
    let (out, lse) = float_dispatch!(OP, q.dtype(), forward(&call))?;
    let kept_out = out.clone();
    tape.record(out, &[q, k, v], move |grad, walk| {
        let grads = float_dispatch!(OP, grad.dtype(), backward(call, kept_out, lse, &grad))?;
        for (source, grad) in sources.into_iter().zip(grads) {
            walk.give(source, grad)?;
        }
        Ok(())
    })
}

struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dims: Dims,
    cu_seqlens: Vec<i32>,
    mask: Mask,
}

impl Call {
    fn input<E: Float>(&self) -> Result<AttendInput<'_, E>> {
        Ok(AttendInput {
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: self.dims.scale(),
            q: self.q.view(OP, "q")?,
            k: self.k.view(OP, "k")?,
            v: self.v.view(OP, "v")?,
        })
    }
}

/// Output and log-sum-exp.
fn forward<E: Float>(call: &Call) -> Result<(Tensor, Vec<f64>)> {
    let (tokens, heads) = (call.q.shape()[0], call.dims.heads);
    let mut out = Buffer::<E>::stale(tokens * heads * call.dims.value_dim);
    let mut lse = vec![0.0; tokens * heads];
    attend_forward(&call.input::<E>()?, call.mask, &mut out, &mut lse)
        .map_err(Error::attention(OP))?;
    Ok((Tensor::from_buffer(out, &[tokens, heads, call.dims.value_dim]), lse))
}

/// Gradients of q, k and v.
fn backward<E: Float>(
    call: Call,
    out: Tensor,
    lse: Vec<f64>,
    grad: &Tensor,
) -> Result<[Tensor; 3]> {
    let mut q = Buffer::<E>::stale(call.q.len());
    let mut k = Buffer::<E>::stale(call.k.len());
    let mut v = Buffer::<E>::stale(call.v.len());
    let grads = AttendGrads { q: &mut q, k: &mut k, v: &mut v };
    let (out, grad) = (out.view(OP, "the output")?, grad.view(OP, "the gradient")?);
    attend_backward(&call.input::<E>()?, call.mask, out, &lse, grad, grads)
        .map_err(Error::attention(OP))?;
    Ok([
        Tensor::from_buffer(q, call.q.shape()),
        Tensor::from_buffer(k, call.k.shape()),
        Tensor::from_buffer(v, call.v.shape()),
    ])
}
