//! Clipping and noise on what a gradient does to the product W = B·A, whatever its factors: the
//! mechanism of PRISM (Wang & Zhang, ICML 2026, arXiv 2606.00944).
//!
//! With `B = Q_B·R_B` and `Aᵀ = Q_A·R_A` (Q with orthonormal columns, R upper triangular) a change of
//! the product that its rank allows is `T = Q_B·M₁ + M₂·Q_Aᵀ`, `Q_Bᵀ·M₂ = 0`, and `|T|² = |M₁|² + |M₂|²`:
//! M₁ `[r, in]` and M₂ `[out, r]` are coordinates of the tangent space in which lengths are those of T.
//! A person's gradient G of the product goes in as its projection, which its factors' gradients hold:
//! `gA = Bᵀ·G`, `gB = G·Aᵀ`, so
//!
//! `M₁ = Q_Bᵀ·G = R_B^−ᵀ·gA`, `M₂ = (I − Q_B·Q_Bᵀ)·G·Q_A = (I − Q_B·Q_Bᵀ)·gB·R_A^−1`.
//!
//! None of it changes with (KA, BK⁻¹) for any invertible K but for rotations within Q_B and Q_A, of
//! which neither the norm nor the noise knows. What was released comes back as the factors' gradients
//! of it: `g̃A = R_Bᵀ·M̃₁`, `g̃B = (Q_B·M̃₁·Q_A + (I − Q_B·Q_Bᵀ)·M̃₂)·R_A`. The noise on W is that of
//! r(in + out − r) numbers; what falls on the rest of M₂ is projected away.
//!
//! # Why it is private
//!
//! Q and R are functions of the weights before the step, which were released. In these coordinates a
//! person's numbers, whatever they are, go through [`ClippedSum`] as any others do: cut to the
//! threshold, summed, noised. The way in depends on one person and on released values, the way back on
//! released values alone, so it is post-processing on both sides of the same Gaussian mechanism;
//! rounding in Q or R, however large, changes what is learnt and not what is promised.
//!
//! Where B has no full rank, as at the start (B = 0), there is no Q_B: M₁ is left out and with it any
//! change of A, the noise in it too. Where A has none, the adapter keeps its own coordinates. The
//! scale α/r is left out of all of it. PRISM's own optimizer and retraction are not here: g̃A and g̃B go
//! to the run's.
//!
//! [`ClippedSum`]: crate::mechanism::clip::ClippedSum

use super::Layout;

/// A column that is shorter than this, of the longest, adds no rank.
const SMALL: f64 = 1e-7;

/// Tall matrix = Q·R; both row-major, Q `[rows, r]`, R `[r, r]` upper triangular.
#[derive(Clone, Debug)]
struct Qr {
    q: Vec<f64>,
    r: Vec<f64>,
    rank: usize,
}

impl Qr {
    /// Gram and Schmidt's, each column twice ("twice is enough"); `None` without full rank.
    fn of(matrix: impl Fn(usize, usize) -> f64, rows: usize, rank: usize) -> Option<Self> {
        let mut columns: Vec<Vec<f64>> =
            (0..rank).map(|j| (0..rows).map(|i| matrix(i, j)).collect()).collect();
        let longest = columns.iter().map(|c| dot(c, c)).fold(0.0, f64::max).sqrt();
        let mut r = vec![0.0; rank * rank];
        for j in 0..rank {
            let (done, rest) = columns.split_at_mut(j);
            let own = &mut rest[0];
            for _ in 0..2 {
                for (i, other) in done.iter().enumerate() {
                    let along = dot(own, other);
                    r[i * rank + j] += along;
                    own.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
                }
            }
            let length = dot(own, own).sqrt();
            // Also where something is no number.
            if !(length.is_finite() && length > SMALL * longest) {
                return None;
            }
            r[j * rank + j] = length;
            own.iter_mut().for_each(|x| *x /= length);
        }
        let q = (0..rows).flat_map(|i| columns.iter().map(move |column| column[i])).collect();
        Some(Self { q, r, rank })
    }

    /// `y·R = x` for a row x, in place.
    fn solve(&self, x: &mut [f64]) {
        for j in 0..self.rank {
            let known: f64 = (0..j).map(|i| x[i] * self.r[i * self.rank + j]).sum();
            x[j] = (x[j] - known) / self.r[j * self.rank + j];
        }
    }

    /// `x·R` of a row x, in place.
    fn apply(&self, x: &mut [f64]) {
        for j in (0..self.rank).rev() {
            x[j] = (0..=j).map(|i| x[i] * self.r[i * self.rank + j]).sum();
        }
    }

    /// Row i of Q.
    fn row(&self, i: usize) -> &[f64] {
        &self.q[i * self.rank..][..self.rank]
    }

    /// `x ← x − Q·(Qᵀ·x)` of a matrix x with the rows of Q and `rank` columns.
    fn leave_out(&self, x: &mut [f64]) {
        let rank = self.rank;
        let mut along = vec![0.0; rank * rank];
        for (i, row) in x.chunks_exact(rank).enumerate() {
            for (q, along) in self.row(i).iter().zip(along.chunks_exact_mut(rank)) {
                along.iter_mut().zip(row).for_each(|(a, x)| *a += q * x);
            }
        }
        for (i, row) in x.chunks_exact_mut(rank).enumerate() {
            for (q, along) in self.row(i).iter().zip(along.chunks_exact(rank)) {
                row.iter_mut().zip(along).for_each(|(x, a)| *x -= q * a);
            }
        }
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The factors of one adapter.
#[derive(Clone, Debug)]
struct Factors {
    a: usize,
    bs: Vec<usize>,
    /// Of Aᵀ `[in, r]`.
    of_a: Qr,
    /// Of B `[out, r]`, all Bs of the adapter one below the other; `None` at the start.
    of_b: Option<Qr>,
}

/// Tangent coordinates of every adapter, for one step.
#[derive(Clone, Debug, Default)]
pub struct Tangent {
    adapters: Vec<Factors>,
}

impl Tangent {
    /// At these weights, by slot.
    pub fn at(layout: &Layout, weights: &[Vec<f32>]) -> Self {
        let rank = layout.rank.max(1);
        let one = |pair: &Vec<usize>| {
            let (a, bs): (Vec<usize>, Vec<usize>) = pair.iter().partition(|&&s| layout.is_a[s]);
            let &[a] = &a[..] else { return None };
            let matrix = &weights[a];
            let width = matrix.len() / rank;
            let of_a = Qr::of(|i, j| f64::from(matrix[j * width + i]), width, rank)?;
            let b: Vec<f32> = bs.iter().flat_map(|&slot| weights[slot].iter().copied()).collect();
            let of_b = Qr::of(|i, j| f64::from(b[i * rank + j]), b.len() / rank, rank);
            Some(Factors { a, bs, of_a, of_b })
        };
        Self { adapters: layout.pairs.iter().filter_map(one).collect() }
    }

    /// A person's gradient, by slot, into these coordinates.
    pub fn forward(&self, gradient: &mut [&mut [f32]]) {
        for Factors { a, bs, of_a, of_b } in &self.adapters {
            match of_b {
                None => gradient[*a].fill(0.0),
                Some(of_b) => each_column(gradient[*a], of_b.rank, |x| of_b.solve(x)),
            }
            let mut m2 = gather(bs, gradient);
            m2.chunks_exact_mut(of_a.rank).for_each(|row| of_a.solve(row));
            if let Some(of_b) = of_b {
                of_b.leave_out(&mut m2);
            }
            scatter(bs, &m2, gradient);
        }
    }

    /// What was released back into gradients of the factors.
    pub fn back(&self, released: &mut [Vec<f32>]) {
        let mut released: Vec<&mut [f32]> = released.iter_mut().map(|x| &mut x[..]).collect();
        for Factors { a, bs, of_a, of_b } in &self.adapters {
            let mut m2 = gather(bs, &released);
            match of_b {
                None => released[*a].fill(0.0),
                Some(of_b) => {
                    of_b.leave_out(&mut m2);
                    let (m1, rank) = (&*released[*a], of_b.rank);
                    // M₁·Q_A, [r, r].
                    let width = m1.len() / rank;
                    let mut inner = vec![0.0; rank * rank];
                    for (row, inner) in m1.chunks_exact(width).zip(inner.chunks_exact_mut(rank)) {
                        for (t, &x) in row.iter().enumerate() {
                            let along = of_a.row(t).iter();
                            inner.iter_mut().zip(along).for_each(|(i, q)| *i += f64::from(x) * q);
                        }
                    }
                    for (i, row) in m2.chunks_exact_mut(rank).enumerate() {
                        for (q, inner) in of_b.row(i).iter().zip(inner.chunks_exact(rank)) {
                            row.iter_mut().zip(inner).for_each(|(x, y)| *x += q * y);
                        }
                    }
                    each_column(released[*a], rank, |x| of_b.apply(x));
                }
            }
            m2.chunks_exact_mut(of_a.rank).for_each(|row| of_a.apply(row));
            scatter(bs, &m2, &mut released);
        }
    }
}

/// Changes each column of a matrix of `rank` rows.
fn each_column(matrix: &mut [f32], rank: usize, change: impl Fn(&mut [f64])) {
    let width = matrix.len() / rank;
    let mut column = vec![0.0; rank];
    for t in 0..width {
        column.iter_mut().enumerate().for_each(|(i, x)| *x = f64::from(matrix[i * width + t]));
        change(&mut column);
        column.iter().enumerate().for_each(|(i, x)| matrix[i * width + t] = *x as f32);
    }
}

fn gather(slots: &[usize], from: &[&mut [f32]]) -> Vec<f64> {
    slots.iter().flat_map(|&slot| from[slot].iter().map(|&x| f64::from(x))).collect()
}

fn scatter(slots: &[usize], from: &[f64], to: &mut [&mut [f32]]) {
    let mut from = from.iter();
    for &slot in slots {
        to[slot].iter_mut().zip(&mut from).for_each(|(to, from)| *to = *from as f32);
    }
}

#[cfg(test)]
mod tests;
