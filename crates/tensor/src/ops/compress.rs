//! φ of native sparse attention (Eq. 7 of arXiv 2502.11089), by `tercet_attention::cpu`: every
//! block of l tokens becomes one row.
//!
//! Keeps x and the parameters; the blocks are walked again in the backward pass.

use tercet_attention::cpu::{self, CompressInput, PhiGrads, compress_backward, compress_forward};
use tercet_attention::{cu_compressed, sequences};
use tercet_cuda::Gpu;

use super::check;
use crate::backward::Weight;
use crate::cuda::compress::Blocks;
use crate::cuda::compress_phi;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::{Device, Error, NsaSpec, Result, Tape, Tensor, Var};

const OP: &str = "compress";

/// The parameters of φ, in the layouts of [`tercet_attention::cpu::Phi`].
#[derive(Clone, Debug)]
pub enum Phi {
    /// Average of the block; no parameters.
    Mean,
    /// One matrix per KV head.
    Linear {
        /// `[K, l·C, C]`.
        weight: Var,
        /// `[K, l, C]`.
        pe: Var,
    },
    /// Two layers with a GELU (exact) between.
    Mlp {
        /// `[K, l·C, M]`.
        weight1: Var,
        /// `[K, M]`.
        bias1: Var,
        /// `[K, M, C]`.
        weight2: Var,
        /// `[K, C]`.
        bias2: Var,
        /// `[K, l, C]`.
        pe: Var,
    },
}

/// A parameter: name, variable, and the shape that it must have.
type Named<'a> = (&'static str, &'a Var, Vec<usize>);

/// Compresses x `[T, K, C]` to `[N, K, C]`; `cu_seqlens` are the B+1 offsets of the sequences,
/// whose blocks are concatenated; tails shorter than a block are dropped.
pub fn compress(
    tape: &mut Tape,
    x: &Var,
    phi: &Phi,
    spec: &NsaSpec,
    cu_seqlens: &[i32],
) -> Result<Var> {
    compress_shifted(tape, x, phi, None, spec, cu_seqlens)
}

/// What φ adds to its first layer whatever the block, `pe · W₁ (+ b₁)`, f32 `[K, outer]`, computed
/// once for many calls of [`compress_shifted`]; `None` where there is no such thing: an average, or
/// on a CPU.
pub fn compress_shift(phi: &Phi) -> Result<Option<Tensor>> {
    let (weight, bias, pe) = match phi {
        Phi::Mean => return Ok(None),
        Phi::Linear { weight, pe } => (weight, None, pe),
        Phi::Mlp { weight1, bias1, pe, .. } => (weight1, Some(bias1), pe),
    };
    let [heads, inner, outer] = check::dims(OP, "weight", weight.value(), "[K, l·C, M]")?;
    if pe.value().len() != heads * inner {
        return Err(Error::shape(OP, "pe", "[K, l, C]", pe.shape()));
    }
    let Device::Cuda(gpu) = check::device(OP, &[("weight", weight.value()), ("pe", pe.value())])?
    else {
        return Ok(None);
    };
    let (weight, bias) = (weight.value(), bias.map(Var::value));
    compress_phi::shift(&gpu, pe.value(), weight, bias, [heads, inner, outer]).map(Some)
}

/// As [`compress`], with what [`compress_shift`] made of the same φ.
pub fn compress_shifted(
    tape: &mut Tape,
    x: &Var,
    phi: &Phi,
    shift: Option<&Tensor>,
    spec: &NsaSpec,
    cu_seqlens: &[i32],
) -> Result<Var> {
    let [tokens, kv_heads, dim] = check::dims(OP, "x", x.value(), "[T, K, C]")?;
    spec.validate().map_err(|e| Error::attention(OP)(e.into()))?;
    let sequences = sequences(cu_seqlens, tokens).map_err(Error::attention(OP))?;
    let rows_at = cu_compressed(spec, &sequences);

    let l = spec.compress_block;
    let (hidden, named): (usize, Vec<Named>) = match phi {
        Phi::Mean => (0, vec![]),
        Phi::Linear { weight, pe } => {
            let weight_shape = vec![kv_heads, l * dim, dim];
            (0, vec![("weight", weight, weight_shape), ("pe", pe, vec![kv_heads, l, dim])])
        }
        Phi::Mlp { weight1, bias1, weight2, bias2, pe } => {
            let [_, hidden] = check::dims(OP, "bias1", bias1.value(), "[K, M]")?;
            let named = vec![
                ("weight1", weight1, vec![kv_heads, l * dim, hidden]),
                ("bias1", bias1, vec![kv_heads, hidden]),
                ("weight2", weight2, vec![kv_heads, hidden, dim]),
                ("bias2", bias2, vec![kv_heads, dim]),
                ("pe", pe, vec![kv_heads, l, dim]),
            ];
            (hidden, named)
        }
    };
    for (name, var, shape) in &named {
        check::same_dtype(OP, x, &[(*name, *var)])?;
        check::shape(OP, name, var.value(), shape)?;
    }
    let call = Call {
        x: x.value().clone(),
        params: named.iter().map(|(_, var, _)| var.value().clone()).collect(),
        hidden,
        spec: spec.clone(),
        cu_seqlens: cu_seqlens.to_vec(),
    };
    let places: Vec<_> = named.iter().map(|(name, var, _)| (*name, var.value())).collect();
    let device = check::device(OP, &[&[("x", x.value())], &places[..]].concat())?;
    let value = match &device {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(&call, rows_at[sequences.len()]))?,
        Device::Cuda(gpu) => call.forward_cuda(gpu, &rows_at, shift)?,
    };
    let mut inputs = vec![x];
    inputs.extend(named.iter().map(|(_, var, _)| *var));
    let to_params: Vec<Weight> = named.iter().map(|(_, var, _)| Weight::of(OP, var)).collect();
    let to_x = x.source();
    tape.record(value, &inputs, move |grad, walk| {
        let (d_x, d_params) = match &device {
            Device::Cpu => float_dispatch!(OP, grad.dtype(), backward(&call, &grad))?,
            Device::Cuda(gpu) => call.backward_cuda(gpu, &rows_at, &grad)?,
        };
        walk.give(to_x, d_x)?;
        for (to, grad) in to_params.iter().zip(d_params) {
            walk.give_f32(to, grad)?;
        }
        Ok(())
    })
}

struct Call {
    x: Tensor,
    /// In the order of the fields of [`Phi`]'s variant.
    params: Vec<Tensor>,
    hidden: usize,
    spec: NsaSpec,
    cu_seqlens: Vec<i32>,
}

impl Call {
    fn input<E: Float>(&self) -> Result<CompressInput<'_, E>> {
        let param = |i: usize| self.params[i].view::<E>(OP, "a parameter");
        let phi = match self.params.len() {
            0 => cpu::Phi::Mean,
            2 => cpu::Phi::Linear { weight: param(0)?, pe: param(1)? },
            _ => cpu::Phi::Mlp {
                weight1: param(0)?,
                bias1: param(1)?,
                weight2: param(2)?,
                bias2: param(3)?,
                pe: param(4)?,
                hidden: self.hidden,
            },
        };
        Ok(CompressInput {
            spec: &self.spec,
            cu_seqlens: &self.cu_seqlens,
            kv_heads: self.x.shape()[1],
            dim: self.x.shape()[2],
            x: self.x.view(OP, "x")?,
            phi,
        })
    }

    fn blocks<'g>(&'g self, gpu: &'g Gpu, rows_at: &'g [usize]) -> Result<Blocks<'g>> {
        Blocks::new(gpu, &self.x, &self.spec, &self.cu_seqlens, rows_at)
    }

    fn forward_cuda(&self, gpu: &Gpu, rows_at: &[usize], shift: Option<&Tensor>) -> Result<Tensor> {
        let blocks = self.blocks(gpu, rows_at)?;
        match &self.params[..] {
            [] => blocks.mean(&self.x),
            params => compress_phi::Phi::new(blocks, params, self.hidden)?.forward(&self.x, shift),
        }
    }

    /// As [`backward`].
    fn backward_cuda(
        &self,
        gpu: &Gpu,
        rows_at: &[usize],
        grad: &Tensor,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let blocks = self.blocks(gpu, rows_at)?;
        match &self.params[..] {
            [] => Ok((blocks.mean_grad(grad)?, Vec::new())),
            params => compress_phi::Phi::new(blocks, params, self.hidden)?.backward(&self.x, grad),
        }
    }
}

fn forward<E: Float>(call: &Call, blocks: usize) -> Result<Tensor> {
    let shape = [blocks, call.x.shape()[1], call.x.shape()[2]];
    let mut out = Buffer::<E>::stale(shape.iter().product());
    compress_forward(&call.input::<E>()?, &mut out).map_err(Error::attention(OP))?;
    Ok(Tensor::from_buffer(out, &shape))
}

/// The gradient of x and, in f32, of the parameters.
fn backward<E: Float>(call: &Call, grad: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
    let mut d_x = Buffer::<E>::stale(call.x.len());
    let mut d_params: Vec<Buffer<f32>> =
        call.params.iter().map(|p| Buffer::stale(p.len())).collect();
    let d_phi = match &mut d_params[..] {
        [weight, pe] => PhiGrads::Linear { weight, pe },
        [weight1, bias1, weight2, bias2, pe] => {
            PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe }
        }
        _ => PhiGrads::Mean,
    };
    compress_backward(&call.input::<E>()?, grad.view(OP, "the gradient")?, &mut d_x, d_phi)
        .map_err(Error::attention(OP))?;
    let d_params = d_params.into_iter().zip(&call.params);
    Ok((
        Tensor::from_buffer(d_x, call.x.shape()),
        d_params.map(|(buffer, p)| Tensor::from_buffer(buffer, p.shape())).collect(),
    ))
}
