//! The 2× rule: no output and no gradient may be off the float64 one by more than twice the error of
//! the plain formula in the same dtype.

use std::collections::BTreeMap;

use super::bounds::{check_same_choice, distance, largest};
use super::case::Case;
use super::exact::{choice, reference, reference_attend, reference_chosen};
use super::magnitude::{attend_magnitudes, magnitudes};
use super::ways::{Outcome, Storage, UNIT32, Way};
use super::{Check, Tally};
use crate::cpu::Mask;

/// What a tensor's error may be beyond twice the plain formula's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// The rounding of the stored result, which no formula escapes.
    Storage,
    /// A few roundings of what is added up: for tensors so small that the plain formula may be
    /// exact by luck.
    Magnitude,
}

fn floor(storage: Storage, exact: &[f64], magnitude: Option<&f64>) -> f64 {
    let unit = storage.unit();
    let stored = unit * largest(exact.iter().filter(|x| x.is_finite()));
    stored + magnitude.map_or(0.0, |m| (4.0 * UNIT32 + unit) * m)
}

/// Holds every output and gradient of a way to the 2× rule, and its choice of blocks to the float64
/// scores. Score `tolerance` is relative.
pub fn two_times_rule(
    tally: &mut Tally,
    way: &Way,
    case: &Case,
    rule: Floor,
    tolerance: f64,
) -> Check<()> {
    let case = way.stored(case);
    let fast = (way.run)(&case)?;
    // f32 is held to the exact compressed keys; bf16 to those it could store.
    let keys = match way.storage {
        Storage::F64 | Storage::F32 => {
            reference(&case.clone().forward_only())?.get("compressed_k").to_vec()
        }
        _ => fast.get("compressed_k").to_vec(),
    };
    let exact = choice(&case, &keys)?;
    let off = check_same_choice(&way.name, &case, &keys, &exact, &fast.indices, tolerance)?;
    tally.hold("choice", off, tolerance);
    // From here on all read the blocks that the way chose.
    let exact = reference_chosen(&case, &fast.indices)?;
    let plain = way.storage.plain(&case, &fast.indices);
    let magnitudes = match rule {
        Floor::Storage => BTreeMap::new(),
        Floor::Magnitude => magnitudes(&case, &exact)?,
    };
    compare(tally, way.storage, &fast, &plain, &exact, &magnitudes);
    Ok(())
}

/// [`two_times_rule`] for dense or window attention.
pub fn two_times_rule_attend(tally: &mut Tally, way: &Way, case: &Case, mask: Mask) -> Check<()> {
    let case = way.stored(case);
    let exact = reference_attend(&case, "slc", mask)?;
    let fast = (way.attend)(&case, "slc", mask)?;
    let plain = way.storage.plain_attend(&case, "slc", mask);
    let magnitudes = attend_magnitudes(&case, "slc", mask, &exact);
    compare(tally, way.storage, &fast, &plain, &exact, &magnitudes);
    Ok(())
}

fn compare(
    tally: &mut Tally,
    storage: Storage,
    fast: &Outcome,
    plain: &Outcome,
    exact: &Outcome,
    magnitudes: &BTreeMap<String, f64>,
) {
    for (name, plain) in &plain.tensors {
        let want = exact.get(name);
        let allowed = 2.0 * distance(plain, want) + floor(storage, want, magnitudes.get(name));
        tally.hold(name, distance(fast.get(name), want), allowed);
    }
}
