//! One layer's cache on a GPU.

use tercet_attention::NsaSpec;
use tercet_tensor::caches::{DenseCache, NsaCache, NsaNew};
use tercet_tensor::{Compressor, DType, Device, Gpu, Mask, Tape, Tensor, ops};

use crate::Result;
use crate::batch::{block_starts, tensor_i32};
use crate::cache::{Blocks, NsaNew as New};
use crate::config::ModelConfig;

/// Tokens there is room for at first; caches grow by doubling.
const ROOM: usize = 1024;

/// Keys and values of a dense layer.
pub(crate) struct CudaDense {
    cache: DenseCache,
    /// A window's ring, which steps of a longer sequence than it was made for do not fit.
    window: bool,
}

impl CudaDense {
    pub fn new(gpu: &Gpu, config: &ModelConfig, dtype: DType, mask: Mask) -> Result<Self> {
        let cache = DenseCache::new(gpu, dtype, (mask, config.dims()), 1, ROOM)?;
        Ok(Self { cache, window: mask != Mask::Causal })
    }

    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Appends q, k, v `[c, …]`; returns the output `[c, H, V]`.
    pub fn extend(&mut self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        Ok(self.cache.extend(0, qkv)?)
    }

    /// Whether [`CudaDense::step`] serves this layer.
    pub fn can_be_captured(&self) -> bool {
        !self.window
    }

    /// Makes room for `tokens` tokens, for steps from here on; returns how many there is room for.
    pub fn prepare(&mut self, tokens: usize) -> Result<usize> {
        self.cache.reserve(tokens)?;
        Ok(self.cache.capacity())
    }

    /// Appends one token's q, k, v `[1, …]` at `positions` (I32 `[1]`, on the device); returns its
    /// output `[1, H, V]`. For a capture.
    pub fn step(&self, positions: &Tensor, qkv: [&Tensor; 3]) -> Result<Tensor> {
        Ok(self.cache.step(positions, qkv)?)
    }

    /// Notes that a captured step was launched.
    pub fn advance(&mut self) -> Result<()> {
        Ok(self.cache.advance(1)?)
    }
}

/// Keys and values of an NSA layer, and the raw rows that no compressed block is made of yet.
pub(crate) struct CudaNsa {
    cache: NsaCache,
    spec: NsaSpec,
    device: Device,
    dtype: DType,
    /// Compressed blocks made.
    blocks: usize,
    /// Raw keys and values `[t, K, _]` from the first token of the next block on.
    tail: Option<[Tensor; 2]>,
}

impl CudaNsa {
    pub fn new(gpu: &Gpu, config: &ModelConfig, spec: &NsaSpec, dtype: DType) -> Result<Self> {
        let cache = NsaCache::new(gpu, dtype, (spec, config.dims()), 1, ROOM)?;
        let device = Device::Cuda(gpu.clone());
        Ok(Self { cache, spec: spec.clone(), device, dtype, blocks: 0, tail: None })
    }

    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Passes raw compression keys and values `[c, K, _]` through φ; returns the completed blocks.
    pub fn compress(
        &mut self,
        config: &ModelConfig,
        raw: [&Tensor; 2],
        phi: [&ops::Phi; 2],
    ) -> Result<Blocks> {
        let joined = match &self.tail {
            None => raw.map(Tensor::clone),
            Some([k, v]) => [k.append_rows(raw[0])?, v.append_rows(raw[1])?],
        };
        let rows = joined[0].shape()[0];
        let blocks = self.spec.compressed_blocks(rows);
        let first = self.blocks;
        let starts = tensor_i32(&self.device, block_starts(&self.spec, first, blocks).collect())?;
        let dims = config.dims();
        if blocks == 0 {
            let none = |dim| Tensor::zeros_on(&self.device, self.dtype, &[0, dims.kv_heads, dim]);
            let (k, v) = (none(dims.key_dim)?, none(dims.value_dim)?);
            self.tail = Some(joined);
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
        self.tail = Some([k.rows(rest.clone())?, v.rows(rest)?]);
        self.blocks += blocks;
        let v = made.pop().ok_or_else(crate::cache::mismatch)?;
        let k = made.pop().ok_or_else(crate::cache::mismatch)?;
        Ok(Blocks { k, v, starts, counts: vec![blocks] })
    }

    /// Appends new tokens; returns the output `[c, H, V]`.
    pub fn extend(&mut self, new: &New) -> Result<Tensor> {
        Ok(self.cache.extend(0, &device_new(new))?)
    }

    /// Whether [`CudaNsa::step`] serves this layer: blocks are averaged on the device.
    pub fn can_be_captured(&self) -> bool {
        self.spec.compressor == Compressor::Mean
    }

    /// Makes room for `tokens` tokens and hands the raw rows over, for steps from here on; returns
    /// how many tokens there is room for.
    pub fn prepare(&mut self, tokens: usize) -> Result<usize> {
        self.cache.reserve(tokens)?;
        if let Some([k, v]) = self.tail.take() {
            self.cache.prime(0, &k, &v)?;
        }
        Ok(self.cache.capacity())
    }

    /// Appends one token at `positions` (I32 `[1]`, on the device), its compression rows raw;
    /// returns its output `[1, H, V]`. For a capture.
    pub fn step(&self, positions: &Tensor, new: &New, turns: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.cache.step(positions, &device_new(new), turns)?)
    }

    /// Notes that a captured step was launched.
    pub fn advance(&mut self) -> Result<()> {
        Ok(self.cache.advance(1)?)
    }
}

fn device_new<'a>(new: &New<'a>) -> NsaNew<'a> {
    let New { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate } = *new;
    NsaNew { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate }
}
