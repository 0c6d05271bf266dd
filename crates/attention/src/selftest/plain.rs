//! The formula as one would first write it in a tensor library of one dtype: every intermediate
//! is rounded to that dtype, every sum runs from first to last in f32. Its error is the yardstick
//! of the fast code's.

use std::collections::BTreeMap;

use crate::cpu::Mask;
use crate::{Dims, Element};

use super::case::Case;
use super::plain_compress::{compress, compress_backward};
use super::visible::{Rows, visible, visible_to};
use super::ways::Outcome;

/// Rounds to `E`.
pub fn round<E: Element>(x: f32) -> f32 {
    E::from_f32(x).to_f32()
}

/// Σ aᵢ·bᵢ in f32, rounded.
pub fn dot<E: Element>(a: &[f32], b: &[f32]) -> f32 {
    round::<E>(a.iter().zip(b).map(|(a, b)| a * b).sum())
}

/// One branch's attention for one token and head.
struct Row {
    /// Visible rows of the keys.
    rows: Vec<usize>,
    /// Their probabilities.
    p: Vec<f32>,
}

/// One branch.
struct Branch<'a> {
    case: &'a Case,
    k: &'a [f32],
    v: &'a [f32],
    /// `[T, H]`.
    rows: Vec<Row>,
    out: Vec<f32>,
    lse: Vec<f32>,
}

fn vector(x: &[f32], i: usize, heads: usize, h: usize, dim: usize) -> &[f32] {
    &x[(i * heads + h) * dim..][..dim]
}

impl<'a> Branch<'a> {
    fn forward<E: Element>(case: &'a Case, k: &'a [f32], v: &'a [f32], visible: &Rows) -> Self {
        let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
        let mut branch = Self { case, k, v, rows: Vec::new(), out: Vec::new(), lse: Vec::new() };
        for t in 0..case.tokens() {
            for h in 0..heads {
                let g = h / case.dims.group();
                let q = vector(case.get("q"), t, heads, h, key_dim);
                let rows = visible[t * kv_heads + g].clone();
                let logit = |&j: &usize| {
                    let s = dot::<E>(q, vector(k, j, kv_heads, g, key_dim));
                    round::<E>(s * case.dims.scale())
                };
                let logits: Vec<f32> = rows.iter().map(logit).collect();
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let e: Vec<f32> = logits.iter().map(|s| (s - largest).exp()).collect();
                let sum: f32 = e.iter().sum();
                let p: Vec<f32> = e.iter().map(|e| round::<E>(e / sum)).collect();
                for c in 0..value_dim {
                    let column = |&j| vector(v, j, kv_heads, g, value_dim)[c];
                    let column: Vec<f32> = rows.iter().map(column).collect();
                    branch.out.push(dot::<E>(&p, &column));
                }
                branch.lse.push(if rows.is_empty() { largest } else { largest + sum.ln() });
                branch.rows.push(Row { rows, p });
            }
        }
        branch
    }

    /// Gradients of q, k and v.
    fn backward<E: Element>(&self, d_out: &[f32]) -> [Vec<f32>; 3] {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.case.dims;
        let q = self.case.get("q");
        let scale = self.case.dims.scale();
        let mut d_q = vec![0.0; q.len()];
        let mut d_k = vec![0.0; self.k.len()];
        let mut d_v = vec![0.0; self.v.len()];
        // A tensor library repeats keys and values for each query head, then sums their gradients.
        for h in 0..heads {
            let g = h / self.case.dims.group();
            let mut dk_head = vec![0.0; d_k.len() / kv_heads];
            let mut dv_head = vec![0.0; d_v.len() / kv_heads];
            for t in 0..self.case.tokens() {
                let Row { rows, p } = &self.rows[t * heads + h];
                let d_o = vector(d_out, t, heads, h, value_dim);
                let d_p: Vec<f32> = (rows.iter())
                    .map(|&j| dot::<E>(d_o, vector(self.v, j, kv_heads, g, value_dim)))
                    .collect();
                let delta: f32 = p.iter().zip(&d_p).map(|(p, d)| p * d).sum();
                let d_q = &mut d_q[(t * heads + h) * key_dim..][..key_dim];
                for ((&j, p), d_p) in rows.iter().zip(p).zip(d_p) {
                    let d_s = round::<E>(round::<E>(p * (d_p - delta)) * scale);
                    add(d_q, d_s, vector(self.k, j, kv_heads, g, key_dim));
                    let q = vector(q, t, heads, h, key_dim);
                    add(&mut dk_head[j * key_dim..][..key_dim], d_s, q);
                    add(&mut dv_head[j * value_dim..][..value_dim], *p, d_o);
                }
                d_q.iter_mut().for_each(|x| *x = round::<E>(*x));
            }
            add_head::<E>(&mut d_k, &dk_head, kv_heads, g, key_dim);
            add_head::<E>(&mut d_v, &dv_head, kv_heads, g, value_dim);
        }
        let all = |x: Vec<f32>| x.into_iter().map(round::<E>).collect();
        [all(d_q), all(d_k), all(d_v)]
    }
}

/// y += a·x.
fn add(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Adds one query head's rounded gradient to its KV head's.
fn add_head<E: Element>(sum: &mut [f32], head: &[f32], kv_heads: usize, g: usize, dim: usize) {
    for (j, row) in head.chunks(dim).enumerate() {
        for (y, x) in sum[(j * kv_heads + g) * dim..][..dim].iter_mut().zip(row) {
            *y += round::<E>(*x);
        }
    }
}

/// Computes `case` (whose inputs are already representable in `E`) reading the blocks `indices`.
pub fn plain<E: Element>(case: &Case, indices: &[i32]) -> Outcome {
    let Dims { heads, value_dim, .. } = case.dims;
    let (k_cmp, v_cmp) = (compress::<E>(case, "k"), compress::<E>(case, "v"));
    let [cmp, slc, win] = visible(case, indices);
    let cmp = Branch::forward::<E>(case, &k_cmp, &v_cmp, &cmp);
    let slc = Branch::forward::<E>(case, case.get("k_slc"), case.get("v_slc"), &slc);
    let win = Branch::forward::<E>(case, case.get("k_win"), case.get("v_win"), &win);
    let branches = [&cmp, &slc, &win];
    let gate = case.get("gate");
    let out = (0..cmp.out.len()).map(|i| {
        let part = |c: usize| round::<E>(gate[i / value_dim * 3 + c] * branches[c].out[i]);
        round::<E>(round::<E>(part(0) + part(1)) + part(2))
    });

    let mut tensors = BTreeMap::new();
    let mut put = |name: &str, x: &[f32]| {
        tensors.insert(name.to_string(), x.iter().map(|&x| f64::from(x)).collect());
    };
    put("out", &out.collect::<Vec<f32>>());
    for (name, branch) in ["cmp", "slc", "win"].iter().zip(branches) {
        put(&format!("out_{name}"), &branch.out);
        put(&format!("lse_{name}"), &branch.lse);
    }
    if let Some(d_out) = case.tensors.get("d_out") {
        let mut d_gate = Vec::new();
        for i in 0..case.tokens() * heads {
            for branch in branches {
                let product = |c| round::<E>(d_out[c] * branch.out[c]);
                let sum: f32 = (i * value_dim..(i + 1) * value_dim).map(product).sum();
                d_gate.push(round::<E>(sum));
            }
        }
        put("d_gate", &d_gate);
        let [cmp, slc, win] = [0, 1, 2].map(|c| {
            let d_branch = |(i, d): (usize, &f32)| round::<E>(gate[i / value_dim * 3 + c] * d);
            let d_branch: Vec<f32> = d_out.iter().enumerate().map(d_branch).collect();
            branches[c].backward::<E>(&d_branch)
        });
        let d_q =
            (0..cmp[0].len()).map(|i| round::<E>(round::<E>(cmp[0][i] + slc[0][i]) + win[0][i]));
        put("d_q", &d_q.collect::<Vec<f32>>());
        for (name, [_, k, v]) in [("slc", &slc), ("win", &win)] {
            put(&format!("d_k_{name}"), k);
            put(&format!("d_v_{name}"), v);
        }
        for (letter, d_rows) in [("k", &cmp[1]), ("v", &cmp[2])] {
            for (name, x) in compress_backward::<E>(case, letter, d_rows) {
                put(&name, &x);
            }
        }
    }
    Outcome { indices: indices.to_vec(), tensors }
}

/// Dense or window attention of the query over one branch's keys and values: `out`, `lse` and,
/// when the case has a `d_out`, `d_q, d_k, d_v`.
pub fn plain_attend<E: Element>(case: &Case, branch: &str, mask: Mask) -> Outcome {
    let (k, v) = (case.get(&format!("k_{branch}")), case.get(&format!("v_{branch}")));
    let attended = Branch::forward::<E>(case, k, v, &visible_to(case, mask));
    let mut tensors = BTreeMap::new();
    let mut put = |name: &str, x: &[f32]| {
        tensors.insert(name.to_string(), x.iter().map(|&x| f64::from(x)).collect());
    };
    put("out", &attended.out);
    put("lse", &attended.lse);
    if let Some(d_out) = case.tensors.get("d_out") {
        let [q, k, v] = attended.backward::<E>(d_out);
        put("d_q", &q);
        put("d_k", &k);
        put("d_v", &v);
    }
    Outcome { indices: Vec::new(), tensors }
}
