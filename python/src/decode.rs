//! Decoding on a device: over the caller's pages, and with caches that own their memory.

use pyo3::prelude::*;
use tercet_attention::Dims;
use tercet_attention::cuda::decode::{
    CacheView, DenseCache, NsaCache, NsaCaches, NsaStep, NsaToken, Rows, dense_rows, nsa_rows,
};
use tercet_attention::cuda::{Plan, Slice};

use crate::attend::mask;
use crate::cache::{head_dims, rows};
use crate::call::{self, SpecNumbers};
use crate::cuda::{Stream, slice};
use crate::dlpack::{DType, Device, Tensor, refuse};
use crate::error::value_error;

/// Pages as Python sends them: keys, values, page table, whether a ring, whether heads come first.
type PyPages<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, bool, bool);

/// Where a tensor lies, when it is on a device.
fn ordinal(tensor: &Tensor) -> PyResult<usize> {
    match tensor.device() {
        Device::Cuda(ordinal) => Ok(ordinal),
        Device::Cpu => Err(refuse(tensor.name(), "on the CPU, expected a CUDA device")),
    }
}

/// Names of a cache's parts.
struct Names {
    k: &'static str,
    v: &'static str,
    table: &'static str,
}

const CMP: Names = Names { k: "cmp.k", v: "cmp.v", table: "cmp.table" };
const SLC: Names = Names { k: "slc.k", v: "slc.v", table: "slc.table" };
const WIN: Names = Names { k: "win.k", v: "win.v", table: "win.table" };
const PAGES: Names = Names { k: "pages.k", v: "pages.v", table: "pages.table" };

/// A checked cache and what keeps its memory alive.
struct Cache<'py> {
    view: CacheView,
    _tensors: (Tensor<'py>, Tensor<'py>, Option<Tensor<'py>>),
    kv_heads: usize,
    dims: [usize; 2],
}

impl<'py> Cache<'py> {
    fn read(names: &Names, pages: &PyPages<'py>, like: &Tensor, count: usize) -> PyResult<Self> {
        let (k, v, table, ring, heads_first) = pages;
        let (k, v) = (Tensor::read(names.k, k)?, Tensor::read(names.v, v)?);
        let layout = if *heads_first { "[pages, K, page, dim]" } else { "[pages, page, K, dim]" };
        let [pages, a, b, key_dim] = k.dims(layout)?;
        let [_, _, _, value_dim] = v.dims(layout)?;
        v.expect_shape(&[pages, a, b, value_dim], layout)?;
        k.expect_like(like)?;
        v.expect_like(like)?;
        let (page, kv_heads) = if *heads_first { (b, a) } else { (a, b) };
        let table = table.as_ref().map(|table| Tensor::read(names.table, table)).transpose()?;
        let view_table = match &table {
            Some(table) => {
                table.expect(like.device(), DType::I32, "every page table")?;
                let [sequences, width] = table.dims("[sequences, pages of each]")?;
                if sequences < count {
                    let message = format!("{sequences} rows for {count} sequences");
                    return Err(refuse(names.table, message));
                }
                Some((slice(table), width))
            }
            None if pages < count => {
                let message = format!("{pages} pages for {count} sequences without a page table");
                return Err(refuse(names.k, message));
            }
            None => None,
        };
        let view = CacheView {
            k: slice(&k),
            v: slice(&v),
            table: view_table,
            page,
            interleaved: !heads_first,
            ring: *ring,
        };
        Ok(Cache { view, _tensors: (k, v, table), kv_heads, dims: [key_dim, value_dim] })
    }
}

/// Checked queries of a step.
struct Step<'py> {
    plan: Plan,
    scale: f32,
    dims: Dims,
    rows: usize,
    q: Tensor<'py>,
    positions: Tensor<'py>,
    sequences: Option<Tensor<'py>>,
    count: usize,
    longest: usize,
}

/// What tells how a step's rows lie: positions, sequences, how many sequences, and a bound.
type PyRows<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, usize, usize);

impl<'py> Step<'py> {
    fn read(
        stream: u64,
        scale: f64,
        q: Tensor<'py>,
        (positions, sequences, count, longest): &PyRows<'py>,
        cache: &Cache,
    ) -> PyResult<Self> {
        let scale = call::scale(scale)?;
        let [rows, heads, key_dim] = q.dims("[R, H, D]")?;
        let positions = Tensor::read("positions", positions)?;
        positions.expect(q.device(), DType::I32, "every list of positions")?;
        positions.expect_shape(&[rows], "[R]")?;
        let sequences = sequences.as_ref().map(|x| Tensor::read("sequences", x)).transpose()?;
        if let Some(sequences) = &sequences {
            sequences.expect(q.device(), DType::I32, "every list of sequences")?;
            sequences.expect_shape(&[rows], "[R]")?;
        } else if rows > *count {
            return Err(refuse("q", format!("{rows} rows for {count} sequences")));
        }
        let dims = Dims { heads, kv_heads: cache.kv_heads, key_dim, value_dim: cache.dims[1] };
        dims.validate().map_err(value_error)?;
        let plan = Stream::get(ordinal(&q)?, stream)?.plan(dims, &q)?;
        let (count, longest) = (*count, *longest);
        Ok(Step { plan, scale, dims, rows, q, positions, sequences, count, longest })
    }

    fn rows(&self) -> Rows<'_> {
        Rows {
            plan: &self.plan,
            scale: self.scale,
            q: slice(&self.q),
            positions: slice(&self.positions),
            sequences: self.sequences.as_ref().map(slice),
            count: self.count,
            longest: self.longest,
        }
    }

    fn expect_dims(&self, name: &'static str, cache: &Cache) -> PyResult<()> {
        let Dims { kv_heads, key_dim, value_dim, .. } = self.dims;
        if cache.kv_heads == kv_heads && cache.dims == [key_dim, value_dim] {
            return Ok(());
        }
        let (heads, [k, v]) = (cache.kv_heads, cache.dims);
        let message = format!(
            "{heads} heads of {k} and {v}, expected {kv_heads} of {key_dim} and {value_dim}"
        );
        Err(refuse(name, message))
    }

    fn out(&self, out: &Bound<'py, PyAny>) -> PyResult<Tensor<'py>> {
        let out = Tensor::read("out", out)?;
        out.expect_like(&self.q)?;
        out.expect_shape(&[self.rows, self.dims.heads, self.dims.value_dim], "[R, H, V]")?;
        Ok(out)
    }
}

/// Writes `out` `[R, H, V]` and, where given, the choice of blocks `[R, K, S]`.
#[pyfunction]
#[pyo3(name = "nsa_rows")]
#[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
pub fn nsa<'py>(
    stream: u64,
    spec: SpecNumbers,
    scale: f64,
    q: Bound<'py, PyAny>,
    gate: Bound<'py, PyAny>,
    at: PyRows<'py>,
    caches: [PyPages<'py>; 3],
    out: Bound<'py, PyAny>,
    indices: Option<Bound<'py, PyAny>>,
) -> PyResult<()> {
    let spec = call::spec(spec)?;
    let (q, gate) = (Tensor::read("q", &q)?, Tensor::read("gate", &gate)?);
    let [cmp, slc, win] = &caches;
    let count = at.2;
    let slc = Cache::read(&SLC, slc, &q, count)?;
    let cmp = Cache::read(&CMP, cmp, &q, count)?;
    let win = Cache::read(&WIN, win, &q, count)?;
    let step = Step::read(stream, scale, q, &at, &slc)?;
    for (name, cache) in [("slc.k", &slc), ("cmp.k", &cmp), ("win.k", &win)] {
        step.expect_dims(name, cache)?;
    }
    gate.expect_like(&step.q)?;
    gate.expect_shape(&[step.rows, step.dims.heads, 3], "[R, H, 3]")?;
    let out = step.out(&out)?;
    let indices = indices.map(|x| Tensor::read("indices", &x)).transpose()?;
    if let Some(indices) = &indices {
        indices.expect(step.q.device(), DType::I32, "every choice of blocks")?;
        let shape = [step.rows, step.dims.kv_heads, spec.select_count];
        indices.expect_shape(&shape, "[R, K, S]")?;
    }
    let caches =
        NsaCaches { spec: &spec, gate: slice(&gate), cmp: cmp.view, slc: slc.view, win: win.view };
    nsa_rows(&step.rows(), &caches, slice(&out), indices.as_ref().map(slice)).map_err(value_error)
}

/// Writes `out` `[R, H, V]`.
#[pyfunction]
#[pyo3(name = "dense_rows", signature = (stream, scale, window, q, at, pages, out))]
pub fn dense<'py>(
    stream: u64,
    scale: f64,
    window: Option<usize>,
    q: Bound<'py, PyAny>,
    at: PyRows<'py>,
    pages: PyPages<'py>,
    out: Bound<'py, PyAny>,
) -> PyResult<()> {
    let mask = mask(window)?;
    let q = Tensor::read("q", &q)?;
    let pages = Cache::read(&PAGES, &pages, &q, at.2)?;
    let step = Step::read(stream, scale, q, &at, &pages)?;
    step.expect_dims("pages.k", &pages)?;
    let out = step.out(&out)?;
    dense_rows(&step.rows(), mask, &pages.view, slice(&out)).map_err(value_error)
}

/// A storage type by PyTorch's name.
fn dtype(name: &str) -> PyResult<DType> {
    [DType::F32, DType::Bf16, DType::F16]
        .into_iter()
        .find(|dtype| dtype.name() == name)
        .ok_or_else(|| refuse("dtype", format!("{name}, expected float32, bfloat16 or float16")))
}

/// What both caches know.
struct Owner {
    ordinal: usize,
    stream: u64,
    dims: Dims,
    dtype: DType,
}

impl Owner {
    /// Refuses tensors that are not this cache's, and another stream than it was made on: its
    /// memory is written and freed in that stream's order.
    fn check(&self, stream: u64, tensors: &[&Tensor]) -> PyResult<()> {
        for tensor in tensors {
            tensor.expect(Device::Cuda(self.ordinal), self.dtype, "this cache")?;
        }
        if stream != self.stream {
            return Err(refuse("stream", "another than the one this cache was first used on"));
        }
        Ok(())
    }

    fn new(ordinal: usize, stream: u64, dims: [usize; 4], name: &str) -> PyResult<(Self, Plan)> {
        let (dims, dtype) = (head_dims(dims)?, dtype(name)?);
        let plan = Stream::get(ordinal, stream)?.plan_of(dims, dtype)?;
        Ok((Owner { ordinal, stream, dims, dtype }, plan))
    }
}

/// `tercet_attention::cuda::decode::NsaCache` for Python.
#[pyclass(name = "CudaNsaCache", module = "tercet._native")]
pub struct PyCudaNsaCache {
    owner: Owner,
    count: usize,
    cache: NsaCache,
}

#[pymethods]
impl PyCudaNsaCache {
    #[new]
    fn new(
        ordinal: usize,
        stream: u64,
        spec: SpecNumbers,
        dims: [usize; 4],
        dtype: &str,
        sequences: usize,
        capacity: usize,
    ) -> PyResult<Self> {
        let spec = call::spec(spec)?;
        let (owner, plan) = Owner::new(ordinal, stream, dims, dtype)?;
        let cache = NsaCache::new(&plan, &spec, sequences, capacity).map_err(value_error)?;
        Ok(Self { owner, count: spec.select_count, cache })
    }

    fn len(&self, sequence: usize) -> usize {
        self.cache.len(sequence)
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    #[getter]
    fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Appends c tokens of a sequence, writes `out` `[c, H, V]` and `indices` `[c, K, S]`.
    fn extend<'py>(
        &mut self,
        stream: u64,
        sequence: usize,
        scale: f64,
        inputs: [Bound<'py, PyAny>; 8],
        out: Bound<'py, PyAny>,
        indices: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let scale = call::scale(scale)?;
        let read = self.read(stream, &inputs, ["[c, H, D]", "[n, K, D]", "[c, H, 3]"])?;
        let (out, indices) = self.outputs(&read[0], &out, &indices)?;
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = read.each_ref().map(slice);
        let step = NsaStep { scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
        self.cache.extend(sequence, &step, slice(&out), Some(slice(&indices))).map_err(value_error)
    }

    /// Hands over raw tokens of the compression branch; see [`NsaCache::prime`].
    fn prime<'py>(
        &self,
        stream: u64,
        sequence: usize,
        k: Bound<'py, PyAny>,
        v: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let Dims { kv_heads, key_dim, value_dim, .. } = self.owner.dims;
        let k = rows("k_cmp", &k, [kv_heads, key_dim], "[c, K, D]")?;
        let v = rows("v_cmp", &v, [kv_heads, value_dim], "[c, K, V]")?;
        v.expect_shape(&[k.shape()[0], kv_heads, value_dim], "[c, K, V]")?;
        self.owner.check(stream, &[&k, &v])?;
        self.cache.prime(sequence, slice(&k), slice(&v)).map_err(value_error)
    }

    /// One token of every sequence; see [`NsaCache::step`].
    #[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
    fn step<'py>(
        &self,
        stream: u64,
        scale: f64,
        positions: Bound<'py, PyAny>,
        inputs: [Bound<'py, PyAny>; 8],
        turns: Option<Bound<'py, PyAny>>,
        out: Bound<'py, PyAny>,
        indices: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let scale = call::scale(scale)?;
        let read = self.read(stream, &inputs, ["[B, H, D]", "[B, K, D]", "[B, H, 3]"])?;
        let device = read[0].device();
        let count = read[0].shape()[0];
        for tensor in &read {
            let shape = [count, tensor.shape()[1], tensor.shape()[2]];
            tensor.expect_shape(&shape, "one token of each sequence")?;
        }
        let positions = Tensor::read("positions", &positions)?;
        positions.expect(device, DType::I32, "every list of positions")?;
        positions.expect_shape(&[count], "[B]")?;
        let turns = turns.map(|turns| Tensor::read("turns", &turns)).transpose()?;
        if let Some(turns) = &turns {
            turns.expect(device, DType::F32, "cosines and sines")?;
            let [known, ..] = turns.dims::<3>("[positions, 2, D/2]")?;
            let shape = [known, 2, self.owner.dims.key_dim / 2];
            turns.expect_shape(&shape, "[positions, 2, D/2]")?;
            if known < self.cache.capacity() {
                let (got, want) = (known, self.cache.capacity());
                return Err(refuse("turns", format!("{got} positions, expected {want}")));
            }
        }
        let (out, indices) = self.outputs(&read[0], &out, &indices)?;
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = read.each_ref().map(slice);
        let token = NsaToken {
            scale,
            positions: slice(&positions),
            q,
            k_cmp,
            v_cmp,
            ready: None,
            sequences: None,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gate,
            turns: turns.as_ref().map(slice),
        };
        self.cache.step(&token, slice(&out), Some(slice(&indices))).map_err(value_error)
    }

    /// Notes that each sequence of `active` holds one token more.
    fn advance(&mut self, active: Vec<usize>) -> PyResult<()> {
        self.cache.advance(active).map_err(value_error)
    }

    /// Makes room for so many tokens of each sequence.
    fn reserve(&mut self, tokens: usize) -> PyResult<()> {
        self.cache.reserve(tokens).map_err(value_error)
    }
}

impl PyCudaNsaCache {
    fn read<'py>(
        &self,
        stream: u64,
        inputs: &[Bound<'py, PyAny>; 8],
        [of_q, of_cmp, of_gate]: [&str; 3],
    ) -> PyResult<[Tensor<'py>; 8]> {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.owner.dims;
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = inputs;
        let (k, v) = ([kv_heads, key_dim], [kv_heads, value_dim]);
        let read = [
            rows("q", q, [heads, key_dim], of_q)?,
            rows("k_cmp", k_cmp, k, of_cmp)?,
            rows("v_cmp", v_cmp, v, of_cmp)?,
            rows("k_slc", k_slc, k, "[c, K, D]")?,
            rows("v_slc", v_slc, v, "[c, K, V]")?,
            rows("k_win", k_win, k, "[c, K, D]")?,
            rows("v_win", v_win, v, "[c, K, V]")?,
            rows("gate", gate, [heads, 3], of_gate)?,
        ];
        self.owner.check(stream, &read.each_ref())?;
        Ok(read)
    }

    fn outputs<'py>(
        &self,
        q: &Tensor,
        out: &Bound<'py, PyAny>,
        indices: &Bound<'py, PyAny>,
    ) -> PyResult<(Tensor<'py>, Tensor<'py>)> {
        let Dims { heads, kv_heads, value_dim, .. } = self.owner.dims;
        let count = q.shape()[0];
        let out = Tensor::read("out", out)?;
        out.expect_like(q)?;
        out.expect_shape(&[count, heads, value_dim], "[c, H, V]")?;
        let indices = Tensor::read("indices", indices)?;
        indices.expect(q.device(), DType::I32, "every choice of blocks")?;
        indices.expect_shape(&[count, kv_heads, self.count], "[c, K, S]")?;
        Ok((out, indices))
    }
}

/// `tercet_attention::cuda::decode::DenseCache` for Python.
#[pyclass(name = "CudaDenseCache", module = "tercet._native")]
pub struct PyCudaDenseCache {
    owner: Owner,
    cache: DenseCache,
}

#[pymethods]
impl PyCudaDenseCache {
    #[new]
    #[pyo3(signature = (ordinal, stream, dims, dtype, window, sequences, capacity))]
    fn new(
        ordinal: usize,
        stream: u64,
        dims: [usize; 4],
        dtype: &str,
        window: Option<usize>,
        sequences: usize,
        capacity: usize,
    ) -> PyResult<Self> {
        let mask = mask(window)?;
        let (owner, plan) = Owner::new(ordinal, stream, dims, dtype)?;
        let cache = DenseCache::new(&plan, mask, sequences, capacity).map_err(value_error)?;
        Ok(Self { owner, cache })
    }

    fn len(&self, sequence: usize) -> usize {
        self.cache.len(sequence)
    }

    #[getter]
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Appends c tokens of a sequence and writes `out` `[c, H, V]`.
    fn extend<'py>(
        &mut self,
        stream: u64,
        sequence: usize,
        scale: f64,
        inputs: [Bound<'py, PyAny>; 3],
        out: Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let scale = call::scale(scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = self.owner.dims;
        let [q, k, v] = &inputs;
        let q = rows("q", q, [heads, key_dim], "[c, H, D]")?;
        let count = q.shape()[0];
        let k = rows("k", k, [kv_heads, key_dim], "[c, K, D]")?;
        let v = rows("v", v, [kv_heads, value_dim], "[c, K, V]")?;
        let out = rows("out", &out, [heads, value_dim], "[c, H, V]")?;
        k.expect_shape(&[count, kv_heads, key_dim], "[c, K, D]")?;
        v.expect_shape(&[count, kv_heads, value_dim], "[c, K, V]")?;
        out.expect_shape(&[count, heads, value_dim], "[c, H, V]")?;
        self.owner.check(stream, &[&q, &k, &v, &out])?;
        let [q, k, v, out]: [Slice; 4] = [&q, &k, &v, &out].map(slice);
        self.cache.extend(sequence, scale, [q, k, v], out).map_err(value_error)
    }
}
