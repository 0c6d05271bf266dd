//! The float64 reference against the golden cases.

mod common;

use common::{golden, golden_reference, pass};

fn check(name: &str) {
    if let Some(golden) = golden(name) {
        pass(golden_reference(&golden));
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
    pass(golden_reference(&golden("varlen").expect("tests/data has this case")));
}

#[test]
fn a_golden_file_that_is_wrong_is_refused_or_fails() {
    let mut golden = golden("varlen").expect("tests/data has this case");
    golden.expected.get_mut("out").unwrap()[7] += 1e-4;
    assert!(!golden_reference(&golden).pass);
    golden.indices[3] += 1;
    assert!(golden_reference(&golden).note.contains("indices"));
    for bytes in [&b""[..], b"12345678", &[0xff; 64]] {
        let error = common::Golden::read("x", bytes, bytes).unwrap_err();
        assert!(error.0.contains("golden case x"), "{error}");
    }
}
