//! The 2× rule for whole cases.

use std::collections::BTreeMap;

use tercet_attention::Element;
use tercet_attention::cpu::Mask;

use super::bounds::{assert_same_choice, largest, over_twice};
use super::case::Case;
use super::magnitude::{attend_magnitudes, magnitudes};
use super::paths::{
    Outcome, UNIT16, UNIT32, choice, fast, fast_attend, reference, reference_attend,
    reference_chosen,
};
use super::plain::{plain, plain_attend};

/// What a tensor's error may be beyond twice the plain formula's.
#[derive(Clone, Copy, PartialEq)]
pub enum Floor {
    /// The rounding of the stored result, which no formula escapes.
    Storage,
    /// A few roundings of what is added up: for tensors so small that the plain formula may be
    /// exact by luck.
    Magnitude,
}

/// The unit roundoff of `E`.
fn storage_unit<E: Element>() -> f64 {
    if E::from_f32(1.0 + f32::EPSILON).to_f32() == 1.0 { UNIT16 } else { UNIT32 }
}

fn floor<E: Element>(exact: &[f64], magnitude: Option<&f64>) -> f64 {
    let stored = storage_unit::<E>() * largest(exact.iter().filter(|x| x.is_finite()));
    stored + magnitude.map_or(0.0, |m| (4.0 * UNIT32 + storage_unit::<E>()) * m)
}

/// Holds every output and gradient of the fast code to the 2× rule, and its choice of blocks to
/// the float64 scores. Score `tolerance` is relative.
pub fn two_times_rule<E: Element>(what: &str, case: &Case, rule: Floor, tolerance: f64) {
    let case = case.rounded::<E>();
    let fast = fast::<E>(&case);
    // f32 is held to the exact compressed keys; bf16 to those it could store.
    let keys = match storage_unit::<E>() == UNIT32 {
        true => reference(&case.clone().forward_only()).get("compressed_k").to_vec(),
        false => fast.get("compressed_k").to_vec(),
    };
    let exact = choice(&case, &keys);
    assert_same_choice(what, &case, &keys, &exact, &fast.indices, tolerance);
    // From here on all read the blocks that the fast code chose.
    let exact = reference_chosen(&case, &fast.indices);
    let plain = plain::<E>(&case, &fast.indices);
    let magnitudes = match rule {
        Floor::Storage => BTreeMap::new(),
        Floor::Magnitude => magnitudes(&case, &exact),
    };
    compare::<E>(what, &fast, &plain, &exact, &magnitudes);
}

/// [`two_times_rule`] for dense or window attention.
pub fn two_times_rule_attend<E: Element>(what: &str, case: &Case, mask: Mask) {
    let case = case.rounded::<E>();
    let exact = reference_attend(&case, "slc", mask);
    let (fast, plain) =
        (fast_attend::<E>(&case, "slc", mask), plain_attend::<E>(&case, "slc", mask));
    let magnitudes = attend_magnitudes(&case, "slc", mask, &exact);
    compare::<E>(what, &fast, &plain, &exact, &magnitudes);
}

fn compare<E: Element>(
    what: &str,
    fast: &Outcome,
    plain: &Outcome,
    exact: &Outcome,
    magnitudes: &BTreeMap<String, f64>,
) {
    let broken = plain.tensors.iter().filter_map(|(name, x)| {
        let want = exact.get(name);
        let floor = floor::<E>(want, magnitudes.get(name));
        over_twice(name, fast.get(name), x, want, floor)
    });
    let broken: Vec<String> = broken.collect();
    assert!(broken.is_empty(), "{what}: {}", broken.join("; "));
}
