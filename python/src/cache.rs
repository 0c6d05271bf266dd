//! Caches for decoding: one sequence, one layer each.

use pyo3::prelude::*;
use tercet_attention::cpu::{CompressTail, DenseCache, NsaCache, NsaStep};
use tercet_attention::{Dims, NsaSpec};

use crate::attend::mask;
use crate::call::{self, SpecNumbers, no_kernels, with_cpu_type};
use crate::compress::Params;
use crate::dlpack::{DType, Device, Tensor, refuse};
use crate::error::value_error;

/// Reads `[c, heads, dim]` for a known number of heads and dimension; c may be anything.
pub fn rows<'py>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
    [heads, dim]: [usize; 2],
    layout: &str,
) -> PyResult<Tensor<'py>> {
    let tensor = Tensor::read(name, object)?;
    let [count, ..] = tensor.dims::<3>(layout)?;
    tensor.expect_shape(&[count, heads, dim], layout)?;
    Ok(tensor)
}

/// Heads and dimensions, checked.
pub fn head_dims(dims: [usize; 4]) -> PyResult<Dims> {
    let [heads, kv_heads, key_dim, value_dim] = dims;
    let dims = Dims { heads, kv_heads, key_dim, value_dim };
    dims.validate().map_err(|error| refuse("dims", error))?;
    Ok(dims)
}

/// `tercet_attention::cpu::NsaCache` for Python.
#[pyclass(name = "NsaCache", module = "tercet._native")]
pub struct PyNsaCache {
    dims: Dims,
    cache: NsaCache,
}

#[pymethods]
impl PyNsaCache {
    #[new]
    fn new(spec: SpecNumbers, dims: [usize; 4]) -> PyResult<Self> {
        let (spec, dims) = (call::spec(spec)?, head_dims(dims)?);
        let cache = NsaCache::new(&spec, dims).map_err(value_error)?;
        Ok(Self { dims, cache })
    }

    fn __len__(&self) -> usize {
        self.cache.len()
    }

    /// Bytes of cache memory in use.
    #[getter]
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Appends c tokens, writes `out` `[c, H, V]` and `indices` `[c, K, S]`.
    fn extend<'py>(
        &mut self,
        py: Python<'py>,
        scale: f64,
        inputs: [Bound<'py, PyAny>; 8],
        out: Bound<'py, PyAny>,
        indices: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let scale = call::scale(scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &inputs;
        let (k, v) = ([kv_heads, key_dim], [kv_heads, value_dim]);
        let q = rows("q", q, [heads, key_dim], "[c, H, D]")?;
        let k_cmp = rows("k_cmp", k_cmp, k, "[n, K, D]")?;
        let v_cmp = rows("v_cmp", v_cmp, v, "[n, K, V]")?;
        let k_slc = rows("k_slc", k_slc, k, "[c, K, D]")?;
        let v_slc = rows("v_slc", v_slc, v, "[c, K, V]")?;
        let k_win = rows("k_win", k_win, k, "[c, K, D]")?;
        let v_win = rows("v_win", v_win, v, "[c, K, V]")?;
        let gate = rows("gate", gate, [heads, 3], "[c, H, 3]")?;
        for tensor in [&k_cmp, &v_cmp, &k_slc, &v_slc, &k_win, &v_win, &gate] {
            tensor.expect_like(&q)?;
        }
        let mut out = rows("out", &out, [heads, value_dim], "[c, H, V]")?;
        out.expect_like(&q)?;
        let mut indices = Tensor::read("indices", &indices)?;
        indices.expect(q.device(), DType::I32, "every choice of blocks")?;
        if q.device() != Device::Cpu {
            return Err(no_kernels(&q));
        }
        with_cpu_type!(&q, E => {
            let step = NsaStep {
                scale,
                q: q.slice::<E>()?,
                k_cmp: k_cmp.slice()?,
                v_cmp: v_cmp.slice()?,
                k_slc: k_slc.slice()?,
                v_slc: v_slc.slice()?,
                k_win: k_win.slice()?,
                v_win: v_win.slice()?,
                gate: gate.slice()?,
            };
            let (out, indices) = (out.slice_mut::<E>()?, indices.slice_mut::<i32>()?);
            let cache = &mut self.cache;
            let chosen = py.detach(|| cache.extend(&step, out)).map_err(value_error)?;
            if chosen.len() != indices.len() {
                let message = format!("{} elements, expected {}", indices.len(), chosen.len());
                return Err(refuse("indices", message));
            }
            indices.copy_from_slice(&chosen);
            Ok(())
        })
    }
}

/// `tercet_attention::cpu::DenseCache` for Python.
#[pyclass(name = "DenseCache", module = "tercet._native")]
pub struct PyDenseCache {
    dims: Dims,
    cache: DenseCache,
}

#[pymethods]
impl PyDenseCache {
    #[new]
    #[pyo3(signature = (dims, window=None))]
    fn new(dims: [usize; 4], window: Option<usize>) -> PyResult<Self> {
        let dims = head_dims(dims)?;
        let cache = DenseCache::new(dims, mask(window)?).map_err(value_error)?;
        Ok(Self { dims, cache })
    }

    fn __len__(&self) -> usize {
        self.cache.len()
    }

    /// Bytes of cache memory in use.
    #[getter]
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Appends c tokens and writes `out` `[c, H, V]`.
    fn extend<'py>(
        &mut self,
        py: Python<'py>,
        scale: f64,
        inputs: [Bound<'py, PyAny>; 3],
        out: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let scale = call::scale(scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let [q, k, v] = &inputs;
        let q = rows("q", q, [heads, key_dim], "[c, H, D]")?;
        let k = rows("k", k, [kv_heads, key_dim], "[c, K, D]")?;
        let v = rows("v", v, [kv_heads, value_dim], "[c, K, V]")?;
        let mut out = rows("out", &out, [heads, value_dim], "[c, H, V]")?;
        for tensor in [&k, &v, &out] {
            tensor.expect_like(&q)?;
        }
        if q.device() != Device::Cpu {
            return Err(no_kernels(&q));
        }
        with_cpu_type!(&q, E => {
            let (q, k, v) = (q.slice::<E>()?, k.slice::<E>()?, v.slice::<E>()?);
            let out = out.slice_mut::<E>()?;
            let cache = &mut self.cache;
            py.detach(|| cache.extend(scale, q, k, v, out)).map_err(value_error)
        })
    }
}

/// A tail in its storage type.
enum Tail {
    F32(CompressTail<f32>),
    Bf16(CompressTail<half::bf16>),
}

/// `tercet_attention::cpu::CompressTail` for Python.
#[pyclass(name = "CompressTail", module = "tercet._native")]
pub struct PyCompressTail {
    spec: NsaSpec,
    kv_heads: usize,
    dim: usize,
    tokens: usize,
    tail: Tail,
}

#[pymethods]
impl PyCompressTail {
    #[new]
    fn new(spec: SpecNumbers, kv_heads: usize, dim: usize, bf16: bool) -> PyResult<Self> {
        let spec = call::spec(spec)?;
        let tail = if bf16 {
            Tail::Bf16(CompressTail::new(&spec, kv_heads, dim).map_err(value_error)?)
        } else {
            Tail::F32(CompressTail::new(&spec, kv_heads, dim).map_err(value_error)?)
        };
        Ok(Self { spec, kv_heads, dim, tokens: 0, tail })
    }

    /// Blocks emitted so far.
    #[getter]
    fn blocks(&self) -> usize {
        match &self.tail {
            Tail::F32(tail) => tail.blocks(),
            Tail::Bf16(tail) => tail.blocks(),
        }
    }

    /// Blocks that `count` more tokens complete.
    fn completes(&self, count: usize) -> usize {
        self.spec.compressed_blocks(self.tokens.saturating_add(count)) - self.blocks()
    }

    /// Takes tokens `[c, K, C]` and writes the blocks they complete into `out` `[n, K, C]`.
    fn push<'py>(
        &mut self,
        py: Python<'py>,
        x: Bound<'py, PyAny>,
        phi: Vec<Bound<'py, PyAny>>,
        out: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let shape = [self.kv_heads, self.dim];
        let x = rows("x", &x, shape, "[c, K, C]")?;
        let mut out = rows("out", &out, shape, "[n, K, C]")?;
        let count = x.shape()[0];
        out.expect_shape(&[self.completes(count), shape[0], shape[1]], "[n, K, C]")?;
        let dtype = match self.tail {
            Tail::F32(_) => DType::F32,
            Tail::Bf16(_) => DType::Bf16,
        };
        x.expect(Device::Cpu, dtype, "this tail")?;
        out.expect_like(&x)?;
        let phi = Params::read(&phi, [shape[0], shape[1], self.spec.compress_block], &x, false)?;
        match &mut self.tail {
            Tail::F32(tail) => {
                let (x, phi, out) = (x.slice::<f32>()?, phi.cpu()?, out.slice_mut::<f32>()?);
                let blocks = py.detach(|| tail.push(x, phi)).map_err(value_error)?;
                out.copy_from_slice(&blocks);
            }
            Tail::Bf16(tail) => {
                let (x, phi) = (x.slice::<half::bf16>()?, phi.cpu()?);
                let out = out.slice_mut::<half::bf16>()?;
                let blocks = py.detach(|| tail.push(x, phi)).map_err(value_error)?;
                out.copy_from_slice(&blocks);
            }
        }
        self.tokens += count;
        Ok(())
    }
}
