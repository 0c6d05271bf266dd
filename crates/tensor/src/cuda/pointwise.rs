//! Launches of the elementwise activations: `sigmoid.cu`, `gelu.cu`, `swiglu.cu`; see their
//! files in `ops/`.

use tercet_cuda::{Args, Gpu, Source};

use super::{PIECES, at, at_mut, kernel, pieces, stale};
use crate::ops::Gelu;
use crate::{DType, Result, Tensor};

const SIGMOID: Source =
    Source { name: "sigmoid", text: include_str!("sigmoid.cu"), headers: &[PIECES] };
const GELU: Source = Source { name: "gelu", text: include_str!("gelu.cu"), headers: &[PIECES] };
const SWIGLU: Source =
    Source { name: "swiglu", text: include_str!("swiglu.cu"), headers: &[PIECES] };

pub(crate) fn sigmoid(gpu: &Gpu, x: &Tensor) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    launch(gpu, &SIGMOID, "sigmoid_forward", x, &[at(x)?, at(&out)?])?;
    Ok(out)
}

/// Turns the gradient of y into that of x.
pub(crate) fn sigmoid_grad(gpu: &Gpu, grad: &mut Tensor, y: &Tensor) -> Result<()> {
    let d = at_mut(grad)?;
    launch(gpu, &SIGMOID, "sigmoid_backward", y, &[d, at(y)?, d])
}

pub(crate) fn gelu(gpu: &Gpu, x: &Tensor, kind: Gelu) -> Result<Tensor> {
    let out = stale(gpu, x.dtype(), x.shape())?;
    let entry = match kind {
        Gelu::Tanh => "gelu_tanh_forward",
        Gelu::Exact => "gelu_exact_forward",
    };
    launch(gpu, &GELU, entry, x, &[at(x)?, at(&out)?])?;
    Ok(out)
}

/// Turns the gradient of y into that of x.
pub(crate) fn gelu_grad(gpu: &Gpu, grad: &mut Tensor, x: &Tensor, kind: Gelu) -> Result<()> {
    let entry = match kind {
        Gelu::Tanh => "gelu_tanh_backward",
        Gelu::Exact => "gelu_exact_backward",
    };
    let d = at_mut(grad)?;
    launch(gpu, &GELU, entry, x, &[d, at(x)?, d])
}

pub(crate) fn swiglu(gpu: &Gpu, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let out = stale(gpu, gate.dtype(), gate.shape())?;
    launch(gpu, &SWIGLU, "swiglu_forward", gate, &[at(gate)?, at(up)?, at(&out)?])?;
    Ok(out)
}

/// Turns `grad` into the gradient of up; returns that of gate.
pub(crate) fn swiglu_grad(
    gpu: &Gpu,
    grad: &mut Tensor,
    gate: &Tensor,
    up: &Tensor,
) -> Result<Tensor> {
    let (d_gate, d) = (stale(gpu, gate.dtype(), gate.shape())?, at_mut(grad)?);
    let addresses = [d, at(gate)?, at(up)?, at(&d_gate)?, d];
    launch(gpu, &SWIGLU, "swiglu_backward", gate, &addresses)?;
    Ok(d_gate)
}

/// All `addresses` are those of tensors like `like`.
fn launch(gpu: &Gpu, source: &Source, entry: &str, like: &Tensor, addresses: &[u64]) -> Result<()> {
    let dtype: DType = like.dtype();
    let kernel = kernel(gpu, source, entry, dtype, &[])?;
    let (grid, block) = pieces(like.len(), dtype);
    let args = addresses.iter().fold(Args::new(), |args, &at| args.ptr(at)).len(like.len());
    // SAFETY: every address holds as many numbers of the same type as `like`.
    Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
}
