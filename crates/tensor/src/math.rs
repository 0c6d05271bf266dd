//! Elementary functions written so that loops over them vectorise.
//!
//! No fused multiply-add is used, so every instruction set gives the same bits. Accuracies are
//! asserted below against f64.

use std::f32::consts::FRAC_1_SQRT_2;

use tercet_attention::Element;

/// Partial sums kept by the reductions; fixed, so that sums do not depend on the machine.
const LANES: usize = 32;

/// `eˣ` within 2 ulp; results below 2⁻¹²⁵ are 0, above the largest f32 ∞; NaN stays NaN.
///
/// `x = n·ln 2 + r`, then `eʳ = 1 + r + r²·p(r)` and `2ⁿ` by exponent; p interpolates at the
/// Chebyshev nodes of |r| ≤ ln 2 / 2.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // nine bits, so that n·LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer in the low bits
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = EXP_FIT[0];
    for c in &EXP_FIT[1..] {
        p = p * r + c;
    }
    let p = (p * r * r + r) + 1.0;
    // 2ⁿ⁻¹, doubled afterwards, so that n = 128 has an exponent too.
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(126) << 23;
    let y = p * f32::from_bits(exponent) * 2.0;
    let y = if x > 88.722_83 { f32::INFINITY } else { y };
    if x < -86.643_4 { 0.0 } else { y }
}

/// `(eʳ − 1 − r)/r²`, highest power first.
const EXP_FIT: [f32; 6] =
    [1.989_098_1e-4, 1.393_364_2e-3, 8.333_310_9e-3, 4.166_646_5e-2, 1.666_666_7e-1, 5.0e-1];

/// `1 / (1 + e⁻ˣ)` within 4 ulp.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Φ, the distribution function of the standard normal, within 1.5·10⁻⁷.
///
/// With `t = |x|/√2`: below 0.9 the series of `erf t`, above it a fit of the logarithm of
/// `erfc t`, which is accurate relative to its small value.
#[inline(always)]
pub(crate) fn normal_cdf(x: f32) -> f32 {
    let t = x.abs() * FRAC_1_SQRT_2;
    let z = t * t;
    let mut series = ERF_SERIES[0];
    for c in &ERF_SERIES[1..] {
        series = series * z + c;
    }
    let u = 1.0 / (1.0 + 0.5 * t);
    let mut fit = ERFC_FIT[0];
    for c in &ERFC_FIT[1..] {
        fit = fit * u + c;
    }
    let tail = if t < 0.9 { 0.5 - 0.5 * t * series } else { 0.5 * u * exp(fit - z) };
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// `2/√π · (−1)ⁿ/(n!(2n + 1))`, n from 9 down to 0.
const ERF_SERIES: [f32; 10] = [
    -1.636_584_4e-7,
    1.646_211_4e-6,
    -1.492_565e-5,
    1.205_533_26e-4,
    -8.548_327e-4,
    5.223_978e-3,
    -2.686_617_1e-2,
    1.128_379_2e-1,
    -3.761_263_9e-1,
    std::f32::consts::FRAC_2_SQRT_PI,
];

/// `ln(erfc t) + t² − ln u` as a polynomial in `u = 1/(1 + t/2)`, highest power first: its
/// interpolation at the Chebyshev nodes of 0.9 ≤ t ≤ 9.5, within 5·10⁻⁸.
const ERFC_FIT: [f32; 8] = [
    -1.857_019_8e-1,
    7.726_367e-1,
    -1.067_426_9,
    4.249_997e-1,
    -8.182_587_5e-2,
    4.064_254_4e-1,
    9.967_424e-1,
    -1.265_370_5,
];

/// Adds up `LANES` partial sums in a fixed tree.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ f(aᵢ, bᵢ, cᵢ)` in a fixed order.
#[inline(always)]
pub(crate) fn sum3<A: Element, B: Element, C: Element>(
    a: &[A],
    b: &[B],
    c: &[C],
    f: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_full, a_rest) = a.as_chunks::<LANES>();
    let (b_full, b_rest) = b.as_chunks::<LANES>();
    let (c_full, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a_full.iter().zip(b_full).zip(c_full) {
        for i in 0..LANES {
            lanes[i] += f(a[i].to_f32(), b[i].to_f32(), c[i].to_f32());
        }
    }
    for (((lane, a), b), c) in lanes.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
        *lane += f(a.to_f32(), b.to_f32(), c.to_f32());
    }
    fold(lanes)
}

/// `Σ f(aᵢ)` in a fixed order.
#[inline(always)]
pub(crate) fn sum<A: Element>(a: &[A], f: impl Fn(f32) -> f32) -> f32 {
    sum3(a, a, a, |x, _, _| f(x))
}

/// `Σ aᵢ·bᵢ` in a fixed order.
#[inline(always)]
pub(crate) fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    sum3(a, b, b, |x, y, _| x * y)
}

/// `Σᵢ aᵢ·bₙᵢ` for each n, in an order that N has no part in; `a` is read, and widened, once.
#[inline(always)]
pub(crate) fn dots<const N: usize, A: Element>(a: &[A], b: [&[f32]; N]) -> [f32; N] {
    let whole = a.len() - a.len() % LANES;
    let (a, a_rest) = a.split_at(whole);
    // One alone has no use for the loop over n, which compiles to slower code.
    let mut sums = if N == 1 { [dot(a, &b[0][..whole]); N] } else { whole_dots(a, b) };
    for n in 0..N {
        for (a, b) in a_rest.iter().zip(&b[n][whole..]) {
            sums[n] += a.to_f32() * b;
        }
    }
    sums
}

/// [`dots`] of whole lanes, with the bits of [`dot`].
#[inline(always)]
fn whole_dots<const N: usize, A: Element>(a: &[A], b: [&[f32]; N]) -> [f32; N] {
    let mut lanes = [[0f32; LANES]; N];
    let a = a.as_chunks::<LANES>().0;
    let b = b.map(|b| &b.as_chunks::<LANES>().0[..a.len()]);
    // The sums stay in registers only with the loop over n inside, and no other use of them.
    for (at, a) in a.iter().enumerate() {
        for i in 0..LANES {
            let a = a[i].to_f32();
            for n in 0..N {
                lanes[n][i] += a * b[n][at][i];
            }
        }
    }
    // The tree of `fold`, level by level for all n: alone, each would be summed in scalars.
    let (mut sixteen, mut eight, mut four) = ([[0f32; 16]; N], [[0f32; 8]; N], [[0f32; 4]; N]);
    for n in 0..N {
        for i in 0..16 {
            sixteen[n][i] = lanes[n][i] + lanes[n][i + 16];
        }
    }
    for n in 0..N {
        for i in 0..8 {
            eight[n][i] = sixteen[n][i] + sixteen[n][i + 8];
        }
    }
    for n in 0..N {
        for i in 0..4 {
            four[n][i] = eight[n][i] + eight[n][i + 4];
        }
    }
    four.map(|x| (x[0] + x[2]) + (x[1] + x[3]))
}

/// The largest element, −∞ of none; NaN is passed over.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (full, rest) = a.as_chunks::<LANES>();
    for a in full {
        for i in 0..LANES {
            lanes[i] = if a[i] > lanes[i] { a[i] } else { lanes[i] };
        }
    }
    let all = rest.iter().chain(&lanes);
    all.fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the f32 nearest to `exact`.
    fn ulps(got: f32, exact: f64) -> f64 {
        let near = exact as f32;
        let ulp = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
        (f64::from(got) - exact).abs() / ulp.abs()
    }

    /// Every 997th f32 between the bounds, both signs, and zero.
    fn sweep(limit: f32) -> impl Iterator<Item = f32> {
        let positive = (0..=limit.to_bits()).step_by(997).map(f32::from_bits);
        positive.flat_map(|x| [x, -x])
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let worst = sweep(88.7)
            .filter(|&x| x > -86.6)
            .map(|x| ulps(exp(x), libm::exp(f64::from(x))))
            .fold(0.0, f64::max);
        assert!(worst <= 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-87.5), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::MAX), f32::INFINITY);
        assert_eq!(exp(f32::MIN), 0.0);
    }

    #[test]
    fn sigmoid_is_within_four_ulp() {
        let worst = sweep(80.0)
            .map(|x| ulps(sigmoid(x), 1.0 / (1.0 + libm::exp(-f64::from(x)))))
            .fold(0.0, f64::max);
        assert!(worst <= 4.0, "{worst} ulp");
        assert!(sigmoid(f32::NAN).is_nan());
        assert_eq!((sigmoid(1e4), sigmoid(-1e4)), (1.0, 0.0));
    }

    #[test]
    fn the_normal_distribution_is_within_its_bound() {
        let exact = |x: f32| 0.5 * libm::erfc(-f64::from(x) / std::f64::consts::SQRT_2);
        let worst =
            sweep(20.0).map(|x| (f64::from(normal_cdf(x)) - exact(x)).abs()).fold(0.0, f64::max);
        assert!(worst <= 1.5e-7, "{worst}");
        // z = x²/2 carries four roundings, which the exponential turns into a relative error.
        for x in sweep(12.0) {
            let bound = 5e-7 + 4.0 * 0.5 * f64::from(x * x) * 2f64.powi(-24);
            let relative = (f64::from(normal_cdf(x)) - exact(x)).abs() / exact(x);
            assert!(relative <= bound, "{x}: {relative}");
        }
        assert!(normal_cdf(f32::NAN).is_nan());
    }

    #[test]
    fn sums_count_every_element_once() {
        for n in [0, 1, 31, 32, 33, 64, 100] {
            let a: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            assert_eq!(sum(&a, |x| x), (n * (n + 1) / 2) as f32);
            assert_eq!(max(&a), if n == 0 { f32::NEG_INFINITY } else { n as f32 });
        }
        assert_eq!(dot(&[1.0f32, 2.0], &[3.0f32, 4.0]), 11.0);
        for n in [0, 1, 31, 32, 33, 64, 100] {
            let of = |step: usize| (0..n).map(|i| (i * step % 17) as f32).collect();
            let [a, b, c]: [Vec<f32>; 3] = [of(1), of(5), of(7)];
            // Integers below 2²⁴: exact in any order.
            assert_eq!(dots(&a, [&b, &c]), [dot(&a, &b), dot(&a, &c)], "{n}");
        }
    }
}
