//! One body, several instruction sets, chosen when the program runs.

/// Compiles a function's body three times — for the baseline, AVX2 and AVX-512 — and calls the
/// best the machine has. The body must be plain slice loops that the compiler vectorises; what
/// it calls must be `#[inline(always)]`. As nothing is contracted to fused multiply-adds, all
/// versions give the same bits.
macro_rules! multiversion {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($g:ident: $bound:path),+>)? (
            $($arg:ident: $ty:ty),* $(,)?
        ) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    body $(::<$($g),+>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    body $(::<$($g),+>)? ($($arg),*)
                }
                match $crate::simd::level() {
                    // SAFETY: the level says that the machine has every feature the function
                    // is compiled for.
                    $crate::simd::AVX512 => return unsafe { avx512 $(::<$($g),+>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::AVX2 => return unsafe { avx2 $(::<$($g),+>)? ($($arg),*) },
                    _ => {}
                }
            }
            body $(::<$($g),+>)? ($($arg),*)
        }
    };
}
pub(crate) use multiversion;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{AVX2, AVX512, level};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::sync::atomic::{AtomicU8, Ordering};

    const UNKNOWN: u8 = 0;
    const BASELINE: u8 = 1;
    pub(crate) const AVX2: u8 = 2;
    pub(crate) const AVX512: u8 = 3;

    /// The best instruction set of this machine; asked once.
    #[inline]
    pub(crate) fn level() -> u8 {
        static LEVEL: AtomicU8 = AtomicU8::new(UNKNOWN);
        match LEVEL.load(Ordering::Relaxed) {
            UNKNOWN => {
                let found = detect();
                LEVEL.store(found, Ordering::Relaxed);
                found
            }
            known => known,
        }
    }

    fn detect() -> u8 {
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
            return BASELINE;
        }
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if wide { AVX512 } else { AVX2 }
    }
}
