//! One step of alignment: log-probabilities of both answers of every pair, the objective's loss
//! and slopes, and the walk back from them.

use std::sync::atomic::{AtomicBool, Ordering};

use tercet_model::Model;
use tercet_tensor::Grads;
use tercet_train::config::TuneTrain;
use tercet_train::run::{Measured, Task};
use tercet_train::tune::{Example, Order, portions};
use tercet_train::{Error, Result};

use crate::objective::{
    Mismatched, Objectives, PairLogProbs, PairOutcome, ReferenceLogProbs, StepTotals, kto_z,
    metrics,
};
use crate::pairs::Pair;
use crate::reference::{Reference, ask};
use crate::sums::{Answer, AnswerSums, Pass};

/// Alignment with an objective.
pub struct Align<'a> {
    /// Batch, portions, recomputation.
    pub train: &'a TuneTrain,
    /// What is descended.
    pub objectives: &'a Objectives,
    /// What answers are measured against.
    pub reference: Reference,
    /// Trained on.
    pub pairs: &'a [Pair],
    /// Held out.
    pub validation: &'a [Pair],
    /// Which pairs a step sees.
    pub order: Order,
    /// Longest answer in tokens, prompt included.
    pub context: usize,
}

/// What all portions of a step found.
#[derive(Default)]
struct Found {
    loss: f64,
    tokens: u64,
    place: Option<String>,
    sums: Vec<AnswerSums>,
    pairs: Vec<PairLogProbs>,
    outcomes: Vec<PairOutcome>,
}

impl Task for Align<'_> {
    fn step(
        &mut self,
        model: &Model,
        step: u64,
        grads: &mut Grads,
        stop: &AtomicBool,
    ) -> Result<Option<Measured>> {
        let indices = self.order.step(step);
        let found = self.through(model, self.pairs, 0, &indices, Some((grads, stop)))?;
        Ok(found.map(Found::measured))
    }

    fn evaluate(&mut self, model: &Model) -> Result<Option<Measured>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let all: Vec<usize> = (0..self.validation.len()).collect();
        let found = self.through(model, self.validation, self.pairs.len(), &all, None)?;
        Ok(found.map(Found::measured))
    }

    fn position(&self, step: u64) -> u64 {
        self.order.positions(step).start
    }
}

impl Align<'_> {
    /// Loss of the pairs at `indices`, portion by portion, and its gradient when asked for. `None`
    /// when stopped. `offset` is added to an index to find a pair among the known sums.
    fn through(
        &self,
        model: &Model,
        pairs: &[Pair],
        offset: usize,
        indices: &[usize],
        mut into: Option<(&mut Grads, &AtomicBool)>,
    ) -> Result<Option<Found>> {
        let alpha = self.objectives.ld_alpha();
        let all: Vec<&Pair> = indices.iter().map(|&i| &pairs[i]).collect();
        let stopped = |into: &Option<(&mut Grads, &AtomicBool)>| {
            into.as_ref().is_some_and(|(_, stop)| stop.load(Ordering::Relaxed))
        };
        if stopped(&into) {
            return Ok(None);
        }
        let mut found = Found::default();
        let kto_z = match self.objectives.needs_kto_z() {
            false => None,
            true => match self.divergence(model, &all)? {
                Some(z) => Some(z),
                None => {
                    found.loss = f64::NAN;
                    found.place = Some("log-probability NaN of a mismatched answer".into());
                    return Ok(Some(found));
                }
            },
        };
        let totals = StepTotals {
            pairs: all.len(),
            chosen_tokens: all.iter().map(|pair| pair.chosen.counted()).sum(),
            kto_z,
        };
        for portion in portions(all.iter().map(|pair| pair.tokens()), self.train.micro_tokens) {
            if stopped(&into) {
                return Ok(None);
            }
            let part = &all[portion.clone()];
            let answers: Vec<Answer> =
                part.iter().flat_map(|pair| Answer::both(pair, alpha)).collect();
            let pass = Pass::new(model, &answers, into.is_some(), self.train.recompute)?;
            let sums = pass.sums()?;
            found.tokens += pass.tokens as u64;
            if let Some(sum) = sums.iter().find(|sum| !sum.log_prob.is_finite()) {
                // The guard skips the step; the next one may be better.
                found.loss = f64::NAN;
                found.place = Some(format!("log-probability {} of an answer", sum.log_prob));
                return Ok(Some(found));
            }
            let references = self.references(part, portion.clone(), offset, indices)?;
            let log_probs: Vec<PairLogProbs> = part
                .iter()
                .zip(sums.chunks_exact(2))
                .zip(references)
                .map(|((pair, sums), reference)| log_probs(pair, sums, reference))
                .collect();
            let outcome = self.objectives.evaluate(&log_probs, &totals)?;
            if let Some((grads, _)) = &mut into {
                let slopes: Vec<f64> = outcome
                    .pairs
                    .iter()
                    .flat_map(|pair| [pair.d_chosen, pair.d_rejected])
                    .collect();
                pass.back(&slopes, grads)?;
            }
            found.loss += outcome.loss;
            found.sums.extend(sums);
            found.pairs.extend(log_probs);
            found.outcomes.extend(outcome.pairs);
        }
        Ok(Some(found))
    }

    /// The reference's sums of a portion.
    fn references(
        &self,
        part: &[&Pair],
        portion: std::ops::Range<usize>,
        offset: usize,
        indices: &[usize],
    ) -> Result<Vec<Option<ReferenceLogProbs>>> {
        Ok(match &self.reference {
            Reference::None => vec![None; part.len()],
            Reference::Model(model) => {
                let sums = ask(model, part, self.objectives.ld_alpha())?;
                sums.into_iter().map(Some).collect()
            }
            Reference::Known(sums) => {
                indices[portion].iter().map(|&i| Some(sums[offset + i])).collect()
            }
        })
    }

    /// KTO's z: every prompt with the answer of the next pair. `None` when a number went wild,
    /// which is for the guard.
    fn divergence(&self, model: &Model, pairs: &[&Pair]) -> Result<Option<f64>> {
        let Reference::Model(reference) = &self.reference else {
            return Err(Error::config(
                "align.precompute",
                "cannot be used with kto, which measures other answers at every step",
            ));
        };
        let examples: Vec<Example> = (0..pairs.len())
            .map(|i| {
                // A step of one pair borrows the answer of another.
                let next = match pairs.len() {
                    1 => self.pairs.iter().find(|pair| *pair != pairs[i]).unwrap_or(pairs[i]),
                    n => pairs[(i + 1) % n],
                };
                mismatched(pairs[i], next, self.context)
            })
            .collect();
        let lengths = examples.iter().map(|example| example.ids.len());
        let mut all = Vec::with_capacity(pairs.len());
        for portion in portions(lengths, self.train.micro_tokens) {
            let answers: Vec<Answer> = examples[portion].iter().map(Answer::alone).collect();
            let policy = Pass::new(model, &answers, false, false)?.sums()?;
            let reference = Pass::new(reference, &answers, false, false)?.sums()?;
            all.extend(policy.iter().zip(reference).map(|(policy, reference)| Mismatched {
                policy: policy.log_prob,
                reference: reference.log_prob,
            }));
        }
        if all.iter().any(|answer| !(answer.policy - answer.reference).is_finite()) {
            return Ok(None);
        }
        Ok(Some(kto_z(&all)?))
    }
}

impl Found {
    fn measured(self) -> Measured {
        let mut measures = metrics(&self.pairs, &self.outcomes);
        let chosen = || self.sums.iter().step_by(2);
        let tokens = chosen().map(|sum| sum.tokens).sum::<usize>() as f64;
        let mean = |of: fn(&AnswerSums) -> f64, by: f64| chosen().map(of).sum::<f64>() / by;
        // Means per pair, and per token of the chosen answers.
        measures.push(("logps/best", mean(|sum| sum.best, self.pairs.len() as f64)));
        measures.push(("entropy", mean(|sum| sum.entropy, tokens)));
        measures.push(("mean_token_accuracy", mean(|sum| sum.hits, tokens)));
        let deltas: Vec<f64> = self.pairs.iter().filter_map(|pair| pair.delta).collect();
        if !deltas.is_empty() {
            measures.push(("delta", deltas.iter().sum::<f64>() / deltas.len() as f64));
        }
        Measured { loss: Some(self.loss), tokens: self.tokens, place: self.place, measures }
    }
}

fn log_probs(
    pair: &Pair,
    sums: &[AnswerSums],
    reference: Option<ReferenceLogProbs>,
) -> PairLogProbs {
    PairLogProbs {
        // Rounding can lift the log-probability of a certain answer above 0 by its last bit.
        chosen: sums[0].log_prob.min(0.0),
        rejected: sums[1].log_prob.min(0.0),
        reference: reference.map(|sums| ReferenceLogProbs {
            chosen: sums.chosen.min(0.0),
            rejected: sums.rejected.min(0.0),
        }),
        chosen_tokens: sums[0].tokens,
        rejected_tokens: sums[1].tokens,
        delta: pair.delta,
    }
}

/// The prompt of one pair with the chosen answer of another, cut to the context.
fn mismatched(prompt: &Pair, answer: &Pair, context: usize) -> Example {
    let opening = |example: &Example| {
        example.learnt.iter().position(|&learnt| learnt).unwrap_or(example.ids.len())
    };
    let prompt = &prompt.chosen.ids[..opening(&prompt.chosen)];
    let from = opening(&answer.chosen);
    let room = context.saturating_sub(prompt.len()).max(1).min(answer.chosen.ids.len() - from);
    let to = from + room;
    let mut learnt = vec![false; prompt.len()];
    learnt.extend_from_slice(&answer.chosen.learnt[from..to]);
    Example { ids: [prompt, &answer.chosen.ids[from..to]].concat(), learnt }
}
