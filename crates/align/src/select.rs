//! The pair of n scored answers that teaches most: the best and the worst.
//!
//! The rule of the iterative pipelines MaPPO is run in (arXiv 2507.21183, algorithm 1): n answers
//! to a prompt, the highest score is chosen, the lowest rejected, the first of equals either way.
//! A prompt whose answers all have one score, or of which fewer than n answers exist, gives none.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a prompt's answers give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Indices of the first answer of the highest and of the lowest score.
    Pair {
        /// The chosen answer.
        best: usize,
        /// The rejected answer.
        worst: usize,
    },
    /// No pair: all scores are equal.
    Tied,
    /// No pair: there are fewer answers than wanted.
    TooFew,
}

/// How many prompts gave what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PickCounts {
    /// Prompts that gave a pair.
    pub pairs: usize,
    /// Prompts whose answers all had one score.
    pub tied: usize,
    /// Prompts with fewer answers than wanted.
    pub too_few: usize,
}

impl PickCounts {
    /// Counts one prompt.
    pub fn add(&mut self, pick: Pick) {
        match pick {
            Pick::Pair { .. } => self.pairs += 1,
            Pick::Tied => self.tied += 1,
            Pick::TooFew => self.too_few += 1,
        }
    }
}

/// The best and the worst of one prompt's answers, of which there should be `wanted` (at least
/// 2). Scores must be finite.
pub fn best_and_worst(scores: &[f64], wanted: usize) -> Result<Pick> {
    const WHAT: &str = "selection";
    if wanted < 2 {
        let problem = format!("{wanted} answers a prompt make no pair, expected at least 2");
        return Err(Error::value(WHAT, problem));
    }
    if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
        let problem = format!("the score of answer {i} is {}, expected a finite number", scores[i]);
        return Err(Error::value(WHAT, problem));
    }
    if scores.len() < wanted {
        return Ok(Pick::TooFew);
    }
    let (mut best, mut worst) = (0, 0);
    for (i, &score) in scores.iter().enumerate() {
        if score > scores[best] {
            best = i;
        }
        if score < scores[worst] {
            worst = i;
        }
    }
    Ok(if best == worst { Pick::Tied } else { Pick::Pair { best, worst } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equals_is_taken_and_ties_and_short_lists_give_none() {
        let mut counts = PickCounts::default();
        for (scores, wanted, expected) in [
            (&[1.0, 3.0, 0.0, 3.0, 0.0][..], 5, Pick::Pair { best: 1, worst: 2 }),
            (&[2.0, 2.0], 2, Pick::Tied),
            (&[0.0, -0.0], 2, Pick::Tied),
            (&[1.0, 2.0], 3, Pick::TooFew),
            (&[], 2, Pick::TooFew),
            (&[1.0, 2.0, 3.0], 2, Pick::Pair { best: 2, worst: 0 }),
        ] {
            let pick = best_and_worst(scores, wanted).unwrap();
            assert_eq!(pick, expected);
            counts.add(pick);
        }
        assert_eq!(counts, PickCounts { pairs: 2, tied: 2, too_few: 2 });
    }

    #[test]
    fn scores_that_are_no_numbers_are_errors() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let text = best_and_worst(&[1.0, bad, 0.0], 3).unwrap_err().to_string();
            assert!(text.contains("answer 1"), "{text}");
        }
        assert!(best_and_worst(&[1.0, 2.0], 1).is_err() && best_and_worst(&[], 0).is_err());
    }
}
