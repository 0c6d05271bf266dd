//! One sequence's keys and values, layer by layer, so that a new token costs one token.

use half::bf16;
use tercet_attention::cpu::DenseCache;
use tercet_tensor::{DType, Device, FEW_ROWS, Gpu, Tape, Tensor, Var, ops};

use crate::batch::Inputs;
use crate::cache_cpu::{self, NsaLayer};
use crate::cache_cuda::{CudaDense, CudaNsa, Room};
use crate::config::ModelConfig;
use crate::decode_graph::{DecodeGraph, Token};
use crate::decoder::Site;
use crate::{Error, Model, Result};

/// Tokens computed at a time while a prompt is read: enough to fill the matrix units, few enough
/// that activations stay small beside the weights.
const PREFILL_CHUNK: usize = 512;

/// The same on a GPU.
const CUDA_PREFILL_CHUNK: usize = 2048;

/// The same for the beginning of a prompt, times the model's width: some 3 GB of intermediate values.
const CUDA_FIRST_CHUNK: usize = 1 << 26;

/// Tokens beyond the present ones that a captured step has room for.
const AHEAD: usize = 1024;

/// What a model remembers of one sequence.
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) len: usize,
    /// Set while layers are being extended: after an error they disagree.
    pub(crate) broken: bool,
    /// Of the weights that what is held was computed with; see [`Model`].
    stamp: u64,
    /// One token's step on a GPU, captured.
    pub(crate) graph: Option<DecodeGraph>,
}

impl Cache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it takes single tokens only, since the rows that no compressed block is made of yet
    /// are where captured steps read them.
    pub(crate) fn only_steps(&self) -> bool {
        let sparse = self.layers.iter().any(|layer| matches!(layer, LayerCache::CudaNsa(_)));
        sparse && self.graph.is_some()
    }

    /// A copy that goes on by itself: what is held is copied once, without the model. `None` on a
    /// GPU, whose caches are not copied; there the tokens have to be read again.
    pub fn fork(&self) -> Option<Self> {
        let layers = self.layers.iter().map(LayerCache::fork).collect::<Option<Vec<_>>>()?;
        let Self { len, broken, stamp, .. } = *self;
        Some(Self { layers, len, broken, stamp, graph: None })
    }

    /// Bytes of keys and values in use.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// The blocks that the last token selected, layer by layer, each `[K, S]`, ascending and −1
    /// padded. `None` for dense models, empty caches, and on a GPU, where they stay on the device.
    pub fn selected(&self) -> Option<Vec<&[i32]>> {
        self.layers.iter().map(LayerCache::chosen).collect()
    }
}

impl Model {
    /// An empty cache for one sequence.
    pub fn cache(&self) -> Result<Cache> {
        let layers: Result<Vec<_>> =
            (0..self.config().num_hidden_layers).map(|i| LayerCache::new(self, i)).collect();
        Ok(Cache { layers: layers?, len: 0, broken: false, stamp: self.stamp, graph: None })
    }

    /// Appends tokens; returns the logits after the last one, `[vocab]`. A long prompt is read
    /// in chunks.
    pub fn extend(&self, cache: &mut Cache, tokens: &[i32]) -> Result<Vec<f32>> {
        if let (Device::Cuda(gpu), &[token]) = (self.device(), tokens) {
            Inputs::appended(self.config(), &Device::Cpu, tokens, cache.len)?;
            if let Some(logits) = self.decode(&gpu, cache, token)? {
                return Ok(logits);
            }
        }
        self.read(cache, tokens)
    }

    /// As [`Model::extend`], never by a captured step: what follows may be
    /// [`Model::extend_many`].
    pub fn read(&self, cache: &mut Cache, tokens: &[i32]) -> Result<Vec<f32>> {
        let chunk = if self.device() == Device::Cpu { PREFILL_CHUNK } else { CUDA_PREFILL_CHUNK };
        let Some(last) = tokens.chunks(chunk).next_back() else {
            return Err(Error::Batch("no token to append; a prompt needs at least one".into()));
        };
        // All or nothing: refuse before the first chunk is taken.
        Inputs::appended(self.config(), &Device::Cpu, tokens, cache.len)?;
        // One entry into the thread pool for the whole step: entering it for each of the hundred
        // small operations of one token costs more than they do.
        rayon::scope(|_| {
            let mut hidden = None;
            for chunk in tokens.chunks(chunk) {
                hidden = Some(self.append(cache, chunk)?);
            }
            let hidden = hidden.ok_or_else(|| Error::Batch("no token to append".into()))?;
            let row = hidden.rows(last.len() - 1..last.len())?;
            let tape = &mut Tape::inference();
            let row = tape.leaf(row);
            Ok(self.head(tape, &row)?.to_vec_f32()?)
        })
    }

    /// As [`Model::read`], with the logits after every token, a few at a time: `each(i, logits)`
    /// gets `[n, vocab]` after tokens i to i + n − 1, in their order, those of the last with the
    /// bits that `read` returns.
    pub fn read_each(
        &self,
        cache: &mut Cache,
        tokens: &[i32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let chunk = if self.device() == Device::Cpu { PREFILL_CHUNK } else { CUDA_PREFILL_CHUNK };
        if tokens.is_empty() {
            return Err(Error::Batch("no token to append; a prompt needs at least one".into()));
        }
        Inputs::appended(self.config(), &Device::Cpu, tokens, cache.len)?;
        let mut done = 0;
        for chunk in tokens.chunks(chunk) {
            let hidden = self.append(cache, chunk)?;
            self.logits_each(&hidden, done, each)?;
            done += chunk.len();
        }
        Ok(())
    }

    /// See [`Model::read_each`]: of hidden rows `[c, C]` that come after `done` others.
    fn logits_each(
        &self,
        hidden: &Tensor,
        done: usize,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let count = hidden.shape()[0];
        // Products of few rows have the bits of one row.
        for first in (0..count).step_by(FEW_ROWS) {
            let tape = &mut Tape::inference();
            let few = tape.leaf(hidden.rows(first..count.min(first + FEW_ROWS))?);
            each(done + first, &self.head(tape, &few)?.to_vec_f32()?);
        }
        Ok(())
    }

    /// Appends tokens; returns the logits after each, f32 `[c, vocab]`.
    pub fn extend_all(&self, cache: &mut Cache, tokens: &[i32]) -> Result<Tensor> {
        let hidden = self.append(cache, tokens)?;
        let tape = &mut Tape::inference();
        let hidden = tape.leaf(hidden);
        self.head(tape, &hidden)
    }

    /// Refuses a cache of another model, or one that an error left half extended.
    pub(crate) fn check_cache(&self, cache: &Cache) -> Result<()> {
        if cache.stamp != self.stamp {
            return Err(Error::Batch(
                "the cache was filled under other weights: an adapter was activated, left or \
                 merged since; start a new one"
                    .into(),
            ));
        }
        if !cache.broken && cache.layers.len() == self.config().num_hidden_layers {
            return Ok(());
        }
        Err(Error::Batch(
            "the cache is of another model, or an earlier call with it failed; start a new one"
                .into(),
        ))
    }

    /// The logits after one more token by a captured graph: capturing one first when there is none
    /// or the room is used up. `None` where this model's caches cannot be captured.
    fn decode(&self, gpu: &Gpu, cache: &mut Cache, token: i32) -> Result<Option<Vec<f32>>> {
        self.check_cache(cache)?;
        // Experts are counted on the host, which cannot be captured.
        let fixed = self.config().moe.is_none();
        if !fixed || cache.layers.iter().any(|layer| !layer.can_be_captured()) {
            return Ok(None);
        }
        cache.broken = true;
        if cache.graph.as_ref().is_none_or(|graph| graph.capacity() <= cache.len) {
            let longest = self.config().max_position_embeddings;
            let mut capacity = longest;
            for layer in &mut cache.layers {
                capacity = capacity.min(layer.prepare((cache.len + 1 + AHEAD).min(longest))?);
                layer.prime(0)?;
            }
            let turns = self.turns(&self.device(), capacity)?;
            let room = (capacity, turns);
            let graph = DecodeGraph::capture(self, gpu, &mut cache.layers, 1, room)?;
            cache.graph = Some(graph);
        }
        let Some(graph) = &mut cache.graph else { return Ok(None) };
        let token = Token { sequence: 0, id: token, position: cache.len };
        let logits = graph.run(&[token], self.config().nsa.as_ref(), (&[], true))?.1.to_vec();
        cache.layers.iter_mut().try_for_each(|layer| layer.advance(&[0]))?;
        cache.len += 1;
        cache.broken = false;
        Ok(Some(logits))
    }

    /// Appends tokens to every layer; returns the output of the last norm, `[c, C]`.
    fn append(&self, cache: &mut Cache, tokens: &[i32]) -> Result<Tensor> {
        self.check_cache(cache)?;
        let inputs = Inputs::appended(self.config(), &self.device(), tokens, cache.len)?;
        let tape = &mut Tape::inference();
        let x = self.embed(tape, &inputs)?;
        if cache.only_steps() {
            return Err(Error::Batch(
                "a cache that has been decoded with on a GPU takes one token at a time".into(),
            ));
        }
        cache.broken = true;
        // Memory may move as caches grow.
        cache.graph = None;
        let hidden = self.through(tape, x, &inputs, &mut cache.layers, 0)?;
        cache.broken = false;
        cache.len += tokens.len();
        Ok(hidden)
    }

    /// New tokens of one sequence, embedded x `[c, C]`, through all layers, whose caches take them;
    /// returns the output of the last norm, `[c, C]`.
    fn through(
        &self,
        tape: &mut Tape,
        mut x: Var,
        inputs: &Inputs,
        layers: &mut [LayerCache],
        sequence: usize,
    ) -> Result<Tensor> {
        for (layer, held) in layers.iter_mut().enumerate() {
            let caches = &mut [held];
            let site = Site { layer, inputs, caches, sequence, dropout: None, step: None };
            x = self.layer(tape, &x, site)?.swap_remove(0);
        }
        Ok(self.norm(tape, &self.slots.norm, &x)?.value().clone())
    }

    /// Appends tokens to a sequence that holds `held` tokens, of the layers on a GPU; returns the
    /// logits after the last one, `[vocab]`.
    pub(crate) fn read_device(
        &self,
        layers: &mut [LayerCache],
        (sequence, held): (usize, usize),
        tokens: &[i32],
    ) -> Result<Vec<f32>> {
        let (mut last, mut at) = (None, held);
        for chunk in self.chunks_device(held, tokens) {
            let hidden = self.hidden_device(layers, (sequence, at), chunk)?;
            last = Some(hidden.rows(chunk.len() - 1..chunk.len())?);
            at += chunk.len();
        }
        let tape = &mut Tape::inference();
        let last = tape.leaf(last.ok_or_else(mismatch)?);
        Ok(self.head(tape, &last)?.to_vec_f32()?)
    }

    /// The same with the logits after every token, see [`Model::read_each`].
    pub(crate) fn read_device_each(
        &self,
        layers: &mut [LayerCache],
        (sequence, held): (usize, usize),
        tokens: &[i32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let mut done = 0;
        for chunk in self.chunks_device(held, tokens) {
            let hidden = self.hidden_device(layers, (sequence, held + done), chunk)?;
            self.logits_each(&hidden, done, each)?;
            done += chunk.len();
        }
        Ok(())
    }

    /// What goes through the model at once. The beginning of a prompt looks nowhere back and is
    /// read several times as fast, so more of it at once.
    fn chunks_device<'t>(&self, held: usize, tokens: &'t [i32]) -> impl Iterator<Item = &'t [i32]> {
        let wide = CUDA_FIRST_CHUNK / self.config().hidden_size.max(1);
        let first = if held == 0 { wide.max(CUDA_PREFILL_CHUNK).min(tokens.len()) } else { 0 };
        let (first, rest) = tokens.split_at(first);
        std::iter::once(first)
            .filter(|chunk| !chunk.is_empty())
            .chain(rest.chunks(CUDA_PREFILL_CHUNK))
    }

    fn hidden_device(
        &self,
        layers: &mut [LayerCache],
        (sequence, held): (usize, usize),
        chunk: &[i32],
    ) -> Result<Tensor> {
        let tape = &mut Tape::inference();
        let inputs = Inputs::appended(self.config(), &self.device(), chunk, held)?;
        let x = self.embed(tape, &inputs)?;
        self.through(tape, x, &inputs, layers, sequence)
    }
}

/// One layer's cache.
pub(crate) enum LayerCache {
    CudaDense(CudaDense),
    CudaNsa(Box<CudaNsa>),
    Dense(DenseCache),
    NsaF32(Box<NsaLayer<f32>>),
    NsaBf16(Box<NsaLayer<bf16>>),
}

/// New tokens of one layer, layouts of [`tercet_attention::cpu::NsaStep`]: those of the first
/// sequence, then as many of the next.
#[derive(Clone, Copy)]
pub(crate) struct NsaNew<'a> {
    pub q: &'a Tensor,
    pub k_cmp: &'a Tensor,
    pub v_cmp: &'a Tensor,
    pub k_slc: &'a Tensor,
    pub v_slc: &'a Tensor,
    pub k_win: &'a Tensor,
    pub v_win: &'a Tensor,
    pub gate: &'a Tensor,
}

impl<'a> NsaNew<'a> {
    /// From tensors in the order of the fields.
    pub fn of(tensors: [&'a Tensor; 8]) -> Self {
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = tensors;
        Self { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate }
    }
}

/// Compressed blocks that new tokens completed.
pub(crate) struct Blocks {
    /// Keys `[n, K, D]`, of one sequence after the other.
    pub k: Tensor,
    /// Values `[n, K, V]`.
    pub v: Tensor,
    /// Position of each block's first token, I32 `[n]`.
    pub starts: Tensor,
    /// How many are each sequence's.
    pub counts: Vec<usize>,
}

impl LayerCache {
    fn new(model: &Model, layer: usize) -> Result<Self> {
        let config = model.config();
        if let Device::Cuda(gpu) = model.device() {
            return Self::on_device(model, &gpu, layer, Room::ONE);
        }
        if config.nsa.is_none() {
            return Ok(Self::Dense(DenseCache::new(config.dims(), model.mask(layer))?));
        }
        Ok(match model.params().dtype() {
            DType::BF16 => Self::NsaBf16(Box::new(NsaLayer::new(config)?)),
            _ => Self::NsaF32(Box::new(NsaLayer::new(config)?)),
        })
    }

    /// Of some sequences on a GPU.
    pub fn on_device(model: &Model, gpu: &Gpu, layer: usize, room: Room) -> Result<Self> {
        let (config, dtype) = (model.config(), model.params().dtype());
        Ok(match &config.nsa {
            None => Self::CudaDense(CudaDense::new(gpu, config, dtype, model.mask(layer), room)?),
            Some(spec) => Self::CudaNsa(Box::new(CudaNsa::new(gpu, config, spec, dtype, room)?)),
        })
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::CudaDense(layer) => layer.bytes(),
            Self::CudaNsa(layer) => layer.bytes(),
            Self::Dense(cache) => cache.bytes(),
            Self::NsaF32(layer) => layer.bytes(),
            Self::NsaBf16(layer) => layer.bytes(),
        }
    }

    /// What the last token selected; see [`Cache::selected`].
    fn chosen(&self) -> Option<&[i32]> {
        let chosen = match self {
            Self::NsaF32(layer) => layer.chosen(),
            Self::NsaBf16(layer) => layer.chosen(),
            _ => return None,
        };
        (!chosen.is_empty()).then_some(chosen)
    }

    fn fork(&self) -> Option<Self> {
        Some(match self {
            Self::CudaDense(_) | Self::CudaNsa(_) => return None,
            Self::Dense(cache) => Self::Dense(cache.clone()),
            Self::NsaF32(layer) => Self::NsaF32(layer.clone()),
            Self::NsaBf16(layer) => Self::NsaBf16(layer.clone()),
        })
    }

    /// Appends q, k, v `[B·c, …]` to the dense layer of B sequences, c tokens to each; returns the
    /// output `[B·c, H, V]`. On a GPU to the one cache, of its sequence `sequence`.
    pub fn extend_dense(
        caches: &mut [&mut Self],
        sequence: usize,
        config: &ModelConfig,
        qkv: [&Tensor; 3],
    ) -> Result<Tensor> {
        match (qkv[0].device(), qkv[0].dtype()) {
            (Device::Cpu, DType::BF16) => cache_cpu::dense::<bf16>(caches, config, qkv),
            (Device::Cpu, _) => cache_cpu::dense::<f32>(caches, config, qkv),
            _ => match caches {
                [Self::CudaDense(layer)] => layer.extend(sequence, qkv),
                _ => Err(mismatch()),
            },
        }
    }

    /// Passes raw compression keys and values `[B·c, K, _]` through φ; returns the blocks they
    /// complete. On a GPU of the one cache's sequence `sequence`.
    pub fn compress(
        caches: &mut [&mut Self],
        sequence: usize,
        config: &ModelConfig,
        raw: [&Tensor; 2],
        phi: [&ops::Phi; 2],
    ) -> Result<Blocks> {
        match (raw[0].device(), raw[0].dtype()) {
            (Device::Cpu, DType::BF16) => cache_cpu::compress::<bf16>(caches, config, raw, phi),
            (Device::Cpu, _) => cache_cpu::compress::<f32>(caches, config, raw, phi),
            _ => match caches {
                [Self::CudaNsa(layer)] => layer.compress(sequence, config, raw, phi),
                _ => Err(mismatch()),
            },
        }
    }

    /// Appends to the NSA layer of B sequences; `counts` of the compressed blocks are each one's.
    /// Returns the output `[B·c, H, V]`. On a GPU of the one cache's `sequence`.
    pub fn extend_nsa(
        caches: &mut [&mut Self],
        sequence: usize,
        config: &ModelConfig,
        new: &NsaNew,
        counts: &[usize],
    ) -> Result<Tensor> {
        match (new.q.device(), new.q.dtype()) {
            (Device::Cpu, DType::BF16) => cache_cpu::nsa::<bf16>(caches, config, new, counts),
            (Device::Cpu, _) => cache_cpu::nsa::<f32>(caches, config, new, counts),
            _ => match caches {
                [Self::CudaNsa(layer)] => layer.extend(sequence, new),
                _ => Err(mismatch()),
            },
        }
    }

    /// Whether one token's step can be captured while the cache grows.
    fn can_be_captured(&self) -> bool {
        match self {
            Self::CudaNsa(_) => true,
            Self::CudaDense(layer) => layer.can_be_captured(),
            _ => false,
        }
    }
}

pub(crate) fn mismatch() -> Error {
    Error::Batch("the cache is of another kind of attention than the model".into())
}
