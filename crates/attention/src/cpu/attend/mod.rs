//! Masked softmax attention: one main loop, three masks.
//!
//! `forward` walks the pages of keys that a tile of query rows can see, with the online softmax;
//! `selected` does the same over the blocks that each query chose; `backward` serves them all.

mod backward;
mod forward;
mod selected;
mod tile;

use super::disjoint::Disjoint;
use super::pages::Pages;
use super::simd::Scale;
use crate::shape::{check_len, check_scale, sequences, total_tokens};
use crate::{Dims, Element, Error, NsaSpec, Result};
use rayon::prelude::*;

pub(super) use backward::{Chosen, Upstream, backward_branch};
pub(super) use forward::{attend_tile, weigh_values};
pub(super) use selected::SELECTED_ROWS;
pub(super) use selected::attend_selected_tile;
pub(super) use tile::{Rows, Scratch, Tile, fill, room, tiles};

/// Keys in a page of the dense, window and compressed loops: one panel of the micro-kernel.
pub(super) const PAGE: usize = 64;

/// Query rows in a tile: enough to hide the reading of a page behind arithmetic.
pub(super) const TILE_ROWS: usize = 96;

/// Which keys a query at position p of its sequence sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Keys 0..=p: ordinary full attention.
    Causal,
    /// The last w keys, p itself included.
    Window(usize),
}

/// A [`Mask`], or the compressed branch's visibility.
#[derive(Clone, Copy)]
pub(super) enum Visible<'a> {
    /// See [`Mask`].
    Mask(Mask),
    /// Compressed blocks that end at or before p.
    Compressed(&'a NsaSpec),
}

impl Visible<'_> {
    /// The keys that position `p` sees, from and to; both grow with p.
    pub fn range(self, p: usize) -> (usize, usize) {
        match self {
            Visible::Mask(Mask::Causal) => (0, p + 1),
            Visible::Mask(Mask::Window(w)) => ((p + 1).saturating_sub(w), p + 1),
            Visible::Compressed(spec) => (0, spec.visible_compressed(p)),
        }
    }
}

/// Inputs of dense or window attention.
#[derive(Clone, Copy)]
pub struct AttendInput<'a, E> {
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[T, H, D]`.
    pub q: &'a [E],
    /// Keys `[T, K, D]`.
    pub k: &'a [E],
    /// Values `[T, K, V]`.
    pub v: &'a [E],
}

/// Where the gradients of [`attend_backward`] go; overwritten.
pub struct AttendGrads<'a, E> {
    /// `[T, H, D]`.
    pub q: &'a mut [E],
    /// `[T, K, D]`.
    pub k: &'a mut [E],
    /// `[T, K, V]`.
    pub v: &'a mut [E],
}

impl Mask {
    /// Refuses a window in which a query does not even see itself.
    pub(super) fn check(self) -> Result<()> {
        match self {
            Mask::Window(0) => Err(Error::Dims("a window of 0 keys, expected at least 1".into())),
            _ => Ok(()),
        }
    }
}

impl<E: Element> AttendInput<'_, E> {
    /// Checks everything but `cu_seqlens` itself; returns T.
    fn check(&self) -> Result<usize> {
        self.dims.validate()?;
        check_scale(self.scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let tokens = total_tokens(self.cu_seqlens);
        check_len("q", self.q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
        check_len("k", self.k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v", self.v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
        Ok(tokens)
    }
}

/// Writes `out` `[T, H, V]` and the natural-log sum of exponentials `lse` `[T, H]`, which is f64
/// because its rounding would turn all of a row's probabilities the same way in the backward.
pub fn attend_forward<E: Element>(
    input: &AttendInput<E>,
    mask: Mask,
    out: &mut [E],
    lse: &mut [f64],
) -> Result<()> {
    let tokens = input.check()?;
    let Dims { heads, value_dim, .. } = input.dims;
    check_len("out", out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    check_len("lse", lse.len(), &[('T', tokens), ('H', heads)])?;
    attend_branch(input, mask, out, lse)
}

/// [`attend_forward`] with any output type, for the window branch.
pub(super) fn attend_branch<E: Element, O: Element>(
    input: &AttendInput<E>,
    mask: Mask,
    out: &mut [O],
    lse: &mut [f64],
) -> Result<()> {
    mask.check()?;
    let &AttendInput { dims, scale, q, k, v, .. } = input;
    let Dims { kv_heads, key_dim, value_dim, .. } = dims;
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    for sequence in sequences(input.cu_seqlens, input.check()?)? {
        let pages = Pages::new(PAGE, kv_heads, key_dim, value_dim).pack(
            &k[sequence.start * kv_heads * key_dim..],
            &v[sequence.start * kv_heads * value_dim..],
            sequence.len(),
        );
        let rows = Rows { q, dims, scale, token: sequence.start, position: 0 };
        tiles(dims, sequence.len(), TILE_ROWS).into_par_iter().with_max_len(1).for_each(|tile| {
            Scratch::with(|scratch| {
                scratch.start(&rows, &tile);
                let first = rows.position(tile.queries.start);
                attend_tile(&pages, Visible::Mask(mask), &tile, first, Scale::new(scale), scratch);
                scratch.finish(&rows, &tile, &out, &lse);
            });
        });
    }
    Ok(())
}

/// Gradients of [`attend_forward`] from its outputs and `d_out` `[T, H, V]`.
pub fn attend_backward<E: Element>(
    input: &AttendInput<E>,
    mask: Mask,
    out: &[E],
    lse: &[f64],
    d_out: &[E],
    grads: AttendGrads<E>,
) -> Result<()> {
    let tokens = input.check()?;
    let Dims { heads, kv_heads, key_dim, value_dim } = input.dims;
    for (name, got) in [("out", out.len()), ("d_out", d_out.len())] {
        check_len(name, got, &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    }
    check_len("lse", lse.len(), &[('T', tokens), ('H', heads)])?;
    check_len("d_q", grads.q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
    check_len("d_k", grads.k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
    check_len("d_v", grads.v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
    mask.check()?;
    let sequences = sequences(input.cu_seqlens, tokens)?;

    let mut delta = vec![0.0; tokens * heads];
    delta.par_chunks_mut(1024).enumerate().for_each(|(chunk, delta)| {
        for (i, delta) in delta.iter_mut().enumerate() {
            let row = (chunk * 1024 + i) * value_dim..(chunk * 1024 + i + 1) * value_dim;
            let terms = out[row.clone()].iter().zip(&d_out[row]);
            *delta = terms.map(|(o, d)| o.to_f32() * d.to_f32()).sum();
        }
    });
    let mut d_q = vec![0.0; input.q.len()];
    for sequence in sequences {
        let keys = sequence.start..sequence.end;
        let upstream = Upstream { d_out, gate: None, lse, delta: &delta };
        let rows = Rows {
            q: input.q,
            dims: input.dims,
            scale: input.scale,
            token: sequence.start,
            position: 0,
        };
        let visible = Chosen::Visible(Visible::Mask(mask));
        let accumulators = backward_branch(
            &rows,
            sequence.len(),
            &input.k[keys.start * kv_heads * key_dim..keys.end * kv_heads * key_dim],
            &input.v[keys.start * kv_heads * value_dim..keys.end * kv_heads * value_dim],
            visible,
            &upstream,
            &mut d_q,
        );
        accumulators.write(
            input.dims,
            &mut grads.k[keys.start * kv_heads * key_dim..keys.end * kv_heads * key_dim],
            &mut grads.v[keys.start * kv_heads * value_dim..keys.end * kv_heads * value_dim],
        );
    }
    narrow(&d_q, grads.q);
    Ok(())
}

/// Rounds f32 sums to the storage type.
pub(super) fn narrow<E: Element>(from: &[f32], to: &mut [E]) {
    to.par_chunks_mut(1 << 14).zip(from.par_chunks(1 << 14)).for_each(|(to, from)| {
        for (to, from) in to.iter_mut().zip(from) {
            *to = E::from_f32(*from);
        }
    });
}
