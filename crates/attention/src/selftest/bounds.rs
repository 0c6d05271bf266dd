//! Measures of error, and the bounds they are held to.

use super::case::Case;
use super::exact::importance;
use super::ways::Outcome;
use super::{Check, Fault, ensure};

/// The largest |x|; of nothing, 0.
pub fn largest<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// The largest |a − b|. Equal infinities differ by 0; a NaN on one side only, or another number of
/// elements, by infinity.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
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

/// Refuses two outcomes that do not hold the same bits, tensor by tensor.
pub fn check_same_bits(what: &str, a: &Outcome, b: &Outcome) -> Check<()> {
    ensure(a.tensors.keys().eq(b.tensors.keys()), || format!("{what}: other tensors"))?;
    for (name, x) in &a.tensors {
        let y = b.get(name);
        ensure(x.len() == y.len(), || format!("{what}: {name} has {} and {}", x.len(), y.len()))?;
        let at = x.iter().zip(y).position(|(a, b)| !same_bits(&[*a], &[*b]));
        if let Some(i) = at {
            return Err(Fault(format!("{what}: {name}[{i}] is {:e} and {:e}", x[i], y[i])));
        }
    }
    ensure(a.indices == b.indices, || format!("{what}: other indices"))
}

/// Refuses blocks `fast` that the float64 scores do not rank first, up to swaps between blocks whose
/// scores differ by less than `tolerance`, relative; returns the largest such difference.
/// `compressed_k` are the keys that the scores come from.
pub fn check_same_choice(
    what: &str,
    case: &Case,
    compressed_k: &[f64],
    exact: &[i32],
    fast: &[i32],
    tolerance: f64,
) -> Check<f64> {
    ensure(exact.len() == fast.len(), || format!("{what}: {} indices", fast.len()))?;
    if exact == fast {
        return Ok(0.0);
    }
    let count = case.spec.select_count;
    let scores = importance(case, compressed_k)?;
    let blocks = scores.len() / (exact.len() / count).max(1);
    let mut worst = 0.0f64;
    for (i, (exact, fast)) in exact.chunks(count).zip(fast.chunks(count)).enumerate() {
        let ascending = fast.windows(2).all(|w| w[0] < w[1] || w[1] == -1);
        let inside = fast.iter().all(|&j| (-1..blocks as i32).contains(&j));
        let listed = |row: &[i32]| row.iter().filter(|&&j| j >= 0).count();
        let valid = ascending && inside && listed(exact) == listed(fast);
        ensure(valid, || format!("{what}: row {i}: {exact:?} {fast:?}"))?;
        let score = |j: &i32| scores[i * blocks + *j as usize];
        let only = |a: &[i32], b: &[i32]| -> Vec<f64> {
            let mut only: Vec<f64> =
                a.iter().filter(|&&j| j >= 0 && !b.contains(&j)).map(score).collect();
            only.sort_by(f64::total_cmp);
            only
        };
        for (better, worse) in only(exact, fast).into_iter().zip(only(fast, exact)) {
            let near = better - worse <= tolerance * better;
            ensure(near, || {
                format!(
                    "{what}: row {i}: chose {fast:?}, not {exact:?}; scores {worse:e} < {better:e}"
                )
            })?;
            worst = worst.max((better - worse) / better.max(f64::MIN_POSITIVE));
        }
    }
    Ok(worst)
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
