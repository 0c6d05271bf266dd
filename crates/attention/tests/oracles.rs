//! Facts that hold whatever the numbers: each is asked of the reference and of the fast code, in
//! f32 and bf16. They are written in `selftest/oracles`.

mod common;

use common::{hold, oracles};
use tercet_attention::selftest::oracles::ORACLES;

#[test]
fn selected_branch_equals_dense_while_every_block_fits() {
    hold(oracles::selected_branch_equals_dense_while_every_block_fits);
}

#[test]
fn a_window_as_long_as_the_sequence_equals_dense() {
    hold(oracles::a_window_as_long_as_the_sequence_equals_dense);
}

#[test]
fn a_window_of_one_reads_its_own_value() {
    hold(oracles::a_window_of_one_reads_its_own_value);
}

#[test]
fn sequences_around_a_block_in_length() {
    hold(oracles::sequences_around_a_block_in_length);
}

#[test]
fn equal_keys_choose_the_lower_blocks() {
    hold(oracles::equal_keys_choose_the_lower_blocks);
}

#[test]
fn a_better_block_that_comes_later_displaces_the_highest_of_equals() {
    hold(oracles::a_better_block_that_comes_later_displaces_the_highest_of_equals);
}

#[test]
fn one_heavy_block_is_found() {
    hold(oracles::one_heavy_block_is_found);
}

#[test]
fn decode_equals_prefill() {
    hold(oracles::decode_equals_prefill);
}

#[test]
fn the_same_bits_on_every_run() {
    hold(oracles::the_same_bits_on_every_run);
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    hold(oracles::the_same_bits_for_any_number_of_threads);
}

#[test]
fn later_tokens_change_no_earlier_bit() {
    hold(oracles::later_tokens_change_no_earlier_bit);
}

#[test]
fn sequences_together_equal_each_alone() {
    hold(oracles::sequences_together_equal_each_alone);
}

#[test]
fn dense_and_window_attention_keep_to_their_past_and_their_sequence() {
    hold(oracles::dense_and_window_attention_keep_to_their_past_and_their_sequence);
}

#[test]
fn huge_and_tiny_magnitudes_stay_finite_and_right() {
    hold(oracles::huge_and_tiny_magnitudes_stay_finite_and_right);
}

#[test]
fn a_nan_query_spoils_its_own_row_only() {
    hold(oracles::a_nan_query_spoils_its_own_row_only);
}

#[test]
fn a_nan_key_or_value_reaches_no_earlier_token_and_no_other_sequence() {
    hold(oracles::a_nan_key_or_value_reaches_no_earlier_token_and_no_other_sequence);
}

#[test]
fn inputs_that_lie_are_refused() {
    hold(oracles::inputs_that_lie_are_refused);
}

#[test]
fn every_fact_of_the_selftest_is_a_test_here() {
    let source = include_str!("oracles.rs");
    for oracle in ORACLES {
        assert!(source.contains(&format!("fn {}()", oracle.name)), "{}", oracle.name);
    }
}
