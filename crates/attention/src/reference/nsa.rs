//! The three branches and their blend, from ready compressed keys and values.

use std::ops::Range;

use super::attend::{self, AttendInput, Attended};
use super::{gate, ranges, score, select::select};
use crate::shape::check_len;
use crate::{Dims, Error, NsaSpec, Result, cu_compressed};

/// Inputs of the operator, as in [`crate::cpu::NsaInput`].
#[derive(Clone, Copy)]
pub struct NsaInput<'a> {
    /// Blocks, counts and window.
    pub spec: &'a NsaSpec,
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// Softmax scale, usually 1/√D.
    pub scale: f64,
    /// Queries `[T, H, D]`.
    pub q: &'a [f64],
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: &'a [f64],
    /// Compressed values `[N, K, V]`.
    pub v_cmp: &'a [f64],
    /// Keys of the selected branch `[T, K, D]`.
    pub k_slc: &'a [f64],
    /// Values of the selected branch `[T, K, V]`.
    pub v_slc: &'a [f64],
    /// Keys of the window branch `[T, K, D]`.
    pub k_win: &'a [f64],
    /// Values of the window branch `[T, K, V]`.
    pub v_win: &'a [f64],
    /// Gates after the sigmoid `[T, H, 3]`: cmp, slc, win.
    pub gate: &'a [f64],
}

/// What the operator produces.
#[derive(Clone, Debug, PartialEq)]
pub struct NsaOutput {
    /// `[T, H, V]`.
    pub out: Vec<f64>,
    /// The compressed branch alone.
    pub cmp: Attended,
    /// The selected branch alone.
    pub slc: Attended,
    /// The window branch alone.
    pub win: Attended,
    /// Selected blocks `[T, K, S]`, ascending, −1 padded.
    pub indices: Vec<i32>,
}

/// Gradients of [`NsaInput`], same layouts.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of NsaInput")]
pub struct NsaGrads {
    pub q: Vec<f64>,
    pub k_cmp: Vec<f64>,
    pub v_cmp: Vec<f64>,
    pub k_slc: Vec<f64>,
    pub v_slc: Vec<f64>,
    pub k_win: Vec<f64>,
    pub v_win: Vec<f64>,
    pub gate: Vec<f64>,
}

/// Where a token stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Position in its sequence, from 0.
    pub position: usize,
    /// Row of its sequence's first token.
    pub start: usize,
    /// Row of its sequence's first compressed block.
    pub first_block: usize,
}

impl Place {
    /// Rows of the compressed blocks whose last token is not after this one.
    pub fn compressed(&self, spec: &NsaSpec) -> Range<usize> {
        self.first_block..self.first_block + spec.visible_compressed(self.position)
    }

    /// Rows of the tokens of the blocks `indices`, up to this token: Eq. 12.
    fn selected(&self, spec: &NsaSpec, indices: &[i32]) -> Vec<usize> {
        (indices.iter())
            .filter(|&&j| j >= 0)
            .flat_map(|&j| j as usize * spec.select_block..(j as usize + 1) * spec.select_block)
            .filter(|&position| position <= self.position)
            .map(|position| self.start + position)
            .collect()
    }

    /// Rows of the last w tokens, this one included.
    fn window(&self, spec: &NsaSpec) -> Range<usize> {
        let t = self.start + self.position;
        attend::window_start(t, self.start, spec.window)..t + 1
    }
}

/// The whole operator.
pub fn nsa_forward(input: &NsaInput) -> Result<NsaOutput> {
    let places = check(input)?;
    let mut indices = Vec::with_capacity(places.len() * input.dims.kv_heads);
    for (t, place) in places.iter().enumerate() {
        for g in 0..input.dims.kv_heads {
            let scores = score::importance_of(input, t, place, g);
            indices.extend(select(input.spec, place.position, &scores));
        }
    }
    Ok(branches(input, &places, indices))
}

/// [`nsa_forward`] with the selected blocks given, `[T, K, S]`.
pub fn nsa_forward_chosen(input: &NsaInput, indices: &[i32]) -> Result<NsaOutput> {
    let places = check(input)?;
    check_indices(input, &places, indices)?;
    Ok(branches(input, &places, indices.to_vec()))
}

/// Gradients from the result of a forward pass and `d_out` `[T, H, V]`. None flows through the
/// choice of blocks.
pub fn nsa_backward(input: &NsaInput, output: &NsaOutput, d_out: &[f64]) -> Result<NsaGrads> {
    let places = check(input)?;
    check_indices(input, &places, &output.indices)?;
    let Dims { heads, value_dim, .. } = input.dims;
    let (t, h, v) = (('T', places.len()), ('H', heads), ('V', value_dim));
    check_len("d_out", d_out.len(), &[t, h, v])?;
    let attended = [&output.cmp, &output.slc, &output.win];
    for branch in attended {
        check_len("branch output", branch.out.len(), &[t, h, v])?;
        check_len("branch lse", branch.lse.len(), &[t, h])?;
    }
    let outs = attended.map(|branch| &branch.out[..]);
    let (d_gate, [d_cmp, d_slc, d_win]) = gate::backward(value_dim, input.gate, outs, d_out);

    let Branches { cmp, slc, win } = Branches::of(input);
    let cmp = attend::backward(&cmp, |t, _| places[t].compressed(input.spec), &output.cmp, &d_cmp);
    let slc = attend::backward(
        &slc,
        |t, g| places[t].selected(input.spec, chosen(input, &output.indices, t, g)).into_iter(),
        &output.slc,
        &d_slc,
    );
    let win = attend::backward(&win, |t, _| places[t].window(input.spec), &output.win, &d_win);

    // One shared query: its gradient is the sum over the branches.
    let q = (cmp.q.iter().zip(&slc.q).zip(&win.q)).map(|((a, b), c)| a + b + c).collect();
    Ok(NsaGrads {
        q,
        k_cmp: cmp.k,
        v_cmp: cmp.v,
        k_slc: slc.k,
        v_slc: slc.v,
        k_win: win.k,
        v_win: win.v,
        gate: d_gate,
    })
}

/// The three branches' attention inputs: one query, three pairs of keys and values.
struct Branches<'a> {
    cmp: AttendInput<'a>,
    slc: AttendInput<'a>,
    win: AttendInput<'a>,
}

impl<'a> Branches<'a> {
    fn of(input: &NsaInput<'a>) -> Self {
        let branch = |k, v| AttendInput {
            dims: input.dims,
            cu_seqlens: input.cu_seqlens,
            scale: input.scale,
            q: input.q,
            k,
            v,
        };
        Self {
            cmp: branch(input.k_cmp, input.v_cmp),
            slc: branch(input.k_slc, input.v_slc),
            win: branch(input.k_win, input.v_win),
        }
    }
}

fn branches(input: &NsaInput, places: &[Place], indices: Vec<i32>) -> NsaOutput {
    let Branches { cmp, slc, win } = Branches::of(input);
    let cmp = attend::forward(&cmp, |t, _| places[t].compressed(input.spec));
    let slc = attend::forward(&slc, |t, g| {
        places[t].selected(input.spec, chosen(input, &indices, t, g)).into_iter()
    });
    let win = attend::forward(&win, |t, _| places[t].window(input.spec));
    let out = gate::forward(input.dims.value_dim, input.gate, [&cmp.out, &slc.out, &win.out]);
    NsaOutput { out, cmp, slc, win, indices }
}

/// The blocks chosen by token `t` and KV head `g`.
fn chosen<'a>(input: &NsaInput, indices: &'a [i32], t: usize, g: usize) -> &'a [i32] {
    let count = input.spec.select_count;
    &indices[(t * input.dims.kv_heads + g) * count..][..count]
}

/// Checks every field; returns where each token stands.
pub(super) fn check(input: &NsaInput) -> Result<Vec<Place>> {
    let NsaInput { spec, dims: Dims { heads, kv_heads, key_dim, value_dim }, .. } = *input;
    spec.validate()?;
    input.dims.validate()?;
    let sequences = ranges(input.cu_seqlens)?;
    let blocks = cu_compressed(spec, &sequences);
    let tokens = sequences.last().map_or(0, |s| s.end);
    let (t, n) = (('T', tokens), ('N', blocks[blocks.len() - 1]));
    let (h, k, d, v) = (('H', heads), ('K', kv_heads), ('D', key_dim), ('V', value_dim));
    check_len("q", input.q.len(), &[t, h, d])?;
    check_len("k_cmp", input.k_cmp.len(), &[n, k, d])?;
    check_len("v_cmp", input.v_cmp.len(), &[n, k, v])?;
    check_len("k_slc", input.k_slc.len(), &[t, k, d])?;
    check_len("v_slc", input.v_slc.len(), &[t, k, v])?;
    check_len("k_win", input.k_win.len(), &[t, k, d])?;
    check_len("v_win", input.v_win.len(), &[t, k, v])?;
    check_len("gate", input.gate.len(), &[t, h, ('3', 3)])?;
    let place = |start: usize, first_block: usize| {
        move |row| Place { position: row - start, start, first_block }
    };
    Ok((sequences.into_iter().zip(blocks))
        .flat_map(|(s, n)| s.clone().map(place(s.start, n)))
        .collect())
}

/// Checks that `indices` are blocks their tokens may read, ascending and −1 padded.
fn check_indices(input: &NsaInput, places: &[Place], indices: &[i32]) -> Result<()> {
    let (kv_heads, count) = (input.dims.kv_heads, input.spec.select_count);
    let layout = [('T', places.len()), ('K', kv_heads), ('S', count)];
    check_len("indices", indices.len(), &layout)?;
    for (t, place) in places.iter().enumerate() {
        let current = (place.position / input.spec.select_block) as i32;
        for g in 0..kv_heads {
            let row = chosen(input, indices, t, g);
            let listed = row.iter().take_while(|&&j| j >= 0).count();
            let ascending = row[..listed].windows(2).all(|w| w[0] < w[1]);
            let inside = row[..listed].iter().all(|&j| j <= current);
            if !ascending || !inside || row[listed..].iter().any(|&j| j != -1) {
                return Err(Error::Indices(format!(
                    "token {t}, key/value head {g} lists {row:?}; expected ascending blocks \
                     of 0..={current}, then -1"
                )));
            }
        }
    }
    Ok(())
}
