//! KTO's reference point.

use crate::{Error, Result};

/// Log-probability sums of one answer that was put to another prompt than its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mismatched {
    /// By the policy.
    pub policy: f64,
    /// By the reference.
    pub reference: f64,
}

/// z of a step, `max(0, mean(policy − reference))` over mismatched answers (arXiv
/// 2402.01306): an estimate of the policy's divergence from the reference. It is a constant:
/// no gradient flows through it.
pub fn kto_z(answers: &[Mismatched]) -> Result<f64> {
    if answers.is_empty() {
        let problem = "z needs at least one answer put to another prompt than its own";
        return Err(Error::value("kto", problem));
    }
    let ratios = answers.iter().map(|a| a.policy - a.reference);
    let mean = ratios.sum::<f64>() / answers.len() as f64;
    if !mean.is_finite() {
        let problem = format!("the mean log-ratio of mismatched answers is {mean}");
        return Err(Error::value("kto", problem));
    }
    Ok(mean.max(0.0))
}
