//! Rewards: every kind of rule by hand, programs that misbehave, a reward model of transformers.

mod classifier;
mod program;
mod rules;

use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};
use tercet_align::reward::{Answer, Error, RewardConfig, RewardSource, Scored};
use tercet_tensor::Device;

/// A flag that is never raised.
static GO: AtomicBool = AtomicBool::new(false);

/// The source of a `[reward]` section, given without its heading.
fn source(section: &str) -> Result<RewardSource, Error> {
    let config: RewardConfig = toml::from_str(section).unwrap();
    RewardSource::new(&config, &Device::Cpu)
}

fn row(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

/// The score of one answer of a prompt whose row is `row`.
fn score(source: &mut RewardSource, text: &str, row: &Map<String, Value>) -> Result<Scored, Error> {
    let answer = Answer { id: 7, prompt: "", answer: text, tokens: text.split(' ').count(), row };
    source.score(&[answer], &GO).map(|mut scored| scored.remove(0))
}

#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(error.is_users(), "{text}");
}

/// Exactly one source, and a section is not forgiven what it does not know.
#[test]
fn a_section_names_exactly_one_source() {
    let refuse = |section: &str, parts: &[&str]| says(&source(section).err().unwrap(), parts);
    refuse("", &["`reward`", "no source", "rules, program, model"]);
    refuse("model = 'x'\nprogram = ['y']", &["more than one", "(program, model)"]);
    refuse(
        "rules = []\nmodel = 'x'\nprogram = ['y']",
        &["more than one", "(rules, program, model)"],
    );
    refuse("rules = []", &["`reward.rules`", "empty"]);
    refuse("program = []", &["`reward.program`", "names no program"]);
    refuse("program = ['']", &["`reward.program`", "names no program"]);
    refuse("model = 'x'\ntimeout = 3", &["`reward.timeout`", "reward.program"]);
    refuse("program = ['cat']\ntimeout = 0", &["`reward.timeout`", "= 0", "1..=86400"]);
    for wrong in ["rule = []", "rules = 3", "program = 'cat'", "timeout = -1"] {
        assert!(toml::from_str::<RewardConfig>(wrong).is_err(), "{wrong}");
    }
}

/// A run writes down what it did.
#[test]
fn a_section_survives_being_written() {
    for section in [
        "program = ['a', 'b']\ntimeout = 5",
        "model = 'folder'",
        "[[rules]]\nkind = 'length'\nunit = 'words'\nmax = 5\nslack = 2.5",
    ] {
        let config: RewardConfig = toml::from_str(section).unwrap();
        let written = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<RewardConfig>(&written).unwrap(), config, "{written}");
    }
}
