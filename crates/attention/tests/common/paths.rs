//! The ways to compute a case: the float64 reference and the fast CPU code in f32 and bf16.

use std::collections::BTreeMap;

use half::bf16;
use tercet_attention::{
    Compressor, Dims, Element, NsaSpec, cpu, cu_compressed, reference, sequences,
};

use super::case::{Case, HIDDEN, INPUTS};

/// What computing a case gives, in the golden files' names; besides those, the branches' outputs
/// `out_cmp, out_slc, out_win` and the compressed keys and values `compressed_k, compressed_v`.
/// Gradients are there when the case has a `d_out`.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub indices: Vec<i32>,
    pub tensors: BTreeMap<String, Vec<f64>>,
}

impl Outcome {
    pub fn get(&self, name: &str) -> &[f64] {
        &self.tensors[name]
    }

    /// Row `t` of a tensor with one row a token.
    pub fn row(&self, name: &str, t: usize, tokens: usize) -> &[f64] {
        let width = self.tensors[name].len() / tokens;
        &self.tensors[name][t * width..(t + 1) * width]
    }
}

/// A way to compute a case.
pub struct Way {
    pub name: &'static str,
    /// Unit roundoff of its arithmetic.
    pub unit: f64,
    /// Unit roundoff of its storage.
    pub storage_unit: f64,
    pub run: fn(&Case) -> Outcome,
    /// Dense or window attention over one branch's keys and values; see [`reference_attend`].
    pub attend: fn(&Case, &str, cpu::Mask) -> Outcome,
}

impl Way {
    /// The case with inputs that this way can store.
    pub fn stored(&self, case: &Case) -> Case {
        if self.storage_unit == UNIT16 { case.rounded::<bf16>() } else { case.clone() }
    }
}

/// The reference, which must pass every oracle too, and the fast code.
pub const WAYS: [Way; 3] = [
    Way {
        name: "reference",
        unit: UNIT64,
        storage_unit: UNIT64,
        run: reference,
        attend: reference_attend,
    },
    Way {
        name: "cpu f32",
        unit: UNIT32,
        storage_unit: UNIT32,
        run: fast::<f32>,
        attend: fast_attend::<f32>,
    },
    Way {
        name: "cpu bf16",
        unit: UNIT32,
        storage_unit: UNIT16,
        run: fast::<bf16>,
        attend: fast_attend::<bf16>,
    },
];

/// Half the distance from 1 to the next number: f64, f32, bf16.
pub const UNIT64: f64 = f64::EPSILON / 2.0;
pub const UNIT32: f64 = f32::EPSILON as f64 / 2.0;
pub const UNIT16: f64 = 1.0 / 256.0;

fn widen<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

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
    fn widen(&self) -> Vec<f64> {
        let (start, end) = (&self.buffer[..MARGIN], &self.buffer[self.buffer.len() - MARGIN..]);
        let whole = start.iter().chain(end).all(|x| x.to_f32().is_nan());
        assert!(whole, "something was written outside a slice");
        widen(self.values())
    }
}

/// A case's tensors in float64, from which the reference's inputs borrow.
pub struct Wide<'a> {
    case: &'a Case,
    tensors: BTreeMap<&'a str, Vec<f64>>,
}

impl<'a> Wide<'a> {
    pub fn of(case: &'a Case) -> Self {
        let tensors = case.tensors.iter().map(|(name, x)| (name.as_str(), widen(x))).collect();
        Self { case, tensors }
    }

    pub fn get_mut(&mut self, name: &str) -> &mut Vec<f64> {
        self.tensors.get_mut(name).unwrap()
    }

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
pub fn reference(case: &Case) -> Outcome {
    reference_with(case, None)
}

/// The reference, reading the blocks that another computation chose.
pub fn reference_chosen(case: &Case, indices: &[i32]) -> Outcome {
    reference_with(case, Some(indices))
}

fn reference_with(case: &Case, indices: Option<&[i32]>) -> Outcome {
    let wide = Wide::of(case);
    let input = wide.input();
    let (k_cmp, v_cmp) = input.compressed().unwrap();
    let ready = input.ready(&k_cmp, &v_cmp);
    let output = match indices {
        None => reference::nsa_forward(&ready),
        Some(indices) => reference::nsa_forward_chosen(&ready, indices),
    }
    .unwrap();
    let mut tensors = BTreeMap::new();
    let mut put = |name: &str, x: Vec<f64>| tensors.insert(name.to_string(), x);
    if let Some(d_out) = wide.tensors.get("d_out") {
        let d = reference::operator_backward(&input, &output, d_out).unwrap();
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
    Outcome { indices: output.indices, tensors }
}

/// Dense or window attention of the query over one branch's keys and values: `out`, `lse` and,
/// when the case has a `d_out`, `d_q, d_k, d_v`.
pub fn reference_attend(case: &Case, branch: &str, mask: cpu::Mask) -> Outcome {
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
    let attended = reference::attend_forward(&input, mask).unwrap();
    let mut tensors = BTreeMap::new();
    if let Some(d_out) = wide.tensors.get("d_out") {
        let d = reference::attend_backward(&input, mask, &attended, d_out).unwrap();
        tensors.extend([("d_q".into(), d.q), ("d_k".into(), d.k), ("d_v".into(), d.v)]);
    }
    tensors.extend([("out".into(), attended.out), ("lse".into(), attended.lse)]);
    Outcome { indices: Vec::new(), tensors }
}

/// The scores p_slc′ `[T, K, J]` in float64, from the compressed keys given.
pub fn importance(case: &Case, compressed_k: &[f64]) -> Vec<f64> {
    let wide = Wide::of(case);
    let input = wide.input();
    let (_, v_cmp) = input.compressed().unwrap();
    reference::importance(&input.ready(compressed_k, &v_cmp)).unwrap()
}

/// The blocks `[T, K, S]` that the reference chooses by the compressed keys given.
pub fn choice(case: &Case, compressed_k: &[f64]) -> Vec<i32> {
    let wide = Wide::of(case);
    let input = wide.input();
    let (_, v_cmp) = input.compressed().unwrap();
    reference::nsa_forward(&input.ready(compressed_k, &v_cmp)).unwrap().indices
}

/// A case's tensors as `E`.
pub struct Narrow<'a, E> {
    case: &'a Case,
    tensors: BTreeMap<&'a str, Guarded<E>>,
}

impl<'a, E: Element> Narrow<'a, E> {
    pub fn of(case: &'a Case) -> Self {
        let narrow = |x: &[f32]| Guarded::holding(x.iter().map(|&x| E::from_f32(x)));
        let tensors = case.tensors.iter().map(|(name, x)| (name.as_str(), narrow(x))).collect();
        Self { case, tensors }
    }

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
                hidden: HIDDEN,
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

/// Compressed blocks of all sequences of a case.
pub fn compressed_rows(case: &Case) -> usize {
    let sequences = sequences(&case.cu_seqlens, case.tokens()).unwrap();
    *cu_compressed(&case.spec, &sequences).last().unwrap()
}

/// The fast CPU code, every output buffer poisoned beforehand.
pub fn fast<E: Element>(case: &Case) -> Outcome {
    let narrow = Narrow::<E>::of(case);
    let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
    let (tokens, rows) = (case.tokens(), compressed_rows(case));
    let mut k_cmp = Guarded::poison(rows * kv_heads * key_dim);
    let mut v_cmp = Guarded::poison(rows * kv_heads * value_dim);
    cpu::compress_forward(&narrow.compress("k"), k_cmp.values_mut()).unwrap();
    cpu::compress_forward(&narrow.compress("v"), v_cmp.values_mut()).unwrap();
    let input = narrow.input(k_cmp.values(), v_cmp.values());
    let mut out = Guarded::poison(tokens * heads * value_dim);
    let saved = cpu::nsa_forward(&input, out.values_mut()).unwrap();

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
        cpu::nsa_backward(&input, &saved, narrow.get("d_out"), grads).unwrap();
        for (name, x) in INPUTS.iter().zip(&d) {
            put(&format!("d_{name}"), x.widen());
        }
        for (letter, d_out) in [("k", &d[1]), ("v", &d[2])] {
            for (name, x) in fast_compress_backward(&narrow, letter, d_out.values()) {
                put(&name, x);
            }
        }
    }
    put("out", out.widen());
    put("out_cmp", widen(&saved.out_cmp));
    put("out_slc", widen(&saved.out_slc));
    put("out_win", widen(&saved.out_win));
    put("lse_cmp", saved.lse_cmp);
    put("lse_slc", saved.lse_slc);
    put("lse_win", saved.lse_win);
    put("compressed_k", k_cmp.widen());
    put("compressed_v", v_cmp.widen());
    Outcome { indices: saved.indices, tensors }
}

/// See [`reference_attend`]; every output buffer is poisoned beforehand.
pub fn fast_attend<E: Element>(case: &Case, branch: &str, mask: cpu::Mask) -> Outcome {
    let narrow = Narrow::<E>::of(case);
    let input = narrow.attend(branch);
    let Dims { heads, value_dim, .. } = case.dims;
    let mut out = Guarded::poison(case.tokens() * heads * value_dim);
    let mut lse = vec![f64::NAN; case.tokens() * heads];
    cpu::attend_forward(&input, mask, out.values_mut(), &mut lse).unwrap();
    let mut tensors = BTreeMap::new();
    if case.tensors.contains_key("d_out") {
        let mut d = [input.q, input.k, input.v].map(|x| Guarded::poison(x.len()));
        let [q, k, v] = d.each_mut().map(Guarded::values_mut);
        let grads = cpu::AttendGrads { q, k, v };
        let d_out = narrow.get("d_out");
        cpu::attend_backward(&input, mask, out.values(), &lse, d_out, grads).unwrap();
        let names = ["d_q", "d_k", "d_v"].map(String::from);
        tensors.extend(names.into_iter().zip(d.iter().map(Guarded::widen)));
    }
    tensors.extend([("out".into(), out.widen()), ("lse".into(), lse)]);
    Outcome { indices: Vec::new(), tensors }
}

/// Gradients of the raw rows and of φ's parameters, by their golden names.
fn fast_compress_backward<E: Element>(
    narrow: &Narrow<E>,
    letter: &str,
    d_out: &[E],
) -> Vec<(String, Vec<f64>)> {
    let input = narrow.compress(letter);
    let mut d_x = Guarded::<E>::poison(input.x.len());
    let mut parts: BTreeMap<String, Guarded<f32>> = (narrow.case.phi_names().into_iter())
        .filter(|name| name.starts_with(&format!("phi_{letter}_")))
        .map(|name| (format!("d_{name}"), Guarded::poison(narrow.case.get(&name).len())))
        .collect();
    let mut values = parts.values_mut().map(Guarded::values_mut);
    // The map yields its parts in alphabetical order.
    let mut next = || values.next().unwrap();
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
    cpu::compress_backward(&input, d_out, d_x.values_mut(), grads).unwrap();
    let mut all: Vec<_> = parts.into_iter().map(|(name, x)| (name, x.widen())).collect();
    all.push((format!("d_{letter}_cmp"), d_x.widen()));
    all
}

/// Decodes a case of one sequence, `chunks` tokens at a time: outputs `[T, H, V]`, indices.
pub fn fast_decode<E: Element>(case: &Case, chunks: &[usize]) -> (Vec<f64>, Vec<i32>) {
    let narrow = Narrow::<E>::of(case);
    let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
    let spec: &NsaSpec = &case.spec;
    let mut tails = [
        cpu::CompressTail::<E>::new(spec, kv_heads, key_dim).unwrap(),
        cpu::CompressTail::<E>::new(spec, kv_heads, value_dim).unwrap(),
    ];
    let mut cache = cpu::NsaCache::new(spec, case.dims).unwrap();
    assert!(cache.is_empty());
    let (mut outs, mut indices, mut at) = (Vec::new(), Vec::new(), 0);
    for &c in chunks {
        let rows = |name: &str, width: usize| &narrow.get(name)[at * width..(at + c) * width];
        let (keys, values) = (kv_heads * key_dim, kv_heads * value_dim);
        let k_cmp = tails[0].push(rows("k_cmp", keys), narrow.phi("k")).unwrap();
        let v_cmp = tails[1].push(rows("v_cmp", values), narrow.phi("v")).unwrap();
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
        indices.extend(cache.extend(&step, out.values_mut()).unwrap());
        outs.extend(out.widen());
        at += c;
        assert_eq!(cache.len(), at);
        assert_eq!(tails[0].blocks(), spec.compressed_blocks(at));
    }
    (outs, indices)
}
