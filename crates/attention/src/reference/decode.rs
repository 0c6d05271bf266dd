//! One step of decoding: the last token of a sequence against everything before it. No mask is
//! needed, because what the token may not see does not exist yet.

use super::attend::{AttendInput, Attended, forward};
use super::gate;
use super::nsa::{NsaInput, check};
use super::operator::OperatorInput;
use super::score::importance_of;
use super::select::select;
use crate::{Dims, Error, Result};

/// The output of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// `[H, V]`.
    pub out: Vec<f64>,
    /// Selected blocks `[K, S]`.
    pub indices: Vec<i32>,
}

/// The output of the last token of `prefix`, which holds one sequence of at least one token.
pub fn decode(prefix: &OperatorInput) -> Result<Decoded> {
    let (k_cmp, v_cmp) = prefix.compressed()?;
    let input = prefix.ready(&k_cmp, &v_cmp);
    let NsaInput { spec, dims, .. } = input;
    let places = check(&input)?;
    let (Some(place), [_, _]) = (places.last(), input.cu_seqlens) else {
        let text = "decoding takes one sequence of at least one token".into();
        return Err(Error::CuSeqlens(text));
    };
    let t = place.position;

    let indices: Vec<i32> = (0..dims.kv_heads)
        .flat_map(|g| select(spec, t, &importance_of(&input, t, place, g)))
        .collect();
    let blocks = spec.visible_compressed(t);
    let cmp = attend_last(&input, input.k_cmp, input.v_cmp, |_| (0..blocks).collect());
    let slc = attend_last(&input, input.k_slc, input.v_slc, |g| {
        let chosen = &indices[g * spec.select_count..][..spec.select_count];
        let block = |j: i32| (j as usize * spec.select_block..).take(spec.select_block);
        chosen.iter().filter(|&&j| j >= 0).flat_map(|&j| block(j)).filter(|&i| i <= t).collect()
    });
    let win = attend_last(&input, input.k_win, input.v_win, |_| {
        (0..t + 1).rev().take(spec.window).rev().collect()
    });
    let gates = &input.gate[t * dims.heads * 3..];
    let out = gate::forward(dims.value_dim, gates, [&cmp.out, &slc.out, &win.out]);
    Ok(Decoded { out, indices })
}

/// Attention of the last query over the rows `rows(g)` of the keys, for every KV head g.
fn attend_last(
    input: &NsaInput,
    k: &[f64],
    v: &[f64],
    rows: impl Fn(usize) -> Vec<usize>,
) -> Attended {
    let Dims { heads, key_dim, .. } = input.dims;
    let q = &input.q[input.q.len() - heads * key_dim..];
    let one = AttendInput { dims: input.dims, cu_seqlens: &[0, 1], scale: input.scale, q, k, v };
    forward(&one, |_, g| rows(g).into_iter())
}
