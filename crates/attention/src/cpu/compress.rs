//! φ: blocks of l tokens become one key or value each (Eq. 7).

use std::ops::Range;

use rayon::prelude::*;

use super::disjoint::Disjoint;
use super::simd::{Gemm, add_scaled, dot, pad};
use crate::shape::{check_len, cu_compressed, sequences, total_tokens};
use crate::{Dims, Element, Error, MAX_HEAD_DIM, NsaSpec, Result};

/// The parameters of φ for keys (C = D) or values (C = V).
#[derive(Clone, Copy)]
pub enum Phi<'a, E> {
    /// Average of the block.
    Mean,
    /// `flatten(x + pe) · weight`.
    Linear {
        /// `[K, l·C, C]`.
        weight: &'a [E],
        /// `[K, l, C]`, added to the block's tokens.
        pe: &'a [E],
    },
    /// `gelu(flatten(x + pe) · weight1 + bias1) · weight2 + bias2`, exact GELU.
    Mlp {
        /// `[K, l·C, M]`.
        weight1: &'a [E],
        /// `[K, M]`.
        bias1: &'a [E],
        /// `[K, M, C]`.
        weight2: &'a [E],
        /// `[K, C]`.
        bias2: &'a [E],
        /// `[K, l, C]`.
        pe: &'a [E],
        /// Hidden width M.
        hidden: usize,
    },
}

/// Gradients of [`Phi`]'s parameters, f32, same layouts; overwritten.
pub enum PhiGrads<'a> {
    /// No parameters.
    Mean,
    /// See [`Phi::Linear`].
    Linear {
        /// `[K, l·C, C]`.
        weight: &'a mut [f32],
        /// `[K, l, C]`.
        pe: &'a mut [f32],
    },
    /// See [`Phi::Mlp`].
    Mlp {
        /// `[K, l·C, M]`.
        weight1: &'a mut [f32],
        /// `[K, M]`.
        bias1: &'a mut [f32],
        /// `[K, M, C]`.
        weight2: &'a mut [f32],
        /// `[K, C]`.
        bias2: &'a mut [f32],
        /// `[K, l, C]`.
        pe: &'a mut [f32],
    },
}

/// Inputs of compression.
#[derive(Clone, Copy)]
pub struct CompressInput<'a, E> {
    /// Block and stride.
    pub spec: &'a NsaSpec,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// KV heads (K).
    pub kv_heads: usize,
    /// C: D for keys, V for values.
    pub dim: usize,
    /// `[T, K, C]`.
    pub x: &'a [E],
    /// Parameters of φ.
    pub phi: Phi<'a, E>,
}

/// Blocks per task of the forward pass.
const BLOCKS: usize = 64;

impl<E: Element> CompressInput<'_, E> {
    fn check(&self) -> Result<(Vec<Range<usize>>, Vec<usize>)> {
        self.spec.validate()?;
        let (heads, dim, block) = (self.kv_heads, self.dim, self.spec.compress_block);
        Dims { heads, kv_heads: heads, key_dim: dim, value_dim: dim }.validate()?;
        let tokens = total_tokens(self.cu_seqlens);
        let sequences = sequences(self.cu_seqlens, tokens)?;
        check_len("x", self.x.len(), &[('T', tokens), ('K', heads), ('C', dim)])?;
        let wide = ('l', block * dim);
        match self.phi {
            Phi::Mean => {}
            Phi::Linear { weight, pe } => {
                check_len("phi weight", weight.len(), &[('K', heads), wide, ('C', dim)])?;
                check_len("phi pe", pe.len(), &[('K', heads), wide])?;
            }
            Phi::Mlp { weight1, bias1, weight2, bias2, pe, hidden } => {
                if hidden == 0 {
                    return Err(Error::Phi("the hidden width is 0, expected at least 1".into()));
                }
                check_len("phi weight1", weight1.len(), &[('K', heads), wide, ('M', hidden)])?;
                check_len("phi bias1", bias1.len(), &[('K', heads), ('M', hidden)])?;
                check_len(
                    "phi weight2",
                    weight2.len(),
                    &[('K', heads), ('M', hidden), ('C', dim)],
                )?;
                check_len("phi bias2", bias2.len(), &[('K', heads), ('C', dim)])?;
                check_len("phi pe", pe.len(), &[('K', heads), wide])?;
            }
        }
        let offsets = cu_compressed(self.spec, &sequences);
        Ok((sequences, offsets))
    }

    /// One head's tokens `range`, f32, `[tokens, C]`. Block i of them is the contiguous slice of
    /// l·C floats at i·d·C: blocks overlap, so flattening costs nothing.
    fn head(&self, head: usize, range: Range<usize>) -> Vec<f32> {
        let mut x = Vec::with_capacity(range.len() * self.dim);
        for t in range {
            let at = (t * self.kv_heads + head) * self.dim;
            x.extend(self.x[at..at + self.dim].iter().map(|x| x.to_f32()));
        }
        x
    }
}

/// Writes `out` `[N, K, C]`, sequences concatenated (see [`crate::cu_compressed`]).
pub fn compress_forward<E: Element>(input: &CompressInput<E>, out: &mut [E]) -> Result<()> {
    let (sequences, offsets) = input.check()?;
    let (heads, dim, spec) = (input.kv_heads, input.dim, input.spec);
    let count = offsets[sequences.len()];
    check_len("out", out.len(), &[('N', count), ('K', heads), ('C', dim)])?;
    let layers: Vec<Option<Phi32>> =
        (0..heads).into_par_iter().map(|head| Phi32::new(input, head)).collect();
    let mut work = Vec::new();
    for (sequence, blocks) in sequences.iter().zip(offsets.windows(2)) {
        for first in (0..blocks[1] - blocks[0]).step_by(BLOCKS) {
            let last = (first + BLOCKS).min(blocks[1] - blocks[0]);
            work.extend((0..heads).map(|head| (head, sequence.start, blocks[0], first..last)));
        }
    }
    let out = Disjoint::new(out);
    work.into_par_iter().with_max_len(1).for_each(|(head, token, base, blocks)| {
        let (stride, l) = (spec.compress_stride, spec.compress_block);
        let start = token + blocks.start * stride;
        let x = input.head(head, start..token + (blocks.end - 1) * stride + l);
        let y = match &layers[head] {
            None => mean(&x, blocks.len(), stride * dim, l, dim),
            Some(phi) => phi.forward(&x, blocks.len(), stride * dim).out,
        };
        for (i, y) in blocks.zip(y.chunks_exact(pad(dim))) {
            // SAFETY: each (block, head) belongs to exactly one task.
            let target = unsafe { out.row(((base + i) * heads + head) * dim, dim) };
            for (target, y) in target.iter_mut().zip(y) {
                *target = E::from_f32(*y);
            }
        }
    });
    Ok(())
}

/// From `d_out` `[N, K, C]`: `d_x` `[T, K, C]` (overwritten) and the parameters' gradients.
pub fn compress_backward<E: Element>(
    input: &CompressInput<E>,
    d_out: &[E],
    d_x: &mut [E],
    d_phi: PhiGrads,
) -> Result<()> {
    let (sequences, offsets) = input.check()?;
    let (heads, dim, spec) = (input.kv_heads, input.dim, input.spec);
    let count = offsets[sequences.len()];
    check_len("d_out", d_out.len(), &[('N', count), ('K', heads), ('C', dim)])?;
    check_len("d_x", d_x.len(), &[('n', input.x.len())])?;
    let d_heads = split_heads(input, d_phi)?;
    let target = Disjoint::new(d_x);
    d_heads.into_par_iter().enumerate().with_max_len(1).for_each(|(head, mut d_phi)| {
        let phi = Phi32::new(input, head);
        let (stride, l) = (spec.compress_stride, spec.compress_block);
        for (sequence, blocks) in sequences.iter().zip(offsets.windows(2)) {
            let count = blocks[1] - blocks[0];
            let mut dy = vec![0.0; count * pad(dim)];
            for (i, row) in dy.chunks_exact_mut(pad(dim)).enumerate() {
                let at = ((blocks[0] + i) * heads + head) * dim;
                for (y, d) in row.iter_mut().zip(&d_out[at..at + dim]) {
                    *y = d.to_f32();
                }
            }
            let d_blocks = phi.as_ref().map(|phi| {
                let x = input.head(head, sequence.clone());
                phi.backward(&x, count, stride * dim, &dy, &mut d_phi)
            });
            for t in 0..sequence.len() {
                // SAFETY: each (token, head) is written here alone.
                let row = unsafe { target.row(((sequence.start + t) * heads + head) * dim, dim) };
                let covering =
                    (t + 1).saturating_sub(l).div_ceil(stride)..(t / stride + 1).min(count);
                let mut sum = [0.0; MAX_HEAD_DIM];
                for i in covering {
                    match &d_blocks {
                        None => {
                            add_scaled(&dy[i * pad(dim)..][..dim], 1.0 / l as f32, &mut sum[..dim])
                        }
                        Some(d) => {
                            let at = i * pad(l * dim) + (t - i * stride) * dim;
                            add_scaled(&d[at..at + dim], 1.0, &mut sum[..dim]);
                        }
                    }
                }
                for (y, x) in row.iter_mut().zip(sum) {
                    *y = E::from_f32(x);
                }
            }
        }
    });
    Ok(())
}

/// Averages of `blocks` blocks of l tokens, `[blocks, pad(C)]`.
fn mean(x: &[f32], blocks: usize, row: usize, l: usize, dim: usize) -> Vec<f32> {
    let mut out = vec![0.0; blocks * pad(dim)];
    for (i, out) in out.chunks_exact_mut(pad(dim)).enumerate() {
        for token in x[i * row..].chunks_exact(dim).take(l) {
            add_scaled(token, 1.0, &mut out[..dim]);
        }
        for y in out.iter_mut() {
            *y /= l as f32;
        }
    }
    out
}

/// The gradients of one head's φ, zeroed; empty where φ has no such tensor.
#[derive(Default)]
struct HeadGrads<'a> {
    layers: Vec<LayerGrads<'a>>,
    pe: &'a mut [f32],
}

struct LayerGrads<'a> {
    weight: &'a mut [f32],
    bias: &'a mut [f32],
}

/// Cuts the parameters' gradients by head.
fn split_heads<'a, E: Element>(
    input: &CompressInput<E>,
    grads: PhiGrads<'a>,
) -> Result<Vec<HeadGrads<'a>>> {
    let (heads, dim) = (input.kv_heads, input.dim);
    let wide = input.spec.compress_block * dim;
    let cut = |name, slice: &'a mut [f32], size: usize| -> Result<Vec<&'a mut [f32]>> {
        check_len(name, slice.len(), &[('K', heads), ('n', size)])?;
        slice.fill(0.0);
        Ok(slice.chunks_exact_mut(size).collect())
    };
    let join = |pe: Vec<&'a mut [f32]>, layers: Vec<[Vec<&'a mut [f32]>; 2]>| {
        let mut heads: Vec<HeadGrads<'a>> =
            pe.into_iter().map(|pe| HeadGrads { layers: Vec::new(), pe }).collect();
        for [weight, bias] in layers {
            let bias = bias.into_iter().chain(std::iter::repeat_with(|| &mut [][..]));
            for ((head, weight), bias) in heads.iter_mut().zip(weight).zip(bias) {
                head.layers.push(LayerGrads { weight, bias });
            }
        }
        heads
    };
    match (input.phi, grads) {
        (Phi::Mean, PhiGrads::Mean) => Ok((0..heads).map(|_| HeadGrads::default()).collect()),
        (Phi::Linear { .. }, PhiGrads::Linear { weight, pe }) => {
            let weight = cut("d phi weight", weight, wide * dim)?;
            Ok(join(cut("d phi pe", pe, wide)?, vec![[weight, Vec::new()]]))
        }
        (Phi::Mlp { hidden, .. }, PhiGrads::Mlp { weight1, bias1, weight2, bias2, pe }) => {
            let first =
                [cut("d phi weight1", weight1, wide * hidden)?, cut("d phi bias1", bias1, hidden)?];
            let second =
                [cut("d phi weight2", weight2, hidden * dim)?, cut("d phi bias2", bias2, dim)?];
            Ok(join(cut("d phi pe", pe, wide)?, vec![first, second]))
        }
        _ => Err(Error::Phi("gradients of another kind of compressor than the input's".into())),
    }
}

/// One head's φ with parameters, f32: a layer, or two with a GELU between.
struct Phi32 {
    layers: Vec<Layer>,
    /// `[l·C]`.
    pe: Vec<f32>,
}

/// What [`Phi32::forward`] computed.
struct Forward {
    /// Before the GELU, `[blocks, pad(M)]`; empty with one layer.
    hidden: Vec<f32>,
    /// `[blocks, pad(C)]`.
    out: Vec<f32>,
}

impl Phi32 {
    fn new<E: Element>(input: &CompressInput<E>, head: usize) -> Option<Self> {
        let dim = input.dim;
        let wide = input.spec.compress_block * dim;
        let of = |slice: &[E], size: usize| -> Vec<f32> {
            slice[head * size..(head + 1) * size].iter().map(|x| x.to_f32()).collect()
        };
        match input.phi {
            Phi::Mean => None,
            Phi::Linear { weight, pe } => {
                let layer = Layer::new(&of(weight, wide * dim), vec![0.0; dim], wide);
                Some(Self { layers: vec![layer], pe: of(pe, wide) })
            }
            Phi::Mlp { weight1, bias1, weight2, bias2, pe, hidden } => {
                let first = Layer::new(&of(weight1, wide * hidden), of(bias1, hidden), wide);
                let second = Layer::new(&of(weight2, hidden * dim), of(bias2, dim), hidden);
                Some(Self { layers: vec![first, second], pe: of(pe, wide) })
            }
        }
    }

    /// `x` holds the blocks, `row` floats apart.
    fn forward(&self, x: &[f32], blocks: usize, row: usize) -> Forward {
        let mut shift = self.layers[0].forward(&self.pe, 1, 0, &vec![0.0; self.layers[0].outputs]);
        // The position encoding is the same for every block: it joins the bias.
        for (y, b) in shift.iter_mut().zip(&self.layers[0].bias) {
            *y += b;
        }
        let first = self.layers[0].forward(x, blocks, row, &shift);
        match self.layers.get(1) {
            None => Forward { hidden: Vec::new(), out: first },
            Some(second) => {
                let active: Vec<f32> = first.iter().map(|&z| gelu(z)).collect();
                let out = second.forward(&active, blocks, second.input_width, &second.bias);
                Forward { hidden: first, out }
            }
        }
    }

    /// Adds to the parameters' gradients; returns the gradient of the flattened blocks,
    /// `[blocks, pad(l·C)]`.
    fn backward(
        &self,
        x: &[f32],
        blocks: usize,
        row: usize,
        dy: &[f32],
        grads: &mut HeadGrads,
    ) -> Vec<f32> {
        let mut d_first = dy.to_vec();
        if let [_, second] = &self.layers[..] {
            let hidden = self.forward(x, blocks, row).hidden;
            let active: Vec<f32> = hidden.iter().map(|&z| gelu(z)).collect();
            second.add_grads(&active, blocks, second.input_width, dy, &mut grads.layers[1]);
            d_first = second.backward(blocks, dy);
            for (d, z) in d_first.iter_mut().zip(hidden) {
                *d *= gelu_slope(z);
            }
        }
        let first = &self.layers[0];
        let columns = first.add_grads(x, blocks, row, &d_first, &mut grads.layers[0]);
        // pe is added to every block: dW += pe ⊗ Σ dz, dpe += W · Σ dz.
        for (i, pe) in self.pe.iter().enumerate() {
            let d_weight = &mut grads.layers[0].weight[i * first.outputs..][..first.outputs];
            add_scaled(&columns[..first.outputs], *pe, d_weight);
            let width = pad(first.outputs);
            grads.pe[i] +=
                dot(&first.weight[i * width..][..first.outputs], &columns[..first.outputs]);
        }
        first.backward(blocks, &d_first)
    }
}

/// `y = x·W + b`, one head, f32.
struct Layer {
    inputs: usize,
    outputs: usize,
    /// `pad(inputs)`.
    input_width: usize,
    /// `[inputs, pad(outputs)]`.
    weight: Vec<f32>,
    /// `[outputs]`.
    bias: Vec<f32>,
}

impl Layer {
    fn new(weight: &[f32], bias: Vec<f32>, inputs: usize) -> Self {
        let outputs = bias.len();
        let mut padded = vec![0.0; inputs * pad(outputs)];
        for (to, from) in padded.chunks_exact_mut(pad(outputs)).zip(weight.chunks_exact(outputs)) {
            to[..outputs].copy_from_slice(from);
        }
        Self { inputs, outputs, input_width: pad(inputs), weight: padded, bias }
    }

    /// `[rows, pad(outputs)]`; `bias` replaces the layer's own.
    fn forward(&self, x: &[f32], rows: usize, row: usize, bias: &[f32]) -> Vec<f32> {
        let width = pad(self.outputs);
        let mut y = vec![0.0; rows * width];
        for y in y.chunks_exact_mut(width) {
            y[..self.outputs].copy_from_slice(&bias[..self.outputs]);
        }
        Gemm {
            m: rows,
            n: width,
            k: self.inputs,
            a: x,
            a_row: row,
            a_step: 1,
            b: &self.weight,
            b_row: width,
            c_row: width,
            a_rows: None,
            c_rows: None,
            accumulate: true,
        }
        .run(&mut y);
        y
    }

    /// dW += xᵀ·dy and db += Σ dy, which is returned, `[pad(outputs)]`.
    fn add_grads(
        &self,
        x: &[f32],
        rows: usize,
        row: usize,
        dy: &[f32],
        to: &mut LayerGrads,
    ) -> Vec<f32> {
        let width = pad(self.outputs);
        let mut d_weight = vec![0.0; self.inputs * width];
        Gemm {
            m: self.inputs,
            n: width,
            k: rows,
            a: x,
            a_row: 1,
            a_step: row,
            b: dy,
            b_row: width,
            c_row: width,
            a_rows: None,
            c_rows: None,
            accumulate: false,
        }
        .run(&mut d_weight);
        let pairs = to.weight.chunks_exact_mut(self.outputs).zip(d_weight.chunks_exact(width));
        pairs.for_each(|(to, from)| add_scaled(&from[..self.outputs], 1.0, to));
        let mut columns = vec![0.0; width];
        dy.chunks_exact(width).for_each(|dy| add_scaled(dy, 1.0, &mut columns));
        for (b, d) in to.bias.iter_mut().zip(&columns) {
            *b += d;
        }
        columns
    }

    /// dx = dy·Wᵀ, `[rows, pad(inputs)]`.
    fn backward(&self, rows: usize, dy: &[f32]) -> Vec<f32> {
        let (width, in_width) = (pad(self.outputs), self.input_width);
        let mut transposed = vec![0.0; self.outputs * in_width];
        for i in 0..self.inputs {
            for o in 0..self.outputs {
                transposed[o * in_width + i] = self.weight[i * width + o];
            }
        }
        let mut dx = vec![0.0; rows * in_width];
        Gemm {
            m: rows,
            n: in_width,
            k: self.outputs,
            a: dy,
            a_row: width,
            a_step: 1,
            b: &transposed,
            b_row: in_width,
            c_row: in_width,
            a_rows: None,
            c_rows: None,
            accumulate: false,
        }
        .run(&mut dx);
        dx
    }
}

/// x·Φ(x), exact.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// d gelu/dx = Φ(x) + x·φ(x).
fn gelu_slope(x: f32) -> f32 {
    const INV_SQRT_TAU: f32 = 0.398_942_3;
    0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
        + x * INV_SQRT_TAU * (-0.5 * x * x).exp()
}
