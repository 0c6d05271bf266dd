//! The arithmetic of the CPU operator: a small matrix product and three softmax steps.
//!
//! Everything above this room is safe code over slices: the functions here check every extent,
//! then run the version for the best instruction set the machine has. Each result element is
//! computed by the same sequence of operations whatever the tile around it, so that prefill,
//! decode and any split over threads give the same bits.

mod gemm;
mod lanes;
mod softmax;

use std::sync::OnceLock;

pub(super) use gemm::Gemm;
pub(super) use softmax::{Backward, Online, Scale, total as sum_lanes};

/// Widths of packed rows are multiples of this, for every instruction set.
pub(super) const PAD: usize = 16;

/// Rounds up to a whole number of vectors.
pub(super) fn pad(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// The versions of one instruction set.
struct Isa {
    name: &'static str,
    gemm: unsafe fn(&gemm::Raw),
    online: unsafe fn(&softmax::RawOnline),
    rows: unsafe fn(*mut f32, usize, Scale) -> (f32, f32),
    backward: unsafe fn(&softmax::RawBackward),
    add_scaled: unsafe fn(*const f32, f32, *mut f32, usize),
    dot: unsafe fn(*const f32, *const f32, usize) -> f32,
}

macro_rules! isa {
    ($module:ident, $lanes:ty, $name:literal $(, $feature:literal)?) => {
        mod $module {
            use super::{Isa, gemm, lanes, softmax};

            // SAFETY (every function below): called only through `ISA`, which `isa()` hands out
            // on machines that have the feature; arguments are checked by the callers in
            // `gemm.rs` and `softmax.rs`.
            $(#[target_feature(enable = $feature)])?
            unsafe fn run_gemm(x: &gemm::Raw) {
                // SAFETY: see above.
                unsafe { gemm::run::<$lanes>(x) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn online(x: &softmax::RawOnline) {
                // SAFETY: see above.
                unsafe { softmax::online::<$lanes>(x) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn rows(s: *mut f32, n: usize, scale: softmax::Scale) -> (f32, f32) {
                // SAFETY: see above.
                unsafe { softmax::row::<$lanes>(s, n, scale) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn backward(x: &softmax::RawBackward) {
                // SAFETY: see above.
                unsafe { softmax::backward::<$lanes>(x) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn add_scaled(x: *const f32, a: f32, y: *mut f32, n: usize) {
                // SAFETY: see above.
                unsafe { softmax::add_scaled::<$lanes>(x, a, y, n) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn dot(x: *const f32, y: *const f32, n: usize) -> f32 {
                // SAFETY: see above.
                unsafe { softmax::dot::<$lanes>(x, y, n) }
            }
            pub(super) static ISA: Isa =
                Isa { name: $name, gemm: run_gemm, online, rows, backward, add_scaled, dot };
        }
    };
}

#[cfg(target_arch = "x86_64")]
isa!(avx512, lanes::Avx512, "AVX-512", "avx512f");
#[cfg(target_arch = "x86_64")]
isa!(avx2, lanes::Avx2, "AVX2", "avx2,fma");
#[cfg(target_arch = "aarch64")]
isa!(neon, lanes::Neon, "NEON", "neon");
isa!(scalar, lanes::Scalar, "scalar");

/// The best instruction set of this machine, found once.
fn isa() -> &'static Isa {
    static BEST: OnceLock<&'static Isa> = OnceLock::new();
    BEST.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return &avx512::ISA;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return &avx2::ISA;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            return &neon::ISA;
        }
        &scalar::ISA
    })
}

/// Every instruction set this machine can run, best first.
#[cfg(test)]
fn every_isa() -> Vec<&'static Isa> {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            all.push(&avx512::ISA);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(&avx2::ISA);
        }
    }
    #[cfg(target_arch = "aarch64")]
    all.push(&neon::ISA);
    all.push(&scalar::ISA);
    all
}

/// The name of the instruction set in use.
pub fn isa_name() -> &'static str {
    isa().name
}

/// Turns a row of raw scores into unnormalised probabilities exp(scale·(s − max)) in place;
/// returns (max, sum). The row may end with −∞ padding; its length is a multiple of [`PAD`].
pub(super) fn softmax_row(s: &mut [f32], scale: Scale) -> (f32, f32) {
    assert!(s.len().is_multiple_of(PAD));
    // SAFETY: the length is whole vectors; the table fits the machine.
    unsafe { (isa().rows)(s.as_mut_ptr(), s.len(), scale) }
}

/// `y += a·x`.
pub(super) fn add_scaled(x: &[f32], a: f32, y: &mut [f32]) {
    assert!(x.len() == y.len());
    // SAFETY: both have the length; the table fits the machine.
    unsafe { (isa().add_scaled)(x.as_ptr(), a, y.as_mut_ptr(), x.len()) }
}

/// Σ x·y, in a fixed order.
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    assert!(x.len() == y.len());
    // SAFETY: both have the length; the table fits the machine.
    unsafe { (isa().dot)(x.as_ptr(), y.as_ptr(), x.len()) }
}
