//! What a policy is worth: mean reward with its uncertainty, length, and how far it has moved.

use serde::{Deserialize, Serialize};
use tercet_model::Model;
use tercet_train::Result;
use tercet_train::tune::{Example, portions};

use super::prompts::Prompt;
use super::samples::Sample;
use crate::sums::{Answer, Pass};

/// Figures over the answers to some prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Worth {
    /// Prompts.
    pub prompts: usize,
    /// Mean reward: the mean over prompts of each prompt's mean.
    pub reward: f64,
    /// Half the width of the 95 % confidence interval of `reward` over prompts (normal, 1.96
    /// standard errors); 0 for a single prompt.
    pub interval: f64,
    /// Mean tokens of an answer.
    pub length: f64,
    /// Share of the answers that the model ended itself.
    pub ended: f64,
    /// Mean over answers of ln π(y) − ln π₀(y), in nats an answer: an unbiased estimate of the
    /// divergence KL(π ‖ π₀) from the start when sampling at temperature 1 without filters.
    pub divergence: Option<f64>,
}

/// Sums up samples, `wanted` for each prompt. `start` is the model at the start of the run.
pub fn worth(
    prompts: &[&Prompt],
    samples: &[Sample],
    wanted: usize,
    start: Option<(&Model, usize)>,
) -> Result<Worth> {
    let means: Vec<f64> = samples
        .chunks(wanted)
        .map(|answers| answers.iter().map(|s| s.score).sum::<f64>() / answers.len() as f64)
        .collect();
    let count = means.len() as f64;
    let reward = means.iter().sum::<f64>() / count;
    let square = means.iter().map(|mean| (mean - reward).powi(2)).sum::<f64>();
    let error = if means.len() > 1 { (square / (count - 1.0) / count).sqrt() } else { 0.0 };
    let over = |of: fn(&Sample) -> f64| samples.iter().map(of).sum::<f64>() / samples.len() as f64;
    let divergence = match start {
        None => None,
        Some((model, micro)) => {
            let before = log_probs(model, prompts, samples, micro)?;
            let moved = samples.iter().zip(before).map(|(sample, start)| sample.log_prob - start);
            Some(moved.sum::<f64>() / samples.len() as f64)
        }
    };
    Ok(Worth {
        prompts: means.len(),
        reward,
        interval: 1.96 * error,
        length: over(|sample| sample.tokens.len() as f64),
        ended: over(|sample| f64::from(u8::from(sample.ended))),
        divergence,
    })
}

/// Log-probability of every answer under a model, in nats.
fn log_probs(
    model: &Model,
    prompts: &[&Prompt],
    samples: &[Sample],
    micro: usize,
) -> Result<Vec<f64>> {
    let examples: Vec<Example> = samples
        .iter()
        .map(|sample| Example::completion(&prompts[sample.prompt].ids, &sample.tokens))
        .collect();
    let mut sums = Vec::with_capacity(samples.len());
    for portion in portions(examples.iter().map(|example| example.ids.len()), micro) {
        let answers: Vec<Answer> = examples[portion].iter().map(Answer::alone).collect();
        let pass = Pass::new(model, &answers, false, false)?;
        sums.extend(pass.sums()?.iter().map(|sum| sum.log_prob));
    }
    Ok(sums)
}
