//! The fast code against the golden cases, by the 2× rule: no output and no gradient may be off
//! the float64 one by more than twice the error of the plain formula in the same dtype.

mod common;

use common::{Floor, assert_same_choice, fast, golden, reference, two_times_rule};
use half::bf16;

fn check(name: &str) {
    if let Some((case, _)) = golden(name) {
        two_times_rule::<f32>(&format!("{name} f32"), &case, Floor::Storage, 1e-6);
        two_times_rule::<bf16>(&format!("{name} bf16"), &case, Floor::Storage, 1e-6);
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
    check("varlen");
}

#[test]
fn f32_chooses_the_golden_blocks() {
    for name in ["default_spec_1100", "mean_no_overlap", "paper_shape_small", "varlen"] {
        if let Some((case, expected)) = golden(name) {
            let case = case.forward_only();
            let keys = reference(&case).get("compressed_k").to_vec();
            let fast = fast::<f32>(&case);
            assert_same_choice(name, &case, &keys, &expected.indices, &fast.indices, 1e-6);
        }
    }
}
