//! Native sparse attention (arXiv 2502.11089) by `tercet_attention`: compressed, selected
//! and window branches, blended by gates.
//!
//! Keeps its inputs and what the operator saves: the branches' outputs, their log-sum-exps and
//! the selected blocks. No gradient flows through the choice of blocks.

use tercet_attention::Dims;
use tercet_attention::cpu::{NsaGrads, NsaInput, NsaSaved, nsa_backward, nsa_forward};

use super::check;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::{Device, Error, NsaSpec, Result, Tape, Tensor, Var, cuda};

const OP: &str = "attention_nsa";

/// Inputs of [`attention_nsa`]; sharing K/V between branches is passing the same variable twice.
#[derive(Clone, Debug)]
pub struct NsaVars {
    /// Queries `[T, H, D]`.
    pub q: Var,
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: Var,
    /// Compressed values `[N, K, V]`.
    pub v_cmp: Var,
    /// Keys of the selected branch `[T, K, D]`.
    pub k_slc: Var,
    /// Values of the selected branch `[T, K, V]`.
    pub v_slc: Var,
    /// Keys of the window branch `[T, K, D]`.
    pub k_win: Var,
    /// Values of the window branch `[T, K, V]`.
    pub v_win: Var,
    /// Gates after the sigmoid `[T, H, 3]`: cmp, slc, win.
    pub gate: Var,
}

/// Names of the inputs, in the order of [`NsaVars::all`].
const NAMES: [&str; 8] = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"];

impl NsaVars {
    fn all(&self) -> [&Var; 8] {
        let Self { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate } = self;
        [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate]
    }
}

/// The three branches, gated: `[T, H, V]`. `cu_seqlens` are the B+1 offsets of the sequences,
/// from 0 to T; compressed rows of all sequences are concatenated; the scale is 1/√D.
pub fn attention_nsa(
    tape: &mut Tape,
    inputs: &NsaVars,
    spec: &NsaSpec,
    cu_seqlens: &[i32],
) -> Result<Var> {
    let vars = inputs.all();
    let [tokens, heads, key_dim] = check::dims(OP, "q", inputs.q.value(), "[T, H, D]")?;
    let [_, kv_heads, value_dim] = check::dims(OP, "v_slc", inputs.v_slc.value(), "[T, K, V]")?;
    let [blocks, ..] = check::dims::<3>(OP, "k_cmp", inputs.k_cmp.value(), "[N, K, D]")?;
    let (k, v) = ([kv_heads, key_dim], [kv_heads, value_dim]);
    let inner = [[heads, key_dim], k, v, k, v, k, v, [heads, 3]];
    for (i, (var, [a, b])) in vars.into_iter().zip(inner).enumerate() {
        check::same_dtype(OP, &inputs.q, &[(NAMES[i], var)])?;
        let rows = if i == 1 || i == 2 { blocks } else { tokens };
        check::shape(OP, NAMES[i], var.value(), &[rows, a, b])?;
    }
    check::offsets(OP, cu_seqlens, tokens)?;
    let dims = Dims { heads, kv_heads, key_dim, value_dim };
    let (sources, values) = (vars.map(Var::source), vars.map(|v| v.value().clone()));
    let places: Vec<_> = NAMES.into_iter().zip(&values).collect();
    if let Device::Cuda(gpu) = check::device(OP, &places)? {
        let save = tape.keeps(&vars);
        let (out, call) =
            cuda::attention::Nsa::forward(&gpu, dims, values, spec, cu_seqlens, save)?;
        return tape.record(out, &vars, move |grad, walk| {
            let grads = call.backward(&grad)?;
            drop((call, grad));
            sources.into_iter().zip(grads).try_for_each(|(to, grad)| walk.give(to, grad))
        });
    }
    let call = Call { values, spec: spec.clone(), dims, cu_seqlens: cu_seqlens.to_vec() };
    let (out, saved) = float_dispatch!(OP, inputs.q.dtype(), forward(&call))?;
    tape.record(out, &vars, move |grad, walk| {
        let grads = float_dispatch!(OP, grad.dtype(), backward(call, saved, &grad))?;
        for (source, grad) in sources.into_iter().zip(grads) {
            walk.give(source, grad)?;
        }
        Ok(())
    })
}

struct Call {
    values: [Tensor; 8],
    spec: NsaSpec,
    dims: Dims,
    cu_seqlens: Vec<i32>,
}

impl Call {
    fn input<E: Float>(&self) -> Result<NsaInput<'_, E>> {
        let view = |i: usize| self.values[i].view::<E>(OP, NAMES[i]);
        Ok(NsaInput {
            spec: &self.spec,
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: self.dims.scale(),
            q: view(0)?,
            k_cmp: view(1)?,
            v_cmp: view(2)?,
            k_slc: view(3)?,
            v_slc: view(4)?,
            k_win: view(5)?,
            v_win: view(6)?,
            gate: view(7)?,
        })
    }
}

fn forward<E: Float>(call: &Call) -> Result<(Tensor, NsaSaved)> {
    let shape = [call.values[0].shape()[0], call.dims.heads, call.dims.value_dim];
    let mut out = Buffer::<E>::stale(shape.iter().product());
    let saved = nsa_forward(&call.input::<E>()?, &mut out).map_err(Error::attention(OP))?;
    Ok((Tensor::from_buffer(out, &shape), saved))
}

/// Gradients in the order of the inputs.
fn backward<E: Float>(call: Call, saved: NsaSaved, grad: &Tensor) -> Result<[Tensor; 8]> {
    let mut buffers = call.values.each_ref().map(|value| Buffer::<E>::stale(value.len()));
    let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &mut buffers;
    let grads = NsaGrads { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
    nsa_backward(&call.input::<E>()?, &saved, grad.view(OP, "the gradient")?, grads)
        .map_err(Error::attention(OP))?;
    let mut shapes = call.values.iter();
    Ok(buffers.map(|buffer| {
        let shape = shapes.next().map(Tensor::shape).unwrap_or_default();
        Tensor::from_buffer(buffer, shape)
    }))
}
