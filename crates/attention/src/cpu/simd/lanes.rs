//! A vector of f32 lanes per instruction set: the only names the kernels use.

/// Vector operations of one instruction set.
///
/// Every function is unsafe for one reason: the caller must run inside a function compiled with
/// the instruction set's target features, on a machine that has them. `load` and `store`
/// additionally need `LANES` readable or writable floats.
pub(super) trait Lanes: Copy {
    /// A vector.
    type V: Copy;
    /// Floats in a vector.
    const LANES: usize;
    /// Vectors of B that one micro-tile spans; with 6 rows it fills the register file.
    const SPAN: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a·b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// The larger; which one a NaN gives is unspecified.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of x and 0; NaN for NaN.
    unsafe fn at_most_zero(x: Self::V) -> Self::V;
    /// 2^x for x ≤ 127: 0 far below, NaN for NaN.
    unsafe fn exp2(x: Self::V) -> Self::V;
}

/// Minimax coefficients of (2^r − 1)/r on |r| ≤ ½, highest power first (Cephes `exp2f`).
const EXP2: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 2.402_264_8e-1, 6.931_472e-1];

/// 2^r on |r| ≤ ½.
#[inline(always)]
unsafe fn exp2_poly<L: Lanes>(r: L::V) -> L::V {
    // SAFETY: the caller upholds the trait's contract.
    unsafe {
        let mut p = L::splat(EXP2[0]);
        for &c in &EXP2[1..] {
            p = L::fma(p, r, L::splat(c));
        }
        L::fma(p, r, L::splat(1.0))
    }
}

/// Plain Rust: any machine.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Lanes for Scalar {
    type V = f32;
    const LANES: usize = 1;
    const SPAN: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> f32 {
        // SAFETY: one readable float, by contract.
        unsafe { *p }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: f32) {
        // SAFETY: one writable float, by contract.
        unsafe { *p = v }
    }
    #[inline(always)]
    unsafe fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    unsafe fn sub(a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    unsafe fn max(a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    unsafe fn at_most_zero(x: f32) -> f32 {
        if x > 0.0 { 0.0 } else { x }
    }
    #[inline(always)]
    unsafe fn exp2(x: f32) -> f32 {
        x.exp2()
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, exp2_poly};

    /// AVX-512 F.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    // SAFETY (every block below): the intrinsics need AVX-512 F and, for load and store, 16
    // floats; both are the contract of `Lanes`.
    impl Lanes for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const SPAN: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: see the impl.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see the impl.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn at_most_zero(x: __m512) -> __m512 {
            // SAFETY: see the impl. min returns its second operand for NaN.
            unsafe { _mm512_min_ps(_mm512_setzero_ps(), x) }
        }
        #[inline(always)]
        unsafe fn exp2(x: __m512) -> __m512 {
            // SAFETY: see the impl.
            unsafe {
                // max returns its second operand for NaN, which keeps NaN alive; the clamp keeps
                // x − round(x) finite for −∞, and scalef then underflows to 0.
                let x = _mm512_max_ps(_mm512_set1_ps(-200.0), x);
                let n = _mm512_roundscale_ps::<0x08>(x);
                _mm512_scalef_ps(exp2_poly::<Self>(_mm512_sub_ps(x, n)), n)
            }
        }
    }

    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    // SAFETY (every block below): the intrinsics need AVX2 and FMA and, for load and store, 8
    // floats; both are the contract of `Lanes`.
    impl Lanes for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const SPAN: usize = 2;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: see the impl.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see the impl.
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn at_most_zero(x: __m256) -> __m256 {
            // SAFETY: see the impl. min returns its second operand for NaN.
            unsafe { _mm256_min_ps(_mm256_setzero_ps(), x) }
        }
        #[inline(always)]
        unsafe fn exp2(x: __m256) -> __m256 {
            // SAFETY: see the impl.
            unsafe {
                // max returns its second operand for NaN, which keeps NaN alive.
                let low = _mm256_set1_ps(-126.0);
                let kept = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, low);
                let x = _mm256_max_ps(low, x);
                let n = _mm256_round_ps::<0x08>(x);
                let p = exp2_poly::<Self>(_mm256_sub_ps(x, n));
                let bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits));
                _mm256_and_ps(_mm256_mul_ps(p, power), kept)
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{Lanes, exp2_poly};

    /// NEON, part of every AArch64.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Neon;

    // SAFETY (every block below): the intrinsics need NEON and, for load and store, 4 floats;
    // both are the contract of `Lanes`.
    impl Lanes for Neon {
        type V = float32x4_t;
        const LANES: usize = 4;
        const SPAN: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vld1q_f32(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: float32x4_t) {
            // SAFETY: see the impl.
            unsafe { vst1q_f32(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vfmaq_f32(c, a, b) }
        }
        #[inline(always)]
        unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vaddq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vsubq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vmulq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe { vmaxq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn at_most_zero(x: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl. vminq keeps NaN alive.
            unsafe { vminq_f32(x, vdupq_n_f32(0.0)) }
        }
        #[inline(always)]
        unsafe fn exp2(x: float32x4_t) -> float32x4_t {
            // SAFETY: see the impl.
            unsafe {
                // vmaxq keeps NaN alive.
                let low = vdupq_n_f32(-126.0);
                let dropped = vcltq_f32(x, low);
                let x = vmaxq_f32(low, x);
                let n = vrndnq_f32(x);
                let p = exp2_poly::<Self>(vsubq_f32(x, n));
                let bits = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                let power = vreinterpretq_f32_s32(vshlq_n_s32::<23>(bits));
                let value = vreinterpretq_u32_f32(vmulq_f32(p, power));
                vreinterpretq_f32_u32(vbicq_u32(value, dropped))
            }
        }
    }
}
