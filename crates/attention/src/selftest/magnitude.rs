//! How large the numbers are that a gradient adds up, before anything cancels. Rounding is
//! relative to these, not to what is left: a formula whose error happens to be zero on a small
//! tensor gives no yardstick, a few roundings of the magnitude do.
//!
//! Every sum of products of the formula is taken over absolute values, in float64.

use std::collections::BTreeMap;

use crate::cpu::Mask;
use crate::{Compressor, Dims, reference};

use super::Check;
use super::case::Case;
use super::visible::{Rows, visible, visible_to};
use super::ways::Outcome;

/// Absolute values in float64.
fn absolute(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.abs())).collect()
}

fn vector(x: &[f64], i: usize, heads: usize, h: usize, dim: usize) -> &[f64] {
    &x[(i * heads + h) * dim..][..dim]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// y += a·|x|.
fn add(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x.abs());
}

/// Magnitudes of one branch.
struct Branch {
    out: Vec<f64>,
    d_q: Vec<f64>,
    d_k: Vec<f64>,
    d_v: Vec<f64>,
    /// The largest Σ|qᵢkᵢ|·scale of a visible pair.
    logit: f64,
}

/// `k` and `v` with their signs, `d_out` (of the branch) absolute.
fn branch(case: &Case, k: &[f64], v: &[f64], visible: &Rows, lse: &[f64], d_out: &[f64]) -> Branch {
    let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
    let scale = (key_dim as f64).powf(-0.5);
    let q: Vec<f64> = case.get("q").iter().map(|&x| f64::from(x)).collect();
    let mut m = Branch {
        out: vec![0.0; case.tokens() * heads * value_dim],
        d_q: vec![0.0; q.len()],
        d_k: vec![0.0; k.len()],
        d_v: vec![0.0; v.len()],
        logit: 0.0,
    };
    for t in 0..case.tokens() {
        for h in 0..heads {
            let g = h / case.dims.group();
            let q = vector(&q, t, heads, h, key_dim);
            let d_o = vector(d_out, t, heads, h, value_dim);
            let rows = &visible[t * kv_heads + g];
            let p = |j: usize| {
                (scale * dot(q, vector(k, j, kv_heads, g, key_dim)) - lse[t * heads + h]).exp()
            };
            let out = &mut m.out[(t * heads + h) * value_dim..][..value_dim];
            for &j in rows {
                add(out, p(j), vector(v, j, kv_heads, g, value_dim));
            }
            let delta = dot(d_o, out);
            for &j in rows {
                let (k, at_k) = (vector(k, j, kv_heads, g, key_dim), (j * kv_heads + g) * key_dim);
                let v: Vec<f64> =
                    vector(v, j, kv_heads, g, value_dim).iter().map(|x| x.abs()).collect();
                let d_s = scale * p(j) * (dot(d_o, &v) + delta);
                add(&mut m.d_q[(t * heads + h) * key_dim..][..key_dim], d_s, k);
                add(&mut m.d_k[at_k..][..key_dim], d_s, q);
                add(&mut m.d_v[(j * kv_heads + g) * value_dim..][..value_dim], p(j), d_o);
                let logit: f64 = q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum();
                m.logit = m.logit.max(scale * logit);
            }
        }
    }
    m
}

/// The largest magnitude in each tensor of a case's outcome, times 1 + the largest logit: an
/// exponential is as wrong, relative, as its logit is wrong, absolute.
pub fn magnitudes(case: &Case, exact: &Outcome) -> Check<BTreeMap<String, f64>> {
    let Dims { value_dim, .. } = case.dims;
    let signed = |name: &str| case.get(name).iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let d_out =
        case.tensors.get("d_out").map_or(vec![0.0; exact.get("out").len()], |d| absolute(d));
    let gate = absolute(case.get("gate"));
    let gated = |c: usize| -> Vec<f64> {
        d_out.iter().enumerate().map(|(i, d)| gate[i / value_dim * 3 + c] * d).collect()
    };
    let visible = visible(case, &exact.indices);
    let (k_cmp, v_cmp) = (exact.get("compressed_k"), exact.get("compressed_v"));
    let cmp = branch(case, k_cmp, v_cmp, &visible[0], exact.get("lse_cmp"), &gated(0));
    let of = |name: &str, rows, c| {
        let (k, v) = (signed(&format!("k_{name}")), signed(&format!("v_{name}")));
        branch(case, &k, &v, rows, exact.get(&format!("lse_{name}")), &gated(c))
    };
    let (slc, win) = (of("slc", &visible[1], 1), of("win", &visible[2], 2));
    let logit = 1.0 + cmp.logit.max(slc.logit).max(win.logit);

    let mut largest = BTreeMap::new();
    let mut put = |name: &str, x: &[f64]| {
        largest.insert(name.to_string(), logit * x.iter().copied().fold(0.0, f64::max));
    };
    let d_gate: Vec<f64> = (0..gate.len())
        .map(|i| {
            let (row, out) = (i / 3 * value_dim, [&cmp, &slc, &win][i % 3]);
            dot(&d_out[row..row + value_dim], &out.out[row..row + value_dim])
        })
        .collect();
    let sum = |f: fn(&Branch) -> &Vec<f64>, weight: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        let part = |i: usize, c: usize| weight(i, c) * f([&cmp, &slc, &win][c])[i];
        (0..f(&cmp).len()).map(|i| part(i, 0) + part(i, 1) + part(i, 2)).collect()
    };
    put("d_gate", &d_gate);
    put("out", &sum(|b| &b.out, &|i, c| gate[i / value_dim * 3 + c]));
    put("d_q", &sum(|b| &b.d_q, &|_, _| 1.0));
    for (name, b) in [("cmp", &cmp), ("slc", &slc), ("win", &win)] {
        put(&format!("out_{name}"), &b.out);
        let lse = exact.get(&format!("lse_{name}"));
        put(
            &format!("lse_{name}"),
            &lse.iter()
                .map(|x| 1.0 + x.abs().min(1e300))
                .filter(|x| *x < 1e300)
                .collect::<Vec<_>>(),
        );
        if name != "cmp" {
            put(&format!("d_k_{name}"), &b.d_k);
            put(&format!("d_v_{name}"), &b.d_v);
        }
    }
    for (letter, d_rows) in [("k", &cmp.d_k), ("v", &cmp.d_v)] {
        for (name, x) in compress_backward(case, letter, d_rows)? {
            put(&name, &x);
        }
    }
    Ok(largest)
}

/// [`magnitudes`] of dense or window attention.
pub fn attend_magnitudes(
    case: &Case,
    name: &str,
    mask: Mask,
    exact: &Outcome,
) -> BTreeMap<String, f64> {
    let signed = |name: &str| case.get(name).iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let (k, v) = (signed(&format!("k_{name}")), signed(&format!("v_{name}")));
    let d_out = absolute(case.get("d_out"));
    let b = branch(case, &k, &v, &visible_to(case, mask), exact.get("lse"), &d_out);
    let lse: Vec<f64> = exact.get("lse").iter().map(|x| 1.0 + x.abs()).collect();
    let parts = [("out", &b.out), ("lse", &lse), ("d_q", &b.d_q), ("d_k", &b.d_k), ("d_v", &b.d_v)];
    let largest = |x: &Vec<f64>| (1.0 + b.logit) * x.iter().copied().fold(0.0, f64::max);
    parts.into_iter().map(|(name, x)| (name.to_string(), largest(x))).collect()
}

/// Magnitudes of the gradients of the raw rows and of φ's parameters.
fn compress_backward(case: &Case, letter: &str, d_rows: &[f64]) -> Check<Vec<(String, Vec<f64>)>> {
    let get = |name: &str| absolute(case.get(&format!("phi_{letter}_{name}")));
    let dim = if letter == "k" { case.dims.key_dim } else { case.dims.value_dim };
    let run = |phi: reference::Phi, x: &[f64], d: &[f64]| {
        let input = reference::CompressInput {
            spec: &case.spec,
            cu_seqlens: &case.cu_seqlens,
            kv_heads: case.dims.kv_heads,
            dim,
            x,
            phi,
        };
        reference::compress_backward(&input, d)
    };
    let x = absolute(case.get(&format!("{letter}_cmp")));
    let named = |name: &str, x: Vec<f64>| (format!("d_phi_{letter}_{name}"), x);
    let mut all = Vec::new();
    let (d_x, d_phi) = match case.spec.compressor {
        Compressor::Mean => run(reference::Phi::Mean, &x, d_rows)?,
        Compressor::Linear => {
            let (weight, pe) = (get("weight"), get("pe"));
            run(reference::Phi::Linear { weight: &weight, pe: &pe }, &x, d_rows)?
        }
        Compressor::Mlp => {
            // |gelu(z)| ≤ |z| and gelu is near z for large z: adding a bias of 10 makes the
            // reference's GELU the identity, of slope 1, here; the true slope is at most 1.13.
            let [weight1, bias1, weight2, bias2, pe] =
                ["weight1", "bias1", "weight2", "bias2", "pe"].map(get);
            let bias1: Vec<f64> = bias1.iter().map(|b| b + 10.0).collect();
            let phi = reference::Phi::Mlp {
                weight1: &weight1,
                bias1: &bias1,
                weight2: &weight2,
                bias2: &bias2,
                pe: &pe,
            };
            run(phi, &x, d_rows)?
        }
    };
    match d_phi {
        reference::PhiGrads::Mean => {}
        reference::PhiGrads::Linear { weight, pe } => {
            all.extend([named("weight", weight), named("pe", pe)]);
        }
        reference::PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe } => {
            all.extend([named("weight1", weight1), named("bias1", bias1)]);
            all.extend([named("weight2", weight2), named("bias2", bias2), named("pe", pe)]);
        }
    }
    all.push((format!("d_{letter}_cmp"), d_x));
    Ok(all)
}
