//! The frozen model that a policy's answers are measured against.
//!
//! It is asked at every step, or once before training: then its sums are kept in a file under a
//! key of the pairs, of how tokens are weighted, and of the model to its last bit.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tercet_model::Model;
use tercet_train::tune::{portions, start};
use tercet_train::{Error, Event, Result, files};

use crate::objective::ReferenceLogProbs;
use crate::pairs::Pair;
use crate::sums::{Answer, Pass};

/// Where the reference's log-probabilities come from.
pub enum Reference {
    /// No term looks at one.
    None,
    /// A model, asked at every step.
    Model(Box<Model>),
    /// The sums of every pair, training pairs first, in the order in which they were read.
    Known(Vec<ReferenceLogProbs>),
}

/// The file of precomputed sums.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    key: String,
    /// As IEEE bits: a resumed run must have the same numbers.
    chosen: Vec<u64>,
    rejected: Vec<u64>,
    /// SHA-256 of the rest, which a damaged number does not have.
    digest: String,
}

impl Kept {
    fn of(key: String, sums: &[ReferenceLogProbs]) -> Self {
        let chosen = sums.iter().map(|sum| sum.chosen.to_bits()).collect();
        let rejected = sums.iter().map(|sum| sum.rejected.to_bits()).collect();
        let mut kept = Self { key, chosen, rejected, digest: String::new() };
        kept.digest = kept.digested();
        kept
    }

    fn digested(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(self.key.as_bytes());
        for bits in self.chosen.iter().chain(&self.rejected) {
            hasher.update(bits.to_le_bytes());
        }
        files::hex(&hasher.finalize())
    }
}

/// What asking a reference once depends on.
pub struct Precompute<'a> {
    /// Folder of the file.
    pub folder: &'a Path,
    /// Key of the training pairs.
    pub pairs_key: &'a str,
    /// LD-DPO's α.
    pub alpha: f64,
    /// Tokens that go through the model at once.
    pub micro_tokens: usize,
    /// Raised to stop.
    pub stop: &'a AtomicBool,
}

/// Sums of `pairs` under `model`, from the file when it is of these pairs and these weights.
pub fn precomputed(
    rule: &Precompute,
    model: &Model,
    pairs: &[&Pair],
    observe: &mut dyn FnMut(Event),
) -> Result<Vec<ReferenceLogProbs>> {
    let key = key(rule, model, pairs)?;
    let path = rule.folder.join("reference.json");
    if let Some(known) = read(&path, &key, pairs.len()) {
        observe(Event::Note("the reference's log-probabilities were computed by an earlier run"));
        return Ok(known);
    }
    let mut sums = Vec::with_capacity(pairs.len());
    let lengths = pairs.iter().map(|pair| pair.tokens());
    let mut told = 0;
    for portion in portions(lengths, rule.micro_tokens) {
        if rule.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        sums.extend(ask(model, &pairs[portion], rule.alpha)?);
        let tenth = sums.len() * 10 / pairs.len();
        if tenth > told {
            told = tenth;
            let text = format!("reference: {} of {} pairs", sums.len(), pairs.len());
            observe(Event::Note(&text));
        }
    }
    let text = serde_json::to_vec(&Kept::of(key, &sums)).map_err(|error| no_json(&error))?;
    files::write_atomic(&path, &text)?;
    Ok(sums)
}

/// Sums of pairs that go through the reference at once.
pub fn ask(model: &Model, pairs: &[&Pair], alpha: f64) -> Result<Vec<ReferenceLogProbs>> {
    let answers: Vec<Answer> = pairs.iter().flat_map(|pair| Answer::both(pair, alpha)).collect();
    let sums = Pass::new(model, &answers, false, false)?.sums()?;
    let pair = |both: &[crate::sums::AnswerSums]| ReferenceLogProbs {
        chosen: both[0].log_prob,
        rejected: both[1].log_prob,
    };
    Ok(sums.chunks_exact(2).map(pair).collect())
}

/// A file that is absent, damaged or of something else is made again.
fn read(path: &Path, key: &str, pairs: usize) -> Option<Vec<ReferenceLogProbs>> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let fits = kept.key == key && kept.chosen.len() == pairs && kept.rejected.len() == pairs;
    let whole = kept.digested() == kept.digest;
    let both = kept.chosen.into_iter().zip(kept.rejected);
    let sums = both.map(|(chosen, rejected)| ReferenceLogProbs {
        chosen: f64::from_bits(chosen),
        rejected: f64::from_bits(rejected),
    });
    (fits && whole).then(|| sums.collect())
}

fn no_json(error: &serde_json::Error) -> Error {
    Error::Data(format!("what the reference depends on has no JSON: {error}"))
}

fn key(rule: &Precompute, model: &Model, pairs: &[&Pair]) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(rule.pairs_key.as_bytes());
    hasher.update(rule.alpha.to_le_bytes());
    for pair in pairs {
        pair.chosen.absorb(&mut hasher);
        pair.rejected.absorb(&mut hasher);
    }
    hasher.update(start::fingerprint(model)?);
    Ok(files::hex(&hasher.finalize()))
}
