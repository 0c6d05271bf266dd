//! Does the promise hold? What attacks find, as numbers beside the proven ε.
//!
//! | room | what it says |
//! |---|---|
//! | [`one_run`] | a lower bound on ε from one run with canaries (Steinke, Nasr & Jagielski 2023) |
//! | [`exposure`] | how far up a canary ranks among what could have been there instead |
//! | [`membership`] | how well losses tell who was in the data |
//! | [`canary`] | which canaries go into a run, by coins |
//! | [`report`] | all of it from the losses of rows |
//!
//! A lower bound is what a particular attack could show. One above the proven ε refutes the proof
//! (or the code); one below it proves nothing.
//!
//! Pure functions of numbers: losses come from whoever has the model. A score is a loss throughout:
//! the lower it is, the likelier was the row learnt from.

pub mod binomial;
pub mod canary;
pub mod exposure;
pub mod membership;
pub mod one_run;
pub mod report;

use crate::{Error, Result};

/// More scores than this are a mistake; it keeps sums of squares of counts within 64 bits.
const MOST_SCORES: usize = 1 << 24;

/// Refuses scores that cannot be put in order.
fn check_scores(what: &str, scores: &[f64]) -> Result<()> {
    if scores.len() > MOST_SCORES {
        let (got, most) = (scores.len(), MOST_SCORES);
        return Err(Error::Audit(format!("{got} {what} are refused, at most {most} are taken")));
    }
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::Audit(format!(
            "score {} of the {what} is {}, expected a finite number; a row without a loss must be \
             left out before the audit, by a rule that knows nothing of who was included",
            at + 1,
            scores[at]
        ))),
    }
}

/// The share of wrong answers an interval or bound may give: above 0 and at most a half.
fn check_error_rate(p: f64) -> Result<()> {
    if p > 0.0 && p <= 0.5 {
        return Ok(());
    }
    Err(Error::parameter("p", p, "one minus the confidence is above 0 and at most 0.5"))
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    /// Uniform numbers of [0, 1).
    pub fn random(seed: u64) -> impl FnMut() -> f64 {
        let mut words = ChaCha20Rng::seed_from_u64(seed);
        move || (words.next_u64() >> 11) as f64 * 2f64.powi(-53)
    }
}
