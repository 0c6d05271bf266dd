//! Where caches keep their tokens.

use tercet_cuda::{Swizzle, TensorMap};

use super::super::plain::int;
use super::super::{Plan, Slice};
use crate::{Dims, Error, Result};

/// Most tokens of a tile; pages and rings are whole tiles.
pub(super) const TILE: usize = 64;

/// Keys and values in pages on the device, as kernels read and write them.
///
/// The page of a sequence's token t is entry `t / page` of its row of `table`, and without a table
/// its own number. Memory is `[pages, K, page, dim]`, or `[pages, page, K, dim]` when interleaved.
#[derive(Clone, Copy, Debug)]
pub struct CacheView {
    /// Keys.
    pub k: Slice,
    /// Values.
    pub v: Slice,
    /// `[sequences, width]` i32; `None`: one page a sequence.
    pub table: Option<(Slice, usize)>,
    /// Tokens in a page, a multiple of 64.
    pub page: usize,
    /// Whether the heads of a token lie together, rather than the tokens of a head.
    pub interleaved: bool,
    /// Whether token t stands at `t mod page`; only without a table.
    pub ring: bool,
}

/// The kernels' `Cache`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct RawCache {
    k: u64,
    v: u64,
    table: u64,
    page: i32,
    width: i32,
    interleaved: i32,
    ring: i32,
}

impl CacheView {
    /// Checks that it can hold `tokens` tokens (a ring: the newest `tokens`) of `sequences`
    /// sequences.
    pub(super) fn check(&self, name: &str, sequences: usize, tokens: usize) -> Result<()> {
        let CacheView { table, page, ring, .. } = *self;
        let refuse = |text: String| Err(Error::Dims(format!("cache {name}: {text}")));
        if page == 0 || !page.is_multiple_of(TILE) {
            return refuse(format!("pages of {page} tokens, expected a multiple of {TILE}"));
        }
        if ring && table.is_some() {
            return refuse("a ring is one page a sequence, without a page table".into());
        }
        let width = table.map_or(1, |(_, width)| width);
        if tokens > page * width {
            let held = page * width;
            return refuse(format!("{tokens} tokens of a sequence; its pages hold {held}"));
        }
        match table {
            Some((table, width)) if table.len() < sequences * width => {
                let got = table.len();
                refuse(format!("a page table of {got} entries for {sequences} rows of {width}"))
            }
            _ => Ok(()),
        }
    }

    /// TMA descriptors of keys and values: boxes of 64 columns and `tile` tokens of one head.
    pub(super) fn maps(&self, plan: &Plan, tile: usize) -> Result<[TensorMap; 2]> {
        let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
        let map = |side: Slice, dim: usize| {
            let pages = side.len() / (kv_heads * self.page * dim);
            let row = dim * plan.number.bytes();
            let (token, head) =
                if self.interleaved { (kv_heads * row, row) } else { (row, self.page * row) };
            let dims = [dim, self.page, kv_heads, pages].map(|x| x as u64);
            let strides = [token, head, kv_heads * self.page * row].map(|x| x as u64);
            let shape = [64, tile as u32, 1, 1];
            TensorMap::tiled(plan.number, side.ptr(), &dims, &strides, &shape, Swizzle::B128)
        };
        Ok([map(self.k, key_dim)?, map(self.v, value_dim)?])
    }

    pub(super) fn raw(&self) -> RawCache {
        let (table, width) = self.table.map_or((0, 1), |(table, width)| (table.ptr(), width));
        RawCache {
            k: self.k.ptr(),
            v: self.v.ptr(),
            table,
            page: int(self.page),
            width: int(width),
            interleaved: self.interleaved.into(),
            ring: self.ring.into(),
        }
    }
}
