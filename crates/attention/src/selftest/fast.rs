//! The CPU kernels on cases, between margins of NaN and into poisoned outputs.

use std::collections::BTreeMap;

use super::case::{Case, INPUTS};
use super::ways::{Outcome, widen};
use super::{Check, ensure};
use crate::cpu::{self, Mask};
use crate::{Compressor, Dims, Element, NsaSpec};

/// NaN on either side of every slice that the fast code sees: it must neither read nor write there.
const MARGIN: usize = 40;

/// A slice between two margins of NaN.
pub struct Guarded<E> {
    buffer: Vec<E>,
}

impl<E: Element> Guarded<E> {
    /// These values.
    fn holding(values: impl Iterator<Item = E>) -> Self {
        let nan = || std::iter::repeat_n(E::from_f32(f32::NAN), MARGIN);
        Self { buffer: nan().chain(values).chain(nan()).collect() }
    }

    /// `len` elements whose old contents must not matter.
    fn poison(len: usize) -> Self {
        Self { buffer: vec![E::from_f32(f32::NAN); len + 2 * MARGIN] }
    }

    fn values(&self) -> &[E] {
        &self.buffer[MARGIN..self.buffer.len() - MARGIN]
    }

    fn values_mut(&mut self) -> &mut [E] {
        let end = self.buffer.len() - MARGIN;
        &mut self.buffer[MARGIN..end]
    }

    /// The values in float64; the margins must be as they were.
    fn widen(&self) -> Check<Vec<f64>> {
        let (start, end) = (&self.buffer[..MARGIN], &self.buffer[self.buffer.len() - MARGIN..]);
        let whole = start.iter().chain(end).all(|x| x.to_f32().is_nan());
        ensure(whole, || "something was written outside a slice".into())?;
        Ok(widen(self.values()))
    }
}

/// A case's tensors as `E`.
pub struct Narrow<'a, E> {
    case: &'a Case,
    tensors: BTreeMap<&'a str, Guarded<E>>,
}

impl<'a, E: Element> Narrow<'a, E> {
    /// Rounds all tensors.
    pub fn of(case: &'a Case) -> Self {
        let narrow = |x: &[f32]| Guarded::holding(x.iter().map(|&x| E::from_f32(x)));
        let tensors = case.tensors.iter().map(|(name, x)| (name.as_str(), narrow(x))).collect();
        Self { case, tensors }
    }

    /// A tensor by its name.
    pub fn get(&self, name: &str) -> &[E] {
        self.tensors[name].values()
    }

    /// φ of the keys (`"k"`) or the values (`"v"`).
    pub fn phi(&self, letter: &str) -> cpu::Phi<'_, E> {
        let get = |name: &str| self.get(&format!("phi_{letter}_{name}"));
        match self.case.spec.compressor {
            Compressor::Mean => cpu::Phi::Mean,
            Compressor::Linear => cpu::Phi::Linear { weight: get("weight"), pe: get("pe") },
            Compressor::Mlp => cpu::Phi::Mlp {
                weight1: get("weight1"),
                bias1: get("bias1"),
                weight2: get("weight2"),
                bias2: get("bias2"),
                pe: get("pe"),
                hidden: self.case.hidden(letter),
            },
        }
    }

    /// Compression of the keys (`"k"`) or the values (`"v"`).
    pub fn compress(&self, letter: &str) -> cpu::CompressInput<'_, E> {
        let Dims { kv_heads, key_dim, value_dim, .. } = self.case.dims;
        cpu::CompressInput {
            spec: &self.case.spec,
            cu_seqlens: &self.case.cu_seqlens,
            kv_heads,
            dim: if letter == "k" { key_dim } else { value_dim },
            x: self.get(&format!("{letter}_cmp")),
            phi: self.phi(letter),
        }
    }

    /// The operator on ready compressed keys and values.
    pub fn input<'b>(&'b self, k_cmp: &'b [E], v_cmp: &'b [E]) -> cpu::NsaInput<'b, E> {
        cpu::NsaInput {
            spec: &self.case.spec,
            dims: self.case.dims,
            cu_seqlens: &self.case.cu_seqlens,
            scale: self.case.dims.scale(),
            q: self.get("q"),
            k_cmp,
            v_cmp,
            k_slc: self.get("k_slc"),
            v_slc: self.get("v_slc"),
            k_win: self.get("k_win"),
            v_win: self.get("v_win"),
            gate: self.get("gate"),
        }
    }

    /// Dense or window attention of the query over the keys and values of a branch.
    pub fn attend(&self, branch: &str) -> cpu::AttendInput<'_, E> {
        cpu::AttendInput {
            dims: self.case.dims,
            cu_seqlens: &self.case.cu_seqlens,
            scale: self.case.dims.scale(),
            q: self.get("q"),
            k: self.get(&format!("k_{branch}")),
            v: self.get(&format!("v_{branch}")),
        }
    }
}

/// The fast CPU code, every output buffer poisoned beforehand.
pub fn fast<E: Element>(case: &Case) -> Check<Outcome> {
    let narrow = Narrow::<E>::of(case);
    let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
    let (tokens, rows) = (case.tokens(), case.compressed_rows());
    let mut k_cmp = Guarded::poison(rows * kv_heads * key_dim);
    let mut v_cmp = Guarded::poison(rows * kv_heads * value_dim);
    cpu::compress_forward(&narrow.compress("k"), k_cmp.values_mut())?;
    cpu::compress_forward(&narrow.compress("v"), v_cmp.values_mut())?;
    let input = narrow.input(k_cmp.values(), v_cmp.values());
    let mut out = Guarded::poison(tokens * heads * value_dim);
    let saved = cpu::nsa_forward(&input, out.values_mut())?;

    let mut tensors = BTreeMap::new();
    let mut put = |name: &str, x: Vec<f64>| tensors.insert(name.to_string(), x);
    if case.tensors.contains_key("d_out") {
        let mut d = INPUTS.map(|name| match name {
            "k_cmp" => Guarded::poison(input.k_cmp.len()),
            "v_cmp" => Guarded::poison(input.v_cmp.len()),
            name => Guarded::poison(case.get(name).len()),
        });
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] =
            d.each_mut().map(Guarded::values_mut);
        let grads = cpu::NsaGrads { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
        cpu::nsa_backward(&input, &saved, narrow.get("d_out"), grads)?;
        for (name, x) in INPUTS.iter().zip(&d) {
            put(&format!("d_{name}"), x.widen()?);
        }
        for (letter, d_out) in [("k", &d[1]), ("v", &d[2])] {
            for (name, x) in fast_compress_backward(&narrow, letter, d_out.values())? {
                put(&name, x);
            }
        }
    }
    put("out", out.widen()?);
    put("out_cmp", widen(&saved.out_cmp));
    put("out_slc", widen(&saved.out_slc));
    put("out_win", widen(&saved.out_win));
    put("lse_cmp", saved.lse_cmp);
    put("lse_slc", saved.lse_slc);
    put("lse_win", saved.lse_win);
    put("compressed_k", k_cmp.widen()?);
    put("compressed_v", v_cmp.widen()?);
    Ok(Outcome { indices: saved.indices, tensors })
}

/// See [`reference_attend`]; every output buffer is poisoned beforehand.
pub fn fast_attend<E: Element>(case: &Case, branch: &str, mask: Mask) -> Check<Outcome> {
    let narrow = Narrow::<E>::of(case);
    let input = narrow.attend(branch);
    let Dims { heads, value_dim, .. } = case.dims;
    let mut out = Guarded::poison(case.tokens() * heads * value_dim);
    let mut lse = vec![f64::NAN; case.tokens() * heads];
    cpu::attend_forward(&input, mask, out.values_mut(), &mut lse)?;
    let mut tensors = BTreeMap::new();
    if case.tensors.contains_key("d_out") {
        let mut d = [input.q, input.k, input.v].map(|x| Guarded::poison(x.len()));
        let [q, k, v] = d.each_mut().map(Guarded::values_mut);
        let grads = cpu::AttendGrads { q, k, v };
        let d_out = narrow.get("d_out");
        cpu::attend_backward(&input, mask, out.values(), &lse, d_out, grads)?;
        let names = ["d_q", "d_k", "d_v"].map(String::from);
        for (name, x) in names.into_iter().zip(&d) {
            tensors.insert(name, x.widen()?);
        }
    }
    tensors.extend([("out".into(), out.widen()?), ("lse".into(), lse)]);
    Ok(Outcome { indices: Vec::new(), tensors })
}

/// Gradients of the raw rows and of φ's parameters, by their golden names.
pub(super) fn fast_compress_backward<E: Element>(
    narrow: &Narrow<E>,
    letter: &str,
    d_out: &[E],
) -> Check<Vec<(String, Vec<f64>)>> {
    let input = narrow.compress(letter);
    let mut d_x = Guarded::<E>::poison(input.x.len());
    let mut parts: BTreeMap<String, Guarded<f32>> = (narrow.case.phi_names().into_iter())
        .filter(|name| name.starts_with(&format!("phi_{letter}_")))
        .map(|name| (format!("d_{name}"), Guarded::poison(narrow.case.get(&name).len())))
        .collect();
    let mut values = parts.values_mut().map(Guarded::values_mut);
    // The map yields its parts in alphabetical order.
    let mut next = || values.next().unwrap_or_default();
    let grads = match narrow.case.spec.compressor {
        Compressor::Mean => cpu::PhiGrads::Mean,
        Compressor::Linear => cpu::PhiGrads::Linear { pe: next(), weight: next() },
        Compressor::Mlp => cpu::PhiGrads::Mlp {
            bias1: next(),
            bias2: next(),
            pe: next(),
            weight1: next(),
            weight2: next(),
        },
    };
    cpu::compress_backward(&input, d_out, d_x.values_mut(), grads)?;
    let mut all = vec![(format!("d_{letter}_cmp"), d_x.widen()?)];
    for (name, x) in parts {
        all.push((name, x.widen()?));
    }
    Ok(all)
}

/// Decodes a case of one sequence, `chunks` tokens at a time: outputs `[T, H, V]`, indices.
pub fn fast_decode<E: Element>(case: &Case, chunks: &[usize]) -> Check<(Vec<f64>, Vec<i32>)> {
    let narrow = Narrow::<E>::of(case);
    let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
    let spec: &NsaSpec = &case.spec;
    let mut tails = [
        cpu::CompressTail::<E>::new(spec, kv_heads, key_dim)?,
        cpu::CompressTail::<E>::new(spec, kv_heads, value_dim)?,
    ];
    let mut cache = cpu::NsaCache::new(spec, case.dims)?;
    ensure(cache.is_empty(), || "a new cache is not empty".into())?;
    let (mut outs, mut indices, mut at) = (Vec::new(), Vec::new(), 0);
    for &c in chunks {
        let rows = |name: &str, width: usize| &narrow.get(name)[at * width..(at + c) * width];
        let (keys, values) = (kv_heads * key_dim, kv_heads * value_dim);
        let k_cmp = tails[0].push(rows("k_cmp", keys), narrow.phi("k"))?;
        let v_cmp = tails[1].push(rows("v_cmp", values), narrow.phi("v"))?;
        let step = cpu::NsaStep {
            scale: case.dims.scale(),
            q: rows("q", heads * key_dim),
            k_cmp: &k_cmp,
            v_cmp: &v_cmp,
            k_slc: rows("k_slc", keys),
            v_slc: rows("v_slc", values),
            k_win: rows("k_win", keys),
            v_win: rows("v_win", values),
            gate: rows("gate", heads * 3),
        };
        let mut out = Guarded::poison(c * heads * value_dim);
        indices.extend(cache.extend(&step, out.values_mut())?);
        outs.extend(out.widen()?);
        at += c;
        let kept = cache.len() == at && tails[0].blocks() == spec.compressed_blocks(at);
        ensure(kept, || format!("after {at} tokens the cache holds {}", cache.len()))?;
    }
    Ok((outs, indices))
}
