//! An operator call with its inputs: read from a golden file, or random from a seed.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::{Compressor, Dims, Element, NsaSpec};

/// The inputs that every case has, in the golden files' names.
pub const INPUTS: [&str; 8] = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"];

/// One call of the operator. Tensors go by the golden files' names; `k_cmp` and `v_cmp` are raw.
#[derive(Clone, Debug)]
pub struct Case {
    /// The sparse operator's spec.
    pub spec: NsaSpec,
    /// Heads and dimensions.
    pub dims: Dims,
    /// Offsets of the sequences, B+1.
    pub cu_seqlens: Vec<i32>,
    /// Inputs, φ's parameters and perhaps `d_out`.
    pub tensors: BTreeMap<String, Vec<f32>>,
}

impl Case {
    /// Tokens of all sequences (T).
    pub fn tokens(&self) -> usize {
        self.cu_seqlens.last().map_or(0, |&end| end as usize)
    }

    /// The rows of each sequence; none where `cu_seqlens` lies.
    pub fn sequences(&self) -> Vec<Range<usize>> {
        crate::sequences(&self.cu_seqlens, self.tokens()).unwrap_or_default()
    }

    /// Compressed blocks of all sequences (N).
    pub fn compressed_rows(&self) -> usize {
        self.sequences().iter().map(|s| self.spec.compressed_blocks(s.len())).sum()
    }

    /// Hidden width of an mlp φ of the keys (`"k"`) or the values (`"v"`); 0 without one.
    pub fn hidden(&self, letter: &str) -> usize {
        let bias = self.tensors.get(&format!("phi_{letter}_bias1"));
        bias.map_or(0, |bias| bias.len() / self.dims.kv_heads.max(1))
    }

    /// A tensor by its name.
    pub fn get(&self, name: &str) -> &[f32] {
        &self.tensors[name]
    }

    /// See [`Case::get`]; empty when there is none.
    pub fn get_mut(&mut self, name: &str) -> &mut Vec<f32> {
        self.tensors.entry(name.to_string()).or_default()
    }

    /// The names of φ's tensors in this case.
    pub fn phi_names(&self) -> Vec<String> {
        self.tensors.keys().filter(|name| name.starts_with("phi_")).cloned().collect()
    }

    /// Multiplies a tensor.
    pub fn scaled(mut self, name: &str, factor: f32) -> Self {
        self.get_mut(name).iter_mut().for_each(|x| *x *= factor);
        self
    }

    /// The same case without a backward pass.
    pub fn forward_only(mut self) -> Self {
        self.tensors.remove("d_out");
        self
    }

    /// The same case with its inputs rounded to `E`.
    pub fn rounded<E: Element>(&self) -> Self {
        let mut case = self.clone();
        for x in case.tensors.values_mut().flatten() {
            *x = E::from_f32(*x).to_f32();
        }
        case
    }

    /// Rows `from..to` of all sequences together, as one sequence.
    pub fn rows(&self, from: usize, to: usize) -> Self {
        let tokens = self.tokens();
        let mut case = self.clone();
        case.cu_seqlens = vec![0, (to - from) as i32];
        for (name, x) in &mut case.tensors {
            if !name.starts_with("phi_") {
                let width = self.tensors[name].len() / tokens.max(1);
                *x = x[from * width..to * width].to_vec();
            }
        }
        case
    }

    /// Sequence `b` alone.
    pub fn sequence(&self, b: usize) -> Self {
        self.rows(self.cu_seqlens[b] as usize, self.cu_seqlens[b + 1] as usize)
    }

    /// Normal queries, keys, values and output gradients; gates in 0…1; a random φ.
    pub fn random(spec: &NsaSpec, dims: Dims, lengths: &[usize], seed: u64) -> Self {
        let mut random = Random(seed);
        let mut cu_seqlens = vec![0];
        cu_seqlens.extend(lengths.iter().scan(0, |at, n| {
            *at += *n as i32;
            Some(*at)
        }));
        let tokens: usize = lengths.iter().sum();
        let Dims { heads, kv_heads, key_dim, value_dim } = dims;
        let mut tensors = BTreeMap::new();
        for (name, width) in [
            ("q", heads * key_dim),
            ("k_cmp", kv_heads * key_dim),
            ("v_cmp", kv_heads * value_dim),
            ("k_slc", kv_heads * key_dim),
            ("v_slc", kv_heads * value_dim),
            ("k_win", kv_heads * key_dim),
            ("v_win", kv_heads * value_dim),
            ("d_out", heads * value_dim),
        ] {
            tensors.insert(name.to_string(), random.normals(tokens * width, 1.0));
        }
        let gate = (0..tokens * heads * 3).map(|_| random.uniform() as f32).collect();
        tensors.insert("gate".into(), gate);
        for (letter, c) in [("k", key_dim), ("v", value_dim)] {
            let n = spec.compress_block * c;
            let hidden = HIDDEN;
            let mut add = |name: &str, len: usize, deviation: f64| {
                tensors.insert(
                    format!("phi_{letter}_{name}"),
                    random.normals(kv_heads * len, deviation),
                );
            };
            match spec.compressor {
                Compressor::Mean => {}
                Compressor::Linear => {
                    add("weight", n * c, (n as f64).powf(-0.5));
                    add("pe", n, 0.5);
                }
                Compressor::Mlp => {
                    add("weight1", n * hidden, 2.0 * (n as f64).powf(-0.5));
                    add("bias1", hidden, 0.3);
                    add("weight2", hidden * c, (hidden as f64).powf(-0.5));
                    add("bias2", c, 0.3);
                    add("pe", n, 0.5);
                }
            }
        }
        Self { spec: spec.clone(), dims, cu_seqlens, tensors }
    }
}

/// Hidden width of the random cases' mlp.
pub const HIDDEN: usize = 6;

/// A spec by its numbers: l, d, l', n, w; one initial and two local blocks.
pub fn spec(numbers: [usize; 5], compressor: Compressor) -> NsaSpec {
    let [compress_block, compress_stride, select_block, select_count, window] = numbers;
    NsaSpec {
        compress_block,
        compress_stride,
        select_block,
        select_count,
        window,
        compressor,
        ..NsaSpec::default()
    }
}

/// H, K, D, V.
pub fn dims(heads: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Dims {
    Dims { heads, kv_heads, key_dim, value_dim }
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    #[expect(clippy::should_implement_trait, reason = "an endless source is no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Normal numbers of mean 0.
    pub fn normals(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        let normal = |_| {
            let radius = (-2.0 * self.uniform().ln()).sqrt();
            (deviation * radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
        };
        (0..count).map(normal).collect()
    }
}
