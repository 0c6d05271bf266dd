//! The fast code against the golden cases, by the 2× rule: no output and no gradient may be off
//! the float64 one by more than twice the error of the plain formula in the same dtype. In f32 it
//! chooses the golden blocks.

mod common;

use common::{fast_ways, golden, golden_case, pass};

fn check(name: &str) {
    if let Some(golden) = golden(name) {
        for way in &fast_ways() {
            pass(golden_case(way, &golden));
        }
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
