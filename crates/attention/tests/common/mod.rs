//! What the suites share: it lives in the crate itself, for `tercet selftest`.
#![allow(dead_code, unused_imports, reason = "each suite uses its own part")]

use std::path::{Path, PathBuf};

use half::bf16;
use tercet_attention::Element;
use tercet_attention::cpu::Mask;
pub use tercet_attention::selftest::*;

/// The ways that every fact is asked of.
pub fn ways() -> [Way<'static>; 3] {
    [Way::reference(), Way::cpu_f32(), Way::cpu_bf16()]
}

/// The two of them that are fast.
pub fn fast_ways() -> [Way<'static>; 2] {
    [Way::cpu_f32(), Way::cpu_bf16()]
}

/// Asserts that a row passed.
pub fn pass(row: Row) {
    assert!(row.pass, "{row}");
}

/// Asserts a fact of every way.
pub fn hold(check: fn(&Way, &mut Tally) -> Check<()>) {
    for way in &ways() {
        pass(Row::of("property", &way.name, |tally| check(way, tally)));
    }
}

/// Asserts the 2× rule of both fast ways.
pub fn twice(what: &str, case: &Case, rule: Floor, tolerance: f64) {
    for way in &fast_ways() {
        twice_of(way, what, case, rule, tolerance);
    }
}

/// Asserts the 2× rule of one way.
pub fn twice_of(way: &Way, what: &str, case: &Case, rule: Floor, tolerance: f64) {
    pass(Row::of("property", format!("{what} {}", way.name), |tally| {
        two_times_rule(tally, way, case, rule, tolerance)
    }));
}

/// Reads the golden case `name`: from the golden folder, else from this crate's `tests/data`.
/// Prints a line and returns none where neither has it.
pub fn golden(name: &str) -> Option<Golden> {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var_os("TERCET_GOLDEN")
        .map_or_else(|| crate_root.join("../../../shared/golden"), PathBuf::from);
    let folders = [folder.join("nsa"), crate_root.join("tests/data")];
    let file = format!("{name}.input.safetensors");
    let Some(folder) = folders.iter().find(|folder| folder.join(&file).is_file()) else {
        eprintln!("skipped: no golden case {name} in {}; set TERCET_GOLDEN", folders[0].display());
        return None;
    };
    let input = std::fs::read(folder.join(file)).unwrap();
    let expected = std::fs::read(folder.join(format!("{name}.expected.safetensors"))).unwrap();
    Some(Golden::read(name, &input, &expected).unwrap())
}
