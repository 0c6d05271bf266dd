//! The memory of caches that own it.

use tercet_cuda::{Buffer, Label};

use super::super::{Plan, Slice};
use super::pages::{Kind, Pages, Partial};
use super::view::{CacheView, TILE};
use crate::{Dims, Error, Result};

/// Most tokens of one sequence that a window's ring takes before they are attended to.
const CHUNK: usize = 512;

/// Keys and values of some sequences: one page each, or pages that they take as they grow.
pub(super) struct Store {
    what: &'static str,
    k: Buffer,
    v: Buffer,
    /// Pages there are.
    count: usize,
    pub page: usize,
    pub ring: bool,
    paged: Option<(Pages, Kind)>,
}

impl Store {
    /// A place of `tokens` tokens for each of `sequences` sequences.
    pub fn new(
        plan: &Plan,
        what: &'static str,
        sequences: usize,
        tokens: usize,
        ring: bool,
    ) -> Result<Self> {
        Self::of(plan, what, [sequences, place(tokens)], ring, None)
    }

    /// Room for all pages of a kind.
    pub fn paged(plan: &Plan, what: &'static str, pages: &Pages, kind: Kind) -> Result<Self> {
        let shape = [pages.count(kind), Pages::ROWS];
        Self::of(plan, what, shape, false, Some((pages.clone(), kind)))
    }

    fn of(
        plan: &Plan,
        what: &'static str,
        [count, page]: [usize; 2],
        ring: bool,
        paged: Option<(Pages, Kind)>,
    ) -> Result<Self> {
        let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
        let side = |dim: usize| {
            let shape = [count, kv_heads, page, dim];
            let bytes = shape.iter().product::<usize>() * plan.number.bytes();
            plan.gpu.alloc_for(bytes, Label::shaped(what, &shape))
        };
        Ok(Store { what, k: side(key_dim)?, v: side(value_dim)?, count, page, ring, paged })
    }

    /// Tokens of one sequence that fit; of a ring, those that it keeps.
    pub fn capacity(&self) -> usize {
        self.page * self.paged.as_ref().map_or(1, |(pages, kind)| pages.width(*kind))
    }

    /// Room for `tokens` of each sequence; what is held is kept.
    pub fn reserve(&mut self, plan: &Plan, tokens: usize) -> Result<()> {
        if tokens <= self.capacity() {
            return Ok(());
        }
        if self.paged.is_some() {
            return Err(Error::Pages(format!(
                "{tokens} tokens of a sequence; its pages hold at most {}",
                self.capacity()
            )));
        }
        let wanted = tokens.max(self.page * 2);
        let new = Store::new(plan, self.what, self.count, wanted, self.ring)?;
        let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
        for (from, to, dim) in [(&self.k, &new.k, key_dim), (&self.v, &new.v, value_dim)] {
            let row = dim * plan.number.bytes();
            for head in 0..(self.count * kv_heads) {
                let (old, own) = (head * self.page * row, head * new.page * row);
                // SAFETY: both are inside their buffers, which are apart.
                unsafe {
                    plan.gpu.copy(
                        to.ptr() + own as u64,
                        from.ptr() + old as u64,
                        self.page * row,
                    )?;
                }
            }
        }
        *self = new;
        Ok(())
    }

    /// Whether a sequence has pages for so many tokens (of blocks, so many tokens' blocks); where
    /// sequences have places of their own there is nothing to ask.
    pub fn covers(&self, sequence: usize, tokens: usize) -> Result<()> {
        self.paged.as_ref().map_or(Ok(()), |(pages, _)| pages.covers(sequence, tokens))
    }

    pub fn view(&self, plan: &Plan) -> CacheView {
        let bytes = plan.number.bytes();
        CacheView {
            k: Slice::whole(&self.k, bytes),
            v: Slice::whole(&self.v, bytes),
            table: self.paged.as_ref().map(|(pages, kind)| pages.table(*kind)),
            page: self.page,
            interleaved: false,
            ring: self.ring,
        }
    }

    pub fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// What one sequence holds becomes another's, too; of pages, what is only partly filled and
    /// therefore not shared.
    pub fn copy(&self, plan: &Plan, from: usize, to: usize, partial: Partial) -> Result<()> {
        let (from, to) = match &self.paged {
            None => (from, to),
            Some((_, kind)) => match partial.of(*kind) {
                Some([from, to]) => (from as usize, to as usize),
                None => return Ok(()),
            },
        };
        if from.max(to) >= self.count {
            let text = format!("places {from} and {to} of a cache of {}", self.count);
            return Err(Error::Dims(text));
        }
        for side in [&self.k, &self.v] {
            let own = side.bytes() / self.count;
            let at = |place: usize| side.ptr() + (place * own) as u64;
            // SAFETY: both are inside the buffer, and apart unless they are the same.
            unsafe { plan.gpu.copy(at(to), at(from), if from == to { 0 } else { own })? };
        }
        Ok(())
    }
}

/// Tokens of a place for `tokens`, in whole tiles.
pub(super) fn place(tokens: usize) -> usize {
    tokens.max(1).next_multiple_of(TILE)
}

/// A ring that keeps the window of the first of `CHUNK` new tokens, or of fewer when no sequence
/// is that long.
pub(super) fn ring_tokens(window: usize, capacity: usize) -> usize {
    window.min(capacity).saturating_add(CHUNK.min(capacity))
}

/// How many of `count` tokens after `len` a ring of `page` takes at once and still holds each one's
/// window.
pub(super) fn ring_chunk(page: usize, window: usize, len: usize, count: usize) -> usize {
    if len + count <= page { count } else { (page + 1).saturating_sub(window).max(1) }
}

/// Positions and sequences of new tokens, on the device.
pub(super) struct Numbered {
    positions: Buffer,
    sequences: Buffer,
}

impl Numbered {
    pub fn new(plan: &Plan, sequence: usize, first: usize, count: usize) -> Result<Self> {
        let positions: Vec<i32> = (first..first + count).map(|p| p as i32).collect();
        let sequences = vec![sequence as i32; count];
        Ok(Numbered {
            positions: plan.gpu.upload(&positions)?,
            sequences: plan.gpu.upload(&sequences)?,
        })
    }

    pub fn part(&self, first: usize, count: usize) -> (Slice, Slice) {
        let part = |buffer: &Buffer| {
            // SAFETY: inside the buffer, which outlives the calls made with the slice.
            unsafe { Slice::new(buffer.ptr() + first as u64 * 4, count) }
        };
        (part(&self.positions), part(&self.sequences))
    }
}
