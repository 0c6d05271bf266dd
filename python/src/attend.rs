//! Dense and window attention, forward and backward.

use pyo3::prelude::*;
use tercet_attention::cpu::{AttendGrads, AttendInput, Mask, attend_backward, attend_forward};
use tercet_attention::cuda;
use tercet_attention::{Dims, Element};

use crate::call::{self, with_cpu_type};
use crate::cuda::{Stream, slice};
use crate::dlpack::{Device, Number, Tensor, refuse};
use crate::error::value_error;

/// Checked inputs.
struct Call<'py> {
    scale: f32,
    mask: Mask,
    dims: Dims,
    tokens: usize,
    cu_seqlens: Vec<i32>,
    q: Tensor<'py>,
    k: Tensor<'py>,
    v: Tensor<'py>,
}

/// Causal attention, or a window of so many keys.
pub fn mask(window: Option<usize>) -> PyResult<Mask> {
    match window {
        None => Ok(Mask::Causal),
        Some(0) => Err(refuse("window", "0 keys, expected at least 1")),
        Some(window) => Ok(Mask::Window(window)),
    }
}

impl<'py> Call<'py> {
    fn read(
        scale: f64,
        window: Option<usize>,
        cu_seqlens: Option<&Bound<'py, PyAny>>,
        batch: usize,
        [q, k, v]: &[Bound<'py, PyAny>; 3],
    ) -> PyResult<Self> {
        let scale = call::scale(scale)?;
        let mask = mask(window)?;
        let (q, k, v) = (Tensor::read("q", q)?, Tensor::read("k", k)?, Tensor::read("v", v)?);
        let (tokens, dims) = call::dims(&q, &v)?;
        let cu_seqlens = call::offsets(cu_seqlens, batch, tokens, "q")?;
        k.expect_like(&q)?;
        v.expect_like(&q)?;
        k.expect_shape(&[tokens, dims.kv_heads, dims.key_dim], "[T, K, D]")?;
        v.expect_shape(&[tokens, dims.kv_heads, dims.value_dim], "[T, K, V]")?;
        Ok(Self { scale, mask, dims, tokens, cu_seqlens, q, k, v })
    }

    fn cpu<E: Element + Number>(&self) -> PyResult<AttendInput<'_, E>> {
        Ok(AttendInput {
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: self.scale,
            q: self.q.slice()?,
            k: self.k.slice()?,
            v: self.v.slice()?,
        })
    }

    /// Runs `f` with the call's device memory.
    fn on_device(
        &self,
        ordinal: usize,
        stream: u64,
        f: impl FnOnce(&cuda::AttendInput) -> tercet_attention::Result<()>,
    ) -> PyResult<()> {
        let stream = Stream::get(ordinal, stream)?;
        let plan = stream.plan(self.dims, &self.q)?;
        let batch = stream.batch(&self.cu_seqlens)?;
        let (q, k, v) = (slice(&self.q), slice(&self.k), slice(&self.v));
        let input = cuda::AttendInput { plan: &plan, batch: &batch, scale: self.scale, q, k, v };
        f(&input).map_err(value_error)
    }

    fn expect_out(&self, out: &Tensor) -> PyResult<()> {
        out.expect_like(&self.q)?;
        out.expect_shape(&[self.tokens, self.dims.heads, self.dims.value_dim], "[T, H, V]")
    }

    fn expect_lse(&self, lse: &Tensor) -> PyResult<()> {
        lse.expect(self.q.device(), call::sums(self.q.device()), "what the forward saved")?;
        lse.expect_shape(&[self.tokens, self.dims.heads], "[T, H]")
    }
}

/// Writes `out` and `lse`.
#[pyfunction]
#[pyo3(name = "attend_forward")]
#[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
pub fn forward<'py>(
    py: Python<'py>,
    stream: u64,
    scale: f64,
    window: Option<usize>,
    cu_seqlens: Option<Bound<'py, PyAny>>,
    batch: usize,
    inputs: [Bound<'py, PyAny>; 3],
    out: Bound<'py, PyAny>,
    lse: Bound<'py, PyAny>,
) -> PyResult<()> {
    let call = Call::read(scale, window, cu_seqlens.as_ref(), batch, &inputs)?;
    let (mut out, mut lse) = (Tensor::read("out", &out)?, Tensor::read("lse", &lse)?);
    call.expect_out(&out)?;
    call.expect_lse(&lse)?;
    match call.q.device() {
        Device::Cpu => with_cpu_type!(&call.q, E => {
            let input = call.cpu::<E>()?;
            let (out, lse) = (out.slice_mut::<E>()?, lse.slice_mut::<f64>()?);
            py.detach(|| attend_forward(&input, call.mask, out, lse)).map_err(value_error)
        }),
        Device::Cuda(ordinal) => call.on_device(ordinal, stream, |input| {
            cuda::attend_forward(input, call.mask, slice(&out), slice(&lse))
        }),
    }
}

/// Writes the gradients of q, k and v.
#[pyfunction]
#[pyo3(name = "attend_backward")]
#[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
pub fn backward<'py>(
    py: Python<'py>,
    stream: u64,
    scale: f64,
    window: Option<usize>,
    cu_seqlens: Option<Bound<'py, PyAny>>,
    batch: usize,
    inputs: [Bound<'py, PyAny>; 3],
    out: Bound<'py, PyAny>,
    lse: Bound<'py, PyAny>,
    d_out: Bound<'py, PyAny>,
    grads: [Bound<'py, PyAny>; 3],
) -> PyResult<()> {
    let call = Call::read(scale, window, cu_seqlens.as_ref(), batch, &inputs)?;
    let (out, lse) = (Tensor::read("out", &out)?, Tensor::read("lse", &lse)?);
    let d_out = Tensor::read("d_out", &d_out)?;
    call.expect_out(&out)?;
    call.expect_out(&d_out)?;
    call.expect_lse(&lse)?;
    let [d_q, d_k, d_v] = &grads;
    let mut d_q = Tensor::read("d_q", d_q)?;
    let mut d_k = Tensor::read("d_k", d_k)?;
    let mut d_v = Tensor::read("d_v", d_v)?;
    for (grad, of) in [(&d_q, &call.q), (&d_k, &call.k), (&d_v, &call.v)] {
        grad.expect_like(of)?;
        grad.expect_shape(of.shape(), "its input's shape")?;
    }
    match call.q.device() {
        Device::Cpu => with_cpu_type!(&call.q, E => {
            let input = call.cpu::<E>()?;
            let (out, lse) = (out.slice::<E>()?, lse.slice::<f64>()?);
            let d_out = d_out.slice::<E>()?;
            let grads = AttendGrads {
                q: d_q.slice_mut()?,
                k: d_k.slice_mut()?,
                v: d_v.slice_mut()?,
            };
            py.detach(|| attend_backward(&input, call.mask, out, lse, d_out, grads))
                .map_err(value_error)
        }),
        Device::Cuda(ordinal) => call.on_device(ordinal, stream, |input| {
            let grads = cuda::AttendGrads { q: slice(&d_q), k: slice(&d_k), v: slice(&d_v) };
            let (out, lse) = (slice(&out), slice(&lse));
            cuda::attend_backward(input, call.mask, out, lse, slice(&d_out), grads)
        }),
    }
}
