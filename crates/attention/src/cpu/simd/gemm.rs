//! `C (+)= A·B` for tiles that live in cache: B's rows contiguous, A read one scalar at a time.
//!
//! Every product of the operator has this form once the right operand is packed: q·Kᵀ, p·V,
//! dO·Vᵀ, dS·K, and with A read by columns Pᵀ·dO and dSᵀ·Q. Each element of C is one chain of
//! fused multiply-adds in the order of k, so its bits never depend on the tile around it. What is
//! added to C is such a chain from 0: sums over many tiles then grow their rounding error with the
//! root of the number of tiles, not of all terms.

use super::lanes::Lanes;
use super::{PAD, isa};

/// Rows of a micro-tile.
const ROWS: usize = 6;

/// One product; extents are checked by [`Gemm::run`].
pub(in super::super) struct Gemm<'a> {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C, a multiple of [`PAD`].
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// A; element (i, k) is `a[row(i)·a_row + k·a_step]`.
    pub a: &'a [f32],
    /// Distance of A's rows.
    pub a_row: usize,
    /// Distance of A's columns.
    pub a_step: usize,
    /// B; element (k, j) is `b[k·b_row + j]`.
    pub b: &'a [f32],
    /// Distance of B's rows.
    pub b_row: usize,
    /// Distance of C's rows.
    pub c_row: usize,
    /// Which rows of A to read, row i of C being `i`; all in order when absent.
    pub a_rows: Option<&'a [u32]>,
    /// Which rows of C to write; all in order when absent.
    pub c_rows: Option<&'a [u32]>,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

/// [`Gemm`] with C, checked.
pub(super) struct Raw<'a> {
    g: &'a Gemm<'a>,
    c: *mut f32,
}

impl Gemm<'_> {
    /// Runs the product; C's element (i, j) is `c[row(i)·c_row + j]`.
    pub fn run(&self, c: &mut [f32]) {
        let &Self { m, n, k, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        let last = |rows: Option<&[u32]>| match rows {
            None => m - 1,
            Some(rows) => {
                assert!(rows.len() == m, "a row list of another length");
                rows.iter().max().map_or(0, |&r| r as usize)
            }
        };
        assert!(n.is_multiple_of(PAD), "columns are whole vectors");
        assert!(last(self.c_rows) * self.c_row + n <= c.len(), "C is too short");
        if k > 0 {
            let a_end = last(self.a_rows) * self.a_row + (k - 1) * self.a_step;
            assert!(a_end < self.a.len(), "A is too short");
            assert!((k - 1) * self.b_row + n <= self.b.len(), "B is too short");
        }
        // SAFETY: every index that `run` forms is below the ends checked above, and the table
        // fits the machine.
        unsafe { (isa().gemm)(&Raw { g: self, c: c.as_mut_ptr() }) }
    }
}

/// All micro-tiles of a product.
#[inline(always)]
pub(super) unsafe fn run<L: Lanes>(raw: &Raw) {
    let g = raw.g;
    let vectors = g.n / L::LANES;
    let mut i = 0;
    while i < g.m {
        let rows = ROWS.min(g.m - i);
        let mut v = 0;
        while v < vectors {
            let span = L::SPAN.min(vectors - v);
            // SAFETY: the tile lies inside the extents that `Gemm::run` checked.
            unsafe {
                match rows {
                    6 => spans::<L, 6>(raw, i, v, span),
                    5 => spans::<L, 5>(raw, i, v, span),
                    4 => spans::<L, 4>(raw, i, v, span),
                    3 => spans::<L, 3>(raw, i, v, span),
                    2 => spans::<L, 2>(raw, i, v, span),
                    _ => spans::<L, 1>(raw, i, v, span),
                }
            }
            v += span;
        }
        i += rows;
    }
}

#[inline(always)]
unsafe fn spans<L: Lanes, const M: usize>(raw: &Raw, i: usize, v: usize, span: usize) {
    // SAFETY: passed on.
    unsafe {
        match span {
            4 if L::SPAN >= 4 => micro::<L, M, 4>(raw, i, v),
            3 if L::SPAN >= 3 => micro::<L, M, 3>(raw, i, v),
            2 => micro::<L, M, 2>(raw, i, v),
            _ => micro::<L, M, 1>(raw, i, v),
        }
    }
}

/// M rows × N vectors of C held in registers over all of k.
#[inline(always)]
unsafe fn micro<L: Lanes, const M: usize, const N: usize>(raw: &Raw, i: usize, v: usize) {
    let g = raw.g;
    let row = |rows: Option<&[u32]>, r: usize| match rows {
        None => i + r,
        // SAFETY: `Gemm::run` checked that the list has m entries.
        Some(rows) => unsafe { *rows.get_unchecked(i + r) as usize },
    };
    // SAFETY: all offsets are inside the extents that `Gemm::run` checked.
    unsafe {
        let mut a = [g.a.as_ptr(); M];
        let mut c = [raw.c; M];
        for r in 0..M {
            a[r] = a[r].wrapping_add(row(g.a_rows, r) * g.a_row);
            c[r] = c[r].add(row(g.c_rows, r) * g.c_row + v * L::LANES);
        }
        let mut b = g.b.as_ptr().wrapping_add(v * L::LANES);
        let mut acc = [[L::splat(0.0); N]; M];
        for _ in 0..g.k {
            let mut x = [L::splat(0.0); N];
            for (j, x) in x.iter_mut().enumerate() {
                *x = L::load(b.add(j * L::LANES));
            }
            for r in 0..M {
                let y = L::splat(*a[r]);
                a[r] = a[r].wrapping_add(g.a_step);
                for (acc, x) in acc[r].iter_mut().zip(x) {
                    *acc = L::fma(y, x, *acc);
                }
            }
            b = b.wrapping_add(g.b_row);
        }
        for r in 0..M {
            for (j, &acc) in acc[r].iter().enumerate() {
                let c = c[r].add(j * L::LANES);
                L::store(c, if g.accumulate { L::add(L::load(c), acc) } else { acc });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::every_isa;
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                x as f32 / u32::MAX as f32 - 0.5
            })
            .collect()
    }

    #[test]
    fn every_instruction_set_multiplies_like_the_plain_loop() {
        for isa in every_isa() {
            for (m, n, k) in [(1, 16, 1), (6, 64, 24), (7, 80, 5), (13, 48, 33), (5, 32, 0)] {
                let (a, b) = (noise(m * k.max(1), 1), noise(k.max(1) * n, 2));
                let mut c = noise(m * n, 3);
                let mut want: Vec<f64> = c.iter().map(|&x| f64::from(x)).collect();
                for i in 0..m {
                    for j in 0..n {
                        for l in 0..k {
                            want[i * n + j] += f64::from(a[i * k + l]) * f64::from(b[l * n + j]);
                        }
                    }
                }
                let g = Gemm {
                    m,
                    n,
                    k,
                    a: &a,
                    a_row: k,
                    a_step: 1,
                    b: &b,
                    b_row: n,
                    c_row: n,
                    a_rows: None,
                    c_rows: None,
                    accumulate: true,
                };
                // SAFETY: the extents fit by construction; `every_isa` is what the machine has.
                unsafe { (isa.gemm)(&Raw { g: &g, c: c.as_mut_ptr() }) };
                for (got, want) in c.iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{} {m}x{n}x{k}", isa.name);
                }
            }
        }
    }

    #[test]
    fn row_lists_and_column_reads_pick_the_right_elements() {
        let a = noise(4 * 3, 1);
        let b = noise(3 * 16, 2);
        let mut c = vec![7.0; 5 * 16];
        // Row i of the product reads column rows[i] of a [3, 4] matrix.
        Gemm {
            m: 2,
            n: 16,
            k: 3,
            a: &a,
            a_row: 1,
            a_step: 4,
            b: &b,
            b_row: 16,
            c_row: 16,
            a_rows: Some(&[3, 1]),
            c_rows: Some(&[4, 0]),
            accumulate: false,
        }
        .run(&mut c);
        for (source, target) in [(3, 4), (1, 0)] {
            for j in 0..16 {
                let want: f32 = (0..3).map(|l| a[l * 4 + source] * b[l * 16 + j]).sum();
                assert!((c[target * 16 + j] - want).abs() < 1e-6);
            }
        }
        assert!(c[16..64].iter().all(|&x| x == 7.0), "other rows stay");
    }
}
