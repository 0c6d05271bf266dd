//! The float64 reference on cases.

use std::collections::BTreeMap;

use super::Check;
use super::case::Case;
use super::ways::{Outcome, widen};
use crate::cpu::Mask;
use crate::{Compressor, reference};

/// A case's tensors in float64, from which the reference's inputs borrow.
pub struct Wide<'a> {
    case: &'a Case,
    tensors: BTreeMap<&'a str, Vec<f64>>,
}

impl<'a> Wide<'a> {
    /// Widens all tensors.
    pub fn of(case: &'a Case) -> Self {
        let tensors = case.tensors.iter().map(|(name, x)| (name.as_str(), widen(x))).collect();
        Self { case, tensors }
    }

    /// A tensor, to be changed.
    pub fn get_mut(&mut self, name: &'a str) -> &mut Vec<f64> {
        self.tensors.entry(name).or_default()
    }

    /// The operator's input.
    pub fn input(&self) -> reference::OperatorInput<'_> {
        let get = |name: &str| &self.tensors[name][..];
        let phi = |letter: &str| {
            let get = |name: &str| &self.tensors[format!("phi_{letter}_{name}").as_str()][..];
            match self.case.spec.compressor {
                Compressor::Mean => reference::Phi::Mean,
                Compressor::Linear => {
                    reference::Phi::Linear { weight: get("weight"), pe: get("pe") }
                }
                Compressor::Mlp => reference::Phi::Mlp {
                    weight1: get("weight1"),
                    bias1: get("bias1"),
                    weight2: get("weight2"),
                    bias2: get("bias2"),
                    pe: get("pe"),
                },
            }
        };
        reference::OperatorInput {
            raw: reference::NsaInput {
                spec: &self.case.spec,
                dims: self.case.dims,
                cu_seqlens: &self.case.cu_seqlens,
                scale: 1.0 / (self.case.dims.key_dim as f64).sqrt(),
                q: get("q"),
                k_cmp: get("k_cmp"),
                v_cmp: get("v_cmp"),
                k_slc: get("k_slc"),
                v_slc: get("v_slc"),
                k_win: get("k_win"),
                v_win: get("v_win"),
                gate: get("gate"),
            },
            phi_k: phi("k"),
            phi_v: phi("v"),
        }
    }
}

/// The reference, choosing its own blocks.
pub fn reference(case: &Case) -> Check<Outcome> {
    reference_with(case, None)
}

/// The reference, reading the blocks that another computation chose.
pub fn reference_chosen(case: &Case, indices: &[i32]) -> Check<Outcome> {
    reference_with(case, Some(indices))
}

fn reference_with(case: &Case, indices: Option<&[i32]>) -> Check<Outcome> {
    let wide = Wide::of(case);
    let input = wide.input();
    let (k_cmp, v_cmp) = input.compressed()?;
    let ready = input.ready(&k_cmp, &v_cmp);
    let output = match indices {
        None => reference::nsa_forward(&ready),
        Some(indices) => reference::nsa_forward_chosen(&ready, indices),
    }?;
    let mut tensors = BTreeMap::new();
    let mut put = |name: &str, x: Vec<f64>| tensors.insert(name.to_string(), x);
    if let Some(d_out) = wide.tensors.get("d_out") {
        let d = reference::operator_backward(&input, &output, d_out)?;
        let raw = d.raw;
        for (name, x) in [
            ("d_q", raw.q),
            ("d_k_cmp", raw.k_cmp),
            ("d_v_cmp", raw.v_cmp),
            ("d_k_slc", raw.k_slc),
            ("d_v_slc", raw.v_slc),
            ("d_k_win", raw.k_win),
            ("d_v_win", raw.v_win),
            ("d_gate", raw.gate),
        ] {
            put(name, x);
        }
        for (letter, phi) in [("k", d.phi_k), ("v", d.phi_v)] {
            let mut put = |name: &str, x| put(&format!("d_phi_{letter}_{name}"), x);
            match phi {
                reference::PhiGrads::Mean => {}
                reference::PhiGrads::Linear { weight, pe } => {
                    put("weight", weight);
                    put("pe", pe);
                }
                reference::PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe } => {
                    put("weight1", weight1);
                    put("bias1", bias1);
                    put("weight2", weight2);
                    put("bias2", bias2);
                    put("pe", pe);
                }
            }
        }
    }
    put("out", output.out);
    for (branch, attended) in [("cmp", output.cmp), ("slc", output.slc), ("win", output.win)] {
        put(&format!("out_{branch}"), attended.out);
        put(&format!("lse_{branch}"), attended.lse);
    }
    put("compressed_k", k_cmp);
    put("compressed_v", v_cmp);
    Ok(Outcome { indices: output.indices, tensors })
}

/// Dense or window attention of the query over one branch's keys and values: `out`, `lse` and,
/// when the case has a `d_out`, `d_q, d_k, d_v`.
pub fn reference_attend(case: &Case, branch: &str, mask: Mask) -> Check<Outcome> {
    let wide = Wide::of(case);
    let raw = wide.input().raw;
    let input = reference::AttendInput {
        dims: raw.dims,
        cu_seqlens: raw.cu_seqlens,
        scale: raw.scale,
        q: raw.q,
        k: &wide.tensors[format!("k_{branch}").as_str()],
        v: &wide.tensors[format!("v_{branch}").as_str()],
    };
    let attended = reference::attend_forward(&input, mask)?;
    let mut tensors = BTreeMap::new();
    if let Some(d_out) = wide.tensors.get("d_out") {
        let d = reference::attend_backward(&input, mask, &attended, d_out)?;
        tensors.extend([("d_q".into(), d.q), ("d_k".into(), d.k), ("d_v".into(), d.v)]);
    }
    tensors.extend([("out".into(), attended.out), ("lse".into(), attended.lse)]);
    Ok(Outcome { indices: Vec::new(), tensors })
}

/// The scores p_slc′ `[T, K, J]` in float64, from the compressed keys given.
pub fn importance(case: &Case, compressed_k: &[f64]) -> Check<Vec<f64>> {
    let wide = Wide::of(case);
    let input = wide.input();
    let (_, v_cmp) = input.compressed()?;
    Ok(reference::importance(&input.ready(compressed_k, &v_cmp))?)
}

/// The blocks `[T, K, S]` that the reference chooses by the compressed keys given.
pub fn choice(case: &Case, compressed_k: &[f64]) -> Check<Vec<i32>> {
    let wide = Wide::of(case);
    let input = wide.input();
    let (_, v_cmp) = input.compressed()?;
    Ok(reference::nsa_forward(&input.ready(compressed_k, &v_cmp))?.indices)
}
