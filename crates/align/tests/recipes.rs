//! The recipes of this repository are valid.

use std::path::{Path, PathBuf};

use tercet_align::AlignConfig;
use tercet_align::iterate::{IterativeConfig, SampleConfig};
use tercet_train::tune::SftConfig;

fn recipe(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(name)
}

#[test]
fn recipes_for_tuning_sampling_and_alignment_are_read_without_a_complaint() {
    SftConfig::load(&recipe("sft.toml"), &[]).unwrap();
    for name in ["align.toml", "mappo-smollm2/align.toml"] {
        AlignConfig::load(&recipe(name), &[]).unwrap();
    }
    for name in ["sample.toml", "mappo-smollm2/sample.toml"] {
        SampleConfig::load(&recipe(name), &[]).unwrap();
    }
    for name in ["iterative.toml", "mappo-smollm2/iterative.toml"] {
        IterativeConfig::load(&recipe(name), &[]).unwrap();
    }
}

#[test]
fn a_slip_in_a_key_is_answered_with_the_right_one_and_a_missing_section_is_named() {
    let refused = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        AlignConfig::load(&recipe("align.toml"), &overrides).unwrap_err().to_string()
    };
    for (overrides, expected) in [
        (["align.term=1"], "did you mean `align.terms`"),
        (["train.microtokens=1"], "did you mean `train.micro_tokens`"),
        (["align.terms=[]"], "`align.terms` is empty"),
        (["align.terms=[{objective=\"dpo\", gamma=1.0}]"], "`align.terms[0].gamma (dpo)`"),
        (["align.terms=[{objective=\"ipo\"}]"], "ipo_mean"),
        (["align.delta.scale=2.0"], "`align.delta.scale` belongs to"),
        (["align.ld_alpha=2.0"], "`align.ld_alpha` is 2"),
        (["train.batch=0"], "`train.batch` = 0"),
        (["train.lr=nan"], "train.lr"),
        (["model.path=\"\""], "`model.path` is missing"),
        (["data.paths=[]"], "`data.paths` is empty"),
    ] {
        let text = refused(&overrides);
        assert!(text.contains(expected), "{overrides:?}: {text}");
    }
}
