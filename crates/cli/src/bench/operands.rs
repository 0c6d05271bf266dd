//! The tensors a benchmark of the operator works on: random, from a seed.

use tercet_attention::cpu::{
    AttendInput, CompressInput, NsaInput, Phi, PhiGrads, compress_backward, compress_forward,
};
use tercet_attention::{Compressor, Dims, Element, NsaSpec, Result};

/// Inputs of one length. The three branches share one K and one V: what they cost does not
/// depend on the values, and the memory of the longest length is what limits a machine.
pub struct Operands<E> {
    /// Heads and dimensions.
    pub dims: Dims,
    /// The sparse operator's spec.
    pub spec: NsaSpec,
    /// Tokens of the one sequence (T).
    pub tokens: usize,
    /// Queries `[T, H, D]`.
    pub q: Vec<E>,
    /// Keys `[T, K, D]`.
    pub k: Vec<E>,
    /// Values `[T, K, V]`.
    pub v: Vec<E>,
    /// Gates `[T, H, 3]`, in 0..1.
    pub gate: Vec<E>,
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: Vec<E>,
    /// Compressed values `[N, K, V]`.
    pub v_cmp: Vec<E>,
    k_phi: PhiTensors<E>,
    v_phi: PhiTensors<E>,
    cu_seqlens: [i32; 2],
}

struct PhiTensors<E> {
    kind: Compressor,
    hidden: usize,
    weight1: Vec<E>,
    bias1: Vec<E>,
    weight2: Vec<E>,
    bias2: Vec<E>,
    pe: Vec<E>,
}

impl<E: Element> Operands<E> {
    /// Random operands; the same seed gives the same numbers everywhere.
    pub fn new(dims: Dims, spec: &NsaSpec, tokens: usize, seed: u64) -> Result<Self> {
        let mut random = Random(seed);
        let Dims { heads, kv_heads, key_dim, value_dim } = dims;
        let q = random.numbers(tokens * heads * key_dim);
        let k = random.numbers(tokens * kv_heads * key_dim);
        let v = random.numbers(tokens * kv_heads * value_dim);
        let gate = (0..tokens * heads * 3).map(|_| E::from_f32(random.unit())).collect();
        let k_phi = PhiTensors::new(spec, kv_heads, key_dim, &mut random);
        let v_phi = PhiTensors::new(spec, kv_heads, value_dim, &mut random);
        let blocks = spec.compressed_blocks(tokens);
        let mut all = Self {
            dims,
            spec: spec.clone(),
            tokens,
            q,
            k,
            v,
            gate,
            k_cmp: vec![E::default(); blocks * kv_heads * key_dim],
            v_cmp: vec![E::default(); blocks * kv_heads * value_dim],
            k_phi,
            v_phi,
            cu_seqlens: [0, tokens as i32],
        };
        let (mut k_cmp, mut v_cmp) = (all.k_cmp.clone(), all.v_cmp.clone());
        all.compress(&mut k_cmp, &mut v_cmp)?;
        (all.k_cmp, all.v_cmp) = (k_cmp, v_cmp);
        Ok(all)
    }

    /// Compresses keys and values, as the whole operator's first step does.
    pub fn compress(&self, k_cmp: &mut [E], v_cmp: &mut [E]) -> Result<()> {
        compress_forward(&self.keys(), k_cmp)?;
        compress_forward(&self.values(), v_cmp)
    }

    /// Backward of [`Operands::compress`]: gradients of keys and values `[T, K, _]` from those of
    /// the compressed ones; the parameters' go into `phi`.
    pub fn compress_backward(
        &self,
        (d_k_cmp, d_v_cmp): (&[E], &[E]),
        (d_k, d_v): (&mut [E], &mut [E]),
        phi: &mut [PhiGradients; 2],
    ) -> Result<()> {
        let [k_phi, v_phi] = phi;
        compress_backward(&self.keys(), d_k_cmp, d_k, k_phi.borrow())?;
        compress_backward(&self.values(), d_v_cmp, d_v, v_phi.borrow())
    }

    /// Room for the gradients of φ's parameters, of keys and of values.
    pub fn phi_gradients(&self) -> [PhiGradients; 2] {
        [PhiGradients::like(&self.k_phi), PhiGradients::like(&self.v_phi)]
    }

    /// Compression of the keys.
    pub fn keys(&self) -> CompressInput<'_, E> {
        self.compression(self.dims.key_dim, &self.k, self.k_phi.borrow())
    }

    /// Compression of the values.
    pub fn values(&self) -> CompressInput<'_, E> {
        self.compression(self.dims.value_dim, &self.v, self.v_phi.borrow())
    }

    fn compression<'a>(&'a self, dim: usize, x: &'a [E], phi: Phi<'a, E>) -> CompressInput<'a, E> {
        let (spec, cu_seqlens, kv_heads) = (&self.spec, &self.cu_seqlens, self.dims.kv_heads);
        CompressInput { spec, cu_seqlens, kv_heads, dim, x, phi }
    }

    /// Input of the sparse operator, with the compressed keys and values ready.
    pub fn nsa(&self) -> NsaInput<'_, E> {
        NsaInput {
            spec: &self.spec,
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: self.dims.scale(),
            q: &self.q,
            k_cmp: &self.k_cmp,
            v_cmp: &self.v_cmp,
            k_slc: &self.k,
            v_slc: &self.v,
            k_win: &self.k,
            v_win: &self.v,
            gate: &self.gate,
        }
    }

    /// Input of dense attention over the same tensors.
    pub fn dense(&self) -> AttendInput<'_, E> {
        AttendInput {
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: self.dims.scale(),
            q: &self.q,
            k: &self.k,
            v: &self.v,
        }
    }

    /// A gradient of the output, `[T, H, V]`.
    pub fn d_out(&self) -> Vec<E> {
        Random(self.tokens as u64).numbers(self.tokens * self.dims.heads * self.dims.value_dim)
    }

    /// FLOPs of compressing keys and values.
    pub fn compress_flops(&self) -> f64 {
        compress_flops(self.dims, &self.spec, self.tokens)
    }
}

/// FLOPs of compressing keys and values.
pub fn compress_flops(dims: Dims, spec: &NsaSpec, tokens: usize) -> f64 {
    let Dims { kv_heads, key_dim, value_dim, .. } = dims;
    let (blocks, l) = (spec.compressed_blocks(tokens), spec.compress_block);
    let per_channel = |c: usize| match spec.compressor {
        Compressor::Mean => l,
        Compressor::Linear => 2 * l * c,
        Compressor::Mlp => 2 * l * c + 2 * c,
    };
    let channels = key_dim * per_channel(key_dim) + value_dim * per_channel(value_dim);
    (blocks * kv_heads * channels) as f64
}

impl<E: Element> PhiTensors<E> {
    /// Parameters of φ for C = `dim`; the hidden width of an MLP is C.
    fn new(spec: &NsaSpec, kv_heads: usize, dim: usize, random: &mut Random) -> Self {
        let (l, kind) = (spec.compress_block, spec.compressor);
        let mut some = |n: usize, when: bool| random.numbers(if when { n } else { 0 });
        let (any, mlp) = (kind != Compressor::Mean, kind == Compressor::Mlp);
        Self {
            kind,
            hidden: dim,
            weight1: some(kv_heads * l * dim * dim, any),
            bias1: some(kv_heads * dim, mlp),
            weight2: some(kv_heads * dim * dim, mlp),
            bias2: some(kv_heads * dim, mlp),
            pe: some(kv_heads * l * dim, any),
        }
    }

    fn borrow(&self) -> Phi<'_, E> {
        let Self { weight1, bias1, weight2, bias2, pe, hidden, .. } = self;
        match self.kind {
            Compressor::Mean => Phi::Mean,
            Compressor::Linear => Phi::Linear { weight: weight1, pe },
            Compressor::Mlp => Phi::Mlp { weight1, bias1, weight2, bias2, pe, hidden: *hidden },
        }
    }
}

/// Gradients of φ's parameters.
pub struct PhiGradients {
    kind: Compressor,
    weight1: Vec<f32>,
    bias1: Vec<f32>,
    weight2: Vec<f32>,
    bias2: Vec<f32>,
    pe: Vec<f32>,
}

impl PhiGradients {
    fn like<E: Element>(phi: &PhiTensors<E>) -> Self {
        let zeros = |x: &Vec<E>| vec![0.0; x.len()];
        Self {
            kind: phi.kind,
            weight1: zeros(&phi.weight1),
            bias1: zeros(&phi.bias1),
            weight2: zeros(&phi.weight2),
            bias2: zeros(&phi.bias2),
            pe: zeros(&phi.pe),
        }
    }

    fn borrow(&mut self) -> PhiGrads<'_> {
        let Self { kind, weight1, bias1, weight2, bias2, pe } = self;
        match kind {
            Compressor::Mean => PhiGrads::Mean,
            Compressor::Linear => PhiGrads::Linear { weight: weight1, pe },
            Compressor::Mlp => PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe },
        }
    }
}

/// SplitMix64: enough randomness for a benchmark, in four lines.
pub struct Random(pub u64);

impl Random {
    /// Uniform in 0..1.
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Mean 0, variance 1 (a sum of three uniforms is normal enough for softmax to be real).
    pub fn numbers<E: Element>(&mut self, n: usize) -> Vec<E> {
        (0..n).map(|_| E::from_f32((self.unit() + self.unit() + self.unit() - 1.5) * 2.0)).collect()
    }
}
