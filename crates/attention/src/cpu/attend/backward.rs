//! Gradients of any branch: keys outside, the queries that see them inside.
//!
//! With P = exp(scale·s − lse) and Δ = ⟨dO, O⟩ (nsa.md 1.5):
//! dV += Pᵀ·dO, dS = P∘(dO·Vᵀ − Δ), dQ += scale·dS·K, dK += scale·dSᵀ·Q.
//!
//! Work is cut into (query chunk, key chunk) pairs. In round r chunk i of the queries meets chunk
//! i − r of the keys, so no two tasks of a round share a row of dQ, dK or dV: no atomics, no
//! copies, and the order of every sum is fixed whatever the number of threads.

use std::f64::consts::LOG2_E;
use std::ops::Range;

use rayon::prelude::*;

use super::super::disjoint::Disjoint;
use super::super::pages::Pages;
use super::super::select::Inverse;
use super::super::simd::{Backward, Gemm, Scale, pad};
use super::tile::{Rows, Scratch, fill, room};
use super::{PAGE, TILE_ROWS, Visible};
use crate::{Dims, Element};

/// Query chunks a sequence is cut into, when it is long enough.
const CHUNKS: usize = 16;
/// Query rows whose shares of dK and dV are summed before they join the rest: a thousand rows often
/// meet one key, and their rounding error is least when both sums have about the root of that.
const SUMMED_ROWS: usize = 32;
/// Smallest and largest query chunk.
const CHUNK_SIZES: (usize, usize) = (128, 2048);

/// Which queries meet which keys.
#[derive(Clone, Copy)]
pub(in super::super) enum Chosen<'a> {
    /// A mask, with pages of [`PAGE`] keys.
    Visible(Visible<'a>),
    /// Selected blocks of so many keys, and which queries chose each.
    Blocks(usize, &'a Inverse),
}

/// What arrives from above, in the layouts of the whole input.
pub(in super::super) struct Upstream<'a, E> {
    /// `[T, H, V]`.
    pub d_out: &'a [E],
    /// Gates `[T, H, 3]` and this branch's place in them; 1 when absent.
    pub gate: Option<(&'a [E], usize)>,
    /// Natural-log sums of exponentials `[T, H]`.
    pub lse: &'a [f64],
    /// Δ `[T, H]`.
    pub delta: &'a [f32],
}

/// dK and dV of one sequence, f32, by page and head.
pub(in super::super) struct Accumulators {
    /// Tokens in a page.
    page: usize,
    /// KV heads.
    heads: usize,
    /// Softmax scale, which dK still lacks.
    scale: f32,
    /// `[page, K, w, pad(D)]`.
    d_k: Vec<f32>,
    /// `[page, K, w, pad(V)]`.
    d_v: Vec<f32>,
}

impl Accumulators {
    /// Rounds into `[t, K, D]` and `[t, K, V]`, tokens of the sequence.
    pub fn write<E: Element>(&self, dims: Dims, d_k: &mut [E], d_v: &mut [E]) {
        self.unpack(&self.d_k, dims.key_dim, self.scale, d_k);
        self.unpack(&self.d_v, dims.value_dim, 1.0, d_v);
    }

    fn unpack<E: Element>(&self, from: &[f32], dim: usize, factor: f32, to: &mut [E]) {
        to.par_chunks_mut(self.page * self.heads * dim).enumerate().for_each(|(page, to)| {
            for (i, to) in to.chunks_exact_mut(dim).enumerate() {
                let (token, head) = (i / self.heads, i % self.heads);
                let row = (page * self.heads + head) * self.page + token;
                for (y, x) in to.iter_mut().zip(&from[row * pad(dim)..]) {
                    *y = E::from_f32(x * factor);
                }
            }
        });
    }
}

/// Adds this branch's dQ into `d_q` `[T, H, D]` and returns its dK and dV. `keys` and `values`
/// are those of the sequence alone; it has `queries` queries.
pub(in super::super) fn backward_branch<E: Element>(
    rows: &Rows<E>,
    queries: usize,
    keys: &[E],
    values: &[E],
    chosen: Chosen,
    upstream: &Upstream<E>,
    d_q: &mut [f32],
) -> Accumulators {
    let dims = rows.dims;
    let (heads, key_dim, value_dim) = (dims.kv_heads, dims.key_dim, dims.value_dim);
    let count = keys.len() / (heads * key_dim);
    let page = match chosen {
        Chosen::Visible(_) => PAGE,
        Chosen::Blocks(tokens, _) => tokens,
    };
    let branch = Branch {
        rows,
        chosen,
        upstream,
        keys_t: Pages::new(page, heads, key_dim, 0).pack(keys, &[], count),
        values_t: Pages::new(page, heads, value_dim, key_dim).pack(values, keys, count),
    };
    let pages = count.div_ceil(page);
    let mut sums = Accumulators {
        page,
        heads,
        scale: rows.scale,
        d_k: vec![0.0; pages * heads * page * pad(key_dim)],
        d_v: vec![0.0; pages * heads * page * pad(value_dim)],
    };
    let chunk = queries.div_ceil(CHUNKS).clamp(CHUNK_SIZES.0, CHUNK_SIZES.1);
    let query_chunks = queries.div_ceil(chunk);
    let key_chunk = pages.div_ceil(query_chunks.max(1)).max(1);
    let chunks = query_chunks.max(pages.div_ceil(key_chunk));
    let targets = Targets {
        d_q: Disjoint::new(d_q),
        d_k: Disjoint::new(&mut sums.d_k),
        d_v: Disjoint::new(&mut sums.d_v),
    };
    for round in 0..chunks {
        (0..query_chunks * heads).into_par_iter().with_max_len(1).for_each(|task| {
            // Late chunks see the most keys: they start first.
            let (i, head) = (query_chunks - 1 - task / heads, task % heads);
            let j = (i + chunks - round) % chunks;
            let own = i * chunk..((i + 1) * chunk).min(queries);
            for page in (j * key_chunk).min(pages)..((j + 1) * key_chunk).min(pages) {
                Scratch::with(|scratch| branch.page(page, head, own.clone(), &targets, scratch));
            }
        });
    }
    sums
}

/// Everything the tasks read.
struct Branch<'a, E> {
    rows: &'a Rows<'a, E>,
    chosen: Chosen<'a>,
    upstream: &'a Upstream<'a, E>,
    /// Kᵀ.
    keys_t: Pages,
    /// Vᵀ, and K by row.
    values_t: Pages,
}

/// Everything the tasks write, each its own rows.
struct Targets<'a> {
    d_q: Disjoint<'a, f32>,
    d_k: Disjoint<'a, f32>,
    d_v: Disjoint<'a, f32>,
}

impl<E: Element> Branch<'_, E> {
    /// One page of keys against those queries of `own` that see it.
    fn page(
        &self,
        page: usize,
        head: usize,
        own: Range<usize>,
        targets: &Targets,
        s: &mut Scratch,
    ) {
        let (dims, tokens) = (self.rows.dims, self.keys_t.tokens);
        let start = page * tokens;
        let mut queries = std::mem::take(&mut s.rows);
        queries.clear();
        match self.chosen {
            Chosen::Visible(visible) => {
                let sees = |&query: &usize| {
                    let (from, to) = visible.range(self.rows.position(query));
                    from < start + tokens && to > start
                };
                queries.extend(own.filter(sees).map(|query| query as u32));
            }
            Chosen::Blocks(_, inverse) => {
                let all = inverse.queries(head, page);
                let from = all.partition_point(|&query| (query as usize) < own.start);
                let to = all.partition_point(|&query| (query as usize) < own.end);
                queries.extend_from_slice(&all[from..to]);
            }
        }
        if !queries.is_empty() {
            let row = (page * dims.kv_heads + head) * tokens;
            let (k_width, v_width) = (pad(dims.key_dim), pad(dims.value_dim));
            // SAFETY: in a round each (key chunk, head) belongs to one task.
            let (d_k, d_v) = unsafe {
                (
                    targets.d_k.row(row * k_width, tokens * k_width),
                    targets.d_v.row(row * v_width, tokens * v_width),
                )
            };
            for some in queries.chunks((TILE_ROWS / dims.group()).max(1)) {
                self.tile(page, head, some, s, d_k, d_v);
                self.add_d_q(head, some, s, &targets.d_q);
            }
        }
        s.rows = queries;
    }

    /// One page against the rows of some queries; leaves the rows' dQ in `s.out`.
    fn tile(
        &self,
        page: usize,
        head: usize,
        queries: &[u32],
        s: &mut Scratch,
        d_k: &mut [f32],
        d_v: &mut [f32],
    ) {
        let (dims, tokens, width) = (self.rows.dims, self.keys_t.tokens, self.keys_t.width);
        let (k_width, v_width) = (pad(dims.key_dim), pad(dims.value_dim));
        let m = queries.len() * dims.group();
        self.load(page, head, queries, s);
        room(&mut s.s, m * width);
        room(&mut s.d_s, m * width);
        room(&mut s.out, m * k_width);
        let rows = Gemm {
            m,
            n: width,
            k: dims.key_dim,
            a: &s.q,
            a_row: k_width,
            a_step: 1,
            b: self.keys_t.keys(page, head),
            b_row: width,
            c_row: width,
            a_rows: None,
            c_rows: None,
            accumulate: false,
        };
        rows.run(&mut s.s);
        let values_t = self.values_t.keys(page, head);
        Gemm { k: dims.value_dim, a: &s.d_o, a_row: v_width, b: values_t, ..rows }.run(&mut s.d_s);
        let scale = Scale::new(self.rows.scale);
        Backward { width, visible: &s.visible, lse: &s.max, delta: &s.sum, scale }
            .run(&mut s.s, &mut s.d_s);
        // P and dS are read by columns: element (key, row) is at row·width + key.
        for first in (0..m).step_by(SUMMED_ROWS) {
            let columns = Gemm {
                m: tokens,
                n: v_width,
                k: SUMMED_ROWS.min(m - first),
                a: &s.s[first * width..],
                a_row: 1,
                a_step: width,
                b: &s.d_o[first * v_width..],
                b_row: v_width,
                c_row: v_width,
                a_rows: None,
                c_rows: None,
                accumulate: true,
            };
            columns.run(d_v);
            let (a, b) = (&s.d_s[first * width..], &s.q[first * k_width..]);
            Gemm { n: k_width, a, b, b_row: k_width, c_row: k_width, ..columns }.run(d_k);
        }
        Gemm {
            m,
            n: k_width,
            k: tokens,
            a: &s.d_s,
            a_row: width,
            a_step: 1,
            b: self.values_t.values(page, head),
            b_row: k_width,
            c_row: k_width,
            a_rows: None,
            c_rows: None,
            accumulate: false,
        }
        .run(&mut s.out);
    }

    /// Loads q, dO·gate, lse·log2 e in two parts and Δ of the queries' rows, and what they see.
    fn load(&self, page: usize, head: usize, queries: &[u32], s: &mut Scratch) {
        let (dims, tokens) = (self.rows.dims, self.keys_t.tokens);
        let (key_dim, value_dim) = (dims.key_dim, dims.value_dim);
        let (k_width, v_width) = (pad(key_dim), pad(value_dim));
        let m = queries.len() * dims.group();
        fill(&mut s.q, m * k_width, 0.0);
        fill(&mut s.d_o, m * v_width, 0.0);
        fill(&mut s.max, 2 * m, 0.0);
        fill(&mut s.sum, m, 0.0);
        s.visible.clear();
        for (i, &query) in queries.iter().enumerate() {
            let position = self.rows.position(query as usize);
            let (from, to) = match self.chosen {
                Chosen::Visible(visible) => visible.range(position),
                Chosen::Blocks(..) => (0, position + 1),
            };
            let clip = |x: usize| x.saturating_sub(page * tokens).min(tokens) as u32;
            s.visible.resize(s.visible.len() + dims.group(), (clip(from), clip(to)));
            for g in 0..dims.group() {
                let row = i * dims.group() + g;
                let at = self.index(head, query, g);
                let q = &self.rows.q[at * key_dim..(at + 1) * key_dim];
                for (y, x) in s.q[row * k_width..].iter_mut().zip(q) {
                    *y = x.to_f32();
                }
                let gate =
                    self.upstream.gate.map_or(1.0, |(g, branch)| g[at * 3 + branch].to_f32());
                let d_out = &self.upstream.d_out[at * value_dim..(at + 1) * value_dim];
                for (y, x) in s.d_o[row * v_width..].iter_mut().zip(d_out) {
                    *y = x.to_f32() * gate;
                }
                // A row that saw nothing weighs nothing: 2^(… − ∞) = 0.
                let lse = self.upstream.lse[at] * LOG2_E;
                let lse = if lse == f64::NEG_INFINITY { f64::INFINITY } else { lse };
                let low = lse - f64::from(lse as f32);
                s.max[row] = lse as f32;
                s.max[m + row] = if lse.is_finite() { low as f32 } else { 0.0 };
                s.sum[row] = self.upstream.delta[at];
            }
        }
    }

    fn add_d_q(&self, head: usize, queries: &[u32], s: &Scratch, d_q: &Disjoint<f32>) {
        let (key_dim, group) = (self.rows.dims.key_dim, self.rows.dims.group());
        for (i, &query) in queries.iter().enumerate() {
            for g in 0..group {
                let at = self.index(head, query, g) * key_dim;
                // SAFETY: in a round each (query chunk, head) belongs to one task.
                let target = unsafe { d_q.row(at, key_dim) };
                let from = &s.out[(i * group + g) * pad(key_dim)..][..key_dim];
                for (y, x) in target.iter_mut().zip(from) {
                    *y += x * self.rows.scale;
                }
            }
        }
    }

    /// Index into `[T, H]` of head g of the group, for a query.
    fn index(&self, head: usize, query: u32, g: usize) -> usize {
        let dims = self.rows.dims;
        (self.rows.token + query as usize) * dims.heads + head * dims.group() + g
    }
}
