//! Caches: one sequence's keys and values, extended by one or many tokens at a time.
//!
//! A cache is [`Pages`], the layout that prefill packs, so a step runs the very loops of prefill
//! over a longer prefix. A single query is cut by heads to give every thread work; rows never mix,
//! so the bits stay those of prefill, and importance is summed over heads in the same order.

use rayon::prelude::*;

use super::attend::{
    Mask, PAGE, Rows, SELECTED_ROWS, Scratch, Tile, Visible, attend_selected_tile, attend_tile,
    tiles,
};
use super::compress::{CompressInput, Phi, compress_forward};
use super::disjoint::Disjoint;
use super::gate::blend;
use super::pages::Pages;
use super::score::{add_head, attend_compressed_tile, tile_rows};
use super::select::{all_selected, select};
use super::simd::{PAD, Scale};
use crate::shape::{check_len, check_scale};
use crate::{Dims, Element, NsaSpec, Result};

/// Rows of a decode tile: small, so that two threads share one KV head's group.
const DECODE_ROWS: usize = 8;

/// Keys and values of the compression branch not yet absorbed by a block.
#[derive(Clone)]
pub struct CompressTail<E> {
    spec: NsaSpec,
    kv_heads: usize,
    dim: usize,
    /// Tokens from the start of the next block on, `[t, K, C]`.
    raw: Vec<E>,
    blocks: usize,
}

impl<E: Element> CompressTail<E> {
    /// An empty tail for one sequence; `dim` is C of `[T, K, C]`.
    pub fn new(spec: &NsaSpec, kv_heads: usize, dim: usize) -> Result<Self> {
        spec.validate()?;
        Dims { heads: kv_heads, kv_heads, key_dim: dim, value_dim: dim }.validate()?;
        Ok(Self { spec: spec.clone(), kv_heads, dim, raw: Vec::new(), blocks: 0 })
    }

    /// Blocks emitted so far; the next one starts at token `blocks()·d`.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Takes new tokens `[c, K, C]`; returns the blocks they complete, `[n, K, C]`, bit-equal to
    /// [`compress_forward`] of the whole sequence.
    pub fn push(&mut self, x: &[E], phi: Phi<E>) -> Result<Vec<E>> {
        let token = self.kv_heads * self.dim;
        check_len("x", x.len(), &[('c', x.len() / token), ('K', self.kv_heads), ('C', self.dim)])?;
        self.raw.extend_from_slice(x);
        let held = self.raw.len() / token;
        let complete = self.spec.compressed_blocks(held);
        if complete == 0 {
            return Ok(Vec::new());
        }
        let mut out = vec![E::default(); complete * token];
        let input = CompressInput {
            spec: &self.spec,
            cu_seqlens: &[0, held as i32],
            kv_heads: self.kv_heads,
            dim: self.dim,
            x: &self.raw,
            phi,
        };
        compress_forward(&input, &mut out)?;
        self.raw.drain(..complete * self.spec.compress_stride * token);
        self.blocks += complete;
        Ok(out)
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
#[derive(Clone)]
pub struct NsaCache {
    spec: NsaSpec,
    dims: Dims,
    cmp: Pages,
    slc: Pages,
    win: Pages,
}

impl NsaCache {
    /// An empty cache.
    pub fn new(spec: &NsaSpec, dims: Dims) -> Result<Self> {
        spec.validate()?;
        dims.validate()?;
        let pages = |tokens| Pages::new(tokens, dims.kv_heads, dims.key_dim, dims.value_dim);
        let win = pages(PAGE).ring(spec.window);
        Ok(Self { spec: spec.clone(), dims, cmp: pages(PAGE), slc: pages(spec.select_block), win })
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.slc.len()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of cache memory in use.
    pub fn bytes(&self) -> usize {
        self.cmp.bytes() + self.slc.bytes() + self.win.bytes()
    }

    fn check<E: Element>(&self, step: &NsaStep<E>, out: &[E]) -> Result<usize> {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let c = step.q.len() / (heads * key_dim);
        check_scale(step.scale)?;
        check_len("q", step.q.len(), &[('c', c), ('H', heads), ('D', key_dim)])?;
        for (name, k) in [("k_slc", step.k_slc), ("k_win", step.k_win)] {
            check_len(name, k.len(), &[('c', c), ('K', kv_heads), ('D', key_dim)])?;
        }
        for (name, v) in [("v_slc", step.v_slc), ("v_win", step.v_win)] {
            check_len(name, v.len(), &[('c', c), ('K', kv_heads), ('V', value_dim)])?;
        }
        check_len("gate", step.gate.len(), &[('c', c), ('H', heads), ('3', 3)])?;
        check_len("out", out.len(), &[('c', c), ('H', heads), ('V', value_dim)])?;
        let n = self.spec.compressed_blocks(self.len() + c) - self.cmp.len();
        check_len("k_cmp", step.k_cmp.len(), &[('n', n), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v_cmp", step.v_cmp.len(), &[('n', n), ('K', kv_heads), ('V', value_dim)])?;
        Ok(c)
    }

    /// Appends c tokens and writes their attention output `[c, H, V]`; returns the blocks each
    /// selected, `[c, K, S]`.
    pub fn extend<E: Element>(&mut self, step: &NsaStep<E>, out: &mut [E]) -> Result<Vec<i32>> {
        let count = self.check(step, out)?;
        // One entry into the pool instead of one for each parallel part: a step is that short.
        Ok(rayon::scope(|_| self.extend_checked(step, count, out)))
    }

    fn extend_checked<E: Element>(
        &mut self,
        step: &NsaStep<E>,
        count: usize,
        out: &mut [E],
    ) -> Vec<i32> {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let new_blocks = step.k_cmp.len() / (kv_heads * key_dim);
        self.cmp.append(step.k_cmp, step.v_cmp, new_blocks);
        let mut indices = vec![-1; count * kv_heads * self.spec.select_count];
        let mut branches = [0; 3].map(|_| vec![0.0f32; count * heads * value_dim]);
        // A ring forgets: tokens enter it a page at a time, never across two.
        let mut done = 0;
        while done < count {
            let some = (count - done).min(PAGE - self.len() % PAGE);
            let part = Part { first: self.len(), done, count: some };
            let (k, v) = (done * kv_heads * key_dim, done * kv_heads * value_dim);
            self.slc.append(&step.k_slc[k..], &step.v_slc[v..], some);
            self.win.append(&step.k_win[k..], &step.v_win[v..], some);
            self.attend_part(step, part, &mut branches, &mut indices);
            done += some;
        }
        let [cmp, slc, win] = &branches;
        blend(step.gate, [cmp, slc, win], value_dim, out);
        indices
    }

    /// The three branches of some of a step's tokens, already in the caches.
    fn attend_part<E: Element>(
        &self,
        step: &NsaStep<E>,
        part: Part,
        branches: &mut [Vec<f32>; 3],
        indices: &mut [i32],
    ) {
        let (spec, dims) = (&self.spec, self.dims);
        let rows =
            Rows { q: step.q, dims, scale: step.scale, token: part.done, position: part.first };
        let [cmp, slc, win] = branches.each_mut().map(|branch| Disjoint::new(&mut branch[..]));
        let mut lse = vec![0.0f64; step.q.len() / dims.key_dim];
        let lse = Disjoint::new(&mut lse);

        // Compressed and window tiles side by side; the compressed ones hand on what they scored.
        let work = decode_tiles(dims, part.count, tile_rows(self.cmp.len()));
        let scored: Vec<Scored> = work
            .par_iter()
            .with_max_len(1)
            .map(|tile| {
                Scratch::with(|scratch| {
                    let first = rows.position(tile.queries.start);
                    scratch.start(&rows, tile);
                    attend_tile(
                        &self.win,
                        Visible::Mask(Mask::Window(spec.window)),
                        tile,
                        first,
                        Scale::new(step.scale),
                        scratch,
                    );
                    scratch.finish(&rows, tile, &win, &lse);
                    scratch.start(&rows, tile);
                    let p = attend_compressed_tile(
                        &self.cmp,
                        spec,
                        tile,
                        first,
                        Scale::new(step.scale),
                        scratch,
                    );
                    scratch.finish(&rows, tile, &cmp, &lse);
                    let sums = scratch.sum.chunks_exact(PAD).map(|lanes| lanes[0]).collect();
                    Scored { row: p.row, p: std::mem::take(&mut scratch.s), sums }
                })
            })
            .collect();
        self.choose(&rows, part, &work, &scored, indices);

        let indices = &*indices;
        decode_tiles(dims, part.count, SELECTED_ROWS).into_par_iter().with_max_len(1).for_each(
            |tile| {
                Scratch::with(|scratch| {
                    scratch.start(&rows, &tile);
                    let chosen = |query: usize| {
                        let query = part.done + tile.queries.start + query;
                        let row = (query * dims.kv_heads + tile.kv_head) * spec.select_count;
                        &indices[row..row + spec.select_count]
                    };
                    let first = rows.position(tile.queries.start);
                    attend_selected_tile(
                        &self.slc,
                        chosen,
                        &tile,
                        first,
                        Scale::new(step.scale),
                        scratch,
                    );
                    scratch.finish(&rows, &tile, &slc, &lse);
                });
            },
        );
    }

    /// Sums what the tiles scored over the heads of each group and chooses blocks.
    fn choose<E: Element>(
        &self,
        rows: &Rows<E>,
        part: Part,
        work: &[Tile],
        scored: &[Scored],
        indices: &mut [i32],
    ) {
        let (spec, heads) = (&self.spec, self.dims.kv_heads);
        let (mut importance, mut best) = (Vec::new(), Vec::new());
        for kv_head in 0..heads {
            for query in 0..part.count {
                let position = rows.position(query);
                let seen = if all_selected(spec, position) {
                    0
                } else {
                    spec.visible_compressed(position)
                };
                importance.clear();
                importance.resize(seen, 0.0);
                let own = |tile: &&(&Tile, &Scored)| {
                    tile.0.kv_head == kv_head && tile.0.queries.contains(&query)
                };
                let pairs: Vec<_> = work.iter().zip(scored).collect();
                for (tile, scored) in pairs.iter().filter(own) {
                    let first = (query - tile.queries.start) * tile.heads.len();
                    for row in first..first + tile.heads.len() {
                        add_head(&mut importance, &scored.p[row * scored.row..], scored.sums[row]);
                    }
                }
                let at = ((part.done + query) * heads + kv_head) * spec.select_count;
                let out = &mut indices[at..at + spec.select_count];
                select(spec, position, &importance, &mut best, out);
            }
        }
    }
}

/// Tokens `done..done + count` of a step, the first at position `first`.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    done: usize,
    count: usize,
}

/// A compressed tile's probabilities, rows `row` apart, and their normalisers.
struct Scored {
    row: usize,
    p: Vec<f32>,
    sums: Vec<f32>,
}

/// Tiles for a step of a few queries: one query's group is cut by heads.
fn decode_tiles(dims: Dims, queries: usize, rows: usize) -> Vec<Tile> {
    if queries > 1 {
        return tiles(dims, queries, rows);
    }
    let group = dims.group();
    (0..dims.kv_heads)
        .flat_map(|kv_head| {
            (0..group).step_by(DECODE_ROWS).map(move |head| Tile {
                kv_head,
                heads: head..(head + DECODE_ROWS).min(group),
                queries: 0..queries,
            })
        })
        .collect()
}

/// One layer's dense (or window) cache of one sequence.
#[derive(Clone)]
pub struct DenseCache {
    dims: Dims,
    mask: Mask,
    pages: Pages,
}

impl DenseCache {
    /// An empty cache.
    pub fn new(dims: Dims, mask: Mask) -> Result<Self> {
        dims.validate()?;
        mask.check()?;
        let pages = Pages::new(PAGE, dims.kv_heads, dims.key_dim, dims.value_dim);
        let pages = match mask {
            Mask::Causal => pages,
            Mask::Window(window) => pages.ring(window),
        };
        Ok(Self { dims, mask, pages })
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of cache memory in use.
    pub fn bytes(&self) -> usize {
        self.pages.bytes()
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
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let count = q.len() / (heads * key_dim);
        check_scale(scale)?;
        check_len("q", q.len(), &[('c', count), ('H', heads), ('D', key_dim)])?;
        check_len("k", k.len(), &[('c', count), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v", v.len(), &[('c', count), ('K', kv_heads), ('V', value_dim)])?;
        check_len("out", out.len(), &[('c', count), ('H', heads), ('V', value_dim)])?;
        let mut lse = vec![0.0f64; count * heads];
        let (out, lse) = (Disjoint::new(out), Disjoint::new(&mut lse));
        let mut done = 0;
        while done < count {
            // A ring forgets: tokens enter it a page at a time, never across two.
            let some = match self.mask {
                Mask::Causal => count,
                Mask::Window(_) => (count - done).min(PAGE - self.len() % PAGE),
            };
            let position = self.len();
            let (k, v) = (&k[done * kv_heads * key_dim..], &v[done * kv_heads * value_dim..]);
            self.pages.append(k, v, some);
            let rows = Rows { q, dims: self.dims, scale, token: done, position };
            let work = decode_tiles(self.dims, some, super::attend::TILE_ROWS);
            work.into_par_iter().with_max_len(1).for_each(|tile| {
                Scratch::with(|scratch| {
                    scratch.start(&rows, &tile);
                    let first = rows.position(tile.queries.start);
                    attend_tile(
                        &self.pages,
                        Visible::Mask(self.mask),
                        &tile,
                        first,
                        Scale::new(scale),
                        scratch,
                    );
                    scratch.finish(&rows, &tile, &out, &lse);
                });
            });
            done += some;
        }
        Ok(())
    }
}
