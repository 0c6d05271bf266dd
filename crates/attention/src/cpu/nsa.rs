//! The whole operator: compressed, selected and window branches, gated.

use std::ops::Range;

use rayon::prelude::*;

use super::attend::{
    AttendInput, Chosen, Mask, PAGE, Rows, SELECTED_ROWS, Scratch, Upstream, Visible,
    attend_branch, attend_selected_tile, backward_branch, narrow, tiles,
};
use super::disjoint::Disjoint;
use super::gate::{blend, blend_backward};
use super::pages::Pages;
use super::score::{attend_compressed_tile, select_tile, tile_rows};
use super::select::Inverse;
use super::simd::Scale;
use crate::shape::{check_len, check_scale, cu_compressed, sequences, total_tokens};
use crate::{Dims, Element, NsaSpec, Result};

/// Inputs of the operator. Compressed keys and values are ready-made (see `compress`), so that
/// a model may put a position encoding between; sharing K/V between branches is passing the
/// same slice twice.
#[derive(Clone, Copy)]
pub struct NsaInput<'a, E> {
    /// Blocks, counts and window.
    pub spec: &'a NsaSpec,
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[T, H, D]`.
    pub q: &'a [E],
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: &'a [E],
    /// Compressed values `[N, K, V]`.
    pub v_cmp: &'a [E],
    /// Keys of the selected branch `[T, K, D]`.
    pub k_slc: &'a [E],
    /// Values of the selected branch `[T, K, V]`.
    pub v_slc: &'a [E],
    /// Keys of the window branch `[T, K, D]`.
    pub k_win: &'a [E],
    /// Values of the window branch `[T, K, V]`.
    pub v_win: &'a [E],
    /// Gates after the sigmoid `[T, H, 3]`: cmp, slc, win.
    pub gate: &'a [E],
}

/// What the backward pass needs of the forward pass.
pub struct NsaSaved {
    /// Output of the compressed branch `[T, H, V]`.
    pub out_cmp: Vec<f32>,
    /// Output of the selected branch `[T, H, V]`.
    pub out_slc: Vec<f32>,
    /// Output of the window branch `[T, H, V]`.
    pub out_win: Vec<f32>,
    /// Natural-log sums of exponentials `[T, H]`; −∞ where nothing is visible. f64: see
    /// [`super::attend_forward`].
    pub lse_cmp: Vec<f64>,
    /// See `lse_cmp`.
    pub lse_slc: Vec<f64>,
    /// See `lse_cmp`.
    pub lse_win: Vec<f64>,
    /// Selected blocks `[T, K, S]`, ascending, −1 padded.
    pub indices: Vec<i32>,
}

/// Where the gradients go; layouts of [`NsaInput`], overwritten.
pub struct NsaGrads<'a, E> {
    /// `[T, H, D]`.
    pub q: &'a mut [E],
    /// `[N, K, D]`.
    pub k_cmp: &'a mut [E],
    /// `[N, K, V]`.
    pub v_cmp: &'a mut [E],
    /// `[T, K, D]`.
    pub k_slc: &'a mut [E],
    /// `[T, K, V]`.
    pub v_slc: &'a mut [E],
    /// `[T, K, D]`.
    pub k_win: &'a mut [E],
    /// `[T, K, V]`.
    pub v_win: &'a mut [E],
    /// `[T, H, 3]`.
    pub gate: &'a mut [E],
}

impl<E: Element> NsaInput<'_, E> {
    /// Checks everything; returns the sequences and their offsets in the compressed layout.
    fn check(&self) -> Result<(Vec<Range<usize>>, Vec<usize>)> {
        self.spec.validate()?;
        self.dims.validate()?;
        check_scale(self.scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let tokens = total_tokens(self.cu_seqlens);
        let sequences = sequences(self.cu_seqlens, tokens)?;
        check_len("q", self.q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
        for (name, k) in [("k_slc", self.k_slc), ("k_win", self.k_win)] {
            check_len(name, k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
        }
        for (name, v) in [("v_slc", self.v_slc), ("v_win", self.v_win)] {
            check_len(name, v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
        }
        check_len("gate", self.gate.len(), &[('T', tokens), ('H', heads), ('3', 3)])?;
        let offsets = cu_compressed(self.spec, &sequences);
        let blocks = offsets[sequences.len()];
        let layout = |dim| [('N', blocks), ('K', kv_heads), dim];
        check_len("k_cmp", self.k_cmp.len(), &layout(('D', key_dim)))?;
        check_len("v_cmp", self.v_cmp.len(), &layout(('V', value_dim)))?;
        Ok((sequences, offsets))
    }

    fn rows(&self, token: usize) -> Rows<'_, E> {
        Rows { q: self.q, dims: self.dims, scale: self.scale, token, position: 0 }
    }
}

/// Writes `out` `[T, H, V]`; returns what [`nsa_backward`] needs.
pub fn nsa_forward<E: Element>(input: &NsaInput<E>, out: &mut [E]) -> Result<NsaSaved> {
    input.check()?;
    let Dims { heads, value_dim, .. } = input.dims;
    let tokens = total_tokens(input.cu_seqlens);
    check_len("out", out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    let mut saved = compressed_branch(input, true)?;
    selected_branch(input, &mut saved)?;
    window_branch(input, &mut saved)?;
    let branches = [&saved.out_cmp[..], &saved.out_slc, &saved.out_win];
    blend(input.gate, branches, value_dim, out);
    Ok(saved)
}

/// The compressed branch and, when asked to `rank`, the choice of blocks; the other branches'
/// places stay empty.
pub(super) fn compressed_branch<E: Element>(input: &NsaInput<E>, rank: bool) -> Result<NsaSaved> {
    let (sequences, offsets) = input.check()?;
    let (spec, dims) = (input.spec, input.dims);
    let Dims { heads, kv_heads, key_dim, value_dim } = dims;
    let tokens = total_tokens(input.cu_seqlens);
    let mut saved = NsaSaved {
        out_cmp: vec![0.0; tokens * heads * value_dim],
        out_slc: Vec::new(),
        out_win: Vec::new(),
        lse_cmp: vec![0.0; tokens * heads],
        lse_slc: Vec::new(),
        lse_win: Vec::new(),
        indices: vec![-1; tokens * kv_heads * spec.select_count],
    };
    let (out, lse) = (Disjoint::new(&mut saved.out_cmp), Disjoint::new(&mut saved.lse_cmp));
    let indices = Disjoint::new(&mut saved.indices);
    for (sequence, blocks) in sequences.into_iter().zip(offsets.windows(2)) {
        let count = blocks[1] - blocks[0];
        let pages = Pages::new(PAGE, kv_heads, key_dim, value_dim).pack(
            &input.k_cmp[blocks[0] * kv_heads * key_dim..],
            &input.v_cmp[blocks[0] * kv_heads * value_dim..],
            count,
        );
        let rows = input.rows(sequence.start);
        let work = tiles(dims, sequence.len(), tile_rows(count));
        work.into_par_iter().with_max_len(1).for_each(|tile| {
            Scratch::with(|scratch| {
                let first = rows.position(tile.queries.start);
                scratch.start(&rows, &tile);
                let p = attend_compressed_tile(
                    &pages,
                    spec,
                    &tile,
                    first,
                    Scale::new(input.scale),
                    scratch,
                );
                if rank {
                    select_tile(spec, &rows, &tile, p, scratch, |query| {
                        let row = (sequence.start + query) * kv_heads + tile.kv_head;
                        // SAFETY: each (token, KV head) belongs to exactly one tile.
                        unsafe { indices.row(row * spec.select_count, spec.select_count) }
                    });
                }
                scratch.finish(&rows, &tile, &out, &lse);
            });
        });
    }
    Ok(saved)
}

/// The selected branch, from the indices already in `saved`.
pub(super) fn selected_branch<E: Element>(input: &NsaInput<E>, saved: &mut NsaSaved) -> Result<()> {
    let (sequences, _) = input.check()?;
    let (spec, dims) = (input.spec, input.dims);
    let Dims { heads, kv_heads, key_dim, value_dim } = dims;
    let tokens = total_tokens(input.cu_seqlens);
    saved.out_slc = vec![0.0; tokens * heads * value_dim];
    saved.lse_slc = vec![0.0; tokens * heads];
    let indices = &saved.indices;
    let (out, lse) = (Disjoint::new(&mut saved.out_slc), Disjoint::new(&mut saved.lse_slc));
    for sequence in sequences {
        let pages = Pages::new(spec.select_block, kv_heads, key_dim, value_dim).pack(
            &input.k_slc[sequence.start * kv_heads * key_dim..],
            &input.v_slc[sequence.start * kv_heads * value_dim..],
            sequence.len(),
        );
        let rows = input.rows(sequence.start);
        let work = tiles(dims, sequence.len(), SELECTED_ROWS);
        work.into_par_iter().with_max_len(1).for_each(|tile| {
            Scratch::with(|scratch| {
                let first = rows.position(tile.queries.start);
                scratch.start(&rows, &tile);
                let chosen = |query: usize| {
                    let token = sequence.start + tile.queries.start + query;
                    let row = (token * kv_heads + tile.kv_head) * spec.select_count;
                    &indices[row..row + spec.select_count]
                };
                attend_selected_tile(
                    &pages,
                    chosen,
                    &tile,
                    first,
                    Scale::new(input.scale),
                    scratch,
                );
                scratch.finish(&rows, &tile, &out, &lse);
            });
        });
    }
    Ok(())
}

/// The window branch.
pub(super) fn window_branch<E: Element>(input: &NsaInput<E>, saved: &mut NsaSaved) -> Result<()> {
    let Dims { heads, value_dim, .. } = input.dims;
    let tokens = total_tokens(input.cu_seqlens);
    saved.out_win = vec![0.0; tokens * heads * value_dim];
    saved.lse_win = vec![0.0; tokens * heads];
    let window = AttendInput {
        dims: input.dims,
        cu_seqlens: input.cu_seqlens,
        scale: input.scale,
        q: input.q,
        k: input.k_win,
        v: input.v_win,
    };
    let mask = Mask::Window(input.spec.window);
    attend_branch(&window, mask, &mut saved.out_win, &mut saved.lse_win)
}

/// Gradients from `d_out` `[T, H, V]`. No gradient flows through the choice of blocks.
pub fn nsa_backward<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    d_out: &[E],
    grads: NsaGrads<E>,
) -> Result<()> {
    input.check()?;
    let Dims { heads, kv_heads, value_dim, .. } = input.dims;
    let tokens = total_tokens(input.cu_seqlens);
    let same = |name, got: usize, like: usize| check_len(name, got, &[('n', like)]);
    check_len("d_out", d_out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    same("d_q", grads.q.len(), input.q.len())?;
    same("d_k_cmp", grads.k_cmp.len(), input.k_cmp.len())?;
    same("d_v_cmp", grads.v_cmp.len(), input.v_cmp.len())?;
    same("d_k_slc", grads.k_slc.len(), input.k_slc.len())?;
    same("d_v_slc", grads.v_slc.len(), input.v_slc.len())?;
    same("d_k_win", grads.k_win.len(), input.k_win.len())?;
    same("d_v_win", grads.v_win.len(), input.v_win.len())?;
    same("d_gate", grads.gate.len(), input.gate.len())?;
    for (name, out, lse) in [
        ("saved cmp", &saved.out_cmp, &saved.lse_cmp),
        ("saved slc", &saved.out_slc, &saved.lse_slc),
        ("saved win", &saved.out_win, &saved.lse_win),
    ] {
        check_len(name, out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
        check_len(name, lse.len(), &[('T', tokens), ('H', heads)])?;
    }
    let layout = [('T', tokens), ('K', kv_heads), ('S', input.spec.select_count)];
    check_len("saved indices", saved.indices.len(), &layout)?;

    let deltas = gate_backward(input, saved, d_out, grads.gate);
    let mut d_q = vec![0.0; input.q.len()];
    let up = |branch: usize| (saved, &deltas[branch][..], d_out);
    branch_backward(input, Branch::Cmp, up(0), &mut d_q, grads.k_cmp, grads.v_cmp)?;
    branch_backward(input, Branch::Slc, up(1), &mut d_q, grads.k_slc, grads.v_slc)?;
    branch_backward(input, Branch::Win, up(2), &mut d_q, grads.k_win, grads.v_win)?;
    narrow(&d_q, grads.q);
    Ok(())
}

/// The gates' gradients, and each branch's Δ.
pub(super) fn gate_backward<E: Element>(
    input: &NsaInput<E>,
    saved: &NsaSaved,
    d_out: &[E],
    d_gate: &mut [E],
) -> [Vec<f32>; 3] {
    let branches = [&saved.out_cmp[..], &saved.out_slc, &saved.out_win];
    blend_backward(input.gate, branches, input.dims.value_dim, d_out, d_gate)
}

/// A branch, in the order of the gates.
#[derive(Clone, Copy)]
pub(super) enum Branch {
    Cmp,
    Slc,
    Win,
}

/// One branch's backward over all sequences: adds to `d_q`, overwrites `d_k` and `d_v`. `up` is
/// what the forward pass saved, the branch's Δ, and the gradient of the operator's output.
pub(super) fn branch_backward<E: Element>(
    input: &NsaInput<E>,
    branch: Branch,
    (saved, delta, d_out): (&NsaSaved, &[f32], &[E]),
    d_q: &mut [f32],
    d_k: &mut [E],
    d_v: &mut [E],
) -> Result<()> {
    let (sequences, offsets) = input.check()?;
    let (spec, dims) = (input.spec, input.dims);
    let heads = dims.kv_heads;
    let (k, v, lse) = match branch {
        Branch::Cmp => (input.k_cmp, input.v_cmp, &saved.lse_cmp),
        Branch::Slc => (input.k_slc, input.v_slc, &saved.lse_slc),
        Branch::Win => (input.k_win, input.v_win, &saved.lse_win),
    };
    let upstream = Upstream { d_out, gate: Some((input.gate, branch as usize)), lse, delta };
    for (sequence, blocks) in sequences.into_iter().zip(offsets.windows(2)) {
        let inverse;
        let (keys, chosen) = match branch {
            Branch::Cmp => (blocks[0]..blocks[1], Chosen::Visible(Visible::Compressed(spec))),
            Branch::Slc => {
                let row = heads * spec.select_count;
                let indices = &saved.indices[sequence.start * row..sequence.end * row];
                let count = spec.selection_blocks(sequence.len());
                inverse = Inverse::new(indices, heads, spec, count)?;
                (sequence.clone(), Chosen::Blocks(spec.select_block, &inverse))
            }
            Branch::Win => {
                (sequence.clone(), Chosen::Visible(Visible::Mask(Mask::Window(spec.window))))
            }
        };
        let rows = input.rows(sequence.start);
        let k_range = keys.start * heads * dims.key_dim..keys.end * heads * dims.key_dim;
        let v_range = keys.start * heads * dims.value_dim..keys.end * heads * dims.value_dim;
        let (k, v) = (&k[k_range.clone()], &v[v_range.clone()]);
        backward_branch(&rows, sequence.len(), k, v, chosen, &upstream, d_q).write(
            dims,
            &mut d_k[k_range],
            &mut d_v[v_range],
        );
    }
    Ok(())
}
