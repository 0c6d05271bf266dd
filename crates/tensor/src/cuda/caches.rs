//! Caches for decoding on a device, in tensors: see `tercet_attention::cuda::decode`.

use tercet_attention::cuda::decode::{self, NsaStep, NsaToken};
use tercet_attention::cuda::{Plan, Slice};
use tercet_attention::{Dims, NsaSpec};
use tercet_cuda::Gpu;

use super::{at, number, stale};
use crate::{DType, Error, Mask, Result, Tensor};

const OP: &str = "cache";

/// A tensor's numbers, for calls whose work is enqueued before the tensor is dropped.
fn slice(tensor: &Tensor) -> Result<Slice> {
    // SAFETY: memory is freed in the stream's order, so after all work enqueued until then.
    Ok(unsafe { Slice::new(at(tensor)?, tensor.len()) })
}

/// One layer's NSA caches of some sequences.
pub struct NsaCache {
    gpu: Gpu,
    dims: Dims,
    dtype: DType,
    cache: decode::NsaCache,
}

/// New tokens of one layer.
#[derive(Clone, Copy)]
pub struct NsaNew<'a> {
    /// `[c, H, D]`.
    pub q: &'a Tensor,
    /// Keys of the compressed branch: for [`NsaCache::extend`] the blocks these tokens complete
    /// `[n, K, D]`, for [`NsaCache::step`] raw `[c, K, D]`.
    pub k_cmp: &'a Tensor,
    /// Its values, `[n, K, V]` or `[c, K, V]`.
    pub v_cmp: &'a Tensor,
    /// `[c, K, D]`.
    pub k_slc: &'a Tensor,
    /// `[c, K, V]`.
    pub v_slc: &'a Tensor,
    /// `[c, K, D]`.
    pub k_win: &'a Tensor,
    /// `[c, K, V]`.
    pub v_win: &'a Tensor,
    /// `[c, H, 3]`.
    pub gate: &'a Tensor,
}

impl NsaCache {
    /// Empty caches of `sequences` sequences with room for `capacity` tokens each.
    pub fn new(
        gpu: &Gpu,
        dtype: DType,
        (spec, dims): (&NsaSpec, Dims),
        sequences: usize,
        capacity: usize,
    ) -> Result<Self> {
        let plan = Plan::new(gpu, dims, number(dtype)).map_err(Error::attention(OP))?;
        let cache = decode::NsaCache::new(&plan, spec, sequences, capacity);
        Ok(Self { gpu: gpu.clone(), dims, dtype, cache: cache.map_err(Error::attention(OP))? })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Tokens of a sequence that fit without growing.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Makes room for `tokens` tokens of each sequence.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.cache.reserve(tokens).map_err(Error::attention(OP))
    }

    /// Appends c tokens of a sequence; returns their output `[c, H, V]`. Grows as needed.
    pub fn extend(&mut self, sequence: usize, new: &NsaNew) -> Result<Tensor> {
        let (dims, count) = (self.dims, new.q.shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let step = NsaStep {
            scale: dims.scale(),
            q: slice(new.q)?,
            k_cmp: slice(new.k_cmp)?,
            v_cmp: slice(new.v_cmp)?,
            k_slc: slice(new.k_slc)?,
            v_slc: slice(new.v_slc)?,
            k_win: slice(new.k_win)?,
            v_win: slice(new.v_win)?,
            gate: slice(new.gate)?,
        };
        let done = self.cache.extend(sequence, &step, slice(&out)?, None);
        done.map_err(Error::attention(OP))?;
        Ok(out)
    }

    /// Hands over the raw rows of the compression branch `[c, K, _]` that stand right before a
    /// sequence's next position; [`NsaCache::step`] needs them after [`NsaCache::extend`].
    pub fn prime(&self, sequence: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.cache.prime(sequence, slice(k)?, slice(v)?).map_err(Error::attention(OP))
    }

    /// Appends one token of every sequence at `positions` (I32 `[B]`, on the device); returns their
    /// output `[B, H, V]`. Can be captured; [`NsaCache::advance`] then tells of each launch. Blocks
    /// are averaged on the device; `turns` (f32 `[positions, 2, D/2]`) rotates their keys.
    pub fn step(&self, positions: &Tensor, new: &NsaNew, turns: Option<&Tensor>) -> Result<Tensor> {
        let (dims, count) = (self.dims, new.q.shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let token = NsaToken {
            scale: dims.scale(),
            positions: slice(positions)?,
            q: slice(new.q)?,
            k_cmp: slice(new.k_cmp)?,
            v_cmp: slice(new.v_cmp)?,
            k_slc: slice(new.k_slc)?,
            v_slc: slice(new.v_slc)?,
            k_win: slice(new.k_win)?,
            v_win: slice(new.v_win)?,
            gate: slice(new.gate)?,
            turns: turns.map(slice).transpose()?,
        };
        self.cache.step(&token, slice(&out)?, None).map_err(Error::attention(OP))?;
        Ok(out)
    }

    /// Notes that a captured [`NsaCache::step`] was launched: every sequence holds a token more.
    pub fn advance(&mut self, sequences: usize) -> Result<()> {
        self.cache.advance(0..sequences).map_err(Error::attention(OP))
    }
}

/// One layer's dense (or window) caches of some sequences.
pub struct DenseCache {
    gpu: Gpu,
    dims: Dims,
    dtype: DType,
    cache: decode::DenseCache,
}

impl DenseCache {
    /// Empty caches of `sequences` sequences with room for `capacity` tokens each.
    pub fn new(
        gpu: &Gpu,
        dtype: DType,
        (mask, dims): (Mask, Dims),
        sequences: usize,
        capacity: usize,
    ) -> Result<Self> {
        let plan = Plan::new(gpu, dims, number(dtype)).map_err(Error::attention(OP))?;
        let cache = decode::DenseCache::new(&plan, mask, sequences, capacity);
        Ok(Self { gpu: gpu.clone(), dims, dtype, cache: cache.map_err(Error::attention(OP))? })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Tokens of a sequence that fit without growing.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Makes room for `tokens` tokens of each sequence.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.cache.reserve(tokens).map_err(Error::attention(OP))
    }

    /// Appends one token of every sequence at `positions` (I32 `[B]`, on the device); returns their
    /// output `[B, H, V]`. Can be captured; [`DenseCache::advance`] then tells of each launch.
    pub fn step(&self, positions: &Tensor, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let (dims, count) = (self.dims, qkv[0].shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let [q, k, v] = qkv;
        let slices = [slice(q)?, slice(k)?, slice(v)?];
        let done = self.cache.step(dims.scale(), slice(positions)?, slices, slice(&out)?);
        done.map_err(Error::attention(OP))?;
        Ok(out)
    }

    /// Notes that a captured [`DenseCache::step`] was launched: every sequence holds a token more.
    pub fn advance(&mut self, sequences: usize) -> Result<()> {
        self.cache.advance(0..sequences).map_err(Error::attention(OP))
    }

    /// Appends c tokens of a sequence (q `[c, H, D]`, k `[c, K, D]`, v `[c, K, V]`); returns their
    /// output `[c, H, V]`. Grows as needed.
    pub fn extend(&mut self, sequence: usize, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let (dims, count) = (self.dims, qkv[0].shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let [q, k, v] = qkv;
        let slices = [slice(q)?, slice(k)?, slice(v)?];
        let done = self.cache.extend(sequence, dims.scale(), slices, slice(&out)?);
        done.map_err(Error::attention(OP))?;
        Ok(out)
    }
}
