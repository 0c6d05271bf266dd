//! GeoClip (arXiv 2506.06549) in low rank: clipping and noise in a basis that released gradients
//! have shown, one for each adapter.
//!
//! A matrix for the whole gradient cannot be held; each adapter g has K directions q_k with
//! variances λ_k, and one variance λ₀ for everything orthogonal to them. A person's gradient goes in
//! as `w = M(g − a)`, `M = Σ_k q_k·q_kᵀ/b_k + (I − Σ_k q_k·q_kᵀ)/b₀`, and comes back by the inverse
//! of M. With `b² = √λ·Σ√λ` over all directions of all adapters, noise is least under `E|w|² ≤ 1`;
//! with one direction a coordinate that is AdaCliP's rule.
//!
//! Directions and variances follow released gradients alone: the leading ones of
//! `β₂·Σ + (1 − β₂)·B·v·vᵀ` with v = g̃ − a, from which the energy of the noise, which is known, is
//! taken away along each q_k and in what is orthogonal to them: without that the noise, being
//! larger where b is, would feed itself.

use super::Layout;
use super::state::{Reader, State};
use crate::Result;

/// Directions of an adapter.
const RANK: usize = 8;
/// Averages of mean and covariance.
const BETA: (f64, f64) = (0.99, 0.9);
/// Variances along a direction are kept within these.
const RANGE: (f64, f64) = (1e-12, 10.0);
/// The threshold in these coordinates.
pub const THRESHOLD: f64 = 1.0;

/// What is known of one adapter's gradients.
#[derive(Clone, Debug)]
struct Shape {
    slots: Vec<usize>,
    sizes: Vec<usize>,
    mean: Vec<f32>,
    /// K orthonormal rows.
    basis: Vec<Vec<f32>>,
    variances: Vec<f64>,
    /// Along every direction that is orthogonal to the basis.
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
            let rest = (RANGE.0 * RANGE.1).sqrt();
            let (basis, variances, scales) = (vec![], vec![], vec![]);
            let slots = slots.clone();
            Shape { slots, sizes, mean, basis, variances, rest, scales, rest_scale: 1.0 }
        };
        let mut new = Self { shapes: layout.pairs.iter().map(shape).collect() };
        new.rescale();
        new
    }

    fn rescale(&mut self) {
        let sum = |shape: &Shape| {
            let left = (shape.mean.len() - shape.basis.len()) as f64;
            shape.variances.iter().map(|v| v.sqrt()).sum::<f64>() + left * shape.rest.sqrt()
        };
        let sum: f64 = self.shapes.iter().map(sum).sum();
        for shape in &mut self.shapes {
            let scale = |variance: f64| (variance.sqrt() * sum).sqrt();
            shape.scales = shape.variances.iter().map(|&v| scale(v)).collect();
            shape.rest_scale = scale(shape.rest);
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

    /// Multiplies every direction by a function of its b.
    fn stretch(&self, own: &mut [f32], by: impl Fn(f64) -> f64) {
        let rest = by(self.rest_scale);
        let along: Vec<f64> = self.basis.iter().map(|q| dot(q, own)).collect();
        own.iter_mut().for_each(|x| *x = (f64::from(*x) * rest) as f32);
        for ((q, along), scale) in self.basis.iter().zip(along).zip(&self.scales) {
            add(own, (by(*scale) - rest) * along, q);
        }
    }

    /// Turns the basis towards `v`, whose noise, in stretched coordinates, is known.
    fn turn(&mut self, v: &[f32], noise: f64, batch: f64) {
        let shrunk = |energy: f64, known: f64| {
            if energy > known { ((energy - known) / energy).sqrt() } else { 0.0 }
        };
        // What is orthogonal to the basis, and what lies along it, each without its noise.
        let along: Vec<f64> = self.basis.iter().map(|q| dot(q, v)).collect();
        let mut clean = v.to_vec();
        for (q, along) in self.basis.iter().zip(&along) {
            add(&mut clean, -along, q);
        }
        let left = (v.len() - self.basis.len()) as f64;
        let keep = shrunk(dot(&clean, &clean), left * (self.rest_scale * noise).powi(2));
        clean.iter_mut().for_each(|x| *x = (f64::from(*x) * keep) as f32);
        for ((q, along), scale) in self.basis.iter().zip(along).zip(&self.scales) {
            add(&mut clean, along * shrunk(along * along, (scale * noise).powi(2)), q);
        }
        // The covariance is the sum of the columns' squares: find its leading directions.
        let mut columns: Vec<Vec<f32>> = Vec::with_capacity(self.basis.len() + 1);
        for (q, variance) in self.basis.iter().zip(&self.variances) {
            columns.push(scaled(q, (BETA.1 * variance).sqrt()));
        }
        columns.push(scaled(&clean, ((1.0 - BETA.1) * batch).sqrt()));
        let gram: Vec<Vec<f64>> =
            columns.iter().map(|a| columns.iter().map(|b| dot(a, b)).collect()).collect();
        let (values, vectors) = eigen(gram);
        self.basis.clear();
        self.variances.clear();
        let mut lost = 0.0;
        for (value, vector) in values.into_iter().zip(vectors) {
            // Below this a column is nothing but the rounding of the others.
            if value <= RANGE.0 {
                continue;
            }
            if self.basis.len() == RANK.min(v.len() - 1) {
                lost += value;
                continue;
            }
            let mut q = vec![0.0; v.len()];
            for (column, share) in columns.iter().zip(&vector) {
                add(&mut q, share / value.sqrt(), column);
            }
            self.basis.push(q);
            self.variances.push(value.clamp(RANGE.0, RANGE.1));
        }
        let left = (v.len() - self.basis.len()) as f64;
        self.rest = (BETA.1 * self.rest + lost / left).clamp(RANGE.0, RANGE.1);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn add(to: &mut [f32], factor: f64, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(x, y)| *x = (f64::from(*x) + factor * f64::from(*y)) as f32);
}

fn scaled(of: &[f32], by: f64) -> Vec<f32> {
    of.iter().map(|x| (f64::from(*x) * by) as f32).collect()
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
        Layout { sizes: vec![20, 10, 5], pairs: vec![vec![0, 1], vec![2]], is_a: vec![true; 3] }
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
                assert!((x - want).abs() < 1e-5, "{x} {want}");
            }
        }
        let shape = &geoclip.shapes[0];
        let length = dot(&loud, &loud).sqrt();
        assert!(dot(&shape.basis[0], &loud).abs() > 0.999 * length);
        assert!(shape.variances[0] > 100.0 * shape.variances[1]);
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
        let layout =
            Layout { sizes: vec![500, 500], pairs: vec![vec![0, 1]], is_a: vec![true, false] };
        let mut geoclip = Geoclip::new(&layout);
        let first = geoclip.shapes[0].rest_scale;
        let mut next = random(3);
        for _ in 0..300 {
            // Uniform numbers of ±1 have a standard deviation of 1/√3.
            let mut noise = || (0..500).map(|_| next()).collect::<Vec<f32>>();
            let mut released = [noise(), noise()];
            geoclip.learn(&mut released, &[3f64.powf(-0.5); 2], 64.0);
        }
        let shape = &geoclip.shapes[0];
        assert!(shape.rest_scale < 10.0 * first, "{} {first}", shape.rest_scale);
    }
}
