//! The yardstick: how fast this machine multiplies matrices right now.
//!
//! Rates of kernels and training steps are given as a share of it, so that a figure means the
//! same on a laptop, a busy server and a slow virtual machine. It is measured in the same run,
//! with the same threads, as whatever it is compared with.

use std::time::Instant;

use tercet_cuda::{Gpu, Matmul, Number};

use crate::device::Choice;

/// Side of the square product that is timed.
pub const SIDE: usize = 1024;

/// Side of the product that is timed on a GPU: as large as those of a language model's layers.
const GPU_SIDE: usize = 8192;

/// GFLOP/s of a matrix product where a verb computes: `gemm`'s on the CPU, cuBLASLt's on a GPU (of
/// bf16 numbers or of f32 ones, 8192³).
pub fn matmul_gflops(device: &Choice, bf16: bool, runs: usize) -> anyhow::Result<f64> {
    match device {
        Choice::Cpu => Ok(gemm_gflops(runs)),
        Choice::Cuda(gpu) => {
            Ok(gpu_gflops(gpu, if bf16 { Number::BF16 } else { Number::F32 }, runs)?)
        }
    }
}

fn gpu_gflops(gpu: &Gpu, number: Number, runs: usize) -> tercet_cuda::Result<f64> {
    let side = if number == Number::F32 { GPU_SIDE / 2 } else { GPU_SIDE };
    // Small numbers without a pattern: multiplying zeros draws less power and clocks higher.
    let words: Vec<u32> = (0..side * side * number.bytes() / 4)
        .map(|i| (((i as u32).wrapping_mul(0x9e37_79b9) >> 2) & 0x03ff_03ff) | 0x3c00_3c00)
        .collect();
    let (a, b) = (gpu.upload(&words)?, gpu.upload(&words)?);
    let c = gpu.alloc(side * side * number.bytes())?;
    let product = Matmul::new([side; 3], number, a.ptr(), b.ptr(), c.ptr());
    let mut times = Vec::new();
    for _ in 0..=runs.max(1) {
        // SAFETY: the three buffers hold side² numbers each and live to the end of this function.
        times.push(gpu.time(|| unsafe { gpu.matmul(&product) })?);
    }
    // The first chooses an algorithm.
    let times = &mut times[1..];
    times.sort_by(f32::total_cmp);
    let seconds = f64::from(times[times.len() / 2]) / 1e3;
    Ok(2.0 * (side as f64).powi(3) / seconds / 1e9)
}

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
