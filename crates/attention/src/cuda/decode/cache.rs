//! Caches that own their memory.

use super::super::{Plan, Slice};
use super::append::{Compress, New, Places, append};
use super::fresh::{self, FRESH};
use super::pages::{Kind, Pages, Partial};
use super::step::{NsaCaches, Rows, dense_rows, nsa_rows};
use super::store::{Numbered, Store, place, ring_chunk, ring_tokens};
use super::tails::tails;
use crate::cpu::Mask;
use crate::shape::check_len;
use crate::{Dims, Error, NsaSpec, Result};

/// Rows `first..first + count` of a tensor whose rows are `width` numbers.
fn rows_of(plan: &Plan, x: Slice, first: usize, count: usize, width: usize) -> Slice {
    let start = (first * width * plan.number.bytes()) as u64;
    // SAFETY: inside `x`, as its length was checked.
    unsafe { Slice::new(x.ptr() + start, count * width) }
}

/// Notes that a sequence holds so many tokens.
fn set_len(lens: &mut [usize], sequence: usize, len: usize) -> Result<()> {
    let count = lens.len();
    let text = || format!("sequence {sequence} of a cache for {count}");
    *lens.get_mut(sequence).ok_or_else(|| Error::Dims(text()))? = len;
    Ok(())
}

/// New tokens of one sequence for [`NsaCache::extend`]: c tokens, and the compressed blocks they
/// complete; see [`crate::cpu::NsaStep`].
#[derive(Clone, Copy)]
pub struct NsaStep {
    /// Softmax scale.
    pub scale: f32,
    /// `[c, H, D]`.
    pub q: Slice,
    /// `[n, K, D]`.
    pub k_cmp: Slice,
    /// `[n, K, V]`.
    pub v_cmp: Slice,
    /// `[c, K, D]`.
    pub k_slc: Slice,
    /// `[c, K, V]`.
    pub v_slc: Slice,
    /// `[c, K, D]`.
    pub k_win: Slice,
    /// `[c, K, V]`.
    pub v_win: Slice,
    /// `[c, H, 3]`.
    pub gate: Slice,
}

/// One new token of each of n sequences for [`NsaCache::step`]. The compression branch gets the raw
/// token, and blocks are averaged on the device when their last token comes; or, with `ready`,
/// blocks that another φ made.
#[derive(Clone, Copy)]
pub struct NsaToken {
    /// Softmax scale.
    pub scale: f32,
    /// Each row's position, i32 `[n]`; −1: the row rests.
    pub positions: Slice,
    /// Each row's sequence, i32 `[n]`, all different; `None`: row i is of sequence i.
    pub sequences: Option<Slice>,
    /// `[n, H, D]`.
    pub q: Slice,
    /// Raw, or ready, `[n, K, D]`.
    pub k_cmp: Slice,
    /// Raw, or ready, `[n, K, V]`.
    pub v_cmp: Slice,
    /// The numbers of ready blocks, i32 `[n]`; −1: the row has none.
    pub ready: Option<Slice>,
    /// `[n, K, D]`.
    pub k_slc: Slice,
    /// `[n, K, V]`.
    pub v_slc: Slice,
    /// `[n, K, D]`.
    pub k_win: Slice,
    /// `[n, K, V]`.
    pub v_win: Slice,
    /// `[n, H, 3]`.
    pub gate: Slice,
    /// Cosines and sines by position, f32 `[positions, 2, D/2]`, that turn a compressed key to its
    /// block's first token; `None`: keys stay as they are.
    pub turns: Option<Slice>,
}

const CMP: &str = "compressed cache";
const SLC: &str = "selected cache";

/// One layer's NSA caches of some sequences; see [`crate::cpu::NsaCache`].
pub struct NsaCache {
    plan: Plan,
    spec: NsaSpec,
    lens: Vec<usize>,
    cmp: Store,
    slc: Store,
    win: Store,
    /// The last l raw tokens of the compression branch.
    raw: Store,
}

impl NsaCache {
    /// Empty caches of `sequences` sequences with room for `capacity` tokens each.
    pub fn new(plan: &Plan, spec: &NsaSpec, sequences: usize, capacity: usize) -> Result<Self> {
        spec.validate()?;
        let capacity = place(capacity);
        let blocks = spec.compressed_blocks(capacity);
        let cmp = Store::new(plan, CMP, sequences, blocks, false)?;
        let slc = Store::new(plan, SLC, sequences, capacity, false)?;
        Self::with(plan, spec, sequences, [cmp, slc])
    }

    /// Empty caches of sequences that take `pages` as they grow, of the same spec; they are
    /// reserved by whoever owns those, before tokens are appended. Rings are for whole sequences.
    pub fn paged(plan: &Plan, spec: &NsaSpec, pages: &Pages) -> Result<Self> {
        spec.validate()?;
        let cmp = Store::paged(plan, CMP, pages, Kind::Blocks)?;
        let slc = Store::paged(plan, SLC, pages, Kind::Tokens)?;
        Self::with(plan, spec, pages.sequences(), [cmp, slc])
    }

    fn with(plan: &Plan, spec: &NsaSpec, sequences: usize, [cmp, slc]: [Store; 2]) -> Result<Self> {
        let [ring, tail] = Self::rings(spec, slc.capacity());
        Ok(NsaCache {
            plan: plan.clone(),
            spec: spec.clone(),
            lens: vec![0; sequences],
            cmp,
            slc,
            win: Store::new(plan, "window cache", sequences, ring, true)?,
            raw: Store::new(plan, "compression tail", sequences, tail, true)?,
        })
    }

    /// Tokens of a sequence's rings, whatever it holds: of the window, of the raw tail.
    fn rings(spec: &NsaSpec, capacity: usize) -> [usize; 2] {
        [place(ring_tokens(spec.window, place(capacity))), place(spec.compress_block)]
    }

    /// Rows of keys and values that a sequence of at most `capacity` tokens takes beside its pages,
    /// however few it holds.
    pub fn ring_rows(spec: &NsaSpec, capacity: usize) -> usize {
        Self::rings(spec, capacity).iter().sum()
    }

    /// Tokens held of a sequence.
    pub fn len(&self, sequence: usize) -> usize {
        self.lens.get(sequence).copied().unwrap_or(0)
    }

    /// Whether no sequence holds a token.
    pub fn is_empty(&self) -> bool {
        self.lens.iter().all(|&len| len == 0)
    }

    /// Tokens of a sequence that fit.
    pub fn capacity(&self) -> usize {
        self.slc.capacity()
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        [&self.cmp, &self.slc, &self.win, &self.raw].iter().map(|store| store.bytes()).sum()
    }

    /// Makes room for `tokens` tokens of each sequence. Graphs captured before hold the old memory.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        if tokens <= self.capacity() {
            return Ok(());
        }
        self.slc.reserve(&self.plan, tokens)?;
        // A ring changes its places when it grows, so it is made for the longest at once unless
        // sequences were short; then no token has wrapped yet.
        let ring = ring_tokens(self.spec.window, self.slc.capacity());
        self.win.reserve(&self.plan, ring)?;
        self.cmp.reserve(&self.plan, self.spec.compressed_blocks(self.slc.capacity()))
    }

    fn caches(&self, gate: Slice) -> NsaCaches<'_> {
        let [cmp, slc, win] = [&self.cmp, &self.slc, &self.win].map(|store| store.view(&self.plan));
        NsaCaches { spec: &self.spec, gate, cmp, slc, win }
    }

    fn check(&self, sequence: usize, step: &NsaStep, out: Slice) -> Result<usize> {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.plan.dims;
        let Some(&len) = self.lens.get(sequence) else {
            let text = format!("sequence {sequence} of a cache for {}", self.lens.len());
            return Err(Error::Dims(text));
        };
        let c = step.q.len() / (heads * key_dim);
        check_len("q", step.q.len(), &[('c', c), ('H', heads), ('D', key_dim)])?;
        for (name, k) in [("k_slc", step.k_slc), ("k_win", step.k_win)] {
            check_len(name, k.len(), &[('c', c), ('K', kv_heads), ('D', key_dim)])?;
        }
        for (name, v) in [("v_slc", step.v_slc), ("v_win", step.v_win)] {
            check_len(name, v.len(), &[('c', c), ('K', kv_heads), ('V', value_dim)])?;
        }
        check_len("gate", step.gate.len(), &[('c', c), ('H', heads), ('3', 3)])?;
        check_len("out", out.len(), &[('c', c), ('H', heads), ('V', value_dim)])?;
        let n = self.spec.compressed_blocks(len + c) - self.spec.compressed_blocks(len);
        check_len("k_cmp", step.k_cmp.len(), &[('n', n), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v_cmp", step.v_cmp.len(), &[('n', n), ('K', kv_heads), ('V', value_dim)])?;
        Ok(c)
    }

    /// Appends c tokens of a sequence and writes their attention output `[c, H, V]` and, when asked
    /// for, the blocks each selected, i32 `[c, K, S]`. Grows as needed. Not while a graph is
    /// captured.
    pub fn extend(
        &mut self,
        sequence: usize,
        step: &NsaStep,
        out: Slice,
        indices: Option<Slice>,
    ) -> Result<()> {
        let count = self.check(sequence, step, out)?;
        if count == 0 {
            return Ok(());
        }
        let Dims { heads, kv_heads, key_dim, value_dim } = self.plan.dims;
        let len = self.lens[sequence];
        self.reserve(len + count)?;
        self.slc.covers(sequence, len + count)?;
        let plan = &self.plan;
        let blocks = self.spec.compressed_blocks(len);
        let ready = step.k_cmp.len() / (kv_heads * key_dim);
        let [cmp, slc, win] = [&self.cmp, &self.slc, &self.win].map(|store| store.view(plan));
        if ready > 0 {
            let numbered = Numbered::new(plan, sequence, blocks, ready)?;
            let (positions, sequences) = numbered.part(0, ready);
            let places = Places { plan, positions, sequences: Some(sequences) };
            append(&places, &[New { k: step.k_cmp, v: step.v_cmp, cache: cmp }], None)?;
        }
        let numbered = Numbered::new(plan, sequence, len, count)?;
        if len == 0 && count >= FRESH {
            let put = |kept: usize, k: Slice, v: Slice, cache| {
                let (first, dims) = (count - kept, [kv_heads * key_dim, kv_heads * value_dim]);
                let (positions, sequences) = numbered.part(first, kept);
                let places = Places { plan, positions, sequences: Some(sequences) };
                let [k, v] = [(k, dims[0]), (v, dims[1])]
                    .map(|(x, width)| rows_of(plan, x, first, kept, width));
                append(&places, &[New { k, v, cache }], None)
            };
            put(count, step.k_slc, step.v_slc, slc)?;
            // A ring has one place for tokens that far apart: only the last of them go in.
            put(count.min(win.page), step.k_win, step.v_win, win)?;
            fresh::nsa((plan, &self.spec), (step, count), out, indices)?;
            self.lens[sequence] = count;
            return Ok(());
        }
        let most = ring_chunk(self.win.page, self.spec.window, len, count);
        let mut done = 0;
        while done < count {
            let some = (count - done).min(most);
            let (positions, sequences) = numbered.part(done, some);
            let places = Places { plan, positions, sequences: Some(sequences) };
            let own = |x: Slice, width: usize| rows_of(plan, x, done, some, width);
            let (k, v) = (kv_heads * key_dim, kv_heads * value_dim);
            let new = [
                New { k: own(step.k_slc, k), v: own(step.v_slc, v), cache: slc },
                New { k: own(step.k_win, k), v: own(step.v_win, v), cache: win },
            ];
            append(&places, &new, None)?;
            let rows = Rows {
                plan,
                scale: step.scale,
                q: own(step.q, heads * key_dim),
                positions,
                sequences: Some(sequences),
                count: self.lens.len(),
                longest: len + done + some,
            };
            let caches = self.caches(own(step.gate, heads * 3));
            let indices = indices.map(|indices| {
                let row = kv_heads * self.spec.select_count;
                // SAFETY: inside `indices`, whose length `nsa_rows` would refuse otherwise.
                unsafe { Slice::new(indices.ptr() + (done * row * 4) as u64, some * row) }
            });
            nsa_rows(&rows, &caches, own(out, heads * value_dim), indices)?;
            done += some;
        }
        self.lens[sequence] += count;
        Ok(())
    }

    /// Appends one token of n sequences at the positions on the device, and writes the attention
    /// output `[n, H, V]`. Enqueues two or three launches and nothing else, so it can be captured; the host
    /// is told by [`NsaCache::advance`], once for every time it happens. Positions must be below
    /// [`NsaCache::capacity`], and of a sequence those that follow one another, for which the raw
    /// tokens of its last l − 1 positions came by `step` or [`NsaCache::prime`].
    pub fn step(&self, token: &NsaToken, out: Slice, indices: Option<Slice>) -> Result<()> {
        let plan = &self.plan;
        self.check_rows(token.positions, token.sequences)?;
        let [raw, slc, win] = [&self.raw, &self.slc, &self.win].map(|store| store.view(plan));
        let cmp = self.cmp.view(plan);
        let own = [
            New { k: token.k_slc, v: token.v_slc, cache: slc },
            New { k: token.k_win, v: token.v_win, cache: win },
        ];
        let places = Places { plan, positions: token.positions, sequences: token.sequences };
        let [k, v] = [token.k_cmp, token.v_cmp];
        match token.ready {
            None => {
                let compress = Compress { spec: &self.spec, cmp, turns: token.turns };
                append(&places, &[New { k, v, cache: raw }, own[0], own[1]], Some(compress))?;
            }
            Some(blocks) => {
                check_len("blocks", blocks.len(), &[('n', token.positions.len())])?;
                append(&places, &own, None)?;
                append(&Places { positions: blocks, ..places }, &[New { k, v, cache: cmp }], None)?;
            }
        }
        let rows = Rows {
            plan,
            scale: token.scale,
            q: token.q,
            positions: token.positions,
            sequences: token.sequences,
            count: self.lens.len(),
            longest: self.capacity(),
        };
        nsa_rows(&rows, &self.caches(token.gate), out, indices)
    }

    /// Takes one raw token of the compression branch of n sequences, k `[n, K, D]` and v
    /// `[n, K, V]`, at the positions on the device, and writes the l last ones `[n·l, K, _]`, from
    /// the positions `starts` (i32 `[n]`) on, to `to`: what a φ with parameters makes a block of.
    /// Rows that complete no block stay as they are. Rows as in [`NsaToken`]. Can be captured.
    pub fn tails(
        &self,
        positions: Slice,
        sequences: Option<Slice>,
        starts: Slice,
        [k, v]: [Slice; 2],
        to: [Slice; 2],
    ) -> Result<()> {
        let (plan, raw) = (&self.plan, self.raw.view(&self.plan));
        self.check_rows(positions, sequences)?;
        check_len("starts", starts.len(), &[('n', positions.len())])?;
        append(&Places { plan, positions, sequences }, &[New { k, v, cache: raw }], None)?;
        tails(plan, &raw, &self.spec, (starts, sequences), to)
    }

    fn check_rows(&self, positions: Slice, sequences: Option<Slice>) -> Result<()> {
        match sequences {
            None => check_len("positions", positions.len(), &[('B', self.lens.len())]),
            Some(own) => check_len("sequences", own.len(), &[('n', positions.len())]),
        }
    }

    /// Forgets what a sequence holds.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        set_len(&mut self.lens, sequence, 0)
    }

    /// What sequence `from` holds becomes what `to` holds, too. `partial` is what [`Pages::copy`]
    /// has left to do, nothing without pages.
    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        for store in [&self.cmp, &self.slc, &self.win, &self.raw] {
            store.copy(&self.plan, from, to, partial)?;
        }
        let len = self.len(from);
        set_len(&mut self.lens, to, len)
    }

    /// Hands over raw tokens of the compression branch, `k` `[c, K, D]` and `v` `[c, K, V]`, the
    /// last of which stand right before the sequence's next position: what [`NsaCache::step`] needs
    /// after [`NsaCache::extend`], which gets ready blocks. Only the last l − 1 matter.
    pub fn prime(&self, sequence: usize, k: Slice, v: Slice) -> Result<()> {
        let Dims { kv_heads, key_dim, value_dim, .. } = self.plan.dims;
        let count = k.len() / (kv_heads * key_dim);
        check_len("k", k.len(), &[('c', count), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v", v.len(), &[('c', count), ('K', kv_heads), ('V', value_dim)])?;
        let len = self.len(sequence);
        let keep = count.min(self.spec.compress_block).min(len);
        if keep == 0 {
            return Ok(());
        }
        let plan = &self.plan;
        let numbered = Numbered::new(plan, sequence, len - keep, keep)?;
        let (positions, sequences) = numbered.part(0, keep);
        let places = Places { plan, positions, sequences: Some(sequences) };
        let own = |x: Slice, width: usize| rows_of(plan, x, count - keep, keep, width);
        let (k, v) = (own(k, kv_heads * key_dim), own(v, kv_heads * value_dim));
        append(&places, &[New { k, v, cache: self.raw.view(plan) }], None)
    }

    /// Notes that a captured [`NsaCache::step`] has been launched: each sequence in `active` holds
    /// one token more.
    pub fn advance(&mut self, active: impl IntoIterator<Item = usize>) -> Result<()> {
        for sequence in active {
            let capacity = self.capacity();
            match self.lens.get_mut(sequence) {
                Some(len) if *len < capacity => *len += 1,
                Some(len) => {
                    let text = format!("sequence {sequence} has {len} tokens and no room for more");
                    return Err(Error::Dims(text));
                }
                None => {
                    return Err(Error::Dims(format!(
                        "sequence {sequence} of a cache for {}",
                        self.lens.len()
                    )));
                }
            }
        }
        Ok(())
    }
}

/// One layer's dense (or window) caches of some sequences; see [`crate::cpu::DenseCache`].
pub struct DenseCache {
    plan: Plan,
    mask: Mask,
    lens: Vec<usize>,
    store: Store,
}

impl DenseCache {
    /// Empty caches of `sequences` sequences with room for `capacity` tokens each.
    pub fn new(plan: &Plan, mask: Mask, sequences: usize, capacity: usize) -> Result<Self> {
        if mask == Mask::Window(0) {
            return Err(Error::Dims("a window of 0 keys, expected at least 1".into()));
        }
        let (tokens, ring) = match mask {
            Mask::Causal => (capacity, false),
            Mask::Window(_) => (Self::ring_rows(mask, capacity), true),
        };
        let store = Store::new(plan, "dense cache", sequences, tokens, ring)?;
        Ok(DenseCache { plan: plan.clone(), mask, lens: vec![0; sequences], store })
    }

    /// Empty causal caches of sequences that take `pages` as they grow; see [`NsaCache::paged`].
    pub fn paged(plan: &Plan, pages: &Pages) -> Result<Self> {
        let store = Store::paged(plan, "dense cache", pages, Kind::Tokens)?;
        let lens = vec![0; pages.sequences()];
        Ok(DenseCache { plan: plan.clone(), mask: Mask::Causal, lens, store })
    }

    /// As [`NsaCache::ring_rows`]; none where every token is kept.
    pub fn ring_rows(mask: Mask, capacity: usize) -> usize {
        match mask {
            Mask::Causal => 0,
            Mask::Window(window) => place(ring_tokens(window, capacity)),
        }
    }

    /// Tokens held of a sequence.
    pub fn len(&self, sequence: usize) -> usize {
        self.lens.get(sequence).copied().unwrap_or(0)
    }

    /// Whether no sequence holds a token.
    pub fn is_empty(&self) -> bool {
        self.lens.iter().all(|&len| len == 0)
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.store.bytes()
    }

    /// Tokens of a sequence that fit; a window's ring takes any number.
    pub fn capacity(&self) -> usize {
        if self.store.ring { i32::MAX as usize } else { self.store.capacity() }
    }

    /// Makes room for `tokens` tokens of each sequence. Graphs captured before hold the old memory.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let tokens = match self.mask {
            Mask::Causal => tokens,
            Mask::Window(window) => ring_tokens(window, tokens),
        };
        self.store.reserve(&self.plan, tokens)
    }

    /// Forgets what a sequence holds.
    pub fn clear(&mut self, sequence: usize) -> Result<()> {
        set_len(&mut self.lens, sequence, 0)
    }

    /// See [`NsaCache::copy`].
    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        self.store.copy(&self.plan, from, to, partial)?;
        let len = self.len(from);
        set_len(&mut self.lens, to, len)
    }

    /// Appends one token of n sequences (`q` `[n, H, D]`, `k` `[n, K, D]`, `v` `[n, K, V]`) at the
    /// `positions` on the device, and writes the output `[n, H, V]`; rows as in [`NsaToken`]. Two
    /// launches, so it can be captured; see [`NsaCache::step`].
    pub fn step(
        &self,
        scale: f32,
        (positions, sequences): (Slice, Option<Slice>),
        [q, k, v]: [Slice; 3],
        out: Slice,
    ) -> Result<()> {
        let (plan, count) = (&self.plan, self.lens.len());
        if sequences.is_none() {
            check_len("positions", positions.len(), &[('B', count)])?;
        }
        let cache = self.store.view(plan);
        let places = Places { plan, positions, sequences };
        append(&places, &[New { k, v, cache }], None)?;
        // What a ring holds is all that a row can see.
        let longest = self.store.capacity();
        let rows = Rows { plan, scale, q, positions, sequences, count, longest };
        dense_rows(&rows, self.mask, &cache, out)
    }

    /// Notes that a captured [`DenseCache::step`] has been launched; see [`NsaCache::advance`].
    pub fn advance(&mut self, active: impl IntoIterator<Item = usize>) -> Result<()> {
        let capacity = self.capacity();
        for sequence in active {
            match self.lens.get_mut(sequence) {
                Some(len) if *len < capacity => *len += 1,
                _ => {
                    return Err(Error::Dims(format!(
                        "sequence {sequence} has no room for a token"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Appends c tokens of a sequence (`q` `[c, H, D]`, `k` `[c, K, D]`, `v` `[c, K, V]`) and writes
    /// their output `[c, H, V]`. Grows as needed. Not while a graph is captured.
    pub fn extend(
        &mut self,
        sequence: usize,
        scale: f32,
        [q, k, v]: [Slice; 3],
        out: Slice,
    ) -> Result<()> {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.plan.dims;
        let Some(&len) = self.lens.get(sequence) else {
            let text = format!("sequence {sequence} of a cache for {}", self.lens.len());
            return Err(Error::Dims(text));
        };
        let count = q.len() / (heads * key_dim);
        check_len("q", q.len(), &[('c', count), ('H', heads), ('D', key_dim)])?;
        check_len("k", k.len(), &[('c', count), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v", v.len(), &[('c', count), ('K', kv_heads), ('V', value_dim)])?;
        check_len("out", out.len(), &[('c', count), ('H', heads), ('V', value_dim)])?;
        if count == 0 {
            return Ok(());
        }
        self.store.covers(sequence, len + count)?;
        let most = match self.mask {
            Mask::Causal => {
                self.store.reserve(&self.plan, len + count)?;
                count
            }
            Mask::Window(window) => {
                let wanted = ring_tokens(window, len + count);
                self.store.reserve(&self.plan, wanted)?;
                ring_chunk(self.store.page, window, len, count)
            }
        };
        let plan = &self.plan;
        let cache = self.store.view(plan);
        let numbered = Numbered::new(plan, sequence, len, count)?;
        if len == 0 && count >= FRESH {
            // A ring has one place for tokens that far apart: only the last of them go in.
            let kept = if cache.ring { count.min(cache.page) } else { count };
            let (positions, sequences) = numbered.part(count - kept, kept);
            let own = |x: Slice, width: usize| rows_of(plan, x, count - kept, kept, width);
            let new = New { k: own(k, kv_heads * key_dim), v: own(v, kv_heads * value_dim), cache };
            append(&Places { plan, positions, sequences: Some(sequences) }, &[new], None)?;
            fresh::dense((plan, self.mask), (scale, count), [q, k, v], out)?;
            self.lens[sequence] = count;
            return Ok(());
        }
        let mut done = 0;
        while done < count {
            let some = (count - done).min(most);
            let (positions, sequences) = numbered.part(done, some);
            let own = |x: Slice, width: usize| rows_of(plan, x, done, some, width);
            let places = Places { plan, positions, sequences: Some(sequences) };
            let new = New { k: own(k, kv_heads * key_dim), v: own(v, kv_heads * value_dim), cache };
            append(&places, &[new], None)?;
            let rows = Rows {
                plan,
                scale,
                q: own(q, heads * key_dim),
                positions,
                sequences: Some(sequences),
                count: self.lens.len(),
                longest: len + done + some,
            };
            dense_rows(&rows, self.mask, &cache, own(out, heads * value_dim))?;
            done += some;
        }
        self.lens[sequence] += count;
        Ok(())
    }
}
