//! Canaries that a run plants itself: what the audit of `tercet private audit RUN` rests on.
//!
//! Each canary is a person of its own beside those of the rows, in the run by a fair coin from the
//! system's entropy. The plan, with all canaries and coins, is `canaries.jsonl` beside the ledger: it
//! is about the data and belongs with them. The coins know nothing of the rows, so adding or removing
//! somebody changes no canary, and the promise to everybody else is what it was without them.
//!
//! * `gradient`: drawn like anybody, and clipped like anybody, its gradient is the threshold along a
//!   coordinate of each adapter, in the coordinates in which the method clips. Its score is summed up
//!   step by step from what was released: `−Σ_t Σ_g x_g·C_g/s_g²`, the likelihood of its presence
//!   under the noise s_g, and so sees every noisy gradient, which the promise covers.
//! * `tokens`: a person with one row of tokens drawn evenly from the vocabulary. Its score is the
//!   row's loss at the end less that under the model the run started from.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tercet_train::config::within;
use tercet_train::tune::Example;
use tercet_train::{Error, Result, files};

use super::rows::Person;
use crate::audit::canary::{self, Canary, Planted};
use crate::audit::report::{Kind, Scored};
use crate::mechanism::clip::{Blocks, ClippedSum, Norms};
use crate::method::Steering;

/// Below a run's output: its canaries and their coins.
pub const CANARIES: &str = "canaries.jsonl";
/// In a checkpoint: the scores of gradient canaries so far.
const SCORES: &str = "state/canaries.json";
/// Tokens of a row, where the context has room.
pub(super) const LENGTH: usize = 16;
/// A gradient canary before it is clipped, in thresholds: far out, so that every rule makes it all
/// but as long as the threshold.
const FAR: f64 = 1e3;

/// `[private.canaries]`: what is planted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanarySection {
    /// What a canary is.
    pub kind: CanaryKind,
    /// How many there are, in or out.
    pub count: usize,
}

/// What a canary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CanaryKind {
    /// A row of tokens.
    Tokens,
    /// A gradient.
    Gradient,
}

impl CanarySection {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// [`Error::Config`] for a count outside 16 … 2¹⁶.
    pub fn check(&self) -> Result<()> {
        within("private.canaries.count", self.count as u64, 16, 1 << 16, "")
    }
}

/// The canaries of a run.
pub(super) struct Canaries {
    /// All of them, in or out.
    pub all: Vec<Canary>,
    /// SHA-256 of the plan, in hexadecimal.
    digest: String,
}

/// What canaries must fit.
pub(super) struct Fits<'a> {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens of a row, at most.
    pub context: usize,
    /// Elements of each block of the gradient.
    pub dims: &'a [usize],
}

impl Canaries {
    /// Those in a run's folder; of a `new` run, which has spent nothing, new ones with coins of `seed`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is missing or is not the plan of these settings;
    /// [`Error::Config`] for more gradient canaries than an adapter has coordinates.
    pub fn open(
        output: &Path,
        section: &CanarySection,
        fits: &Fits,
        (new, seed): (bool, impl FnOnce() -> Result<u64>),
    ) -> Result<Self> {
        let path = output.join(CANARIES);
        if new {
            let seed = seed()?;
            let vocabulary: Vec<u32> = (0..fits.vocab as u32).collect();
            let all = match section.kind {
                CanaryKind::Gradient => canary::gradient(section.count, fits.dims, seed),
                CanaryKind::Tokens => {
                    let length = LENGTH.min(fits.context);
                    canary::new_tokens(section.count, &vocabulary, length, seed)
                }
            };
            let all =
                all.map_err(|error| Error::config("private.canaries.count", error.to_string()))?;
            files::write_atomic(&path, canary::manifest(&all)?.as_bytes())?;
        }
        let found = Self::read(&path)?;
        let one = |canary: &Canary| match &canary.planted {
            Planted::Gradient { elements } => {
                section.kind == CanaryKind::Gradient
                    && elements.len() == fits.dims.len()
                    && elements.iter().zip(fits.dims).all(|(element, dim)| element < dim)
            }
            Planted::NewToken { tokens } => {
                section.kind == CanaryKind::Tokens
                    && (2..=fits.context).contains(&tokens.len())
                    && tokens.iter().all(|&token| (token as usize) < fits.vocab)
            }
        };
        if found.all.len() != section.count || !found.all.iter().all(one) {
            return Err(Error::Checkpoint(format!(
                "{} does not have the {} canaries of this run; bring it back from a copy, or begin \
                 a new run in another `output`",
                path.display(),
                section.count
            )));
        }
        Ok(found)
    }

    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::Checkpoint(format!(
                "{} cannot be read: {error}; the run planted canaries, and without their coins \
                 nothing can be said of them. Bring it back from a copy",
                path.display()
            ))
        })?;
        let all = canary::read_manifest(&text)
            .map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))?;
        Ok(Self { all, digest: files::hex(&Sha256::digest(&text)) })
    }

    /// The key of the rows and of these.
    pub fn key(&self, rows: &str) -> String {
        files::hex(&Sha256::digest([rows, &self.digest].concat()))
    }

    /// The rows of token canaries, all in order; none of gradient canaries.
    pub fn examples(&self) -> impl Iterator<Item = (&Canary, Example)> {
        self.all.iter().filter_map(|canary| match &canary.planted {
            Planted::NewToken { tokens } => Some((canary, example(tokens))),
            Planted::Gradient { .. } => None,
        })
    }

    /// The included token canaries as persons.
    pub fn persons(&self) -> impl Iterator<Item = Person> {
        let included = self.examples().filter(|(canary, _)| canary.included);
        included.map(|(_, example)| Person { examples: vec![example] })
    }

    /// The gradient canaries of a run, with the scores of the checkpoint it goes on from.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for scores that are not there, or of other canaries.
    pub fn gradients(self, from: Option<&Path>) -> Result<Option<Gradients>> {
        let elements = |canary: &Canary| match &canary.planted {
            Planted::Gradient { elements } => Some(elements.clone()),
            Planted::NewToken { .. } => None,
        };
        let included = (0..self.all.len()).filter(|&at| self.all[at].included).collect();
        let elements: Vec<Vec<usize>> = self.all.iter().filter_map(elements).collect();
        if elements.is_empty() {
            return Ok(None);
        }
        let scores = match from {
            Some(checkpoint) => scores(checkpoint, elements.len())?,
            None => vec![0.0; elements.len()],
        };
        Ok(Some(Gradients { elements, included, scores }))
    }

    /// What a checkpoint's scores say of gradient canaries.
    ///
    /// # Errors
    /// As [`Canaries::gradients`].
    pub fn scored(&self, checkpoint: &Path) -> Result<Vec<Scored>> {
        let scores = scores(checkpoint, self.all.len())?;
        let scored = |(canary, score): (&Canary, f64)| Scored {
            id: canary.id.clone(),
            included: canary.included,
            score,
            kind: Kind::Canary,
            candidates: Vec::new(),
        };
        Ok(self.all.iter().zip(scores).map(scored).collect())
    }
}

/// A row of tokens, all of them learnt.
pub(super) fn example(tokens: &[u32]) -> Example {
    let ids = tokens.iter().map(|&token| token as i32).collect();
    Example { ids, learnt: vec![true; tokens.len()] }
}

/// Gradient canaries during a run.
pub struct Gradients {
    /// Of each canary, the element of each block.
    elements: Vec<Vec<usize>>,
    /// Which of them are in.
    included: Vec<usize>,
    scores: Vec<f64>,
}

impl Gradients {
    /// How many are in: so many persons more than those of the rows.
    pub fn included(&self) -> usize {
        self.included.len()
    }

    /// Adds the included canary of this number to a step's sum, statistics and all; its loss
    /// counts as 0.
    pub(super) fn add(
        &self,
        which: usize,
        sum: &mut ClippedSum,
        steering: &Steering,
    ) -> crate::Result<()> {
        let bounds = steering.bounds();
        let far: Vec<f64> = bounds.iter().map(|bound| FAR * bound).collect();
        let places = places(steering.blocks(), &self.elements[self.included[which]]);
        let mut all: Vec<(usize, usize, f32)> =
            places.zip(&far).map(|((slot, at), &far)| (slot, at, far as f32)).collect();
        let (statistics, first) = (steering.statistics(), steering.blocks().sizes().len());
        if !statistics.is_empty() {
            let rows = statistics.rows(&[0.0], &Norms { norms: far }, bounds)?;
            for (slot, row) in rows.iter().enumerate() {
                all.extend(row.iter().enumerate().map(|(at, &value)| (first + slot, at, value)));
            }
        }
        sum.add_sparse(&all)
    }

    /// Scores what a step released, in the coordinates in which it was clipped; `scales` are the
    /// standard deviations by block.
    pub(super) fn score(&mut self, steering: &Steering, released: &[Vec<f32>], scales: &[f64]) {
        // Without noise any weight would do.
        let weigh = |(c, s): (&f64, &f64)| if *s > 0.0 { c / (s * s) } else { 1.0 / c };
        let weights: Vec<f64> = steering.bounds().iter().zip(scales).map(weigh).collect();
        for (score, elements) in self.scores.iter_mut().zip(&self.elements) {
            let places = places(steering.blocks(), elements).zip(&weights);
            let seen = places.map(|((slot, at), weight)| weight * f64::from(released[slot][at]));
            *score -= seen.sum::<f64>();
        }
    }

    /// What a checkpoint must hold of them: name and content.
    ///
    /// # Errors
    /// [`Error::Fault`].
    pub(super) fn file(&self) -> Result<(String, Vec<u8>)> {
        // As IEEE bits: a resumed run must have the same numbers.
        let bits: Vec<u64> = self.scores.iter().map(|score| score.to_bits()).collect();
        let text = serde_json::to_vec(&bits)
            .map_err(|error| Error::Fault(format!("the canaries' scores have no JSON: {error}")))?;
        Ok((SCORES.into(), text))
    }
}

/// Slot and place of an element of each block. All exist: the plan was checked against the blocks.
fn places<'a>(
    blocks: &'a Blocks,
    elements: &'a [usize],
) -> impl Iterator<Item = (usize, usize)> + 'a {
    let each = elements.iter().enumerate();
    each.filter_map(|(block, &element)| blocks.place(block, element))
}

fn scores(checkpoint: &Path, count: usize) -> Result<Vec<f64>> {
    let path = checkpoint.join(SCORES);
    let refuse = |problem: String| Error::Checkpoint(format!("{}: {problem}", path.display()));
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let bits: Vec<u64> =
        serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
    let scores: Vec<f64> = bits.into_iter().map(f64::from_bits).collect();
    if scores.len() != count || scores.iter().any(|score| !score.is_finite()) {
        return Err(refuse(format!("does not hold a finite score of each of {count} canaries")));
    }
    Ok(scores)
}
