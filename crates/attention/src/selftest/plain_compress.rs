//! φ of the plain formula; see `plain`.

use crate::{Compressor, Element};

use super::case::Case;
use super::plain::round;

/// A small matrix `[rows, columns]`.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    columns: usize,
    x: Vec<f32>,
}

impl Matrix {
    /// A matrix of at least one column.
    fn new(columns: usize, x: Vec<f32>) -> Self {
        Self { rows: x.len() / columns, columns, x }
    }

    fn transposed(&self) -> Self {
        let column = |c| self.x.iter().skip(c).step_by(self.columns).copied();
        let x = (0..self.columns).flat_map(column).collect();
        Self { rows: self.columns, columns: self.rows, x }
    }

    /// `self · other + bias`, rounded once.
    fn times<E: Element>(&self, other: &Self, bias: Option<&[f32]>) -> Self {
        let columns = other.columns;
        let mut x = Vec::with_capacity(self.rows * columns);
        for r in 0..self.rows {
            for c in 0..columns {
                let row = &self.x[r * self.columns..][..self.columns];
                let sum: f32 =
                    (row.iter().enumerate()).map(|(i, a)| a * other.x[i * columns + c]).sum();
                x.push(round::<E>(sum + bias.map_or(0.0, |bias| bias[c])));
            }
        }
        Self { rows: self.rows, columns, x }
    }

    fn zip<E: Element>(&self, other: &Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let x = self.x.iter().zip(&other.x).map(|(a, b)| round::<E>(f(*a, *b)));
        Self { x: x.collect(), ..*self }
    }

    fn column_sums<E: Element>(&self) -> Vec<f32> {
        let sum = |c| self.x.iter().skip(c).step_by(self.columns).sum();
        (0..self.columns).map(sum).map(round::<E>).collect()
    }
}

/// The blocks of one head, their position encoding added: `[N, l·C]`, and their first tokens.
fn blocks<E: Element>(case: &Case, letter: &str, h: usize) -> (Matrix, Vec<usize>) {
    let (l, dim, kv_heads) = (case.spec.compress_block, dim(case, letter), case.dims.kv_heads);
    let raw = case.get(&format!("{letter}_cmp"));
    let pe = case.tensors.get(&format!("phi_{letter}_pe")).map(|pe| part(pe, h, kv_heads));
    let mut starts = Vec::new();
    for s in case.sequences() {
        let count = case.spec.compressed_blocks(s.len());
        starts.extend((0..count).map(|i| s.start + i * case.spec.compress_stride));
    }
    let x = starts.iter().flat_map(|&start| {
        (0..l * dim).map(move |i| {
            let x = raw[((start + i / dim) * kv_heads + h) * dim + i % dim];
            pe.map_or(x, |pe| round::<E>(x + pe[i]))
        })
    });
    (Matrix::new(l * dim, x.collect()), starts)
}

fn dim(case: &Case, letter: &str) -> usize {
    if letter == "k" { case.dims.key_dim } else { case.dims.value_dim }
}

/// Head `h` of a `[K, …]` parameter.
fn part(x: &[f32], h: usize, kv_heads: usize) -> &[f32] {
    let len = x.len() / kv_heads;
    &x[h * len..][..len]
}

/// The compressed keys (`"k"`) or values (`"v"`), `[N, K, C]`.
pub fn compress<E: Element>(case: &Case, letter: &str) -> Vec<f32> {
    let (dim, kv_heads) = (dim(case, letter), case.dims.kv_heads);
    let mut out = Vec::new();
    for h in 0..kv_heads {
        let y = forward::<E>(case, letter, h, &blocks::<E>(case, letter, h).0).1;
        out.resize(y.rows * kv_heads * dim, 0.0);
        for (i, row) in y.x.chunks(dim).enumerate() {
            out[(i * kv_heads + h) * dim..][..dim].copy_from_slice(row);
        }
    }
    out
}

/// The hidden layer before its GELU (the blocks themselves if there is none) and φ.
fn forward<E: Element>(case: &Case, letter: &str, h: usize, blocks: &Matrix) -> (Matrix, Matrix) {
    let (dim, kv_heads) = (dim(case, letter), case.dims.kv_heads);
    let get = |name: &str| part(case.get(&format!("phi_{letter}_{name}")), h, kv_heads);
    match case.spec.compressor {
        Compressor::Mean => {
            let mean = |block: &[f32], c| {
                let sum: f32 = block.iter().skip(c).step_by(dim).sum();
                round::<E>(sum / case.spec.compress_block as f32)
            };
            let y = blocks.x.chunks(blocks.columns);
            let y = y.flat_map(|block| (0..dim).map(move |c| mean(block, c)));
            (blocks.clone(), Matrix::new(dim, y.collect()))
        }
        Compressor::Linear => {
            let weight = Matrix::new(dim, get("weight").to_vec());
            (blocks.clone(), blocks.times::<E>(&weight, None))
        }
        Compressor::Mlp => {
            let weight1 = Matrix::new(case.hidden(letter), get("weight1").to_vec());
            let weight2 = Matrix::new(dim, get("weight2").to_vec());
            let hidden = blocks.times::<E>(&weight1, Some(get("bias1")));
            let active = hidden.zip::<E>(&hidden, |z, _| gelu(z));
            (hidden, active.times::<E>(&weight2, Some(get("bias2"))))
        }
    }
}

/// Gradients of the raw rows and of φ's parameters, by their golden names.
pub fn compress_backward<E: Element>(
    case: &Case,
    letter: &str,
    d_out: &[f32],
) -> Vec<(String, Vec<f32>)> {
    let (dim, kv_heads) = (dim(case, letter), case.dims.kv_heads);
    let mut d_x = vec![0.0; case.get(&format!("{letter}_cmp")).len()];
    let mut grads: Vec<(String, Vec<f32>)> = (case.phi_names().into_iter())
        .filter(|name| name.starts_with(&format!("phi_{letter}_")))
        .map(|name| (format!("d_{name}"), Vec::new()))
        .collect();
    let mut put = |name: &str, x: Vec<f32>| {
        let name = format!("d_phi_{letter}_{name}");
        if let Some(grad) = grads.iter_mut().find(|grad| grad.0 == name) {
            grad.1.extend(x);
        }
    };
    for h in 0..kv_heads {
        let (blocks, starts) = blocks::<E>(case, letter, h);
        let d_y = (0..starts.len()).flat_map(|i| &d_out[(i * kv_heads + h) * dim..][..dim]);
        let d_y = Matrix::new(dim, d_y.copied().collect());
        let get = |name: &str| part(case.get(&format!("phi_{letter}_{name}")), h, kv_heads);
        let d_blocks = match case.spec.compressor {
            Compressor::Mean => {
                let l = case.spec.compress_block;
                let row = |row: &[f32]| -> Vec<f32> {
                    (0..l * dim).map(|i| round::<E>(row[i % dim] / l as f32)).collect()
                };
                Matrix::new(l * dim, d_y.x.chunks(dim).flat_map(row).collect())
            }
            Compressor::Linear => {
                let weight = Matrix::new(dim, get("weight").to_vec());
                put("weight", blocks.transposed().times::<E>(&d_y, None).x);
                let d_blocks = d_y.times::<E>(&weight.transposed(), None);
                put("pe", d_blocks.column_sums::<E>());
                d_blocks
            }
            Compressor::Mlp => {
                let weight1 = Matrix::new(case.hidden(letter), get("weight1").to_vec());
                let weight2 = Matrix::new(dim, get("weight2").to_vec());
                let hidden = forward::<E>(case, letter, h, &blocks).0;
                let active = hidden.zip::<E>(&hidden, |z, _| gelu(z));
                put("weight2", active.transposed().times::<E>(&d_y, None).x);
                put("bias2", d_y.column_sums::<E>());
                let d_active = d_y.times::<E>(&weight2.transposed(), None);
                let d_hidden = d_active.zip::<E>(&hidden, |d, z| d * gelu_slope(z));
                put("weight1", blocks.transposed().times::<E>(&d_hidden, None).x);
                put("bias1", d_hidden.column_sums::<E>());
                let d_blocks = d_hidden.times::<E>(&weight1.transposed(), None);
                put("pe", d_blocks.column_sums::<E>());
                d_blocks
            }
        };
        for (d_block, &start) in d_blocks.x.chunks(d_blocks.columns).zip(&starts) {
            for (i, d) in d_block.iter().enumerate() {
                let x = &mut d_x[((start + i / dim) * kv_heads + h) * dim + i % dim];
                *x = round::<E>(*x + d);
            }
        }
    }
    grads.push((format!("d_{letter}_cmp"), d_x));
    grads
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

fn gelu_slope(x: f32) -> f32 {
    let density = (-0.5 * x * x).exp() / std::f32::consts::TAU.sqrt();
    0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
}
