//! Softmax steps on tiles of raw scores q·k; the scale is applied inside the exponential.

use super::lanes::Lanes;
use super::{PAD, isa};

/// The softmax scale times log2 e, so that exp becomes exp2, in two parts.
///
/// One f32 would be off by up to 2⁻²⁵, which turns every probability of a row the same way, and
/// sums of gradients would see it; hi + lo is exact to 2⁻⁴⁷. `lo` is always above 0, so that −∞
/// times it stays −∞.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Scale {
    hi: f32,
    lo: f32,
}

impl Scale {
    /// Of a positive, finite scale.
    pub fn new(scale: f32) -> Self {
        let exact = f64::from(scale) * std::f64::consts::LOG2_E;
        let nearest = exact as f32;
        let hi = if f64::from(nearest) < exact { nearest } else { nearest.next_down() };
        Self { hi, lo: (exact - f64::from(hi)) as f32 }
    }

    /// 2^(scale·t), t ≤ 0.
    fn exp2(self, t: f32) -> f32 {
        t.mul_add(self.hi, t * self.lo).exp2()
    }
}

/// 2^(scale·(s − max)): exactly 1 at the maximum however large it is, 0 for −∞.
#[inline(always)]
unsafe fn exp2_below<L: Lanes>(s: L::V, max: L::V, hi: L::V, lo: L::V) -> L::V {
    // SAFETY: the caller upholds the contract of `Lanes`.
    unsafe {
        let t = L::sub(s, max);
        L::exp2(L::fma(t, hi, L::mul(t, lo)))
    }
}

/// One step of the online softmax (Milakov & Gimelshein 2018; FlashAttention) over a tile.
pub(in super::super) struct Online<'a> {
    /// Columns of the tile, a multiple of [`PAD`].
    pub width: usize,
    /// Visible columns of each tile row: from, to. The rest become 0.
    pub visible: &'a [(u32, u32)],
    /// The state row of each tile row; in order when absent.
    pub rows: Option<&'a [u32]>,
    /// Columns of the output rows, a multiple of [`PAD`].
    pub out_width: usize,
    /// Softmax scale.
    pub scale: Scale,
}

/// [`Online`] with its buffers, checked.
pub(super) struct RawOnline<'a> {
    x: &'a Online<'a>,
    s: *mut f32,
    max: *mut f32,
    sum: *mut f32,
    out: *mut f32,
}

impl Online<'_> {
    /// Scores `s` `[m, width]` become probabilities relative to the running maximum `max`
    /// `[rows]` of raw scores; the running sums `sum` `[rows, PAD]` and outputs `out` `[rows, out_width]` are
    /// rescaled where the maximum grew.
    pub fn run(&self, s: &mut [f32], max: &mut [f32], sum: &mut [f32], out: &mut [f32]) {
        let m = self.visible.len();
        let last = match self.rows {
            None => m,
            Some(rows) => {
                assert!(rows.len() == m, "a row list of another length");
                rows.iter().max().map_or(0, |&r| r as usize + 1)
            }
        };
        assert!(self.width.is_multiple_of(PAD) && self.out_width.is_multiple_of(PAD));
        assert!(m * self.width <= s.len(), "the score tile is too short");
        assert!(last <= max.len() && last * PAD <= sum.len(), "the state is too short");
        assert!(last * self.out_width <= out.len(), "the output is too short");
        let ends = self.visible.iter().all(|&(a, b)| a <= b && b as usize <= self.width);
        assert!(ends, "a visible range leaves the tile");
        let raw = RawOnline {
            x: self,
            s: s.as_mut_ptr(),
            max: max.as_mut_ptr(),
            sum: sum.as_mut_ptr(),
            out: out.as_mut_ptr(),
        };
        // SAFETY: extents checked above; the table fits the machine.
        unsafe { (isa().online)(&raw) }
    }
}

#[inline(always)]
pub(super) unsafe fn online<L: Lanes>(raw: &RawOnline) {
    let x = raw.x;
    // SAFETY: rows and columns are inside the extents that `Online::run` checked.
    unsafe {
        for (i, &(from, to)) in x.visible.iter().enumerate() {
            let s = raw.s.add(i * x.width);
            hide::<L>(s, x.width, from as usize, to as usize, f32::NEG_INFINITY);
            if from == to {
                hide::<L>(s, x.width, 0, 0, 0.0);
                continue;
            }
            let row = x.rows.map_or(i, |rows| *rows.get_unchecked(i) as usize);
            let old = *raw.max.add(row);
            let new = reduce_max::<L>(s, x.width).max(old);
            let sum = raw.sum.add(row * PAD);
            if new > old {
                let factor = if old == f32::NEG_INFINITY { 0.0 } else { x.scale.exp2(old - new) };
                *raw.max.add(row) = new;
                scale::<L>(sum, factor, PAD);
                scale::<L>(raw.out.add(row * x.out_width), factor, x.out_width);
            }
            exp2_and_sum::<L>(s, x.width, x.scale, new, sum);
        }
    }
}

/// Sets everything outside `from..to` to `value`.
#[inline(always)]
unsafe fn hide<L: Lanes>(s: *mut f32, width: usize, from: usize, to: usize, value: f32) {
    // SAFETY: from ≤ to ≤ width.
    unsafe {
        for j in 0..from {
            *s.add(j) = value;
        }
        for j in to..width {
            *s.add(j) = value;
        }
    }
}

#[inline(always)]
unsafe fn scale<L: Lanes>(x: *mut f32, factor: f32, n: usize) {
    // SAFETY: n is whole vectors.
    unsafe {
        let f = L::splat(factor);
        for j in (0..n).step_by(L::LANES) {
            L::store(x.add(j), L::mul(L::load(x.add(j)), f));
        }
    }
}

#[inline(always)]
unsafe fn reduce_max<L: Lanes>(s: *const f32, n: usize) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; PAD];
    // SAFETY: n is whole vectors, at least one.
    unsafe {
        let mut best = L::load(s);
        for j in (L::LANES..n).step_by(L::LANES) {
            best = L::max(best, L::load(s.add(j)));
        }
        L::store(lanes.as_mut_ptr(), best);
    }
    let mut half = PAD / 2;
    while half > 0 {
        for j in 0..half {
            lanes[j] = if lanes[j] > lanes[j + half] { lanes[j] } else { lanes[j + half] };
        }
        half /= 2;
    }
    lanes[0]
}

/// s ← 2^(scale·(s − max)); adds to the [`PAD`] partial sums.
#[inline(always)]
unsafe fn exp2_and_sum<L: Lanes>(s: *mut f32, n: usize, scale: Scale, max: f32, sum: *mut f32) {
    // A row whose scores are all −∞ has nothing to weigh; any finite maximum gives zeros.
    let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
    // SAFETY: n and PAD are whole vectors.
    unsafe {
        let (hi, lo, m) = (L::splat(scale.hi), L::splat(scale.lo), L::splat(max));
        for lane in (0..PAD).step_by(L::LANES) {
            let mut total = L::load(sum.add(lane));
            for j in (lane..n).step_by(PAD) {
                let p = exp2_below::<L>(L::load(s.add(j)), m, hi, lo);
                L::store(s.add(j), p);
                total = L::add(total, p);
            }
            L::store(sum.add(lane), total);
        }
    }
}

/// See [`super::softmax_row`].
#[inline(always)]
pub(super) unsafe fn row<L: Lanes>(s: *mut f32, n: usize, scale: Scale) -> (f32, f32) {
    if n == 0 {
        return (f32::NEG_INFINITY, 0.0);
    }
    let mut sum = [0.0; PAD];
    // SAFETY: n is whole vectors, by contract.
    unsafe {
        let max = reduce_max::<L>(s, n);
        exp2_and_sum::<L>(s, n, scale, max, sum.as_mut_ptr());
        (max, total(&sum))
    }
}

/// The sum of [`PAD`] partial sums, pairwise.
pub(in super::super) fn total(lanes: &[f32]) -> f32 {
    let mut x = [0.0; PAD];
    x.copy_from_slice(lanes);
    let mut half = PAD / 2;
    while half > 0 {
        for j in 0..half {
            x[j] += x[j + half];
        }
        half /= 2;
    }
    x[0]
}

/// Softmax backward on a tile: P from scores and row constants, dS from dP.
pub(in super::super) struct Backward<'a> {
    /// Columns of the tile, a multiple of [`PAD`].
    pub width: usize,
    /// Visible columns of each row; P and dS are 0 elsewhere.
    pub visible: &'a [(u32, u32)],
    /// Base-2 log-sum-exp of each row, `[m]` high parts then `[m]` low parts: rounding it to one
    /// f32 would turn all of a row's probabilities the same way.
    pub lse: &'a [f32],
    /// Δ = ⟨dO, O⟩ of each row.
    pub delta: &'a [f32],
    /// Softmax scale.
    pub scale: Scale,
}

/// [`Backward`] with its buffers, checked.
pub(super) struct RawBackward<'a> {
    x: &'a Backward<'a>,
    s: *mut f32,
    d: *mut f32,
}

impl Backward<'_> {
    /// `s`: scores become P = 2^(scale·s − lse). `d`: dP becomes dS = P∘(dP − Δ).
    pub fn run(&self, s: &mut [f32], d: &mut [f32]) {
        let m = self.visible.len();
        assert!(self.width.is_multiple_of(PAD));
        assert!(m * self.width <= s.len() && m * self.width <= d.len(), "a tile is too short");
        assert!(
            self.lse.len() == 2 * m && self.delta.len() == m,
            "row constants of another length"
        );
        let ends = self.visible.iter().all(|&(a, b)| a <= b && b as usize <= self.width);
        assert!(ends, "a visible range leaves the tile");
        // SAFETY: extents checked above; the table fits the machine.
        unsafe { (isa().backward)(&RawBackward { x: self, s: s.as_mut_ptr(), d: d.as_mut_ptr() }) }
    }
}

#[inline(always)]
pub(super) unsafe fn backward<L: Lanes>(raw: &RawBackward) {
    let x = raw.x;
    // SAFETY: rows and columns are inside the extents that `Backward::run` checked.
    unsafe {
        for (i, &(from, to)) in x.visible.iter().enumerate() {
            let (s, d) = (raw.s.add(i * x.width), raw.d.add(i * x.width));
            if from < to {
                let (hi, lo) = (L::splat(x.scale.hi), L::splat(x.scale.lo));
                let lse = *x.lse.get_unchecked(i);
                let minus_low = L::splat(-*x.lse.get_unchecked(x.visible.len() + i));
                let (minus_lse, delta) = (L::splat(-lse), L::splat(*x.delta.get_unchecked(i)));
                for j in (0..x.width).step_by(L::LANES) {
                    let score = L::load(s.add(j));
                    let small = L::fma(score, lo, minus_low);
                    let exponent = L::add(L::fma(score, hi, minus_lse), small);
                    // A probability: whatever rounding does to huge scores, at most 1.
                    let p = L::exp2(L::at_most_zero(exponent));
                    L::store(s.add(j), p);
                    L::store(d.add(j), L::mul(p, L::sub(L::load(d.add(j)), delta)));
                }
            }
            hide::<L>(s, x.width, from as usize, to as usize, 0.0);
            hide::<L>(d, x.width, from as usize, to as usize, 0.0);
        }
    }
}

/// See [`super::add_scaled`].
#[inline(always)]
pub(super) unsafe fn add_scaled<L: Lanes>(x: *const f32, a: f32, y: *mut f32, n: usize) {
    // SAFETY: both have n floats.
    unsafe {
        let f = L::splat(a);
        let whole = n - n % L::LANES;
        for j in (0..whole).step_by(L::LANES) {
            L::store(y.add(j), L::fma(f, L::load(x.add(j)), L::load(y.add(j))));
        }
        for j in whole..n {
            *y.add(j) += a * *x.add(j);
        }
    }
}

/// See [`super::dot`].
#[inline(always)]
pub(super) unsafe fn dot<L: Lanes>(x: *const f32, y: *const f32, n: usize) -> f32 {
    let mut sum = [0.0; PAD];
    // SAFETY: both have n floats.
    unsafe {
        let whole = n - n % PAD;
        for lane in (0..PAD).step_by(L::LANES) {
            let mut acc = L::splat(0.0);
            for j in (lane..whole).step_by(PAD) {
                acc = L::fma(L::load(x.add(j)), L::load(y.add(j)), acc);
            }
            L::store(sum.as_mut_ptr().add(lane), acc);
        }
        for j in whole..n {
            sum[j - whole] += *x.add(j) * *y.add(j);
        }
    }
    total(&sum)
}

#[cfg(test)]
mod tests {
    use super::super::every_isa;
    use super::*;

    /// The scale that makes exponents equal scores.
    fn one() -> Scale {
        Scale { hi: 1.0, lo: f32::MIN_POSITIVE }
    }

    #[test]
    fn the_two_parts_of_a_scale_are_exact_and_keep_minus_infinity() {
        for scale in [1.0f32, 0.125, 0.072_168_78, 3.7e-3, 55.0] {
            let parts = Scale::new(scale);
            let exact = f64::from(scale) * std::f64::consts::LOG2_E;
            let error = f64::from(parts.hi) + f64::from(parts.lo) - exact;
            // lo is at most 2⁻²³ of the whole and itself rounded to 2⁻²⁴.
            let bound = exact * 2f64.powi(-47);
            assert!(parts.lo > 0.0 && error.abs() <= bound, "{scale}: {error}");
        }
    }

    #[test]
    fn exp2_is_within_two_ulp_and_keeps_zero_and_nan() {
        for isa in every_isa() {
            // A maximum of 0 at the front makes the row's probabilities exp2 of the scores.
            for chunk in 0..400 {
                let mut s: Vec<f32> = (0..PAD).map(|i| -0.0197 * (chunk * 15 + i) as f32).collect();
                s[0] = 0.0;
                let want: Vec<f64> = s.iter().map(|&x| f64::from(x).exp2()).collect();
                // SAFETY: PAD floats.
                let (max, _) = unsafe { (isa.rows)(s.as_mut_ptr(), PAD, one()) };
                assert_eq!(max, 0.0);
                for (got, want) in s.iter().zip(want) {
                    assert!((f64::from(*got) - want).abs() <= 2.4e-7 * want, "{}", isa.name);
                }
            }
            let mut s = [f32::NEG_INFINITY; PAD];
            s[3] = 5.0;
            s[4] = -1000.0;
            // SAFETY: PAD floats.
            let (max, sum) = unsafe { (isa.rows)(s.as_mut_ptr(), PAD, one()) };
            assert_eq!((max, sum, s[3], s[4], s[0]), (5.0, 1.0, 1.0, 0.0, 0.0));
            s[7] = f32::NAN;
            // SAFETY: PAD floats.
            let (_, sum) = unsafe { (isa.rows)(s.as_mut_ptr(), PAD, one()) };
            assert!(sum.is_nan(), "{}", isa.name);
        }
    }

    #[test]
    fn two_online_steps_equal_one_softmax() {
        let scores: Vec<f32> = (0..32).map(|i| ((i * 37) % 23) as f32 * 0.7 - 6.0).collect();
        let (mut max, mut sum) = ([f32::NEG_INFINITY], [0.0; PAD]);
        let mut out = [1.0; PAD];
        let step =
            |visible| Online { width: PAD, visible, rows: None, out_width: PAD, scale: one() };
        let mut tile = scores[..16].to_vec();
        step(&[(0, 16)]).run(&mut tile, &mut max, &mut sum, &mut out);
        let mut tile = scores[16..].to_vec();
        step(&[(0, 9)]).run(&mut tile, &mut max, &mut sum, &mut out);
        let best = scores[..25].iter().copied().fold(f32::MIN, f32::max);
        let want: f32 = scores[..25].iter().map(|s| (s - best).exp2()).sum();
        assert_eq!(max[0], best);
        assert!((total(&sum) - want).abs() < 1e-5);
        assert!(tile[9..].iter().all(|&p| p == 0.0), "hidden columns weigh nothing");
    }
}
