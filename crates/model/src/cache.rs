//! One sequence's keys and values, layer by layer, so that a new token costs one token.

use half::bf16;
use tercet_attention::Element;
use tercet_attention::cpu::{CompressTail, DenseCache, NsaCache, NsaStep, Phi};
use tercet_tensor::{DType, Device, Gpu, Tape, Tensor, ops};

use crate::batch::{Inputs, block_starts, tensor_i32};
use crate::cache_cuda::{CudaDense, CudaNsa};
use crate::config::ModelConfig;
use crate::decode_graph::DecodeGraph;
use crate::decoder::Site;
use crate::{Error, Model, Result};

/// Tokens computed at a time while a prompt is read: enough to fill the matrix units, few enough
/// that activations stay small beside the weights.
const PREFILL_CHUNK: usize = 512;

/// The same on a GPU.
const CUDA_PREFILL_CHUNK: usize = 2048;

/// What a model remembers of one sequence.
pub struct Cache {
    layers: Vec<LayerCache>,
    len: usize,
    /// Set while layers are being extended: after an error they disagree.
    broken: bool,
    /// Of the weights that what is held was computed with; see [`Model`].
    stamp: u64,
    /// One token's step on a GPU, captured.
    graph: Option<DecodeGraph>,
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

    /// Bytes of keys and values in use.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
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
        let chunk = if self.device() == Device::Cpu { PREFILL_CHUNK } else { CUDA_PREFILL_CHUNK };
        let Some(last) = tokens.chunks(chunk).next_back() else {
            return Err(Error::Batch("no token to append; a prompt needs at least one".into()));
        };
        // All or nothing: refuse before the first chunk is taken.
        Inputs::appended(self.config(), &Device::Cpu, tokens, cache.len)?;
        if let (Device::Cuda(gpu), &[token]) = (self.device(), tokens)
            && let Some(logits) = self.decode(&gpu, cache, token)?
        {
            return Ok(logits);
        }
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

    /// Appends tokens; returns the logits after each, f32 `[c, vocab]`.
    pub fn extend_all(&self, cache: &mut Cache, tokens: &[i32]) -> Result<Tensor> {
        let hidden = self.append(cache, tokens)?;
        let tape = &mut Tape::inference();
        let hidden = tape.leaf(hidden);
        self.head(tape, &hidden)
    }

    /// Refuses a cache of another model, or one that an error left half extended.
    fn check_cache(&self, cache: &Cache) -> Result<()> {
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
            let graph = DecodeGraph::capture(self, gpu, &mut cache.layers, cache.len + 1)?;
            cache.graph = Some(graph);
        }
        let Some(graph) = &cache.graph else { return Ok(None) };
        let logits = graph.run(token, cache.len)?;
        cache.layers.iter_mut().try_for_each(LayerCache::advance)?;
        cache.len += 1;
        cache.broken = false;
        Ok(Some(logits))
    }

    /// Appends tokens to every layer; returns the output of the last norm, `[c, C]`.
    fn append(&self, cache: &mut Cache, tokens: &[i32]) -> Result<Tensor> {
        self.check_cache(cache)?;
        let inputs = Inputs::appended(self.config(), &self.device(), tokens, cache.len)?;
        let tape = &mut Tape::inference();
        let mut x = self.embed(tape, &inputs)?;
        if cache.only_steps() {
            return Err(Error::Batch(
                "a cache that has been decoded with on a GPU takes one token at a time".into(),
            ));
        }
        cache.broken = true;
        // Memory may move as caches grow.
        cache.graph = None;
        for (layer, held) in cache.layers.iter_mut().enumerate() {
            let site =
                Site { layer, inputs: &inputs, cache: Some(held), dropout: None, step: None };
            x = self.layer(tape, &x, site)?.swap_remove(0);
        }
        cache.broken = false;
        cache.len += tokens.len();
        Ok(self.norm(tape, &self.slots.norm, &x)?.value().clone())
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

pub(crate) struct NsaLayer<E> {
    cache: NsaCache,
    k_tail: CompressTail<E>,
    v_tail: CompressTail<E>,
}

/// New tokens of one layer; layouts of [`NsaStep`].
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

impl LayerCache {
    fn new(model: &Model, layer: usize) -> Result<Self> {
        let config = model.config();
        if let Device::Cuda(gpu) = model.device() {
            let dtype = model.params().dtype();
            return Ok(match &config.nsa {
                None => Self::CudaDense(CudaDense::new(&gpu, config, dtype, model.mask(layer))?),
                Some(spec) => Self::CudaNsa(Box::new(CudaNsa::new(&gpu, config, spec, dtype)?)),
            });
        }
        if config.nsa.is_none() {
            return Ok(Self::Dense(DenseCache::new(config.dims(), model.mask(layer))?));
        }
        Ok(match model.params().dtype() {
            DType::BF16 => Self::NsaBf16(Box::new(NsaLayer::new(config)?)),
            _ => Self::NsaF32(Box::new(NsaLayer::new(config)?)),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::CudaDense(layer) => layer.bytes(),
            Self::CudaNsa(layer) => layer.bytes(),
            Self::Dense(cache) => cache.bytes(),
            Self::NsaF32(layer) => layer.cache.bytes(),
            Self::NsaBf16(layer) => layer.cache.bytes(),
        }
    }

    /// Appends to a dense layer; returns the output `[c, H, V]`.
    pub fn extend_dense(
        &mut self,
        config: &ModelConfig,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let cache = match self {
            Self::Dense(cache) => cache,
            Self::CudaDense(layer) => return layer.extend([q, k, v]),
            _ => return Err(mismatch()),
        };
        match q.dtype() {
            DType::BF16 => dense::<bf16>(cache, config, [q, k, v]),
            _ => dense::<f32>(cache, config, [q, k, v]),
        }
    }

    /// Passes raw compression keys and values `[c, K, _]` through φ; returns the completed
    /// blocks' keys and values `[n, K, _]` and the position of each.
    pub fn compress(
        &mut self,
        config: &ModelConfig,
        raw: [&Tensor; 2],
        phi: [&ops::Phi; 2],
    ) -> Result<(Tensor, Tensor, Tensor)> {
        match self {
            Self::NsaF32(layer) => layer.compress(config, raw, phi),
            Self::NsaBf16(layer) => layer.compress(config, raw, phi),
            Self::CudaNsa(layer) => layer.compress(config, raw, phi),
            Self::Dense(_) | Self::CudaDense(_) => Err(mismatch()),
        }
    }

    /// Appends to an NSA layer; returns the output `[c, H, V]`.
    pub fn extend_nsa(&mut self, config: &ModelConfig, new: &NsaNew) -> Result<Tensor> {
        match self {
            Self::NsaF32(layer) => layer.extend(config, new),
            Self::NsaBf16(layer) => layer.extend(config, new),
            Self::CudaNsa(layer) => layer.extend(new),
            Self::Dense(_) | Self::CudaDense(_) => Err(mismatch()),
        }
    }

    /// Whether one token's step can be captured.
    fn can_be_captured(&self) -> bool {
        match self {
            Self::CudaNsa(layer) => layer.can_be_captured(),
            Self::CudaDense(layer) => layer.can_be_captured(),
            _ => false,
        }
    }

    /// Notes that a captured step has been launched.
    fn advance(&mut self) -> Result<()> {
        match self {
            Self::CudaNsa(layer) => layer.advance(),
            Self::CudaDense(layer) => layer.advance(),
            _ => Err(mismatch()),
        }
    }
}

pub(crate) fn mismatch() -> Error {
    Error::Batch("the cache is of another kind of attention than the model".into())
}

fn dense<E: Stored>(
    cache: &mut DenseCache,
    config: &ModelConfig,
    [q, k, v]: [&Tensor; 3],
) -> Result<Tensor> {
    let dims = config.dims();
    let shape = [q.shape()[0], dims.heads, dims.value_dim];
    let mut out = vec![E::default(); shape.iter().product()];
    cache.extend(dims.scale(), E::of(q)?, E::of(k)?, E::of(v)?, &mut out)?;
    E::tensor(out, &shape)
}

impl<E: Stored> NsaLayer<E> {
    fn new(config: &ModelConfig) -> Result<Self> {
        let spec = config.nsa.as_ref().ok_or_else(mismatch)?;
        let dims = config.dims();
        Ok(Self {
            cache: NsaCache::new(spec, dims)?,
            k_tail: CompressTail::new(spec, dims.kv_heads, dims.key_dim)?,
            v_tail: CompressTail::new(spec, dims.kv_heads, dims.value_dim)?,
        })
    }

    fn compress(
        &mut self,
        config: &ModelConfig,
        [k, v]: [&Tensor; 2],
        [phi_k, phi_v]: [&ops::Phi; 2],
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let spec = config.nsa.as_ref().ok_or_else(mismatch)?;
        let dims = config.dims();
        let first = self.k_tail.blocks();
        let k = self.k_tail.push(E::of(k)?, slices(phi_k)?)?;
        let v = self.v_tail.push(E::of(v)?, slices(phi_v)?)?;
        let blocks = self.k_tail.blocks() - first;
        let starts = tensor_i32(&Device::Cpu, block_starts(spec, first, blocks).collect())?;
        let k = E::tensor(k, &[blocks, dims.kv_heads, dims.key_dim])?;
        let v = E::tensor(v, &[blocks, dims.kv_heads, dims.value_dim])?;
        Ok((k, v, starts))
    }

    fn extend(&mut self, config: &ModelConfig, new: &NsaNew) -> Result<Tensor> {
        let dims = config.dims();
        let shape = [new.q.shape()[0], dims.heads, dims.value_dim];
        let mut out = vec![E::default(); shape.iter().product()];
        let step = NsaStep {
            scale: dims.scale(),
            q: E::of(new.q)?,
            k_cmp: E::of(new.k_cmp)?,
            v_cmp: E::of(new.v_cmp)?,
            k_slc: E::of(new.k_slc)?,
            v_slc: E::of(new.v_slc)?,
            k_win: E::of(new.k_win)?,
            v_win: E::of(new.v_win)?,
            gate: E::of(new.gate)?,
        };
        self.cache.extend(&step, &mut out)?;
        E::tensor(out, &shape)
    }
}

/// φ's parameters as the operator takes them.
fn slices<E: Stored>(phi: &ops::Phi) -> Result<Phi<'_, E>> {
    Ok(match phi {
        ops::Phi::Mean => Phi::Mean,
        ops::Phi::Linear { weight, pe } => {
            Phi::Linear { weight: E::of(weight.value())?, pe: E::of(pe.value())? }
        }
        ops::Phi::Mlp { weight1, bias1, weight2, bias2, pe } => Phi::Mlp {
            weight1: E::of(weight1.value())?,
            bias1: E::of(bias1.value())?,
            weight2: E::of(weight2.value())?,
            bias2: E::of(bias2.value())?,
            pe: E::of(pe.value())?,
            hidden: bias1.shape()[1],
        },
    })
}

/// The element types a model is stored in, as tensors hold them.
pub(crate) trait Stored: Element {
    fn of(tensor: &Tensor) -> Result<&[Self]>;
    fn tensor(values: Vec<Self>, shape: &[usize]) -> Result<Tensor>;
}

impl Stored for f32 {
    fn of(tensor: &Tensor) -> Result<&[f32]> {
        Ok(tensor.as_f32()?)
    }
    fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_f32(values, shape)?)
    }
}

impl Stored for bf16 {
    fn of(tensor: &Tensor) -> Result<&[bf16]> {
        Ok(tensor.as_bf16()?)
    }
    fn tensor(values: Vec<bf16>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_bf16(values, shape)?)
    }
}
