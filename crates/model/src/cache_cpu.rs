//! One layer's caches on the CPU, of one sequence or of many side by side.

use half::bf16;
use rayon::prelude::*;
use tercet_attention::Element;
use tercet_attention::cpu::{CompressTail, DenseCache, NsaCache, NsaStep, Phi};
use tercet_tensor::{Device, Tensor, ops};

use crate::batch::{block_starts, tensor_i32};
use crate::cache::{Blocks, LayerCache, NsaNew, mismatch};
use crate::config::ModelConfig;
use crate::{Error, Result};

/// Keys and values of an NSA layer, and those that no compressed block is made of yet.
#[derive(Clone)]
pub(crate) struct NsaLayer<E> {
    cache: NsaCache,
    k_tail: CompressTail<E>,
    v_tail: CompressTail<E>,
    /// Blocks that the last token selected, `[K, S]`, ascending and −1 padded; empty before it.
    chosen: Vec<i32>,
}

impl<E: Stored> NsaLayer<E> {
    pub fn new(config: &ModelConfig) -> Result<Self> {
        let spec = config.nsa.as_ref().ok_or_else(mismatch)?;
        let dims = config.dims();
        Ok(Self {
            cache: NsaCache::new(spec, dims)?,
            k_tail: CompressTail::new(spec, dims.kv_heads, dims.key_dim)?,
            v_tail: CompressTail::new(spec, dims.kv_heads, dims.value_dim)?,
            chosen: Vec::new(),
        })
    }

    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Blocks that the last token selected, `[K, S]`.
    pub fn chosen(&self) -> &[i32] {
        &self.chosen
    }
}

/// See [`LayerCache::extend_dense`].
pub(crate) fn dense<E: Stored>(
    caches: &mut [&mut LayerCache],
    config: &ModelConfig,
    [q, k, v]: [&Tensor; 3],
) -> Result<Tensor> {
    let dims = config.dims();
    let of = |cache| match cache {
        &mut &mut LayerCache::Dense(ref mut cache) => Ok(cache),
        _ => Err(mismatch()),
    };
    let caches: Vec<&mut DenseCache> = caches.iter_mut().map(of).collect::<Result<_>>()?;
    let shape = [q.shape()[0], dims.heads, dims.value_dim];
    let mut out = vec![E::default(); shape.iter().product()];
    let new: Vec<_> = shares(E::of(q)?, caches.len())?
        .zip(shares(E::of(k)?, caches.len())?)
        .zip(shares(E::of(v)?, caches.len())?)
        .collect();
    let share = out.len() / caches.len();
    caches
        .into_par_iter()
        .zip(new)
        .zip(out.par_chunks_mut(share))
        .try_for_each(|((cache, ((q, k), v)), out)| cache.extend(dims.scale(), q, k, v, out))?;
    E::tensor(out, &shape)
}

/// See [`LayerCache::compress`].
pub(crate) fn compress<E: Stored>(
    caches: &mut [&mut LayerCache],
    config: &ModelConfig,
    [k, v]: [&Tensor; 2],
    [phi_k, phi_v]: [&ops::Phi; 2],
) -> Result<Blocks> {
    let spec = config.nsa.as_ref().ok_or_else(mismatch)?;
    let dims = config.dims();
    let layers = layers::<E>(caches)?;
    let (phi_k, phi_v) = (slices(phi_k)?, slices(phi_v)?);
    let firsts: Vec<usize> = layers.iter().map(|layer| layer.k_tail.blocks()).collect();
    let new: Vec<_> =
        shares(E::of(k)?, layers.len())?.zip(shares(E::of(v)?, layers.len())?).collect();
    let made = layers
        .into_par_iter()
        .zip(new)
        .map(|(layer, (k, v))| Ok((layer.k_tail.push(k, phi_k)?, layer.v_tail.push(v, phi_v)?)));
    let made: Vec<(Vec<E>, Vec<E>)> = made.collect::<Result<_>>()?;
    let width = dims.kv_heads * dims.key_dim;
    let counts: Vec<usize> = made.iter().map(|(k, _)| k.len() / width).collect();
    let starts = firsts.iter().zip(&counts);
    let starts = starts.flat_map(|(&first, &count)| block_starts(spec, first, count)).collect();
    let (k, v): (Vec<_>, Vec<_>) = made.into_iter().unzip();
    let blocks = counts.iter().sum();
    Ok(Blocks {
        k: E::tensor(k.concat(), &[blocks, dims.kv_heads, dims.key_dim])?,
        v: E::tensor(v.concat(), &[blocks, dims.kv_heads, dims.value_dim])?,
        starts: tensor_i32(&Device::Cpu, starts)?,
        counts,
    })
}

/// See [`LayerCache::extend_nsa`].
pub(crate) fn nsa<E: Stored>(
    caches: &mut [&mut LayerCache],
    config: &ModelConfig,
    new: &NsaNew,
    counts: &[usize],
) -> Result<Tensor> {
    let dims = config.dims();
    let layers = layers::<E>(caches)?;
    let shape = [new.q.shape()[0], dims.heads, dims.value_dim];
    let mut out = vec![E::default(); shape.iter().product()];
    let each = |tensor| shares(E::of(tensor)?, counts.len());
    let (mut q, mut gate) = (each(new.q)?, each(new.gate)?);
    let (mut k_slc, mut v_slc) = (each(new.k_slc)?, each(new.v_slc)?);
    let (mut k_win, mut v_win) = (each(new.k_win)?, each(new.v_win)?);
    let (mut k_cmp, mut v_cmp) = (E::of(new.k_cmp)?, E::of(new.v_cmp)?);
    let mut steps = Vec::with_capacity(counts.len());
    for count in counts {
        steps.push(NsaStep {
            scale: dims.scale(),
            q: q.next().ok_or_else(mismatch)?,
            k_cmp: split(&mut k_cmp, count * dims.kv_heads * dims.key_dim)?,
            v_cmp: split(&mut v_cmp, count * dims.kv_heads * dims.value_dim)?,
            k_slc: k_slc.next().ok_or_else(mismatch)?,
            v_slc: v_slc.next().ok_or_else(mismatch)?,
            k_win: k_win.next().ok_or_else(mismatch)?,
            v_win: v_win.next().ok_or_else(mismatch)?,
            gate: gate.next().ok_or_else(mismatch)?,
        });
    }
    let share = out.len() / counts.len();
    let last = dims.kv_heads * config.nsa.as_ref().map_or(0, |spec| spec.select_count);
    let work = layers.into_par_iter().zip(steps).zip(out.par_chunks_mut(share));
    work.try_for_each(|((layer, step), out)| -> Result<()> {
        let mut chosen = layer.cache.extend(&step, out)?;
        layer.chosen = chosen.split_off(chosen.len().saturating_sub(last));
        Ok(())
    })?;
    E::tensor(out, &shape)
}

fn layers<'c, E: Stored>(caches: &'c mut [&mut LayerCache]) -> Result<Vec<&'c mut NsaLayer<E>>> {
    caches.iter_mut().map(|cache| E::nsa(cache).ok_or_else(mismatch)).collect()
}

/// Equal parts, one a sequence.
fn shares<E>(rows: &[E], sequences: usize) -> Result<std::slice::ChunksExact<'_, E>> {
    if sequences == 0 || rows.is_empty() || !rows.len().is_multiple_of(sequences) {
        let text = format!("{} numbers are not rows of {sequences} sequences", rows.len());
        return Err(Error::Batch(text));
    }
    Ok(rows.chunks_exact(rows.len() / sequences))
}

/// Takes the first `len` off.
fn split<'a, E>(rows: &mut &'a [E], len: usize) -> Result<&'a [E]> {
    let (first, rest) = rows.split_at_checked(len).ok_or_else(mismatch)?;
    *rows = rest;
    Ok(first)
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

/// The element types a model is stored in, as tensors and caches hold them.
pub(crate) trait Stored: Element {
    fn of(tensor: &Tensor) -> Result<&[Self]>;
    fn tensor(values: Vec<Self>, shape: &[usize]) -> Result<Tensor>;
    fn nsa(cache: &mut LayerCache) -> Option<&mut NsaLayer<Self>>;
}

impl Stored for f32 {
    fn of(tensor: &Tensor) -> Result<&[f32]> {
        Ok(tensor.as_f32()?)
    }
    fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_f32(values, shape)?)
    }
    fn nsa(cache: &mut LayerCache) -> Option<&mut NsaLayer<f32>> {
        if let LayerCache::NsaF32(layer) = cache { Some(layer) } else { None }
    }
}

impl Stored for bf16 {
    fn of(tensor: &Tensor) -> Result<&[bf16]> {
        Ok(tensor.as_bf16()?)
    }
    fn tensor(values: Vec<bf16>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_bf16(values, shape)?)
    }
    fn nsa(cache: &mut LayerCache) -> Option<&mut NsaLayer<bf16>> {
        if let LayerCache::NsaBf16(layer) = cache { Some(layer) } else { None }
    }
}
