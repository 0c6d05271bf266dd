//! Facts that hold whatever the numbers: asked of every way.

mod bitwise;
mod decode;
mod facts;
mod strange;

pub use bitwise::*;
pub use decode::*;
pub use facts::*;
pub use strange::*;

use super::{
    Case, Check, Fault, Outcome, Tally, Way, largest_logit, output_bound, same_bits, spec,
};
use crate::{Compressor, NsaSpec};

/// A fact and the suite it belongs to.
pub struct Oracle {
    /// `property`, `bitwise` or `hostile`.
    pub suite: &'static str,
    /// The fact, as a sentence.
    pub name: &'static str,
    /// Asks a way.
    pub check: fn(&Way, &mut Tally) -> Check<()>,
}

macro_rules! oracles {
    ($($suite:literal: $($check:ident),+;)+) => {
        /// All facts, by suite.
        pub const ORACLES: &[Oracle] =
            &[$($(Oracle { suite: $suite, name: stringify!($check), check: $check }),+),+];
    };
}

oracles! {
    "property":
        selected_branch_equals_dense_while_every_block_fits,
        a_window_as_long_as_the_sequence_equals_dense,
        a_window_of_one_reads_its_own_value,
        sequences_around_a_block_in_length,
        equal_keys_choose_the_lower_blocks,
        a_better_block_that_comes_later_displaces_the_highest_of_equals,
        one_heavy_block_is_found,
        decode_equals_prefill;
    "bitwise":
        the_same_bits_on_every_run,
        the_same_bits_for_any_number_of_threads,
        later_tokens_change_no_earlier_bit,
        sequences_together_equal_each_alone,
        dense_and_window_attention_keep_to_their_past_and_their_sequence;
    "hostile":
        huge_and_tiny_magnitudes_stay_finite_and_right,
        a_nan_query_spoils_its_own_row_only,
        a_nan_key_or_value_reaches_no_earlier_token_and_no_other_sequence,
        inputs_that_lie_are_refused;
}

/// The spec of most facts: l 8, d 4, l' 16, n 4, w 12.
fn small(compressor: Compressor) -> NsaSpec {
    spec([8, 4, 16, 4, 12], compressor)
}

const COMPRESSORS: [Compressor; 3] = [Compressor::Mean, Compressor::Linear, Compressor::Mlp];

/// Outputs with one row a token.
const ROWS: [&str; 7] = ["out", "out_cmp", "out_slc", "out_win", "lse_cmp", "lse_slc", "lse_win"];

/// Refuses row `t` of `a` and row `u` of `b` that do not hold the same bits, outputs and choice.
/// Outputs of single branches are compared where both ways give them.
fn same_row(what: &str, a: (&Outcome, usize, usize), b: (&Outcome, usize, usize)) -> Check<()> {
    for name in ROWS {
        let (x, y) = (a.0.row(name, a.1, a.2), b.0.row(name, b.1, b.2));
        if !same_bits(x, y) {
            return Err(Fault(format!("{what}: {name} of rows {} and {}: {x:?} {y:?}", a.1, b.1)));
        }
    }
    let width = a.0.indices.len() / a.2;
    let row = |o: &Outcome, t: usize| o.indices[t * width..(t + 1) * width].to_vec();
    super::ensure(row(a.0, a.1) == row(b.0, b.1), || {
        format!("{what}: indices of rows {} and {}", a.1, b.1)
    })
}

/// A bound on the error of an output of `way` for `case`, absolute; see `output_bound`.
fn bound(way: &Way, case: &Case, got: &Outcome) -> f64 {
    let logit = largest_logit(case, got.get("compressed_k"));
    let value = |name: &str| case.get(name).iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let value = f64::from(value("v_slc").max(value("v_win")))
        .max(got.get("compressed_v").iter().fold(0.0, |m: f64, x| m.max(x.abs())));
    // Up to three branches of gate at most 1; the storage rounds once.
    3.0 * value * (output_bound(case, logit, case.tokens(), way.unit) + way.storage.unit())
}
