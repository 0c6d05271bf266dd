//! Eq. 1–2: softmax attention over the keys a query sees. Every branch is this with another
//! list of visible keys; dense and window attention too.

use super::{add_scaled, dot, ranges, vector, vector_mut};
use crate::cpu::Mask;
use crate::shape::check_len;
use crate::{Dims, Error, Result};

/// Inputs of dense or window attention.
#[derive(Clone, Copy)]
pub struct AttendInput<'a> {
    /// Heads and dimensions.
    pub dims: Dims,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// Softmax scale, usually 1/√D.
    pub scale: f64,
    /// Queries `[T, H, D]`.
    pub q: &'a [f64],
    /// Keys `[T, K, D]`.
    pub k: &'a [f64],
    /// Values `[T, K, V]`.
    pub v: &'a [f64],
}

/// What attention produces.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attended {
    /// `[T, H, V]`; zero where nothing is visible.
    pub out: Vec<f64>,
    /// Natural-log sum of exponentials `[T, H]`; −∞ where nothing is visible.
    pub lse: Vec<f64>,
}

/// Gradients of attention.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttendGrads {
    /// `[T, H, D]`.
    pub q: Vec<f64>,
    /// Like the keys.
    pub k: Vec<f64>,
    /// Like the values.
    pub v: Vec<f64>,
}

/// Dense causal or window attention.
pub fn attend_forward(input: &AttendInput, mask: Mask) -> Result<Attended> {
    let visible = checked_mask(input, mask)?;
    Ok(forward(input, |t, _| visible[t].clone()))
}

/// Gradients of [`attend_forward`] from its result and `d_out` `[T, H, V]`.
pub fn attend_backward(
    input: &AttendInput,
    mask: Mask,
    attended: &Attended,
    d_out: &[f64],
) -> Result<AttendGrads> {
    let visible = checked_mask(input, mask)?;
    let Dims { heads, value_dim, .. } = input.dims;
    let tokens = visible.len();
    check_len("d_out", d_out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    check_len("out", attended.out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    check_len("lse", attended.lse.len(), &[('T', tokens), ('H', heads)])?;
    Ok(backward(input, |t, _| visible[t].clone(), attended, d_out))
}

/// Checks the input; returns the rows of the keys that each token sees.
fn checked_mask(input: &AttendInput, mask: Mask) -> Result<Vec<std::ops::Range<usize>>> {
    let Dims { heads, kv_heads, key_dim, value_dim } = input.dims;
    input.dims.validate()?;
    let sequences = ranges(input.cu_seqlens)?;
    let tokens = sequences.last().map_or(0, |s| s.end);
    check_len("q", input.q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
    check_len("k", input.k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
    check_len("v", input.v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
    if mask == Mask::Window(0) {
        return Err(Error::Dims("a window of 0 keys sees nothing; it must be at least 1".into()));
    }
    let first = |t: usize, start: usize| match mask {
        Mask::Causal => start,
        Mask::Window(w) => window_start(t, start, w),
    };
    Ok(sequences
        .into_iter()
        .flat_map(|s| s.clone().map(move |t| first(t, s.start)..t + 1))
        .collect())
}

/// The first of the `w` keys that end with row `t`, not before its sequence's `start`.
pub(super) fn window_start(t: usize, start: usize, w: usize) -> usize {
    (t + 1).saturating_sub(w).max(start)
}

/// Attention where token `t` of KV head `g` sees the rows `visible(t, g)` of the keys.
/// The input has been checked, but for the number of rows of its keys and values, which is free.
pub(super) fn forward<I: Iterator<Item = usize>>(
    input: &AttendInput,
    visible: impl Fn(usize, usize) -> I,
) -> Attended {
    let Dims { heads, kv_heads, key_dim, value_dim } = input.dims;
    let tokens = input.cu_seqlens[input.cu_seqlens.len() - 1] as usize;
    let mut out = vec![0.0; tokens * heads * value_dim];
    let mut lse = vec![f64::NEG_INFINITY; tokens * heads];
    for t in 0..tokens {
        for h in 0..heads {
            let g = h / input.dims.group();
            let q = vector(input.q, t, heads, h, key_dim);
            let rows: Vec<usize> = visible(t, g).collect();
            let logits: Vec<f64> = (rows.iter())
                .map(|&j| input.scale * dot(q, vector(input.k, j, kv_heads, g, key_dim)))
                .collect();
            let total = log_sum_exp(&logits);
            lse[t * heads + h] = total;
            let out = vector_mut(&mut out, t, heads, h, value_dim);
            for (&j, s) in rows.iter().zip(logits) {
                add_scaled(out, (s - total).exp(), vector(input.v, j, kv_heads, g, value_dim));
            }
        }
    }
    Attended { out, lse }
}

/// Gradients of [`forward`]. With P = exp(s − lse), dP = dO·Vᵀ and Δ = ⟨dO, O⟩:
/// dV = Pᵀ·dO, dS = P∘(dP − Δ), dQ = scale·dS·K, dK = scale·dSᵀ·Q.
pub(super) fn backward<I: Iterator<Item = usize>>(
    input: &AttendInput,
    visible: impl Fn(usize, usize) -> I,
    attended: &Attended,
    d_out: &[f64],
) -> AttendGrads {
    let Dims { heads, kv_heads, key_dim, value_dim } = input.dims;
    let tokens = input.cu_seqlens[input.cu_seqlens.len() - 1] as usize;
    let mut d = AttendGrads {
        q: vec![0.0; input.q.len()],
        k: vec![0.0; input.k.len()],
        v: vec![0.0; input.v.len()],
    };
    for t in 0..tokens {
        for h in 0..heads {
            let g = h / input.dims.group();
            let q = vector(input.q, t, heads, h, key_dim);
            let d_o = vector(d_out, t, heads, h, value_dim);
            let delta = dot(d_o, vector(&attended.out, t, heads, h, value_dim));
            for j in visible(t, g) {
                let k = vector(input.k, j, kv_heads, g, key_dim);
                let v = vector(input.v, j, kv_heads, g, value_dim);
                let p = (input.scale * dot(q, k) - attended.lse[t * heads + h]).exp();
                let d_s = p * (dot(d_o, v) - delta);
                add_scaled(vector_mut(&mut d.v, j, kv_heads, g, value_dim), p, d_o);
                add_scaled(vector_mut(&mut d.q, t, heads, h, key_dim), input.scale * d_s, k);
                add_scaled(vector_mut(&mut d.k, j, kv_heads, g, key_dim), input.scale * d_s, q);
            }
        }
    }
    d
}

/// ln Σ exp(sᵢ); −∞ of nothing.
pub(super) fn log_sum_exp(logits: &[f64]) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        // Nothing visible, or only NaN (which `max` steps over): the sum keeps the NaN.
        return logits.iter().fold(f64::NEG_INFINITY, |a, &s| if s.is_nan() { s } else { a });
    }
    largest + logits.iter().map(|s| (s - largest).exp()).sum::<f64>().ln()
}
