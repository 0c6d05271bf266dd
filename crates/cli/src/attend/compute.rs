//! From checked inputs to results, by the fast code or by the reference.

use std::iter::zip;

use tercet_attention::{
    Compressor, Dims, Element, cpu, cu_compressed, reference as float64, sequences,
};

use super::input::{Input, Tensors};
use super::output::{Data, Stored, Tensor};

/// The inputs that have a gradient, φ's apart, in the order of `NsaGrads`.
pub const INPUTS: [&str; 8] = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"];

/// Parameters of a linear φ.
pub const LINEAR: [&str; 2] = ["weight", "pe"];
/// Parameters of an mlp φ.
pub const MLP: [&str; 5] = ["weight1", "bias1", "weight2", "bias2", "pe"];

/// The fast CPU code, inputs stored as `E`.
pub fn fast<E: Stored>(input: &Input) -> anyhow::Result<Vec<Tensor>> {
    let tensors = input.read::<E>()?;
    let Dims { heads, kv_heads, key_dim, value_dim } = input.dims;
    let sequences = sequences(&input.cu_seqlens, input.tokens)?;
    let blocks = cu_compressed(&input.spec, &sequences).last().copied().unwrap_or(0);
    let zeros = |n: usize| vec![E::default(); n];

    let (keys, values) = (compression(input, &tensors, "k"), compression(input, &tensors, "v"));
    let mut k_cmp = zeros(blocks * kv_heads * key_dim);
    let mut v_cmp = zeros(blocks * kv_heads * value_dim);
    cpu::compress_forward(&keys, &mut k_cmp)?;
    cpu::compress_forward(&values, &mut v_cmp)?;
    let ready = cpu::NsaInput {
        spec: &input.spec,
        dims: input.dims,
        cu_seqlens: &input.cu_seqlens,
        scale: input.dims.scale(),
        q: &tensors["q"],
        k_cmp: &k_cmp,
        v_cmp: &v_cmp,
        k_slc: &tensors["k_slc"],
        v_slc: &tensors["v_slc"],
        k_win: &tensors["k_win"],
        v_win: &tensors["v_win"],
        gate: &tensors["gate"],
    };
    let mut out = zeros(input.tokens * heads * value_dim);
    let saved = cpu::nsa_forward(&ready, &mut out)?;

    let mut results = Results::new(input);
    if input.backward {
        let mut grads = INPUTS.map(|name| match name {
            "k_cmp" => zeros(k_cmp.len()),
            "v_cmp" => zeros(v_cmp.len()),
            name => zeros(tensors[name].len()),
        });
        let [q, d_k_cmp, d_v_cmp, k_slc, v_slc, k_win, v_win, gate] = &mut grads;
        let (k_cmp, v_cmp) = (d_k_cmp, d_v_cmp);
        let into = cpu::NsaGrads { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
        cpu::nsa_backward(&ready, &saved, &tensors["d_out"], into)?;
        for (letter, compression) in [("k", &keys), ("v", &values)] {
            let d_rows = &mut grads[if letter == "k" { 1 } else { 2 }];
            let mut d_x = zeros(compression.x.len());
            let d_phi = compress_backward(input, &tensors, letter, compression, d_rows, &mut d_x)?;
            *d_rows = d_x;
            for (name, gradient) in d_phi {
                results.gradient(&name, Data::F32(gradient));
            }
        }
        for (name, gradient) in zip(INPUTS, grads) {
            results.gradient(name, E::data(gradient));
        }
    }
    results.forward(E::data(out), saved.indices, [saved.lse_cmp, saved.lse_slc, saved.lse_win]);
    Ok(results.tensors)
}

/// The float64 reference on inputs rounded to `E`; results are rounded to f32.
pub fn reference<E: Element>(input: &Input) -> anyhow::Result<Vec<Tensor>> {
    let widen = |x: Vec<E>| x.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<f64>>();
    let tensors: Tensors<f64> =
        input.read::<E>()?.into_iter().map(|(name, x)| (name, widen(x))).collect();
    let narrow = |x: Vec<f64>| Data::F32(x.into_iter().map(|x| x as f32).collect());
    let raw = float64::NsaInput {
        spec: &input.spec,
        dims: input.dims,
        cu_seqlens: &input.cu_seqlens,
        scale: 1.0 / (input.dims.key_dim as f64).sqrt(),
        q: &tensors["q"],
        k_cmp: &tensors["k_cmp"],
        v_cmp: &tensors["v_cmp"],
        k_slc: &tensors["k_slc"],
        v_slc: &tensors["v_slc"],
        k_win: &tensors["k_win"],
        v_win: &tensors["v_win"],
        gate: &tensors["gate"],
    };
    let [phi_k, phi_v] = ["k", "v"].map(|letter| {
        let get = |name: &str| &tensors[&phi_name(letter, name)][..];
        match input.spec.compressor {
            Compressor::Mean => float64::Phi::Mean,
            Compressor::Linear => float64::Phi::Linear { weight: get("weight"), pe: get("pe") },
            Compressor::Mlp => float64::Phi::Mlp {
                weight1: get("weight1"),
                bias1: get("bias1"),
                weight2: get("weight2"),
                bias2: get("bias2"),
                pe: get("pe"),
            },
        }
    });
    let operator = float64::OperatorInput { raw, phi_k, phi_v };
    let output = float64::operator_forward(&operator)?;

    let mut results = Results::new(input);
    if input.backward {
        let d = float64::operator_backward(&operator, &output, &tensors["d_out"])?;
        for (letter, d_phi) in [("k", d.phi_k), ("v", d.phi_v)] {
            let parts: Vec<(&str, Vec<f64>)> = match d_phi {
                float64::PhiGrads::Mean => Vec::new(),
                float64::PhiGrads::Linear { weight, pe } => zip(LINEAR, [weight, pe]).collect(),
                float64::PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe } => {
                    zip(MLP, [weight1, bias1, weight2, bias2, pe]).collect()
                }
            };
            for (name, x) in parts {
                results.gradient(&phi_name(letter, name), narrow(x));
            }
        }
        let d = d.raw;
        let grads = [d.q, d.k_cmp, d.v_cmp, d.k_slc, d.v_slc, d.k_win, d.v_win, d.gate];
        for (name, x) in zip(INPUTS, grads) {
            results.gradient(name, narrow(x));
        }
    }
    let lse = [output.cmp.lse, output.slc.lse, output.win.lse];
    results.forward(narrow(output.out), output.indices, lse);
    Ok(results.tensors)
}

/// A parameter of φ of the keys (`"k"`) or of the values (`"v"`).
pub fn phi_name(letter: &str, name: &str) -> String {
    format!("phi_{letter}_{name}")
}

/// Compression of the keys (`"k"`) or of the values (`"v"`).
fn compression<'a, E: Element>(
    input: &'a Input,
    tensors: &'a Tensors<E>,
    letter: &str,
) -> cpu::CompressInput<'a, E> {
    let get = |name: &str| &tensors[&phi_name(letter, name)][..];
    let Dims { kv_heads, key_dim, value_dim, .. } = input.dims;
    cpu::CompressInput {
        spec: &input.spec,
        cu_seqlens: &input.cu_seqlens,
        kv_heads,
        dim: if letter == "k" { key_dim } else { value_dim },
        x: &tensors[&format!("{letter}_cmp")],
        phi: match input.spec.compressor {
            Compressor::Mean => cpu::Phi::Mean,
            Compressor::Linear => cpu::Phi::Linear { weight: get("weight"), pe: get("pe") },
            Compressor::Mlp => cpu::Phi::Mlp {
                weight1: get("weight1"),
                bias1: get("bias1"),
                weight2: get("weight2"),
                bias2: get("bias2"),
                pe: get("pe"),
                hidden: input.hidden,
            },
        },
    }
}

/// Writes the gradient of the raw rows; returns those of φ's parameters by the parameters' names.
fn compress_backward<E: Element>(
    input: &Input,
    tensors: &Tensors<E>,
    letter: &str,
    compression: &cpu::CompressInput<E>,
    d_rows: &[E],
    d_x: &mut [E],
) -> anyhow::Result<Vec<(String, Vec<f32>)>> {
    let zeros = |name: &str| vec![0.0f32; tensors[&phi_name(letter, name)].len()];
    let named = |name: &str, x| (phi_name(letter, name), x);
    match input.spec.compressor {
        Compressor::Mean => {
            cpu::compress_backward(compression, d_rows, d_x, cpu::PhiGrads::Mean)?;
            Ok(Vec::new())
        }
        Compressor::Linear => {
            let mut grads = LINEAR.map(zeros);
            let [weight, pe] = &mut grads;
            let into = cpu::PhiGrads::Linear { weight, pe };
            cpu::compress_backward(compression, d_rows, d_x, into)?;
            Ok(zip(LINEAR, grads).map(|(name, x)| named(name, x)).collect())
        }
        Compressor::Mlp => {
            let mut grads = MLP.map(zeros);
            let [weight1, bias1, weight2, bias2, pe] = &mut grads;
            let into = cpu::PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe };
            cpu::compress_backward(compression, d_rows, d_x, into)?;
            Ok(zip(MLP, grads).map(|(name, x)| named(name, x)).collect())
        }
    }
}

/// Results with the names and shapes of the golden files.
pub struct Results<'a> {
    input: &'a Input,
    /// What there is so far.
    pub tensors: Vec<Tensor>,
}

impl<'a> Results<'a> {
    /// None yet.
    pub fn new(input: &'a Input) -> Self {
        Self { input, tensors: Vec::new() }
    }

    fn push(&mut self, name: &str, shape: Vec<usize>, data: Data) {
        self.tensors.push(Tensor { name: name.into(), shape, data });
    }

    /// The gradient of the input `name`.
    pub fn gradient(&mut self, name: &str, data: Data) {
        self.push(&format!("d_{name}"), self.input.shape(name), data);
    }

    /// What the forward pass gives.
    pub fn forward(&mut self, out: Data, indices: Vec<i32>, lse: [Vec<f64>; 3]) {
        let Dims { heads, kv_heads, value_dim, .. } = self.input.dims;
        let (tokens, count) = (self.input.tokens, self.input.spec.select_count);
        self.push("out", vec![tokens, heads, value_dim], out);
        self.push("indices", vec![tokens, kv_heads, count], Data::I32(indices));
        for (name, lse) in zip(["lse_cmp", "lse_slc", "lse_win"], lse) {
            let lse = lse.into_iter().map(|x| x as f32).collect();
            self.push(name, vec![tokens, heads], Data::F32(lse));
        }
    }
}
