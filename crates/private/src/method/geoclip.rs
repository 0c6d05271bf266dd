//! GeoClip (arXiv 2506.06549) in low rank: clipping and noise in a basis that released gradients
//! have shown, one for each adapter.
//!
//! A matrix for the whole gradient cannot be held; each adapter has K directions q_k with variances
//! λ_k, and one variance λ₀ for everything orthogonal to them. A person's gradient goes in as
//! `w = M(g − a)`, `M = Σ_k q_k·q_kᵀ/b_k + (I − Σ_k q_k·q_kᵀ)/b₀`, and comes back by the inverse of
//! M. Noise is least, for a given `E|w|²`, at `b² ∝ √λ`; the mean of b² over all directions of all
//! adapters is 1, and the threshold says how long a gradient may be (see [`super::adaclip`], which
//! this is with one direction a coordinate).
//!
//! Directions and variances follow released gradients alone: the leading ones of
//! `β₂·Σ + (1 − β₂)·B·v·vᵀ` with v = g̃ − a, from which the energy of the noise, which is known, is
//! taken away along each q_k and in what is orthogonal to them.
//!
//! The paper's own code differs in what is private (github.com/atefeh-gilani/GeoClip): its first steps
//! in low rank release the mean gradient without noise. Here the first step has no direction and all
//! of the noise.

use super::Layout;
use super::state::{Reader, State};
use crate::Result;

/// Directions of an adapter.
const RANK: usize = 8;
/// Averages of mean and covariance: the paper's β₁, and the β₃ of its streaming variant (its section
/// 4; 0.999 with a whole covariance matrix).
const BETA: (f64, f64) = (0.99, 0.99);
/// No variance counts as less than this share of the largest. The paper clamps between 10⁻¹⁵ and h₂,
/// 1 or 10 by data set; here the scale is fixed otherwise, and no number depends on the data.
const LEAST: f64 = 1e-4;

/// What is known of one adapter's gradients.
#[derive(Clone, Debug)]
struct Shape {
    slots: Vec<usize>,
    sizes: Vec<usize>,
    mean: Vec<f32>,
    /// K orthonormal rows.
    basis: Vec<Vec<f32>>,
    variances: Vec<f64>,
    /// In all directions that are orthogonal to the basis together, without its noise, so that
    /// it may come out below 0.
    rest: f64,
    /// b_k, and b₀.
    scales: Vec<f64>,
    rest_scale: f64,
}

/// A basis for each adapter.
#[derive(Clone, Debug)]
pub struct Geoclip {
    shapes: Vec<Shape>,
}

impl Geoclip {
    /// No direction known yet: everything is alike.
    pub fn new(layout: &Layout) -> Self {
        let shape = |slots: &Vec<usize>| {
            let sizes: Vec<usize> = slots.iter().map(|&slot| layout.sizes[slot]).collect();
            let mean = vec![0.0; sizes.iter().sum()];
            let (basis, variances, scales) = (vec![], vec![], vec![]);
            let (slots, rest) = (slots.clone(), 0.0);
            Shape { slots, sizes, mean, basis, variances, rest, scales, rest_scale: 1.0 }
        };
        Self { shapes: layout.pairs.iter().map(shape).collect() }
    }

    fn rescale(&mut self) {
        let rest = |shape: &Shape| shape.rest / shape.left();
        let all = self.shapes.iter().flat_map(|s| s.variances.iter().copied().chain([rest(s)]));
        let least = LEAST * all.fold(0.0, f64::max);
        let deviation = |variance: f64| variance.max(least).sqrt();
        let sum = |shape: &Shape| {
            let along: f64 = shape.variances.iter().map(|&v| deviation(v)).sum();
            along + shape.left() * deviation(rest(shape))
        };
        let count: usize = self.shapes.iter().map(|shape| shape.mean.len()).sum();
        let mean = self.shapes.iter().map(sum).sum::<f64>() / count as f64;
        // Without anything that stands out of the noise all is alike.
        let scale = |v: f64| if mean > 0.0 { (deviation(v) / mean).sqrt() } else { 1.0 };
        for shape in &mut self.shapes {
            shape.scales = shape.variances.iter().map(|&v| scale(v)).collect();
            shape.rest_scale = scale(rest(shape));
        }
    }

    /// A person's gradient, by slot, into these coordinates.
    pub fn forward(&self, gradient: &mut [&mut [f32]]) {
        for shape in &self.shapes {
            let mut own = shape.gather(|slot| &*gradient[slot]);
            own.iter_mut().zip(&shape.mean).for_each(|(x, mean)| *x -= mean);
            shape.stretch(&mut own, |scale| 1.0 / scale);
            shape.scatter(&own, |slot, own| gradient[slot].copy_from_slice(own));
        }
    }

    /// Brings back what was released, with noise of standard deviation `noise` on each number of
    /// it, and learns from it; `batch` is the expected one.
    pub fn learn(&mut self, released: &mut [Vec<f32>], noise: &[f64], batch: f64) {
        for shape in &mut self.shapes {
            let noise = noise[shape.slots[0]];
            let mut own = shape.gather(|slot| &released[slot]);
            shape.stretch(&mut own, |scale| scale);
            shape.turn(&own, noise, batch);
            for (x, mean) in own.iter_mut().zip(&mut shape.mean) {
                *x += *mean;
                *mean = (BETA.0 * f64::from(*mean) + (1.0 - BETA.0) * f64::from(*x)) as f32;
            }
            shape.scatter(&own, |slot, own| released[slot].copy_from_slice(own));
        }
        self.rescale();
    }

    pub(super) fn write(&self, state: &mut State) {
        for shape in &self.shapes {
            state.numbers.push(shape.basis.len() as f64);
            state.numbers.extend(shape.variances.iter().chain([&shape.rest]));
            state.arrays.push(shape.mean.clone());
            state.arrays.extend(shape.basis.iter().cloned());
        }
    }

    pub(super) fn read(&mut self, reader: &mut Reader) -> Result<()> {
        for shape in &mut self.shapes {
            let (rank, len) = ((reader.number()? as usize).min(RANK), shape.mean.len());
            shape.variances = reader.numbers(rank)?;
            shape.rest = reader.number()?;
            shape.mean = reader.array(len)?;
            shape.basis = (0..rank).map(|_| reader.array(len)).collect::<Result<_>>()?;
        }
        self.rescale();
        Ok(())
    }
}

impl Shape {
    fn gather<'a>(&self, of: impl Fn(usize) -> &'a [f32]) -> Vec<f32> {
        self.slots.iter().flat_map(|&slot| of(slot)).copied().collect()
    }

    fn scatter(&self, own: &[f32], mut to: impl FnMut(usize, &[f32])) {
        let mut from = 0;
        for (&slot, &size) in self.slots.iter().zip(&self.sizes) {
            to(slot, &own[from..from + size]);
            from += size;
        }
    }

    /// Directions that are orthogonal to the basis.
    fn left(&self) -> f64 {
        (self.mean.len() - self.basis.len()) as f64
    }

    /// Multiplies every direction by a function of its b.
    fn stretch(&self, own: &mut [f32], by: impl Fn(f64) -> f64) {
        let rest = by(self.rest_scale);
        let mut sum: Vec<f64> = own.iter().map(|&x| rest * f64::from(x)).collect();
        for (q, scale) in self.basis.iter().zip(&self.scales) {
            add(&mut sum, (by(*scale) - rest) * dot(q, own), q);
        }
        own.iter_mut().zip(sum).for_each(|(x, sum)| *x = sum as f32);
    }

    /// Turns the basis towards `v`, whose noise, in stretched coordinates, is known.
    fn turn(&mut self, v: &[f32], noise: f64, batch: f64) {
        let shrunk = |energy: f64, known: f64| {
            if energy > known { ((energy - known) / energy).sqrt() } else { 0.0 }
        };
        // What is orthogonal to the basis, and what lies along it, each without its noise.
        let along: Vec<f64> = self.basis.iter().map(|q| dot(q, v)).collect();
        let mut clean: Vec<f64> = v.iter().map(|&x| f64::from(x)).collect();
        for (q, along) in self.basis.iter().zip(&along) {
            add(&mut clean, -along, q);
        }
        let energy = clean.iter().map(|x| x * x).sum::<f64>();
        let known = self.left() * (self.rest_scale * noise).powi(2);
        let keep = shrunk(energy, known);
        clean.iter_mut().for_each(|x| *x *= keep);
        for ((q, along), scale) in self.basis.iter().zip(along).zip(&self.scales) {
            add(&mut clean, along * shrunk(along * along, (scale * noise).powi(2)), q);
        }
        // The covariance is the sum of the columns' squares: find its leading directions.
        let mut columns: Vec<Vec<f32>> = Vec::with_capacity(self.basis.len() + 1);
        for (q, variance) in self.basis.iter().zip(&self.variances) {
            columns.push(
                q.iter().map(|&x| (f64::from(x) * (BETA.1 * variance).sqrt()) as f32).collect(),
            );
        }
        let weight = (1.0 - BETA.1) * batch;
        columns.push(clean.iter().map(|x| (x * weight.sqrt()) as f32).collect());
        let gram: Vec<Vec<f64>> =
            columns.iter().map(|a| columns.iter().map(|b| dot(a, b)).collect()).collect();
        let (values, vectors) = eigen(gram);
        // Below this a column is nothing but the rounding of the others.
        let least = 1e-10 * values.first().copied().unwrap_or(0.0);
        let most = RANK.min(v.len() - 1);
        let mut taken = 0.0;
        self.basis.clear();
        self.variances.clear();
        for (value, vector) in values.into_iter().zip(vectors).take(most) {
            if value <= least || value <= 0.0 {
                break;
            }
            let mut q = vec![0.0; v.len()];
            for (column, share) in columns.iter().zip(&vector) {
                add(&mut q, share / value.sqrt(), column);
            }
            self.basis.push(q.into_iter().map(|x| x as f32).collect());
            self.variances.push(value);
            taken += value;
        }
        // What went into the sum and not into the basis is left over; so is less than nothing,
        // where there was less than the noise.
        let all: f64 = columns.iter().map(|column| dot(column, column)).sum();
        self.rest = BETA.1 * self.rest + (all - taken) + weight * (energy - known).min(0.0);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(x, y)| *x += factor * f64::from(*y));
}

/// Eigenvalues, largest first, and their vectors, of a small symmetric matrix (Jacobi's rotations).
fn eigen(mut m: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = m.len();
    let mut turned: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..30 {
        for p in 0..n {
            for q in p + 1..n {
                if m[p][q].abs() <= f64::EPSILON * (m[p][p] * m[q][q]).abs().sqrt() {
                    continue;
                }
                let half = (m[q][q] - m[p][p]) / (2.0 * m[p][q]);
                let tan = half.signum() / (half.abs() + (half * half + 1.0).sqrt());
                let cos = 1.0 / (tan * tan + 1.0).sqrt();
                let sin = tan * cos;
                for row in &mut m {
                    (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
                }
                for k in 0..n {
                    let (a, b) = (m[p][k], m[q][k]);
                    (m[p][k], m[q][k]) = (cos * a - sin * b, sin * a + cos * b);
                    let (a, b) = (turned[p][k], turned[q][k]);
                    (turned[p][k], turned[q][k]) = (cos * a - sin * b, sin * a + cos * b);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| m[b][b].total_cmp(&m[a][a]));
    (order.iter().map(|&i| m[i][i]).collect(), order.iter().map(|&i| turned[i].clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout {
            sizes: vec![20, 10, 5],
            pairs: vec![vec![0, 1], vec![2]],
            is_a: vec![true; 3],
            rank: 5,
        }
    }

    fn random(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    #[test]
    fn eigenvectors_are_of_the_matrix() {
        let mut next = random(1);
        let half: Vec<Vec<f64>> = (0..6).map(|_| (0..6).map(|_| next().into()).collect()).collect();
        let at = |i: usize, j: usize| (0..6).map(|k| half[i][k] * half[j][k]).sum::<f64>();
        let m: Vec<Vec<f64>> = (0..6).map(|i| (0..6).map(|j| at(i, j)).collect()).collect();
        let (values, vectors) = eigen(m.clone());
        assert!(values.windows(2).all(|w| w[0] >= w[1]));
        for (value, vector) in values.iter().zip(&vectors) {
            for (row, x) in m.iter().zip(vector) {
                let y: f64 = row.iter().zip(vector).map(|(a, b)| a * b).sum();
                assert!((y - value * x).abs() < 1e-12, "{y} {}", value * x);
            }
        }
    }

    #[test]
    fn it_comes_back_as_it_went_in_and_finds_the_direction_that_varies() {
        let mut geoclip = Geoclip::new(&layout());
        let mut next = random(2);
        let loud: Vec<f32> = (0..30).map(|i| if i % 3 == 0 { 0.3 } else { 0.0 }).collect();
        for _ in 0..60 {
            let along = next();
            let mut values: Vec<f32> = loud.iter().map(|x| x * along + 1e-4 * next()).collect();
            let (a, b) = values.split_at_mut(20);
            let mut c: Vec<f32> = (0..5).map(|_| 1e-4 * next()).collect();
            let want = [a.to_vec(), b.to_vec(), c.clone()].concat();
            geoclip.forward(&mut [a, b, &mut c]);
            let mut released = [a.to_vec(), b.to_vec(), c];
            geoclip.learn(&mut released, &[0.0; 3], 10.0);
            for (x, want) in released.concat().iter().zip(want) {
                // Rounded to f32 on either side, stretched by at most 10 between.
                assert!((x - want).abs() < 3e-6, "{x} {want}");
            }
        }
        let shape = &geoclip.shapes[0];
        let length = dot(&loud, &loud).sqrt();
        assert!(dot(&shape.basis[0], &loud).abs() > 0.999 * length);
        assert!(shape.variances[0] > 100.0 * shape.variances[1]);
        assert!(shape.scales[0] > 2.0 * shape.rest_scale);
        for (i, a) in shape.basis.iter().enumerate() {
            for (j, b) in shape.basis.iter().enumerate() {
                let want = f64::from(u8::from(i == j));
                assert!((dot(a, b) - want).abs() < 1e-4, "{i} {j} {}", dot(a, b));
            }
        }
    }

    /// Noise alone must not be taken for a signal: b would grow, and with it the noise.
    #[test]
    fn noise_alone_does_not_feed_itself() {
        let layout = Layout {
            sizes: vec![500, 500],
            pairs: vec![vec![0, 1]],
            is_a: vec![true, false],
            rank: 1,
        };
        let mut geoclip = Geoclip::new(&layout);
        let mut next = random(3);
        for _ in 0..300 {
            // Uniform numbers of ±1 have a standard deviation of 1/√3.
            let mut noise = || (0..500).map(|_| next()).collect::<Vec<f32>>();
            let mut released = [noise(), noise()];
            geoclip.learn(&mut released, &[3f64.powf(-0.5); 2], 64.0);
            // No more noise in all, and nearly everything nearly as it was.
            let shape = &geoclip.shapes[0];
            let along: f64 = shape.scales.iter().map(|b| b * b).sum();
            let all = along + shape.left() * shape.rest_scale.powi(2);
            assert!((all / 1000.0 - 1.0).abs() < 1e-9, "{all}");
            assert!(shape.rest_scale > 0.5, "{}", shape.rest_scale);
        }
    }
}
