//! φ: blocks of tokens become one key or value each, forward and backward.

use pyo3::prelude::*;
use tercet_attention::cpu::{CompressInput, Phi, PhiGrads, compress_backward, compress_forward};
use tercet_attention::{Dims, Element, NsaSpec, cu_compressed, sequences};

use crate::call::{self, SpecNumbers, with_cpu_type};
use crate::dlpack::{DType, Device, Number, Tensor, refuse};
use crate::error::value_error;

/// φ's parameters: none, `weight, pe`, or `weight1, bias1, weight2, bias2, pe`.
pub enum Params<'py> {
    /// Average of the block.
    Mean,
    /// One matrix.
    Linear([Tensor<'py>; 2]),
    /// Two layers, and M.
    Mlp(Box<[Tensor<'py>; 5]>, usize),
}

impl<'py> Params<'py> {
    /// Reads and checks them for tokens of `[K, C]` in blocks of `block`; `grads` reads their
    /// gradients, which are float32.
    pub fn read(
        objects: &[Bound<'py, PyAny>],
        [heads, dim, block]: [usize; 3],
        like: &Tensor,
        grads: bool,
    ) -> PyResult<Self> {
        let read = |i: usize, name, shape: &[usize], layout| {
            let tensor = Tensor::read(name, &objects[i])?;
            let dtype = if grads { DType::F32 } else { like.dtype() };
            tensor.expect(like.device(), dtype, like.name())?;
            tensor.expect_shape(shape, layout)?;
            Ok::<_, PyErr>(tensor)
        };
        let wide = block.saturating_mul(dim);
        match objects.len() {
            0 => Ok(Self::Mean),
            2 => Ok(Self::Linear([
                read(0, "phi.weight", &[heads, wide, dim], "[K, l*C, C]")?,
                read(1, "phi.pe", &[heads, block, dim], "[K, l, C]")?,
            ])),
            5 => {
                let bias1 = Tensor::read("phi.bias1", &objects[1])?;
                let [_, hidden] = bias1.dims("[K, M]")?;
                if hidden == 0 {
                    return Err(refuse("phi.bias1", "a hidden width of 0, expected at least 1"));
                }
                let params = [
                    read(0, "phi.weight1", &[heads, wide, hidden], "[K, l*C, M]")?,
                    read(1, "phi.bias1", &[heads, hidden], "[K, M]")?,
                    read(2, "phi.weight2", &[heads, hidden, dim], "[K, M, C]")?,
                    read(3, "phi.bias2", &[heads, dim], "[K, C]")?,
                    read(4, "phi.pe", &[heads, block, dim], "[K, l, C]")?,
                ];
                Ok(Self::Mlp(Box::new(params), hidden))
            }
            n => Err(refuse("phi", format!("{n} tensors, expected 0, 2 or 5"))),
        }
    }

    /// As the CPU's operator takes them.
    pub fn cpu<E: Element + Number>(&self) -> PyResult<Phi<'_, E>> {
        Ok(match self {
            Self::Mean => Phi::Mean,
            Self::Linear([weight, pe]) => Phi::Linear { weight: weight.slice()?, pe: pe.slice()? },
            Self::Mlp(tensors, hidden) => {
                let [weight1, bias1, weight2, bias2, pe] = &**tensors;
                Phi::Mlp {
                    weight1: weight1.slice()?,
                    bias1: bias1.slice()?,
                    weight2: weight2.slice()?,
                    bias2: bias2.slice()?,
                    pe: pe.slice()?,
                    hidden: *hidden,
                }
            }
        })
    }

    fn cpu_grads(&mut self) -> PyResult<PhiGrads<'_>> {
        Ok(match self {
            Self::Mean => PhiGrads::Mean,
            Self::Linear([weight, pe]) => {
                PhiGrads::Linear { weight: weight.slice_mut()?, pe: pe.slice_mut()? }
            }
            Self::Mlp(tensors, _) => {
                let [weight1, bias1, weight2, bias2, pe] = &mut **tensors;
                PhiGrads::Mlp {
                    weight1: weight1.slice_mut()?,
                    bias1: bias1.slice_mut()?,
                    weight2: weight2.slice_mut()?,
                    bias2: bias2.slice_mut()?,
                    pe: pe.slice_mut()?,
                }
            }
        })
    }
}

/// Checked inputs.
struct Call<'py> {
    spec: NsaSpec,
    cu_seqlens: Vec<i32>,
    x: Tensor<'py>,
    phi: Params<'py>,
    /// N, K and C.
    out: [usize; 3],
}

impl<'py> Call<'py> {
    fn read(
        spec: SpecNumbers,
        cu_seqlens: Option<&Bound<'py, PyAny>>,
        batch: usize,
        x: &Bound<'py, PyAny>,
        phi: &[Bound<'py, PyAny>],
    ) -> PyResult<Self> {
        let spec = call::spec(spec)?;
        let x = Tensor::read("x", x)?;
        let [tokens, heads, dim] = x.dims("[T, K, C]")?;
        let dims = Dims { heads, kv_heads: heads, key_dim: dim, value_dim: dim };
        dims.validate().map_err(|error| refuse("x", error))?;
        let cu_seqlens = call::offsets(cu_seqlens, batch, tokens, "x")?;
        let phi = Params::read(phi, [heads, dim, spec.compress_block], &x, false)?;
        let sequences = sequences(&cu_seqlens, tokens).map_err(value_error)?;
        let blocks = cu_compressed(&spec, &sequences)[sequences.len()];
        Ok(Self { spec, cu_seqlens, x, phi, out: [blocks, heads, dim] })
    }

    fn cpu<E: Element + Number>(&self) -> PyResult<CompressInput<'_, E>> {
        let [_, kv_heads, dim] = self.out;
        Ok(CompressInput {
            spec: &self.spec,
            cu_seqlens: &self.cu_seqlens,
            kv_heads,
            dim,
            x: self.x.slice()?,
            phi: self.phi.cpu()?,
        })
    }

    fn expect_out(&self, out: &Tensor) -> PyResult<()> {
        out.expect_like(&self.x)?;
        out.expect_shape(&self.out, "[N, K, C]")
    }
}

/// N: compressed blocks of all sequences together.
#[pyfunction]
pub fn compressed_blocks(
    spec: SpecNumbers,
    cu_seqlens: Option<Bound<PyAny>>,
    batch: usize,
    tokens: usize,
) -> PyResult<usize> {
    let spec = call::spec(spec)?;
    let offsets = call::offsets(cu_seqlens.as_ref(), batch, tokens, "x")?;
    let sequences = sequences(&offsets, tokens).map_err(value_error)?;
    Ok(cu_compressed(&spec, &sequences)[sequences.len()])
}

/// Writes `out`.
#[pyfunction]
#[pyo3(name = "compress_forward")]
pub fn forward<'py>(
    py: Python<'py>,
    spec: SpecNumbers,
    cu_seqlens: Option<Bound<'py, PyAny>>,
    batch: usize,
    x: Bound<'py, PyAny>,
    phi: Vec<Bound<'py, PyAny>>,
    out: Bound<'py, PyAny>,
) -> PyResult<()> {
    let call = Call::read(spec, cu_seqlens.as_ref(), batch, &x, &phi)?;
    let mut out = Tensor::read("out", &out)?;
    call.expect_out(&out)?;
    match call.x.device() {
        Device::Cpu => with_cpu_type!(&call.x, E => {
            let input = call.cpu::<E>()?;
            let out = out.slice_mut::<E>()?;
            py.detach(|| compress_forward(&input, out)).map_err(value_error)
        }),
        Device::Cuda(_) => Err(refuse("x", "compressed by PyTorch on CUDA")),
    }
}

/// Writes the gradients of `x` and, in float32, of φ's parameters.
#[pyfunction]
#[pyo3(name = "compress_backward")]
#[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
pub fn backward<'py>(
    py: Python<'py>,
    spec: SpecNumbers,
    cu_seqlens: Option<Bound<'py, PyAny>>,
    batch: usize,
    x: Bound<'py, PyAny>,
    phi: Vec<Bound<'py, PyAny>>,
    d_out: Bound<'py, PyAny>,
    d_x: Bound<'py, PyAny>,
    d_phi: Vec<Bound<'py, PyAny>>,
) -> PyResult<()> {
    let call = Call::read(spec, cu_seqlens.as_ref(), batch, &x, &phi)?;
    let (d_out, mut d_x) = (Tensor::read("d_out", &d_out)?, Tensor::read("d_x", &d_x)?);
    call.expect_out(&d_out)?;
    d_x.expect_like(&call.x)?;
    d_x.expect_shape(call.x.shape(), "[T, K, C]")?;
    if d_phi.len() != phi.len() {
        return Err(refuse("d_phi", format!("{} tensors, expected {}", d_phi.len(), phi.len())));
    }
    let [_, heads, dim] = call.out;
    let shape = [heads, dim, call.spec.compress_block];
    let mut d_phi = Params::read(&d_phi, shape, &call.x, true)?;
    match call.x.device() {
        Device::Cpu => with_cpu_type!(&call.x, E => {
            let input = call.cpu::<E>()?;
            let (d_out, d_x) = (d_out.slice::<E>()?, d_x.slice_mut::<E>()?);
            let d_phi = d_phi.cpu_grads()?;
            py.detach(|| compress_backward(&input, d_out, d_x, d_phi)).map_err(value_error)
        }),
        Device::Cuda(_) => Err(refuse("x", "compressed by PyTorch on CUDA")),
    }
}
