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
    /// `[n, K, D]`, for [`NsaCache::step`] raw, or ready, `[c, K, D]`.
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

    /// Appends one token of n sequences; returns their output `[n, H, V]`. Can be captured;
    /// [`NsaCache::advance`] then tells of each launch.
    pub fn step(&self, rows: Rows, new: &NsaNew, blocks: &NsaBlocks) -> Result<Tensor> {
        let (dims, count) = (self.dims, new.q.shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let (ready, turns) = match *blocks {
            NsaBlocks::Mean { turns } => (None, turns),
            NsaBlocks::Ready { numbers } => (Some(slice(numbers)?), None),
        };
        let token = NsaToken {
            scale: dims.scale(),
            positions: slice(rows.positions)?,
            sequences: Some(slice(rows.sequences)?),
            q: slice(new.q)?,
            k_cmp: slice(new.k_cmp)?,
            v_cmp: slice(new.v_cmp)?,
            ready,
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

    /// Takes one raw token of the compression branch of n sequences, k `[n, K, D]` and v
    /// `[n, K, V]`; returns the last l of each, `[n·l, K, _]`, from its position of `starts` (I32
    /// `[n]`) on: what a φ with parameters makes a block of. Can be captured.
    pub fn tails(
        &self,
        at: Rows,
        starts: &Tensor,
        [k, v]: [&Tensor; 2],
        length: usize,
    ) -> Result<[Tensor; 2]> {
        let (dims, rows) = (self.dims, k.shape()[0] * length);
        let side = |dim| stale(&self.gpu, self.dtype, &[rows, dims.kv_heads, dim]);
        let to = [side(dims.key_dim)?, side(dims.value_dim)?];
        let done = self.cache.tails(
            slice(at.positions)?,
            Some(slice(at.sequences)?),
            slice(starts)?,
            [slice(k)?, slice(v)?],
            [slice(&to[0])?, slice(&to[1])?],
        );
        done.map_err(Error::attention(OP))?;
        Ok(to)
    }

    /// Notes that a captured [`NsaCache::step`] was launched: each of `sequences` holds a token
    /// more.
    pub fn advance(&mut self, sequences: impl IntoIterator<Item = usize>) -> Result<()> {
        self.cache.advance(sequences).map_err(Error::attention(OP))
    }

    /// Forgets what a sequence holds.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        self.cache.clear(sequence).map_err(Error::attention(OP))
    }

    /// What sequence `from` holds becomes what `to` holds, too.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        self.cache.copy(from, to).map_err(Error::attention(OP))
    }
}

/// Where the rows of a step stand, on the device.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Each row's position, I32 `[n]`; −1: the row rests, and its output is 0.
    pub positions: &'a Tensor,
    /// Each row's sequence, I32 `[n]`, all different.
    pub sequences: &'a Tensor,
}

/// Where the compressed blocks of a step come from.
#[derive(Clone, Copy)]
pub enum NsaBlocks<'a> {
    /// Raw tokens are averaged on the device, keys turned by `turns` (f32 `[positions, 2, D/2]`).
    Mean {
        /// Cosines and sines; `None` leaves keys as they are.
        turns: Option<&'a Tensor>,
    },
    /// They were made before, by another φ.
    Ready {
        /// Their numbers, I32 `[n]`; −1: the row has none.
        numbers: &'a Tensor,
    },
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

    /// Appends one token of n sequences; returns their output `[n, H, V]`. Can be captured;
    /// [`DenseCache::advance`] then tells of each launch.
    pub fn step(&self, rows: Rows, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let (dims, count) = (self.dims, qkv[0].shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let [q, k, v] = qkv;
        let slices = [slice(q)?, slice(k)?, slice(v)?];
        let rows = (slice(rows.positions)?, Some(slice(rows.sequences)?));
        let done = self.cache.step(dims.scale(), rows, slices, slice(&out)?);
        done.map_err(Error::attention(OP))?;
        Ok(out)
    }

    /// Notes that a captured [`DenseCache::step`] was launched: each of `sequences` holds a token
    /// more.
    pub fn advance(&mut self, sequences: impl IntoIterator<Item = usize>) -> Result<()> {
        self.cache.advance(sequences).map_err(Error::attention(OP))
    }

    /// Forgets what a sequence holds.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        self.cache.clear(sequence).map_err(Error::attention(OP))
    }

    /// What sequence `from` holds becomes what `to` holds, too.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        self.cache.copy(from, to).map_err(Error::attention(OP))
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
