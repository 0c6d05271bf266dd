//! The memory of caches that own it.

use tercet_cuda::{Buffer, Label};

use super::super::{Plan, Slice};
use super::view::{CacheView, TILE};
use crate::{Dims, Error, Result};

/// Most tokens of one sequence that a window's ring takes before they are attended to.
const CHUNK: usize = 512;

/// Keys and values of some sequences, one page each.
pub(super) struct Store {
    what: &'static str,
    k: Buffer,
    v: Buffer,
    sequences: usize,
    pub page: usize,
    pub ring: bool,
}

impl Store {
    pub fn new(
        plan: &Plan,
        what: &'static str,
        sequences: usize,
        tokens: usize,
        ring: bool,
    ) -> Result<Self> {
        let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
        let page = tokens.max(1).next_multiple_of(TILE);
        let side = |dim: usize| {
            let shape = [sequences, kv_heads, page, dim];
            let bytes = shape.iter().product::<usize>() * plan.number.bytes();
            plan.gpu.alloc_for(bytes, Label::shaped(what, &shape))
        };
        Ok(Store { what, k: side(key_dim)?, v: side(value_dim)?, sequences, page, ring })
    }

    /// Room for `tokens` of each sequence; what is held is kept.
    pub fn reserve(&mut self, plan: &Plan, tokens: usize) -> Result<()> {
        if tokens <= self.page {
            return Ok(());
        }
        let wanted = tokens.max(self.page * 2);
        let new = Store::new(plan, self.what, self.sequences, wanted, self.ring)?;
        let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
        for (from, to, dim) in [(&self.k, &new.k, key_dim), (&self.v, &new.v, value_dim)] {
            let row = dim * plan.number.bytes();
            for head in 0..(self.sequences * kv_heads) {
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

    pub fn view(&self, plan: &Plan) -> CacheView {
        let bytes = plan.number.bytes();
        CacheView {
            k: Slice::whole(&self.k, bytes),
            v: Slice::whole(&self.v, bytes),
            table: None,
            page: self.page,
            interleaved: false,
            ring: self.ring,
        }
    }

    pub fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// What one sequence holds becomes another's, too.
    pub fn copy(&self, plan: &Plan, from: usize, to: usize) -> Result<()> {
        for side in [&self.k, &self.v] {
            let own = side.bytes() / self.sequences;
            let at = |sequence: usize| side.ptr() + (sequence * own) as u64;
            if from.max(to) >= self.sequences {
                let text = format!("sequences {from} and {to} of a cache for {}", self.sequences);
                return Err(Error::Dims(text));
            }
            // SAFETY: both are inside the buffer, and apart unless they are the same.
            unsafe { plan.gpu.copy(at(to), at(from), if from == to { 0 } else { own })? };
        }
        Ok(())
    }
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
