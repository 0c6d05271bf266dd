//! Eq. 7: φ turns the block of tokens `[i·d, i·d + l)` into one key (and one value).

use super::{add_scaled, dot, ranges};
use crate::shape::check_len;
use crate::{Dims, Error, NsaSpec, Result, cu_compressed};

/// The parameters of φ for keys (C = D) or values (C = V).
#[derive(Clone, Copy, Debug)]
pub enum Phi<'a> {
    /// Average of the block.
    Mean,
    /// `flatten(x + pe) · weight`.
    Linear {
        /// `[K, l·C, C]`.
        weight: &'a [f64],
        /// `[K, l, C]`.
        pe: &'a [f64],
    },
    /// `gelu(flatten(x + pe) · weight1 + bias1) · weight2 + bias2`, exact GELU.
    Mlp {
        /// `[K, l·C, M]`.
        weight1: &'a [f64],
        /// `[K, M]`.
        bias1: &'a [f64],
        /// `[K, M, C]`.
        weight2: &'a [f64],
        /// `[K, C]`.
        bias2: &'a [f64],
        /// `[K, l, C]`.
        pe: &'a [f64],
    },
}

/// Gradients of [`Phi`]'s parameters, same layouts.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of Phi")]
pub enum PhiGrads {
    /// No parameters.
    Mean,
    /// See [`Phi::Linear`].
    Linear { weight: Vec<f64>, pe: Vec<f64> },
    /// See [`Phi::Mlp`].
    Mlp { weight1: Vec<f64>, bias1: Vec<f64>, weight2: Vec<f64>, bias2: Vec<f64>, pe: Vec<f64> },
}

/// Inputs of compression.
#[derive(Clone, Copy)]
pub struct CompressInput<'a> {
    /// Block and stride.
    pub spec: &'a NsaSpec,
    /// Sequence offsets, B+1.
    pub cu_seqlens: &'a [i32],
    /// KV heads (K).
    pub kv_heads: usize,
    /// C: D for keys, V for values.
    pub dim: usize,
    /// `[T, K, C]`.
    pub x: &'a [f64],
    /// Parameters of φ.
    pub phi: Phi<'a>,
}

/// Returns `[N, K, C]`, the sequences' blocks concatenated (see [`crate::cu_compressed`]).
pub fn compress_forward(input: &CompressInput) -> Result<Vec<f64>> {
    let starts = check(input)?;
    let mut out = Vec::with_capacity(starts.len() * input.kv_heads * input.dim);
    for &start in &starts {
        for h in 0..input.kv_heads {
            out.extend(phi(input, h, &block(input, start, h)).1);
        }
    }
    Ok(out)
}

/// From `d_out` `[N, K, C]`: the gradients of x, `[T, K, C]`, and of φ's parameters.
pub fn compress_backward(input: &CompressInput, d_out: &[f64]) -> Result<(Vec<f64>, PhiGrads)> {
    let starts = check(input)?;
    let CompressInput { kv_heads, dim, .. } = *input;
    check_len("d_out", d_out.len(), &[('N', starts.len()), ('K', kv_heads), ('C', dim)])?;
    let mut d_x = vec![0.0; input.x.len()];
    let mut d_phi = zero_grads(&input.phi);
    for (i, &start) in starts.iter().enumerate() {
        for h in 0..kv_heads {
            let d_y = &d_out[(i * kv_heads + h) * dim..][..dim];
            let d_block = phi_backward(input, h, &block(input, start, h), d_y, &mut d_phi);
            for (o, d_row) in d_block.chunks(dim).enumerate() {
                add_scaled(&mut d_x[((start + o) * kv_heads + h) * dim..][..dim], 1.0, d_row);
            }
        }
    }
    Ok((d_x, d_phi))
}

/// Checks everything; returns the first token of each block.
fn check(input: &CompressInput) -> Result<Vec<usize>> {
    let CompressInput { spec, kv_heads, dim, .. } = *input;
    spec.validate()?;
    Dims { heads: kv_heads, kv_heads, key_dim: dim, value_dim: dim }.validate()?;
    let sequences = ranges(input.cu_seqlens)?;
    let tokens = sequences.last().map_or(0, |s| s.end);
    check_len("x", input.x.len(), &[('T', tokens), ('K', kv_heads), ('C', dim)])?;
    let (k, l, c) = (('K', kv_heads), ('l', spec.compress_block), ('C', dim));
    match input.phi {
        Phi::Mean => {}
        Phi::Linear { weight, pe } => {
            check_len("phi weight", weight.len(), &[k, l, c, c])?;
            check_len("phi pe", pe.len(), &[k, l, c])?;
        }
        Phi::Mlp { weight1, bias1, weight2, bias2, pe } => {
            let m = ('M', bias1.len() / kv_heads);
            if m.1 == 0 {
                return Err(Error::Phi("the hidden layer of the mlp has no units".into()));
            }
            check_len("phi bias1", bias1.len(), &[k, m])?;
            check_len("phi weight1", weight1.len(), &[k, l, c, m])?;
            check_len("phi weight2", weight2.len(), &[k, m, c])?;
            check_len("phi bias2", bias2.len(), &[k, c])?;
            check_len("phi pe", pe.len(), &[k, l, c])?;
        }
    }
    let counts = cu_compressed(spec, &sequences);
    Ok((sequences.iter().zip(counts.windows(2)))
        .flat_map(|(s, n)| (0..n[1] - n[0]).map(|i| s.start + i * spec.compress_stride))
        .collect())
}

/// The block that starts at token `start`, with its intra-block position encoding: `[l, C]`.
fn block(input: &CompressInput, start: usize, h: usize) -> Vec<f64> {
    let CompressInput { kv_heads, dim, x, .. } = *input;
    let l = input.spec.compress_block;
    let mut block: Vec<f64> =
        (start..start + l).flat_map(|t| &x[(t * kv_heads + h) * dim..][..dim]).copied().collect();
    match input.phi {
        Phi::Mean => {}
        Phi::Linear { pe, .. } | Phi::Mlp { pe, .. } => {
            add_scaled(&mut block, 1.0, head(pe, h, l * dim));
        }
    }
    block
}

/// φ of one block: its hidden layer before the GELU (empty if there is none) and its result.
fn phi(input: &CompressInput, h: usize, block: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let dim = input.dim;
    match input.phi {
        Phi::Mean => {
            let l = input.spec.compress_block;
            let mean = |c| block.iter().skip(c).step_by(dim).sum::<f64>() / l as f64;
            (Vec::new(), (0..dim).map(mean).collect())
        }
        Phi::Linear { weight, .. } => {
            (Vec::new(), row_times_matrix(block, head(weight, h, block.len() * dim), dim))
        }
        Phi::Mlp { weight1, bias1, weight2, bias2, .. } => {
            let m = bias1.len() / input.kv_heads;
            let mut hidden = row_times_matrix(block, head(weight1, h, block.len() * m), m);
            add_scaled(&mut hidden, 1.0, head(bias1, h, m));
            let active: Vec<f64> = hidden.iter().map(|&z| gelu(z)).collect();
            let mut y = row_times_matrix(&active, head(weight2, h, m * dim), dim);
            add_scaled(&mut y, 1.0, head(bias2, h, dim));
            (hidden, y)
        }
    }
}

/// Adds the gradients of φ's parameters to `d_phi`; returns that of the block's tokens, which is
/// also that of the position encoding.
fn phi_backward(
    input: &CompressInput,
    h: usize,
    block: &[f64],
    d_y: &[f64],
    d_phi: &mut PhiGrads,
) -> Vec<f64> {
    let dim = input.dim;
    let n = block.len();
    match (input.phi, d_phi) {
        (Phi::Linear { weight, .. }, PhiGrads::Linear { weight: d_weight, pe: d_pe }) => {
            add_outer(head_mut(d_weight, h, n * dim), block, d_y);
            let d_block = matrix_times_column(head(weight, h, n * dim), d_y);
            add_scaled(head_mut(d_pe, h, n), 1.0, &d_block);
            d_block
        }
        (
            Phi::Mlp { weight1, weight2, .. },
            PhiGrads::Mlp { weight1: d1, bias1: b1, weight2: d2, bias2: b2, pe },
        ) => {
            let hidden = phi(input, h, block).0;
            let m = hidden.len();
            let active: Vec<f64> = hidden.iter().map(|&z| gelu(z)).collect();
            add_scaled(head_mut(b2, h, dim), 1.0, d_y);
            add_outer(head_mut(d2, h, m * dim), &active, d_y);
            let d_active = matrix_times_column(head(weight2, h, m * dim), d_y);
            let d_hidden: Vec<f64> =
                d_active.iter().zip(&hidden).map(|(d, &z)| d * gelu_slope(z)).collect();
            add_scaled(head_mut(b1, h, m), 1.0, &d_hidden);
            add_outer(head_mut(d1, h, n * m), block, &d_hidden);
            let d_block = matrix_times_column(head(weight1, h, n * m), &d_hidden);
            add_scaled(head_mut(pe, h, n), 1.0, &d_block);
            d_block
        }
        // The mean; `zero_grads` made the gradients after the same variant as the parameters.
        _ => {
            let l = input.spec.compress_block as f64;
            (0..n).map(|i| d_y[i % dim] / l).collect()
        }
    }
}

fn zero_grads(phi: &Phi) -> PhiGrads {
    let zeros = |x: &[f64]| vec![0.0; x.len()];
    match phi {
        Phi::Mean => PhiGrads::Mean,
        Phi::Linear { weight, pe } => PhiGrads::Linear { weight: zeros(weight), pe: zeros(pe) },
        Phi::Mlp { weight1, bias1, weight2, bias2, pe } => PhiGrads::Mlp {
            weight1: zeros(weight1),
            bias1: zeros(bias1),
            weight2: zeros(weight2),
            bias2: zeros(bias2),
            pe: zeros(pe),
        },
    }
}

/// The part of a `[K, len]` parameter that belongs to head `h`.
fn head(x: &[f64], h: usize, len: usize) -> &[f64] {
    &x[h * len..][..len]
}

/// See [`head`].
fn head_mut(x: &mut [f64], h: usize, len: usize) -> &mut [f64] {
    &mut x[h * len..][..len]
}

/// `[n] · [n, columns]`.
fn row_times_matrix(row: &[f64], matrix: &[f64], columns: usize) -> Vec<f64> {
    let mut y = vec![0.0; columns];
    for (i, a) in row.iter().enumerate() {
        add_scaled(&mut y, *a, &matrix[i * columns..][..columns]);
    }
    y
}

/// `[n, columns] · [columns]`.
fn matrix_times_column(matrix: &[f64], column: &[f64]) -> Vec<f64> {
    matrix.chunks(column.len()).map(|row| dot(row, column)).collect()
}

/// `matrix += a ⊗ b`.
fn add_outer(matrix: &mut [f64], a: &[f64], b: &[f64]) {
    for (row, a) in matrix.chunks_mut(b.len()).zip(a) {
        add_scaled(row, *a, b);
    }
}

/// x·Φ(x), Φ the normal distribution function.
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2))
}

/// Derivative of [`gelu`]: Φ(x) + x·φ(x).
fn gelu_slope(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    0.5 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2)) + x * density
}
