//! Compression and attention through the tape. The operator has suites of its own
//! (`tercet_attention::selftest`); here its results must reach the right places. Every block is
//! selected, so that no near-tie of scores can be decided differently.

use super::{Case, tensor};
use crate::ops::{self, NsaVars, Phi};
use crate::{Compressor, Mask, NsaSpec, Result, Tensor};

fn all_of(shapes: &[&[usize]], seed: u64) -> Vec<Tensor> {
    let inputs = shapes.iter().enumerate().map(|(i, s)| tensor(s, seed + i as u64));
    inputs.collect::<Result<_>>().unwrap_or_default()
}

fn spec() -> NsaSpec {
    NsaSpec { select_count: 8, window: 24, ..NsaSpec::default() }
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let cu_seqlens = || vec![0i32, 200, 200, 263, 300];
    for [heads, kv_heads, dim] in [[4, 2, 16], [6, 2, 64], [16, 1, 128]] {
        let (q, k) = ([300, heads, dim], [300, kv_heads, dim]);
        for (name, mask) in [("causal", Mask::Causal), ("window 40", Mask::Window(40))] {
            let name = format!("attention_dense {name} {q:?}, {kv_heads} kv heads");
            let inputs = all_of(&[&q, &k, &k], 70);
            cases.push(Case::new(name, inputs, 3, 300, move |tape, x, _| {
                let out = ops::attention_dense(tape, &x[0], &x[1], &x[2], &cu_seqlens(), mask)?;
                Ok(vec![out])
            }));
        }
        let gate = [300, heads, 3];
        let name = format!("compress mean and attention_nsa {q:?}, {kv_heads} kv heads");
        let inputs = all_of(&[&q, &k, &k, &k, &k, &k, &k, &gate], 80);
        let nsa = Case::new(name, inputs, 8, 300, move |tape, x, _| {
            let offsets = cu_seqlens();
            let k_cmp = ops::compress(tape, &x[1], &Phi::Mean, &spec(), &offsets)?;
            let v_cmp = ops::compress(tape, &x[2], &Phi::Mean, &spec(), &offsets)?;
            let vars = NsaVars {
                q: x[0].clone(),
                k_cmp,
                v_cmp,
                k_slc: x[3].clone(),
                v_slc: x[4].clone(),
                k_win: x[5].clone(),
                v_win: x[6].clone(),
                gate: ops::sigmoid(tape, &x[7])?,
            };
            Ok(vec![ops::attention_nsa(tape, &vars, &spec(), &offsets)?])
        });
        cases.push(nsa);
    }
    compressors(&mut cases);
    cases
}

fn compressors(cases: &mut Vec<Case>) {
    for [kv_heads, dim, hidden] in [[1, 8, 12], [2, 64, 40]] {
        let spec = NsaSpec::default();
        let (x, l) = ([300, kv_heads, dim], spec.compress_block);
        let (weight, pe) = ([kv_heads, l * dim, dim], [kv_heads, l, dim]);
        let inputs = all_of(&[&x, &weight, &pe], 100);
        let name = format!("compress linear {x:?}");
        let terms = (l * dim).max(300);
        cases.push(Case::new(name, inputs, 1, terms, |tape, x, _| {
            let phi = Phi::Linear { weight: x[1].clone(), pe: x[2].clone() };
            let offsets = [0, 150, 170, 300];
            let spec = NsaSpec { compressor: Compressor::Linear, ..NsaSpec::default() };
            Ok(vec![ops::compress(tape, &x[0], &phi, &spec, &offsets)?])
        }));
        let (weight1, bias1) = ([kv_heads, l * dim, hidden], [kv_heads, hidden]);
        let (weight2, bias2) = ([kv_heads, hidden, dim], [kv_heads, dim]);
        let inputs = all_of(&[&x, &weight1, &bias1, &weight2, &bias2, &pe], 110);
        let name = format!("compress mlp {x:?}, {hidden} wide");
        let mlp = Case::new(name, inputs, 1, terms, |tape, x, _| {
            let phi = Phi::Mlp {
                weight1: x[1].clone(),
                bias1: x[2].clone(),
                weight2: x[3].clone(),
                bias2: x[4].clone(),
                pe: x[5].clone(),
            };
            let offsets = [0, 150, 170, 300];
            let spec = NsaSpec { compressor: Compressor::Mlp, ..NsaSpec::default() };
            Ok(vec![ops::compress(tape, &x[0], &phi, &spec, &offsets)?])
        });
        // The hidden layer, its activation and its gradient are stored in bf16: half a unit of
        // 2⁻⁸ each.
        cases.push(mlp.stored(3.0 / 512.0));
    }
    averages(cases);
    chunks(cases);
}

/// Averages whose blocks overlap more or less, in rows that do and do not fill vectors.
fn averages(cases: &mut Vec<Case>) {
    for (heads, dim, l, d) in [(1, 7, 24, 4), (3, 20, 32, 16), (4, 128, 16, 16), (2, 64, 8, 1)] {
        let name = format!("compress mean [600, {heads}, {dim}], {l} every {d}");
        let inputs = all_of(&[&[600, heads, dim]], 120);
        cases.push(Case::new(name, inputs, 1, l, move |tape, x, _| {
            let spec = NsaSpec { compress_block: l, compress_stride: d, ..NsaSpec::default() };
            let offsets = [0, 5, 5, 37, 300, 331, 600];
            Ok(vec![ops::compress(tape, &x[0], &Phi::Mean, &spec, &offsets)?])
        }));
    }
}

/// More flattened blocks, in f32, than a device makes at once; they share tokens over the seam.
fn chunks(cases: &mut Vec<Case>) {
    let (tokens, kv_heads, dim, l, hidden) = (4400, 8, 8, 64, 8);
    let x = [tokens, kv_heads, dim];
    let spec = || NsaSpec { compress_block: 64, compress_stride: 1, ..NsaSpec::default() };
    let offsets = || [0, 2000, 2010, 4400];
    let (weight, pe) = ([kv_heads, l * dim, dim], [kv_heads, l, dim]);
    let inputs = all_of(&[&x, &weight, &pe], 130);
    let name = format!("compress linear in chunks {x:?}");
    cases.push(Case::new(name, inputs, 1, tokens, move |tape, x, _| {
        let phi = Phi::Linear { weight: x[1].clone(), pe: x[2].clone() };
        Ok(vec![ops::compress(tape, &x[0], &phi, &spec(), &offsets())?])
    }));
    let (weight1, bias1) = ([kv_heads, l * dim, hidden], [kv_heads, hidden]);
    let (weight2, bias2) = ([kv_heads, hidden, dim], [kv_heads, dim]);
    let inputs = all_of(&[&x, &weight1, &bias1, &weight2, &bias2, &pe], 140);
    let name = format!("compress mlp in chunks {x:?}, {hidden} wide");
    let case = Case::new(name, inputs, 1, tokens, move |tape, x, _| {
        let phi = Phi::Mlp {
            weight1: x[1].clone(),
            bias1: x[2].clone(),
            weight2: x[3].clone(),
            bias2: x[4].clone(),
            pe: x[5].clone(),
        };
        Ok(vec![ops::compress(tape, &x[0], &phi, &spec(), &offsets())?])
    });
    cases.push(case.stored(3.0 / 512.0));
}
