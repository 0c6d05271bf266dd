//! From log-probabilities of tokens to sums of answers, and back from the slopes of sums to the
//! gradients of tokens.

use tercet_model::{ForwardOptions, Model, TokenLogProbs};
use tercet_tensor::{Grads, Tape, Tensor};
use tercet_train::Result;
use tercet_train::tune::{Example, pack};

use crate::objective::ld_weight;
use crate::pairs::Pair;

/// Sums over the learnt tokens of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AnswerSums {
    /// Log-probabilities of its tokens, weighted where LD-DPO is on, in nats.
    pub log_prob: f64,
    /// Log-probabilities of the most probable tokens at the same places.
    pub best: f64,
    /// Entropies at the same places.
    pub entropy: f64,
    /// Tokens that were the most probable ones.
    pub hits: f64,
    /// Tokens.
    pub tokens: usize,
}

/// An answer among others, with the weight of each of its tokens.
pub struct Answer<'a> {
    example: &'a Example,
    /// Learnt tokens of this answer and of the one it is compared with.
    counts: [usize; 2],
    alpha: f64,
}

impl<'a> Answer<'a> {
    /// An answer whose tokens all weigh 1.
    pub fn alone(example: &'a Example) -> Self {
        Self { example, counts: [example.counted(); 2], alpha: 1.0 }
    }

    /// Both answers of a pair, the chosen first, with LD-DPO's weights.
    pub fn both(pair: &'a Pair, alpha: f64) -> [Self; 2] {
        let counts = [pair.chosen.counted(), pair.rejected.counted()];
        [&pair.chosen, &pair.rejected].map(|example| Self { example, counts, alpha })
    }

    /// For each position that predicts a learnt token: where it stands and what it weighs.
    fn weights(&self) -> impl Iterator<Item = (usize, f64)> + '_ {
        let learnt = self.example.learnt.iter().skip(1).enumerate().filter(|(_, learnt)| **learnt);
        learnt.enumerate().map(|(index, (position, _))| {
            (position, ld_weight(index, self.counts[0], self.counts[1], self.alpha))
        })
    }
}

/// A forward pass over answers, recorded when it is to be walked back.
pub struct Pass<'a, 'm> {
    answers: &'a [Answer<'a>],
    tape: Tape<'m>,
    found: TokenLogProbs,
    /// Tokens of all answers.
    pub tokens: usize,
}

impl<'a, 'm> Pass<'a, 'm> {
    /// Runs `model` over the answers, packed; `record` keeps what [`Pass::back`] needs.
    pub fn new(
        model: &'m Model,
        answers: &'a [Answer<'a>],
        record: bool,
        recompute: bool,
    ) -> Result<Self> {
        let batch = pack(answers.iter().map(|answer| answer.example));
        let mut tape = if record { Tape::recording() } else { Tape::inference() };
        let options = ForwardOptions { recompute, ..ForwardOptions::default() };
        let found = model.token_log_probs(&mut tape, &batch, &options)?;
        Ok(Self { answers, tape, found, tokens: batch.input_ids.len() })
    }

    /// The sums of every answer.
    pub fn sums(&self) -> Result<Vec<AnswerSums>> {
        let found = &self.found;
        let log_probs = found.log_probs.value().to_vec_f32()?;
        let (best, entropy) = (found.best.to_vec_f32()?, found.entropy.to_vec_f32()?);
        let hits = found.hits.to_vec_f32()?;
        let mut start = 0;
        let mut sums = Vec::with_capacity(self.answers.len());
        for answer in self.answers {
            let mut sum = AnswerSums::default();
            for (position, weight) in answer.weights() {
                let at = start + position;
                sum.log_prob += weight * f64::from(log_probs[at]);
                sum.best += f64::from(best[at]);
                sum.entropy += f64::from(entropy[at]);
                sum.hits += f64::from(hits[at]);
                sum.tokens += 1;
            }
            start += answer.example.ids.len();
            sums.push(sum);
        }
        Ok(sums)
    }

    /// Adds the gradients of `Σ slope · sum` over the answers.
    pub fn back(mut self, slopes: &[f64], grads: &mut Grads) -> Result<()> {
        let mut gradient = vec![0.0f32; self.tokens];
        let mut start = 0;
        for (answer, slope) in self.answers.iter().zip(slopes) {
            for (position, weight) in answer.weights() {
                gradient[start + position] = (slope * weight) as f32;
            }
            start += answer.example.ids.len();
        }
        let gradient = Tensor::from_f32(gradient, &[self.tokens])?;
        self.tape.backward_from(&[(&self.found.log_probs, gradient)], grads)?;
        Ok(())
    }
}
