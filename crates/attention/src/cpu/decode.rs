//! Caches: one sequence's keys and values, extended by one or many tokens at a time.

use super::{Mask, Phi};
use crate::{Dims, Element, NsaSpec, Result};

/// Keys and values of the compression branch not yet absorbed by a block.
pub struct CompressTail<E> {
    raw: Vec<E>,
}

impl<E: Element> CompressTail<E> {
    /// An empty tail for one sequence; `dim` is C of `[T, K, C]`.
    pub fn new(spec: &NsaSpec, kv_heads: usize, dim: usize) -> Result<Self> {
        let _ = (spec, kv_heads, dim);
        todo!()
    }

    /// Blocks emitted so far; the next one starts at token `blocks()·d`.
    pub fn blocks(&self) -> usize {
        todo!()
    }

    /// Takes new tokens `[c, K, C]`; returns the blocks they complete, `[n, K, C]`, bit-equal to
    /// [`super::compress_forward`] of the whole sequence.
    pub fn push(&mut self, x: &[E], phi: Phi<E>) -> Result<Vec<E>> {
        let _ = (x, phi, &self.raw);
        todo!()
    }
}

/// New tokens for [`NsaCache::extend`]: c tokens, and the compressed blocks they complete.
#[derive(Clone, Copy)]
pub struct NsaStep<'a, E> {
    /// Softmax scale.
    pub scale: f32,
    /// `[c, H, D]`.
    pub q: &'a [E],
    /// `[n, K, D]`, from [`CompressTail::push`].
    pub k_cmp: &'a [E],
    /// `[n, K, V]`.
    pub v_cmp: &'a [E],
    /// `[c, K, D]`.
    pub k_slc: &'a [E],
    /// `[c, K, V]`.
    pub v_slc: &'a [E],
    /// `[c, K, D]`.
    pub k_win: &'a [E],
    /// `[c, K, V]`.
    pub v_win: &'a [E],
    /// `[c, H, 3]`.
    pub gate: &'a [E],
}

/// One layer's NSA cache of one sequence: selected K/V in pages of one selection block,
/// window K/V in a ring, compressed K/V growing by one block every d tokens.
pub struct NsaCache {}

impl NsaCache {
    /// An empty cache.
    pub fn new(spec: &NsaSpec, dims: Dims) -> Result<Self> {
        let _ = (spec, dims);
        todo!()
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of cache memory in use.
    pub fn bytes(&self) -> usize {
        todo!()
    }

    /// Appends c tokens and writes their attention output `[c, H, V]`; returns the blocks each
    /// selected, `[c, K, S]`.
    pub fn extend<E: Element>(&mut self, step: &NsaStep<E>, out: &mut [E]) -> Result<Vec<i32>> {
        let _ = (step, out);
        todo!()
    }
}

/// One layer's dense (or window) cache of one sequence.
pub struct DenseCache {}

impl DenseCache {
    /// An empty cache.
    pub fn new(dims: Dims, mask: Mask) -> Result<Self> {
        let _ = (dims, mask);
        todo!()
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of cache memory in use.
    pub fn bytes(&self) -> usize {
        todo!()
    }

    /// Appends c tokens (`q` `[c, H, D]`, `k` `[c, K, D]`, `v` `[c, K, V]`) and writes their
    /// output `[c, H, V]`.
    pub fn extend<E: Element>(
        &mut self,
        scale: f32,
        q: &[E],
        k: &[E],
        v: &[E],
        out: &mut [E],
    ) -> Result<()> {
        let _ = (scale, q, k, v, out);
        todo!()
    }
}
