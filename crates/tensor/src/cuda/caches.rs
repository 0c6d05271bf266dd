//! Caches for decoding on a device, in tensors: see `tercet_attention::cuda::decode`.

use tercet_attention::cuda::decode::{self, NsaStep, NsaToken};
use tercet_attention::cuda::{Plan, Slice};
use tercet_attention::{Dims, NsaSpec};
use tercet_cuda::Gpu;

use super::{at, number, stale};
use crate::{DType, Error, Mask, Result, Tensor};

pub use tercet_attention::cuda::decode::Partial;

const OP: &str = "cache";

/// A tensor's numbers, for calls whose work is enqueued before the tensor is dropped.
fn slice(tensor: &Tensor) -> Result<Slice> {
    // SAFETY: memory is freed in the stream's order, so after all work enqueued until then.
    Ok(unsafe { Slice::new(at(tensor)?, tensor.len()) })
}

/// The pages of all layers' caches; see [`decode::Pages`]. Clones are the same pages.
#[derive(Clone)]
pub struct Pages(decode::Pages);

impl Pages {
    /// Tokens, or compressed blocks, of a page.
    pub const ROWS: usize = decode::Pages::ROWS;

    /// Pages of `tokens`·64 tokens together, for `sequences` sequences of at most `capacity`
    /// tokens each.
    pub fn new(
        gpu: &Gpu,
        spec: Option<&NsaSpec>,
        [sequences, capacity]: [usize; 2],
        tokens: usize,
    ) -> Result<Self> {
        let pages = decode::Pages::new(gpu, spec, [sequences, capacity], tokens);
        Ok(Self(pages.map_err(Error::attention(OP))?))
    }

    /// How many pages of tokens and of compressed blocks [`Pages::new`] makes.
    pub fn counts(spec: Option<&NsaSpec>, sequences: [usize; 2], tokens: usize) -> [usize; 2] {
        decode::Pages::counts(spec, sequences, tokens)
    }

    /// Bytes of the tables that [`Pages::new`] makes.
    pub fn table_bytes(spec: Option<&NsaSpec>, sequences: [usize; 2]) -> usize {
        decode::Pages::table_bytes(spec, sequences)
    }

    /// Bytes of the tables.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Pages of tokens that no sequence holds.
    pub fn free(&self) -> usize {
        self.0.free()
    }

    /// Gives each of some sequences the pages for so many tokens: all, or none and an error.
    pub fn reserve(&self, wants: &[(usize, usize)]) -> Result<()> {
        self.0.reserve(wants).map_err(Error::attention(OP))
    }

    /// Sequence `to` becomes a copy of the `tokens` tokens of `from`, as far as pages go; an error
    /// changes nothing.
    pub fn copy(&self, from: usize, to: usize, tokens: usize) -> Result<Partial> {
        self.0.copy(from, to, tokens).map_err(Error::attention(OP))
    }

    /// Takes a sequence's pages back.
    pub fn clear(&self, sequence: usize) -> Result<()> {
        self.0.clear(sequence).map_err(Error::attention(OP))
    }
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

    /// Empty caches of sequences that take `pages` as they grow.
    pub fn paged(
        gpu: &Gpu,
        dtype: DType,
        (spec, dims): (&NsaSpec, Dims),
        pages: &Pages,
    ) -> Result<Self> {
        let plan = Plan::new(gpu, dims, number(dtype)).map_err(Error::attention(OP))?;
        let cache = decode::NsaCache::paged(&plan, spec, &pages.0);
        Ok(Self { gpu: gpu.clone(), dims, dtype, cache: cache.map_err(Error::attention(OP))? })
    }

    /// Rows of keys and values that a sequence of at most `capacity` tokens takes beside its pages.
    pub fn ring_rows(spec: &NsaSpec, capacity: usize) -> usize {
        decode::NsaCache::ring_rows(spec, capacity)
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

    /// Appends c tokens of a sequence; returns their output `[c, H, V]`. Grows as needed, but for
    /// pages. The blocks that the last token selects become the first row of `chosen`, I32
    /// `[≥ 1, K, S]`.
    pub fn extend(
        &mut self,
        sequence: usize,
        new: &NsaNew,
        chosen: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (dims, count) = (self.dims, new.q.shape()[0]);
        let out = stale(&self.gpu, self.dtype, &[count, dims.heads, dims.value_dim])?;
        let each = match chosen {
            Some(chosen) => {
                Some(stale(&self.gpu, DType::I32, &[&[count], &chosen.shape()[1..]].concat())?)
            }
            None => None,
        };
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
        let indices = each.as_ref().map(slice).transpose()?;
        let done = self.cache.extend(sequence, &step, slice(&out)?, indices);
        done.map_err(Error::attention(OP))?;
        if let (Some(each), Some(chosen)) = (&each, chosen)
            && count > 0
        {
            let row = first_rows(chosen, 1)?;
            let bytes = row.len() * size_of::<i32>();
            // SAFETY: the last of `count` rows, and the first of another tensor.
            unsafe { self.gpu.copy(row.ptr(), at(each)? + ((count - 1) * bytes) as u64, bytes)? };
        }
        Ok(out)
    }

    /// Hands over the raw rows of the compression branch `[c, K, _]` that stand right before a
    /// sequence's next position; [`NsaCache::step`] needs them after [`NsaCache::extend`].
    pub fn prime(&self, sequence: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.cache.prime(sequence, slice(k)?, slice(v)?).map_err(Error::attention(OP))
    }

    /// Appends one token of n sequences; returns their output `[n, H, V]`. Can be captured;
    /// [`NsaCache::advance`] then tells of each launch. The blocks that each row selects become the
    /// first rows of `chosen`, I32 `[≥ n, K, S]`, −1 where a row rests.
    pub fn step(
        &self,
        rows: Rows,
        new: &NsaNew,
        blocks: &NsaBlocks,
        chosen: Option<&Tensor>,
    ) -> Result<Tensor> {
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
        let indices = chosen.map(|chosen| first_rows(chosen, count)).transpose()?;
        self.cache.step(&token, slice(&out)?, indices).map_err(Error::attention(OP))?;
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

    /// What sequence `from` holds becomes what `to` holds, too; `partial` is what [`Pages::copy`]
    /// left to do.
    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        self.cache.copy(from, to, partial).map_err(Error::attention(OP))
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

/// The first rows of a tensor of integers.
fn first_rows(tensor: &Tensor, rows: usize) -> Result<Slice> {
    let held = tensor.shape().first().copied().unwrap_or(0);
    if tensor.dtype() != DType::I32 || rows > held {
        let expected = format!("at least {rows} rows of i32");
        return Err(Error::shape(OP, "the chosen blocks", expected, tensor.shape()));
    }
    let len = tensor.len() / held.max(1) * rows;
    // SAFETY: inside the tensor; as in `slice`.
    Ok(unsafe { Slice::new(at(tensor)?, len) })
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

    /// Empty causal caches of sequences that take `pages` as they grow.
    pub fn paged(gpu: &Gpu, dtype: DType, dims: Dims, pages: &Pages) -> Result<Self> {
        let plan = Plan::new(gpu, dims, number(dtype)).map_err(Error::attention(OP))?;
        let cache = decode::DenseCache::paged(&plan, &pages.0);
        Ok(Self { gpu: gpu.clone(), dims, dtype, cache: cache.map_err(Error::attention(OP))? })
    }

    /// As [`NsaCache::ring_rows`].
    pub fn ring_rows(mask: Mask, capacity: usize) -> usize {
        decode::DenseCache::ring_rows(mask, capacity)
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

    /// What sequence `from` holds becomes what `to` holds, too; `partial` is what [`Pages::copy`]
    /// left to do.
    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        self.cache.copy(from, to, partial).map_err(Error::attention(OP))
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
