//! One layer's caches on a GPU, of one sequence or some.

use tercet_attention::NsaSpec;
use tercet_tensor::caches::{DenseCache, NsaBlocks, NsaCache, NsaNew, Pages, Partial, Rows};
use tercet_tensor::{Compressor, DType, Device, Gpu, Mask, Tape, Tensor, ops};

use crate::Result;
use crate::batch::{block_starts, tensor_i32};
use crate::cache::{Blocks, NsaNew as New};
use crate::config::ModelConfig;

/// Sequences of a layer's caches, and tokens of each: those there is room for at first, where
/// caches grow by doubling, or the most there may be, where all layers share pages.
#[derive(Clone, Copy)]
pub(crate) struct Room<'a> {
    pub sequences: usize,
    pub tokens: usize,
    pub pages: Option<&'a Pages>,
}

impl Room<'_> {
    /// What a cache of one sequence begins with.
    pub const ONE: Self = Self { sequences: 1, tokens: 1024, pages: None };
}

/// Keys and values of a dense layer.
pub(crate) struct CudaDense {
    cache: DenseCache,
    /// A window's ring, which steps of a longer sequence than it was made for do not fit.
    window: bool,
}

impl CudaDense {
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        dtype: DType,
        mask: Mask,
        room: Room,
    ) -> Result<Self> {
        let dims = config.dims();
        let cache = match room.pages {
            Some(pages) if mask == Mask::Causal => DenseCache::paged(gpu, dtype, dims, pages)?,
            _ => DenseCache::new(gpu, dtype, (mask, dims), room.sequences, room.tokens)?,
        };
        Ok(Self { cache, window: mask != Mask::Causal })
    }

    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Appends q, k, v `[c, …]` to a sequence; returns the output `[c, H, V]`.
    pub fn extend(&mut self, sequence: usize, qkv: [&Tensor; 3]) -> Result<Tensor> {
        Ok(self.cache.extend(sequence, qkv)?)
    }

    /// Whether [`CudaDense::step`] serves a sequence that grows.
    pub fn can_be_captured(&self) -> bool {
        !self.window
    }

    /// Makes room for `tokens` tokens, for steps from here on; returns how many there is room for.
    pub fn prepare(&mut self, tokens: usize) -> Result<usize> {
        self.cache.reserve(tokens)?;
        Ok(self.cache.capacity())
    }

    /// Appends a token of n sequences, q, k, v `[n, …]`; returns the output `[n, H, V]`. For a
    /// capture.
    pub fn step(&self, rows: Rows, qkv: [&Tensor; 3]) -> Result<Tensor> {
        Ok(self.cache.step(rows, qkv)?)
    }

    /// Notes that a captured step was launched.
    pub fn advance(&mut self, sequences: &[usize]) -> Result<()> {
        Ok(self.cache.advance(sequences.iter().copied())?)
    }

    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        Ok(self.cache.clear(sequence)?)
    }

    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        Ok(self.cache.copy(from, to, partial)?)
    }
}

/// Of one sequence, what no compressed block is made of yet.
#[derive(Clone, Default)]
struct Tail {
    /// Compressed blocks made.
    blocks: usize,
    /// Raw keys and values `[t, K, _]` from the first token of the next block on.
    raw: Option<[Tensor; 2]>,
}

/// Keys and values of an NSA layer.
pub(crate) struct CudaNsa {
    cache: NsaCache,
    spec: NsaSpec,
    device: Device,
    dtype: DType,
    tails: Vec<Tail>,
    /// What each row of the last step, or the last token of the last chunk, selected: I32
    /// `[sequences, K, S]` at a fixed place; where sequences share pages.
    chosen: Option<Tensor>,
}

impl CudaNsa {
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        spec: &NsaSpec,
        dtype: DType,
        room: Room,
    ) -> Result<Self> {
        let (dims, device) = (config.dims(), Device::Cuda(gpu.clone()));
        let (cache, chosen) = match room.pages {
            None => (NsaCache::new(gpu, dtype, (spec, dims), room.sequences, room.tokens)?, None),
            Some(pages) => {
                let shape = [room.sequences, dims.kv_heads, spec.select_count];
                let chosen = Tensor::zeros_on(&device, DType::I32, &shape)?;
                (NsaCache::paged(gpu, dtype, (spec, dims), pages)?, Some(chosen))
            }
        };
        let tails = vec![Tail::default(); room.sequences];
        Ok(Self { cache, spec: spec.clone(), device, dtype, tails, chosen })
    }

    /// What a row of the last step selected, `[K, S]`, or of a chunk its last token, row 0; read
    /// from the device.
    pub fn chosen(&self, row: usize) -> Result<Option<Vec<i32>>> {
        let Some(chosen) = &self.chosen else { return Ok(None) };
        let all = chosen.to_device(&Device::Cpu)?;
        let width = all.len() / all.shape()[0];
        Ok(all.as_i32()?.chunks_exact(width).nth(row).map(<[i32]>::to_vec))
    }

    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Passes a sequence's raw compression keys and values `[c, K, _]` through φ; returns the
    /// completed blocks.
    pub fn compress(
        &mut self,
        sequence: usize,
        config: &ModelConfig,
        raw: [&Tensor; 2],
        phi: [&ops::Phi; 2],
    ) -> Result<Blocks> {
        let tail = &mut self.tails[sequence];
        let joined = match &tail.raw {
            None => raw.map(Tensor::clone),
            Some([k, v]) => [k.append_rows(raw[0])?, v.append_rows(raw[1])?],
        };
        let rows = joined[0].shape()[0];
        let blocks = self.spec.compressed_blocks(rows);
        let first = tail.blocks;
        let starts = tensor_i32(&self.device, block_starts(&self.spec, first, blocks).collect())?;
        let dims = config.dims();
        if blocks == 0 {
            let none = |dim| Tensor::zeros_on(&self.device, self.dtype, &[0, dims.kv_heads, dim]);
            let (k, v) = (none(dims.key_dim)?, none(dims.value_dim)?);
            tail.raw = Some(joined);
            return Ok(Blocks { k, v, starts, counts: vec![0] });
        }
        let tape = &mut Tape::inference();
        let mut made = Vec::with_capacity(2);
        for (x, phi) in joined.iter().zip(phi) {
            let x = tape.leaf(x.clone());
            let y = ops::compress(tape, &x, phi, &self.spec, &[0, rows as i32])?;
            made.push(y.value().clone());
        }
        let rest = blocks * self.spec.compress_stride..rows;
        let [k, v] = joined;
        tail.raw = Some([k.rows(rest.clone())?, v.rows(rest)?]);
        tail.blocks += blocks;
        let v = made.pop().ok_or_else(crate::cache::mismatch)?;
        let k = made.pop().ok_or_else(crate::cache::mismatch)?;
        Ok(Blocks { k, v, starts, counts: vec![blocks] })
    }

    /// Appends new tokens to a sequence; returns the output `[c, H, V]`.
    pub fn extend(&mut self, sequence: usize, new: &New) -> Result<Tensor> {
        Ok(self.cache.extend(sequence, &device_new(new), self.chosen.as_ref())?)
    }

    /// Makes room for `tokens` tokens, for steps from here on; returns how many there is room for.
    pub fn prepare(&mut self, tokens: usize) -> Result<usize> {
        self.cache.reserve(tokens)?;
        Ok(self.cache.capacity())
    }

    /// Hands a sequence's raw rows over to where steps read them: from here on it takes steps only.
    pub fn prime(&mut self, sequence: usize) -> Result<()> {
        if let Some([k, v]) = self.tails[sequence].raw.take() {
            self.cache.prime(sequence, &k, &v)?;
        }
        Ok(())
    }

    /// Appends a token of n sequences, whose compression rows are raw, averaged on the device.
    pub fn step_mean(&self, rows: Rows, new: &New, turns: Option<&Tensor>) -> Result<Tensor> {
        let blocks = NsaBlocks::Mean { turns };
        Ok(self.cache.step(rows, &device_new(new), &blocks, self.chosen.as_ref())?)
    }

    /// Takes the raw compression rows of n sequences; returns the last l of each `[n·l, K, _]`,
    /// from the positions `starts` on, of which a φ with parameters makes blocks.
    pub fn tails(&self, rows: Rows, starts: &Tensor, raw: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        Ok(self.cache.tails(rows, starts, raw, self.spec.compress_block)?)
    }

    /// Appends a token of n sequences with its compressed blocks; `numbers` are theirs.
    pub fn step_ready(&self, rows: Rows, new: &New, numbers: &Tensor) -> Result<Tensor> {
        let blocks = NsaBlocks::Ready { numbers };
        Ok(self.cache.step(rows, &device_new(new), &blocks, self.chosen.as_ref())?)
    }

    /// Whether blocks are averages, which steps make themselves.
    pub fn is_mean(&self) -> bool {
        self.spec.compressor == Compressor::Mean
    }

    /// Notes that a captured step was launched.
    pub fn advance(&mut self, sequences: &[usize]) -> Result<()> {
        Ok(self.cache.advance(sequences.iter().copied())?)
    }

    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        self.tails[sequence] = Tail::default();
        Ok(self.cache.clear(sequence)?)
    }

    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        self.tails[to] = self.tails[from].clone();
        Ok(self.cache.copy(from, to, partial)?)
    }
}

fn device_new<'a>(new: &New<'a>) -> NsaNew<'a> {
    let New { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate } = *new;
    NsaNew { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate }
}
