//! Rewards by declared rules: known ground truth, without a model.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};

use super::error::{Error, Result};
use super::keys::Keys;
use super::measure::Measure;
use super::{Answer, Scored};

/// Largest weight of a rule: past it a number is a slip.
const MAX_WEIGHT: f64 = 1e6;

/// Rules, each with a value in [0, 1]; the reward is their weighted mean, in [0, 1] too.
///
/// A rule is a table with `kind` and the keys of its kind, and with `weight` (above 0, 1 when
/// absent) and `name` (of its part of the score; `KIND_INDEX` when absent). Indices count from 0.
///
/// | kind | value | keys (default) |
/// |---|---|---|
/// | `regex` | 1 if the pattern is found, or with `match = false` if not | `pattern`, `whole` (false), `match` (true) |
/// | `length` | 1 in [min, max], falling linearly to 0 over `slack` beside it | `unit` (characters, words, sentences, tokens), `min` (0), `max` (none), `slack` (0) |
/// | `json` | the share fulfilled of: it is JSON; each key is there and of its type | `keys` (none), a table from key to any, array, boolean, integer, null, number, object or string |
/// | `keywords` | `all`: the share found; `any`, `none`: 1 or 0 | `words` or `column`, `need` (all), `ignore_case` (false), `whole_words` (false) |
/// | `arithmetic` | 1 if the answer's last number is the column's number or expression | `column`, `tolerance` (1e-12; relative, below 1 absolute) |
/// | `equals` | 1 if the answer is the column's text, number or truth value | `column`, `ignore_case` (false) |
/// | `starts_with`, `ends_with` | 1 if the answer does | `text`, `ignore_case` (false) |
/// | `lines` | the share of lines that match; 0 if they are not min to max in number | `pattern`, `min` (0), `max` (none) |
///
/// White space around the answer, the column and the text is not looked at by `json`, `equals`,
/// `starts_with` and `ends_with`; blank lines not by `lines`. Patterns are those of Rust's
/// `regex`: linear in time, without look-around and back-references.
///
/// ```toml
/// [[reward.rules]]
/// kind = "length"
/// unit = "words"
/// max = 100
/// slack = 50
/// ```
pub struct Rules {
    rules: Vec<Rule>,
}

struct Rule {
    name: String,
    weight: f64,
    measure: Measure,
}

impl Rules {
    /// Checks the tables of `reward.rules`; an error names the rule, the key, its value and what
    /// is allowed.
    pub fn new(tables: &[Map<String, Value>]) -> Result<Self> {
        if tables.is_empty() {
            return Err(Error::config("reward.rules", "is empty; give at least one rule"));
        }
        let mut names = HashSet::new();
        let mut rules = Vec::with_capacity(tables.len());
        for (index, table) in tables.iter().enumerate() {
            let mut keys = Keys::new(format!("reward.rules[{index}]"), table);
            let kind = Measure::kind(&mut keys)?;
            let name = match keys.text("name")? {
                Some(name) => name.to_owned(),
                None => format!("{kind}_{index}"),
            };
            if !names.insert(name.clone()) {
                return Err(keys.error("name", format!("= {name:?} is another rule's name too")));
            }
            let weight = keys.number("weight")?.unwrap_or(1.0);
            if !(weight > 0.0 && weight <= MAX_WEIGHT) {
                let problem = format!("= {weight} is outside (0, {MAX_WEIGHT}]");
                return Err(keys.error("weight", problem));
            }
            let measure = Measure::read(kind, &mut keys)?;
            keys.done()?;
            rules.push(Rule { name, weight, measure });
        }
        Ok(Self { rules })
    }

    /// Whether a row holds the columns that the rules read, as they need them.
    pub fn check_row(&self, id: u64, row: &Map<String, Value>) -> Result<()> {
        // Every measure reads its column first.
        self.one(&Answer { id, prompt: "", answer: "", tokens: 0, row }).map(|_| ())
    }

    /// Scores of the answers in their order; the parts are the rules' values, without weights.
    pub fn score(&self, answers: &[Answer], stop: &AtomicBool) -> Result<Vec<Scored>> {
        let one = |answer: &Answer| match stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => self.one(answer),
        };
        answers.iter().map(one).collect()
    }

    fn one(&self, answer: &Answer) -> Result<Scored> {
        let mut parts = Vec::with_capacity(self.rules.len());
        // Both sums are rounded alike and each term of the first is at most that of the second,
        // so the quotient is at most 1.
        let (mut sum, mut weights) = (0.0, 0.0);
        for rule in &self.rules {
            let value = rule.measure.value(answer).map_err(|problem| Error::Row {
                id: answer.id,
                problem: format!("{problem} (read by rule {})", rule.name),
            })?;
            sum += rule.weight * value;
            weights += rule.weight;
            parts.push((rule.name.clone(), value));
        }
        Ok(Scored { total: sum / weights, parts })
    }
}
