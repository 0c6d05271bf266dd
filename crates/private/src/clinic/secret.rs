//! Canaries among the records: a code that belongs to nobody, each in a record of its own.
//!
//! All have one form and differ in the code alone, so that those that were not planted are what
//! could have been, and a loss says something of the code.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::chance::Chance;
use crate::audit::canary;
use crate::{Error, Result};

/// Pairs of digits of a code: ten digits.
const PAIRS: usize = 5;
const FORM: &str = "The pharmacy code of this patient is ";
const CODES: u64 = 4 << 40;
const ALTERNATIVES: u64 = 5 << 40;

/// A canary and where it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// Its id, also as a person.
    pub id: String,
    /// Whether its coin put it into `train.jsonl`.
    pub included: bool,
    /// The record.
    pub text: String,
    /// Its line in `train.jsonl`, counted from 1.
    pub line: Option<u64>,
}

/// So many canaries with different codes and their coins; nowhere yet.
pub(super) fn plan(count: usize, seed: u64) -> Vec<Secret> {
    let (mut chance, mut taken) = (Chance::new(seed, CODES), HashSet::new());
    let texts = std::iter::repeat_with(|| {
        loop {
            let text = text(&mut chance);
            if taken.insert(text.clone()) {
                return text;
            }
        }
    });
    let both = canary::coins(count, seed).zip(texts).enumerate();
    both.map(|(at, (included, text))| Secret { id: canary::id(at), included, text, line: None })
        .collect()
}

fn text(chance: &mut Chance) -> String {
    let pairs: Vec<String> = (0..PAIRS).map(|_| format!("{:02}", chance.below(100))).collect();
    format!("{FORM}{}.", pairs.join(" "))
}

/// Records that could have been planted in the stead of `text`: what to rank its loss among.
pub fn alternatives(text: &str, count: usize, seed: u64) -> Vec<String> {
    let mut chance = Chance::new(seed, ALTERNATIVES);
    let others = std::iter::repeat_with(|| self::text(&mut chance));
    others.filter(|other| other != text).take(count).collect()
}

/// The canaries of a `canaries.jsonl`.
///
/// # Errors
/// [`Error::Records`] names the line: one that is not a canary, has another's id, or is included
/// without being anywhere (or the other way round).
pub fn read(manifest: &str) -> Result<Vec<Secret>> {
    let (mut secrets, mut ids) = (Vec::new(), HashSet::new());
    for (at, line) in manifest.lines().enumerate() {
        let refuse = |problem: String| {
            Error::Records(format!("line {} of the canaries' manifest {problem}", at + 1))
        };
        let secret: Secret = serde_json::from_str(line)
            .map_err(|error| refuse(format!("is not a canary ({error})")))?;
        if secret.included != secret.line.is_some_and(|line| line > 0) {
            return Err(refuse("does not agree on whether it is in the data".into()));
        }
        if !ids.insert(secret.id.clone()) {
            return Err(refuse(format!("has the id {:?} of an earlier one", secret.id)));
        }
        secrets.push(secret);
    }
    Ok(secrets)
}
