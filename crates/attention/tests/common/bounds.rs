//! Measures of error, and the bounds they are held to.

use super::case::Case;
use super::paths::{Outcome, importance};

/// The largest |x|; of nothing, 0.
pub fn largest<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// The largest |a − b|. Equal infinities differ by 0; a NaN on one side only by infinity.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let one = |(&a, &b): (&f64, &f64)| match a - b {
        _ if a == b || (a.is_nan() && b.is_nan()) => 0.0,
        d if d.is_nan() => f64::INFINITY,
        d => d.abs(),
    };
    a.iter().zip(b).map(one).fold(0.0, f64::max)
}

/// Whether two slices hold the same bits (any NaN equals any NaN).
pub fn same_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

/// Asserts that two outcomes hold the same bits, tensor by tensor.
pub fn assert_same_bits(what: &str, a: &Outcome, b: &Outcome) {
    assert!(a.tensors.keys().eq(b.tensors.keys()), "{what}: other tensors");
    for (name, x) in &a.tensors {
        let at = x.iter().zip(&b.tensors[name]).position(|(a, b)| !same_bits(&[*a], &[*b]));
        if let Some(i) = at {
            panic!("{what}: {name}[{i}] is {:e} and {:e}", x[i], b.tensors[name][i]);
        }
    }
    assert_eq!(a.indices, b.indices, "{what}: indices");
}

/// The 2× rule: the fast code's largest error in a tensor is at most twice that of the plain
/// formula in the same dtype, plus `floor`, which is for what the plain formula gets by luck.
/// Returns a line that says how it is broken, if it is.
pub fn over_twice(
    name: &str,
    fast: &[f64],
    plain: &[f64],
    exact: &[f64],
    floor: f64,
) -> Option<String> {
    let (fast, plain) = (distance(fast, exact), distance(plain, exact));
    (fast > 2.0 * plain + floor).then(|| {
        let size = largest(exact.iter().filter(|x| x.is_finite()));
        format!("{name} is off by {fast:.2e} > 2 × {plain:.2e} + {floor:.1e}; largest {size:.2e}")
    })
}

/// Asserts that `fast` chose the blocks that the float64 scores rank first, up to swaps between
/// blocks whose scores differ by less than `tolerance`, relative. `compressed_k` are the keys that
/// the scores come from.
pub fn assert_same_choice(
    what: &str,
    case: &Case,
    compressed_k: &[f64],
    exact: &[i32],
    fast: &[i32],
    tolerance: f64,
) {
    assert_eq!(exact.len(), fast.len(), "{what}: indices");
    if exact == fast {
        return;
    }
    let count = case.spec.select_count;
    let scores = importance(case, compressed_k);
    let blocks = scores.len() / (exact.len() / count);
    for (i, (exact, fast)) in exact.chunks(count).zip(fast.chunks(count)).enumerate() {
        let ascending = fast.windows(2).all(|w| w[0] < w[1] || w[1] == -1);
        let listed = |row: &[i32]| row.iter().filter(|&&j| j >= 0).count();
        assert!(ascending && listed(exact) == listed(fast), "{what}: row {i}: {exact:?} {fast:?}");
        let score = |j: &i32| scores[i * blocks + *j as usize];
        let only = |a: &[i32], b: &[i32]| -> Vec<f64> {
            let mut only: Vec<f64> = a.iter().filter(|j| !b.contains(j)).map(score).collect();
            only.sort_by(f64::total_cmp);
            only
        };
        for (better, worse) in only(exact, fast).into_iter().zip(only(fast, exact)) {
            assert!(
                better - worse <= tolerance * better,
                "{what}: row {i}: chose {fast:?}, not {exact:?}; scores {worse:e} < {better:e}"
            );
        }
    }
}

/// The largest possible |logit| of the branches, from the norms of queries and keys.
pub fn largest_logit(case: &Case, compressed_k: &[f64]) -> f64 {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let norms = |x: &[f64]| x.chunks(case.dims.key_dim).map(norm).fold(0.0, f64::max);
    let wide = |name: &str| case.get(name).iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let keys = norms(&wide("k_slc")).max(norms(&wide("k_win"))).max(norms(compressed_k));
    norms(&wide("q")) * keys / (case.dims.key_dim as f64).sqrt()
}

/// A bound on the error of one branch's output, relative to the largest |value|, when `keys` are
/// read in arithmetic of unit roundoff `unit`: a logit is off by (D + 2)·unit·|logit|, which
/// shifts its exponential and the normaliser by as much; sums of `keys` terms twice add keys·unit
/// each; exp, ln, the quotient and the gates a few roundings more.
pub fn output_bound(case: &Case, logit: f64, keys: usize, unit: f64) -> f64 {
    let d = case.dims.key_dim as f64;
    unit * (2.0 * (d + 2.0) * logit + 2.0 * keys as f64 + 12.0)
}
