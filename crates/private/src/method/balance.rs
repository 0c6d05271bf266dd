//! Clipping and noise as if A and B of every pair had equal norms.
//!
//! (cA, B/c) is the same model for every c, but gradients of A and B, and what noise on them does to
//! B·A, are not the same: a threshold for the pair means something else for every c (PRISM, arXiv
//! 2606.00944). With `c = √(|B|/|A|)` the factors cA and B/c have equal norms; the gradients there
//! are `gA/c` and `c·gB`. Clipping and noise happen there, and what was released is brought back by
//! `c·g̃A` and `g̃B/c`. The weights are released values, so that c is post-processing.

use super::Layout;

/// c of a pair is kept within [1/16, 16]: B is 0 at the start.
const MOST: f64 = 16.0;

/// What gradients of each slot are multiplied by before they are clipped.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    factors: Vec<f32>,
}

impl Balance {
    /// No change.
    pub fn none(slots: usize) -> Self {
        Self { factors: vec![1.0; slots] }
    }

    /// From the squared norms of the slots' weights.
    pub fn of(layout: &Layout, squares: &[f64]) -> Self {
        let mut factors = vec![1.0; layout.sizes.len()];
        for pair in &layout.pairs {
            let of = |a: bool| {
                let slots = pair.iter().filter(|&&slot| layout.is_a[slot] == a);
                slots.map(|&slot| squares[slot]).sum::<f64>()
            };
            let ratio = (of(false) / of(true)).sqrt().sqrt();
            let c = if ratio.is_nan() { 1.0 } else { ratio.clamp(1.0 / MOST, MOST) };
            for &slot in pair {
                factors[slot] = if layout.is_a[slot] { 1.0 / c } else { c } as f32;
            }
        }
        Self { factors }
    }

    /// Into balanced coordinates.
    pub fn forward(&self, slot: usize, values: &mut [f32]) {
        values.iter_mut().for_each(|x| *x *= self.factors[slot]);
    }

    /// And back.
    pub fn back(&self, slot: usize, values: &mut [f32]) {
        values.iter_mut().for_each(|x| *x /= self.factors[slot]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (cA, B/c) is the same model: the gradients in balanced coordinates must be the same, too.
    #[test]
    fn the_gauge_changes_nothing() {
        let layout =
            Layout { sizes: vec![2, 2], pairs: vec![vec![0, 1]], is_a: vec![true, false], rank: 1 };
        let seen = |c: f32| {
            let (a, b) = ([3.0 * c, 4.0 * c], [0.5 / c, 0.1 / c]);
            let square = |w: [f32; 2]| w.iter().map(|x| f64::from(x * x)).sum::<f64>();
            let balance = Balance::of(&layout, &[square(a), square(b)]);
            let (mut ga, mut gb) = ([0.7 / c, -0.2 / c], [1.5 * c, 2.5 * c]);
            balance.forward(0, &mut ga);
            balance.forward(1, &mut gb);
            [ga, gb].concat()
        };
        for c in [0.3, 2.0, 5.0] {
            for (one, other) in seen(1.0).iter().zip(seen(c)) {
                assert!((one / other - 1.0).abs() < 1e-5, "{one} {other}");
            }
        }
        assert_eq!(Balance::of(&layout, &[0.0, 0.0]), Balance::none(2));
        let (mut values, balance) = ([0.3, 0.7], Balance::of(&layout, &[16.0, 1.0]));
        balance.forward(0, &mut values);
        assert_eq!(values, [0.6, 1.4]);
        balance.back(0, &mut values);
        assert_eq!(values, [0.3, 0.7]);
    }
}
