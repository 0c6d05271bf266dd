//! The golden numbers of the preference objectives, and how a test asks for an objective.

#![allow(dead_code, reason = "every test binary uses its own part of this")]

use serde_json::Value;
use tercet_align::objective::{
    ObjectiveConfig, Objectives, PairLogProbs, ReferenceLogProbs, TermConfig,
};

/// `tests/data/preference.json`: float64 values made with mpmath and checked against TRL's own
/// statements; see its `about`.
pub fn golden() -> Value {
    serde_json::from_str(include_str!("../data/preference.json")).unwrap()
}

/// The float64 tolerance the golden file states for itself.
pub const RELATIVE: f64 = 1e-10;
pub const ABSOLUTE: f64 = 1e-12;

pub fn number(x: &Value) -> f64 {
    x.as_f64().unwrap_or_else(|| panic!("{x} is no number"))
}

pub fn numbers(x: &Value) -> Vec<f64> {
    x.as_array().unwrap_or_else(|| panic!("{x} is no list")).iter().map(number).collect()
}

/// Asserts `|got − want| ≤ absolute + relative·|want|`.
pub fn near(what: &str, got: f64, want: f64, relative: f64, absolute: f64) {
    let allowed = absolute + relative * want.abs();
    assert!((got - want).abs() <= allowed, "{what}: got {got:e}, want {want:e} within {allowed:e}");
}

pub fn golden_near(what: &str, got: f64, want: f64) {
    near(what, got, want, RELATIVE, ABSOLUTE);
}

/// The golden pairs, without Δ.
pub fn pairs(golden: &Value) -> Vec<PairLogProbs> {
    let of = |pair: &Value| PairLogProbs {
        chosen: number(&pair["logp_w"]),
        rejected: number(&pair["logp_l"]),
        reference: Some(ReferenceLogProbs {
            chosen: number(&pair["ref_w"]),
            rejected: number(&pair["ref_l"]),
        }),
        chosen_tokens: number(&pair["len_w"]) as usize,
        rejected_tokens: number(&pair["len_l"]) as usize,
        delta: None,
    };
    golden["pairs"].as_array().unwrap().iter().map(of).collect()
}

/// A term as a configuration file has it.
pub fn term(toml: &str) -> TermConfig {
    toml::from_str(toml).unwrap_or_else(|error| panic!("{toml}: {error}"))
}

pub fn objectives(terms: Vec<TermConfig>) -> Objectives {
    Objectives::new(&ObjectiveConfig { terms, ld_alpha: 1.0 }).unwrap()
}

/// Numbers in `-1..1`, the same for the same seed.
pub fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    }
}
