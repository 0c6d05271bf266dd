//! The yardstick: how fast this machine multiplies matrices right now.
//!
//! Rates of kernels and training steps are given as a share of it, so that a figure means the
//! same on a laptop, a busy server and a slow virtual machine. It is measured in the same run,
//! with the same threads, as whatever it is compared with.

use std::time::Instant;

/// Side of the square product that is timed.
pub const SIDE: usize = 1024;

/// GFLOP/s of `gemm`'s f32 1024³ product on all threads of the pool: the median of `runs` after
/// one warm-up.
pub fn gemm_gflops(runs: usize) -> f64 {
    let threads = rayon::current_num_threads();
    let (a, b) = (ramp(1), ramp(2));
    let mut c = vec![0.0f32; SIDE * SIDE];
    let mut times: Vec<f64> = (0..=runs.max(1))
        .map(|_| {
            let start = Instant::now();
            product(&mut c, &a, &b, threads);
            start.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    std::hint::black_box(&c);
    times.sort_by(f64::total_cmp);
    2.0 * (SIDE as f64).powi(3) / times[times.len() / 2] / 1e9
}

/// Small numbers without a pattern that a multiplication could skip.
fn ramp(seed: usize) -> Vec<f32> {
    (0..SIDE * SIDE).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 / 1000.0 - 0.5).collect()
}

/// `c = a · b`, all row-major `SIDE × SIDE`.
fn product(c: &mut [f32], a: &[f32], b: &[f32], threads: usize) {
    assert!([c.len(), a.len(), b.len()] == [SIDE * SIDE; 3]);
    let parallelism =
        if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    let (n, row, column) = (SIDE, SIDE as isize, 1);
    // SAFETY: the three slices hold SIDE² elements (asserted above) and the strides walk exactly
    // those; `c` is borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            n,
            n,
            n,
            c.as_mut_ptr(),
            column,
            row,
            false,
            a.as_ptr(),
            column,
            row,
            b.as_ptr(),
            column,
            row,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timed_product_is_the_product() {
        let (a, b) = (ramp(1), ramp(2));
        let mut c = vec![f32::NAN; SIDE * SIDE];
        product(&mut c, &a, &b, 1);
        for (i, j) in [(0, 0), (1, 1023), (1023, 5), (511, 512)] {
            let exact: f64 =
                (0..SIDE).map(|k| f64::from(a[i * SIDE + k]) * f64::from(b[k * SIDE + j])).sum();
            // 1024 products of numbers below 1/2, each rounded: at most 1024² · ε/2 · 1/4.
            let bound = (SIDE * SIDE) as f64 * f64::from(f32::EPSILON) / 8.0;
            assert!((f64::from(c[i * SIDE + j]) - exact).abs() <= bound);
        }
    }
}
