//! Matrix products through the `gemm` crate: f32 arithmetic, any of the operands transposed by
//! strides rather than by copying.
//!
//! `gemm` splits rows and columns between threads but never the inner sum, so its bits do not
//! depend on the number of threads (asserted by the tests of this crate).

use std::ops::Deref;

use crate::parallel;
use crate::pool::Buffer;
use half::bf16;

/// A matrix seen through strides.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl<'a> Mat<'a> {
    /// `rows × cols`, row-major.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix view must cover its slice");
        Mat { data, rows, cols, transposed: false }
    }

    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        Mat { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Row and column stride.
    fn strides(&self) -> (isize, isize) {
        if self.transposed { (1, self.rows as isize) } else { (self.cols as isize, 1) }
    }
}

/// `out = a·b`, or `out += a·b` when `add`; out is row-major.
pub(crate) fn matmul(out: &mut [f32], a: Mat, b: Mat, add: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(b.rows, k, "inner dimensions of a product must agree");
    assert_eq!(out.len(), m * n, "a product must cover its output");
    if out.is_empty() {
        return;
    }
    if k == 0 {
        if !add {
            out.fill(0.0);
        }
        return;
    }
    let ((a_rs, a_cs), (b_rs, b_cs)) = (a.strides(), b.strides());
    // SAFETY: the assertions of `Mat::new` and above make every index inside the three slices;
    // `out` is borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a_cs,
            a_rs,
            b.data.as_ptr(),
            b_cs,
            b_rs,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// f32 numbers, borrowed when they were f32 all along.
pub(crate) enum Wide<'a> {
    Borrowed(&'a [f32]),
    Owned(Buffer<f32>),
}

impl Deref for Wide<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Wide::Borrowed(x) => x,
            Wide::Owned(x) => x,
        }
    }
}

/// Storage types that products can read and write.
pub(crate) trait Widen: Sized {
    /// As f32; a copy only for bf16.
    fn widen(x: &[Self]) -> Wide<'_>;
    /// Lets `f` write f32 and rounds the result; for f32 there is no detour. `f` finds the old
    /// numbers there when `keep`.
    fn write(out: &mut [Self], keep: bool, f: impl FnOnce(&mut [f32]));
}

impl Widen for f32 {
    fn widen(x: &[f32]) -> Wide<'_> {
        Wide::Borrowed(x)
    }
    fn write(out: &mut [f32], _keep: bool, f: impl FnOnce(&mut [f32])) {
        f(out);
    }
}

impl Widen for bf16 {
    fn widen(x: &[bf16]) -> Wide<'_> {
        Wide::Owned(crate::tensor::convert(x))
    }
    fn write(out: &mut [bf16], keep: bool, f: impl FnOnce(&mut [f32])) {
        let mut wide = if keep { crate::tensor::convert(out) } else { Buffer::stale(out.len()) };
        f(&mut wide);
        parallel::map(out, &wide, crate::tensor::convert_slice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed;
        (0..n)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect()
    }

    #[test]
    fn products_do_not_depend_on_the_number_of_threads() {
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let pools = [pool(1), pool(2), pool(3), pool(7)];
        for (m, n, k) in [
            (2048, 256, 256),
            (2048, 688, 256),
            (256, 688, 2048),
            (513, 512, 256),
            (17, 33, 1000),
            (5, 1000, 257),
            (300, 4, 2000),
        ] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let (at, bt) = (Mat::new(&a, k, m).t(), Mat::new(&b, n, k).t());
            for (a, b) in [
                (Mat::new(&a, m, k), Mat::new(&b, k, n)),
                (Mat::new(&a, m, k), bt),
                (at, Mat::new(&b, k, n)),
            ] {
                let run = |pool: &rayon::ThreadPool, add| {
                    let mut out = numbers(m * n, 3);
                    pool.install(|| matmul(&mut out, a, b, add));
                    out
                };
                for add in [false, true] {
                    let one = run(&pools[0], add);
                    for pool in &pools[1..] {
                        assert!(one == run(pool, add), "{m}x{n}x{k} add {add}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_empty_inner_sum_is_zero_or_keeps_the_output() {
        let mut out = [7.0; 6];
        matmul(&mut out, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), true);
        assert_eq!(out, [7.0; 6]);
        matmul(&mut out, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), false);
        assert_eq!(out, [0.0; 6]);
    }
}
