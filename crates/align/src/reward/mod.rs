//! Scores for answers sampled from a policy: declared rules, an external program, or a reward
//! model.
//!
//! A [`RewardConfig`] names exactly one source; [`RewardSource::new`] checks it and gets it ready,
//! and the source is kept for the whole run, across rounds.

mod arithmetic;
mod classifier;
mod error;
mod keys;
mod measure;
mod program;
mod rules;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tercet_tensor::Device;

pub use classifier::Classifier;
pub use error::{Error, Result};
pub use program::Program;
pub use rules::Rules;

/// Seconds without progress after which an external program is ended, unless configured.
const TIMEOUT: u64 = 60;

/// Longest configurable timeout in seconds: a day.
const MAX_TIMEOUT: u64 = 86_400;

/// One answer to score.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// Names the answer; no two of one call share it.
    pub id: u64,
    /// The prompt's text, as the policy read it.
    pub prompt: &'a str,
    /// What the policy wrote.
    pub answer: &'a str,
    /// Tokens of the answer, as the policy counts them.
    pub tokens: usize,
    /// The prompt's JSON row, with columns such as `expected` that rules and programs read.
    pub row: &'a Map<String, Value>,
}

/// The score of one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The reward; finite. In [0, 1] when it comes from rules.
    pub total: f64,
    /// What it is made of, by name: each rule's value, or what the program said. All finite.
    pub parts: Vec<(String, f64)>,
}

/// `[reward]`: where scores come from. Exactly one of `rules`, `program` and `model` is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// Rules whose weighted mean is the reward; each a table with a `kind`, see [`Rules`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<Map<String, Value>>>,
    /// An external program and its arguments, see [`Program`]. No shell is involved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<Vec<String>>,
    /// Seconds without progress after which the program is ended; 60 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// The folder of a reward model, see [`Classifier`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
}

impl RewardConfig {
    /// Checks what needs no program and no file: the rules.
    ///
    /// # Errors
    /// As [`Rules::new`].
    pub fn check(&self) -> Result<()> {
        self.rules.as_deref().map_or(Ok(()), |rules| Rules::new(rules).map(drop))
    }
}

/// Where rewards come from, ready to score.
pub enum RewardSource {
    /// Declared rules.
    Rules(Rules),
    /// An external program that speaks JSON lines.
    Program(Program),
    /// A reward model.
    Classifier(Box<Classifier>),
}

impl RewardSource {
    /// Checks the configuration and gets the source ready: compiles the rules, starts the program,
    /// or loads the reward model onto `device`, which the others do not use.
    pub fn new(config: &RewardConfig, device: &Device) -> Result<Self> {
        if config.timeout.is_some() && config.program.is_none() {
            return Err(Error::config("reward.timeout", "is for reward.program, which is absent"));
        }
        match (&config.rules, &config.program, &config.model) {
            (Some(rules), None, None) => Ok(Self::Rules(Rules::new(rules)?)),
            (None, Some(argv), None) => {
                let seconds = config.timeout.unwrap_or(TIMEOUT);
                if !(1..=MAX_TIMEOUT).contains(&seconds) {
                    let problem = format!("= {seconds} seconds is outside 1..={MAX_TIMEOUT}");
                    return Err(Error::config("reward.timeout", problem));
                }
                Ok(Self::Program(Program::start(argv, Duration::from_secs(seconds))?))
            }
            (None, None, Some(dir)) => {
                Ok(Self::Classifier(Box::new(Classifier::load(dir, device)?)))
            }
            (None, None, None) => Err(Error::config(
                "reward",
                "names no source of rewards; give one of rules, program, model",
            )),
            (rules, program, model) => {
                let given = [
                    ("rules", rules.is_some()),
                    ("program", program.is_some()),
                    ("model", model.is_some()),
                ];
                let given: Vec<&str> = given.iter().filter(|g| g.1).map(|g| g.0).collect();
                let problem = format!(
                    "names more than one source of rewards ({}); keep exactly one of rules, \
                     program, model",
                    given.join(", ")
                );
                Err(Error::config("reward", problem))
            }
        }
    }

    /// Whether the row of a prompt holds what this source will read from it: to be asked of
    /// every row before hours are spent on sampling. `id` is for the message.
    pub fn check_row(&self, id: u64, row: &Map<String, Value>) -> Result<()> {
        match self {
            Self::Rules(rules) => rules.check_row(id, row),
            Self::Program(_) => Ok(()),
            Self::Classifier(classifier) => classifier.check_row(id, row),
        }
    }

    /// Scores of the answers, in their order; every number is finite. `stop` ends the call early
    /// with [`Error::Interrupted`].
    ///
    /// After an error of a program the source is spent: every later call is an error too.
    pub fn score(&mut self, answers: &[Answer], stop: &AtomicBool) -> Result<Vec<Scored>> {
        match self {
            Self::Rules(rules) => rules.score(answers, stop),
            Self::Program(program) => program.score(answers, stop),
            Self::Classifier(classifier) => classifier.score(answers, stop),
        }
    }
}
