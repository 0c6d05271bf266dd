//! Preference objectives as functions of log-probabilities: numbers in, a loss and its slopes out.
//!
//! A training step works in this order: sum each answer's token log-probabilities under the
//! policy (and, once, the reference), hand the sums of a micro-batch with the whole step's
//! [`StepTotals`] to [`Objectives::evaluate`], and walk back from the slopes: every token of the
//! chosen answer of pair i has the gradient `outcome.pairs[i].d_chosen`, of the rejected answer
//! `d_rejected`, multiplied by [`ld_weight`] where LD-DPO is on. Losses and slopes of micro-batches
//! are shares of the step's: they add up to what one large batch gives.
//!
//! All in f64. Reads: the formulas at [`Kind`], and one idea a file: `margin.rs`, `sides.rs`,
//! `odds.rs`, `nll.rs`, `kto.rs`, `ld.rs`.

mod config;
mod kto;
mod ld;
mod margin;
mod metrics;
mod nll;
mod odds;
mod sides;

pub use config::{Kind, ObjectiveConfig, TermConfig};
pub use kto::{Mismatched, kto_z};
pub use ld::ld_weight;
pub use metrics::{Rewards, metrics};
pub use nll::NllMean;

use config::{Rule, Score, Term};

use crate::error::in_range;
use crate::{Error, Result};

const WHAT: &str = "objective";

/// Sums of log-probabilities (nats) of a pair under the frozen reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReferenceLogProbs {
    /// Of the chosen answer.
    pub chosen: f64,
    /// Of the rejected answer.
    pub rejected: f64,
}

/// One pair: sums over the answers' tokens of log-probabilities (nats), weighted by [`ld_weight`]
/// where LD-DPO is on, policy and reference alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLogProbs {
    /// Sum of the chosen answer under the policy.
    pub chosen: f64,
    /// Sum of the rejected answer under the policy.
    pub rejected: f64,
    /// The same under the reference; not looked at when [`Objectives::needs_reference`] is false.
    pub reference: Option<ReferenceLogProbs>,
    /// Tokens of the chosen answer, at least 1.
    pub chosen_tokens: usize,
    /// Tokens of the rejected answer, at least 1.
    pub rejected_tokens: usize,
    /// Δ in [−1, 1]; not looked at when [`Objectives::needs_delta`] is false. What to do with a
    /// negative one is decided before: [`crate::delta`].
    pub delta: Option<f64>,
}

/// What a micro-batch must know of the whole optimiser step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTotals {
    /// Pairs of the step.
    pub pairs: usize,
    /// Tokens of all chosen answers of the step.
    pub chosen_tokens: usize,
    /// From [`kto_z`] over the whole step; needed by kto alone.
    pub kto_z: Option<f64>,
}

impl StepTotals {
    /// Those of a step that is one batch, without KTO's z.
    pub fn of(pairs: &[PairLogProbs]) -> Self {
        let chosen_tokens = pairs.iter().map(|pair| pair.chosen_tokens).sum();
        StepTotals { pairs: pairs.len(), chosen_tokens, kto_z: None }
    }
}

/// A micro-batch's share of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Of the loss: the shares of all micro-batches add up to the step's loss.
    pub loss: f64,
    /// Of each term, weighted, in the order of the configuration; they add up to `loss`.
    pub terms: Vec<f64>,
    /// One for each pair.
    pub pairs: Vec<PairOutcome>,
}

/// What the objective makes of one pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairOutcome {
    /// Slope of the step's loss by the chosen answer's sum of log-probabilities.
    pub d_chosen: f64,
    /// By the rejected answer's.
    pub d_rejected: f64,
    /// The margin of the first term that compares the answers, Δ and γ included: what a
    /// logistic objective takes −ln σ of. None when no term does.
    pub u: Option<f64>,
    /// The implicit rewards of that term, without Δ.
    pub rewards: Option<Rewards>,
}

/// A checked sum of objectives.
#[derive(Clone, Debug, PartialEq)]
pub struct Objectives {
    terms: Vec<Term>,
    ld_alpha: f64,
}

impl Objectives {
    /// Checks a configuration.
    pub fn new(config: &ObjectiveConfig) -> Result<Self> {
        if config.terms.is_empty() {
            return Err(Error::config("terms", "is empty, expected at least one objective"));
        }
        let range = "a number from 0 to 1";
        let fits = |x| (0.0..=1.0).contains(&x);
        let ld_alpha = in_range("ld_alpha", config.ld_alpha, range, fits)?;
        let terms = config.terms.iter().enumerate().map(|(i, term)| term.check(i));
        let terms: Vec<Term> = terms.collect::<Result<_>>()?;
        if let Some(term) = terms.iter().find(|term| term.nll.is_some() && ld_alpha < 1.0) {
            let problem = format!(
                "is {ld_alpha}, but {} learns the likelihood of whole answers, whose tokens all \
                 weigh 1; remove one of the two",
                term.kind.name()
            );
            return Err(Error::config("ld_alpha", problem));
        }
        Ok(Objectives { terms, ld_alpha })
    }

    /// Whether [`PairLogProbs::reference`] must be there.
    pub fn needs_reference(&self) -> bool {
        self.terms.iter().any(|term| {
            let ratios = matches!(term.score, Score::Ratio | Score::RatioMean);
            ratios && term.rule != Rule::Nothing
        })
    }

    /// Whether [`PairLogProbs::delta`] must be there.
    pub fn needs_delta(&self) -> bool {
        self.terms.iter().any(|term| matches!(term.rule, Rule::Margin { delta: true, .. }))
    }

    /// Whether [`StepTotals::kto_z`] must be there.
    pub fn needs_kto_z(&self) -> bool {
        self.terms.iter().any(|term| term.kind == Kind::Kto)
    }

    /// LD-DPO's α for [`ld_weight`].
    pub fn ld_alpha(&self) -> f64 {
        self.ld_alpha
    }

    /// The share of a step's loss that `pairs` have, and its slopes. `totals` are the whole
    /// step's.
    pub fn evaluate(&self, pairs: &[PairLogProbs], totals: &StepTotals) -> Result<Outcome> {
        let z = self.check_totals(pairs, totals)?;
        let mut outcome = Outcome {
            loss: 0.0,
            terms: vec![0.0; self.terms.len()],
            pairs: Vec::with_capacity(pairs.len()),
        };
        for (i, pair) in pairs.iter().enumerate() {
            let wrong = |problem: String| Error::value(WHAT, format!("pair {i}: {problem}"));
            self.check_pair(pair).map_err(wrong)?;
            let mut found = PairOutcome::default();
            for (term, share) in self.terms.iter().zip(&mut outcome.terms) {
                *share += term.weight * term.add(pair, totals, z, &mut found);
            }
            let all = [found.d_chosen, found.d_rejected, outcome.terms.iter().sum()];
            if !all.iter().all(|x| x.is_finite()) {
                let problem = format!("the loss or its slope is beyond what f64 holds: {pair:?}");
                return Err(wrong(problem));
            }
            outcome.pairs.push(found);
        }
        outcome.loss = outcome.terms.iter().sum();
        Ok(outcome)
    }

    /// Refuses totals that are not those of a step with these pairs; z, or 0 where none is needed.
    fn check_totals(&self, pairs: &[PairLogProbs], totals: &StepTotals) -> Result<f64> {
        let held = StepTotals::of(pairs);
        for (name, total, held) in [
            ("pairs", totals.pairs, held.pairs),
            ("chosen_tokens", totals.chosen_tokens, held.chosen_tokens),
        ] {
            if total < held {
                let problem =
                    format!("the step's {name} is {total}, but this part of it has {held}");
                return Err(Error::value(WHAT, problem));
            }
        }
        match totals.kto_z {
            _ if !self.needs_kto_z() => Ok(0.0),
            Some(z) if z.is_finite() && z >= 0.0 => Ok(z),
            z => {
                let problem =
                    format!("kto_z is {z:?}, expected kto_z of the step's mismatched answers");
                Err(Error::value(WHAT, problem))
            }
        }
    }

    /// Refuses a pair that lacks what the terms need, or whose numbers are none.
    fn check_pair(&self, pair: &PairLogProbs) -> std::result::Result<(), String> {
        let mut sums = vec![("chosen", pair.chosen), ("rejected", pair.rejected)];
        if self.needs_reference() {
            let reference = pair.reference.ok_or(
                "the reference's log-probabilities are missing; this objective needs them",
            )?;
            sums.push(("chosen (reference)", reference.chosen));
            sums.push(("rejected (reference)", reference.rejected));
        }
        if let Some((name, sum)) = sums.iter().find(|(_, sum)| !(sum.is_finite() && *sum <= 0.0)) {
            return Err(format!(
                "the sum of log-probabilities of {name} is {sum}, expected a finite number that \
                 is not above 0"
            ));
        }
        if pair.chosen_tokens == 0 || pair.rejected_tokens == 0 {
            let which = if pair.chosen_tokens == 0 { "chosen" } else { "rejected" };
            return Err(format!("the {which} answer has no tokens; drop such pairs beforehand"));
        }
        if self.needs_delta() {
            let delta = pair.delta.ok_or("Δ is missing; it is never taken for 1")?;
            if !(-1.0..=1.0).contains(&delta) {
                return Err(format!("Δ is {delta}, expected a number from -1 to 1"));
            }
        }
        Ok(())
    }
}

/// The scores of a pair and their slopes by the policy's sums.
struct Scores {
    w: f64,
    l: f64,
    slope_w: f64,
    slope_l: f64,
}

impl Term {
    fn scores(&self, pair: &PairLogProbs) -> Scores {
        let reference = match self.score {
            Score::Ratio | Score::RatioMean => pair.reference.map(|r| (r.chosen, r.rejected)),
            Score::Policy | Score::PolicyMean => None,
        };
        let (cw, cl) = reference.unwrap_or_default();
        let (mut w, mut l) = (pair.chosen - cw, pair.rejected - cl);
        let (mut slope_w, mut slope_l) = (self.scale, self.scale);
        if matches!(self.score, Score::RatioMean | Score::PolicyMean) {
            let (n, m) = (pair.chosen_tokens as f64, pair.rejected_tokens as f64);
            (w, l, slope_w, slope_l) = (w / n, l / m, slope_w / n, slope_l / m);
        }
        Scores { w: self.scale * w, l: self.scale * l, slope_w, slope_l }
    }

    /// The pair's share of the term's loss; adds the weighted slopes.
    fn add(
        &self,
        pair: &PairLogProbs,
        totals: &StepTotals,
        z: f64,
        found: &mut PairOutcome,
    ) -> f64 {
        let mut scores = self.scores(pair);
        if let Rule::Margin { delta: true, .. } = self.rule {
            // MaPPO's whole change: the rejected answer counts Δ times.
            let delta = pair.delta.unwrap_or(f64::NAN);
            scores.l *= delta;
            scores.slope_l *= delta;
        }
        let Scores { w, l, slope_w, slope_l } = scores;
        let (u, loss, by_w, by_l) = match self.rule {
            Rule::Margin { gamma, loss, .. } => {
                let u = w - l - gamma;
                let (value, slope) = loss.at(u);
                (Some(u), value, slope, -slope)
            }
            Rule::Sides(sides) => {
                let (value, by_w, by_l) = sides.at(w, l, self.scale * z);
                (Some(w - l), value, by_w, by_l)
            }
            Rule::Odds => {
                let (u, value, by_w, by_l) = odds::at(w, l);
                (Some(u), self.beta * value, self.beta * by_w, self.beta * by_l)
            }
            Rule::Nothing => (None, 0.0, 0.0, 0.0),
        };
        if found.u.is_none() && u.is_some() {
            found.u = u;
            found.rewards = Some(self.rewards(pair));
        }
        let share = self.weight / totals.pairs as f64;
        found.d_chosen += share * by_w * slope_w;
        found.d_rejected += share * by_l * slope_l;
        let mut sum = loss / totals.pairs as f64;
        if let Some((factor, mean)) = self.nll {
            let factor = factor * mean.factor(pair.chosen_tokens, totals);
            found.d_chosen -= self.weight * factor;
            sum -= factor * pair.chosen;
        }
        sum
    }

    /// β times what the term compares, as TRL logs it: log-ratios are summed even where the
    /// objective takes their mean.
    fn rewards(&self, pair: &PairLogProbs) -> Rewards {
        let score = match self.score {
            Score::RatioMean => Score::Ratio,
            score => score,
        };
        let scores = Term { score, scale: self.beta, ..*self }.scores(pair);
        Rewards { chosen: scores.w, rejected: scores.l }
    }
}
