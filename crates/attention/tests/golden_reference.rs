//! The float64 reference against the golden cases.

mod common;

use common::{Case, Expected, UNIT32, distance, golden, largest, reference};

/// The files hold float64 results rounded to f32: that rounding, and 1e-12 for another order of
/// summation, relative to the largest value but at least to 1. (The inputs are of that size, and
/// what is added up may cancel: shifting all keys alike moves no softmax, so that `d_phi_k_pe` of a
/// linear φ is zero but for rounding.)
fn assert_golden(case: &Case, expected: &Expected) {
    let got = reference(case);
    assert_eq!(got.indices, expected.indices, "indices");
    for (name, x) in &expected.tensors {
        let want: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let size = largest(want.iter().filter(|x| x.is_finite()));
        let tolerance = UNIT32 * size + 1e-12 * size.max(1.0);
        let error = distance(got.get(name), &want);
        assert!(error <= tolerance, "{name} is off by {error:e}, allowed {tolerance:e}");
    }
}

fn check(name: &str) {
    if let Some((case, expected)) = golden(name) {
        assert_golden(&case, &expected);
    }
}

#[test]
fn default_spec_with_linear_compression() {
    check("default_spec_1100");
}

#[test]
fn blocks_that_do_not_overlap() {
    check("mean_no_overlap");
}

#[test]
fn one_group_of_sixteen_heads_and_other_value_dim() {
    check("paper_shape_small");
}

#[test]
fn many_sequences_of_odd_lengths() {
    let (case, expected) = golden("varlen").expect("tests/data has this case");
    assert_golden(&case, &expected);
}
