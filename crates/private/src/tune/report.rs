//! `privacy.json`: what is promised of an adapter, in a file beside it.
//!
//! Its gist stands in `adapter_config.json` as well, so that it goes where the adapter goes: PEFT from
//! 0.14 on (pull request 2038) drops a key that it does not know with a warning.

use serde::Serialize;
use serde_json::{Map, Value, json};
use tercet_train::{Error, Result};

use super::budget::{Budget, INSECURE, Mode};
use super::config::PrivateConfig;
use super::planted::CanarySection;
use crate::mechanism::ledger::Entry;

/// The file's name.
pub const FILE: &str = "privacy.json";

/// What is promised. Every number is public, or made of what the ledger holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Promise {
    /// Whether anything is promised.
    pub private: bool,
    /// Why not, or what else is wrong with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// ε of everything that was released; null without noise.
    pub epsilon: Option<f64>,
    /// δ that belongs to it.
    pub delta: f64,
    /// Whose presence is hidden.
    pub unit: String,
    /// Which neighbours are meant.
    pub adjacency: &'static str,
    /// Rows of one person that were learnt from, at most.
    pub cap: usize,
    /// How ε was found.
    pub accountant: String,
    /// The ε that must not be passed.
    pub target: Option<f64>,
    /// Method and mode.
    pub method: &'static str,
    /// What is adapted.
    pub mode: &'static str,
    /// Nominal noise multiplier.
    pub sigma: f64,
    /// Probability with which each person was drawn.
    pub rate: f64,
    /// The expected batch.
    pub expected_batch: f64,
    /// Persons, as declared.
    pub people: u64,
    /// Steps that were released, those that had to be done again included.
    pub steps: u64,
    /// Whether noise is drawn on a grid of integers.
    pub hardened: bool,
    /// Whether noise came from a seed that can be known.
    pub insecure_seed: bool,
    /// What was planted for an audit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canaries: Option<CanarySection>,
    /// What the held-out numbers are, when there are any.
    pub validation: Option<&'static str>,
    /// What is not promised.
    pub not_covered: [&'static str; 3],
}

impl Promise {
    /// For what a ledger holds.
    pub fn of(
        config: &PrivateConfig,
        budget: &Budget,
        epsilon: Option<f64>,
        entries: &[Entry],
    ) -> Self {
        let private = &config.private;
        let mut warnings = Vec::new();
        if !private.noise {
            warnings.push("NOT PRIVATE: no noise was added (private.noise = false)".to_owned());
        }
        if private.insecure_seed.is_some() {
            warnings.push(INSECURE.to_owned());
        }
        if budget.delta * budget.people as f64 >= 1.0 {
            warnings.push("delta is not below one over the persons".to_owned());
        }
        let accountant = match budget.mode {
            _ if !private.noise => "none".to_owned(),
            Mode::M2 => format!(
                "Rényi filter at the order {}; epsilon is the target, whatever was spent",
                budget.order
            ),
            _ => "privacy-loss distributions, upper bound".to_owned(),
        };
        let validation = match (&config.data.validation_paths[..], config.data.validation) {
            ([], 0.0) => None,
            (_, _) if private.public_validation => Some("public rows"),
            _ => Some(
                "held-out persons, none of whom was trained on: the adapter says nothing of them \
                 (parallel composition); the validation losses in metrics.jsonl are exact and \
                 protect nobody",
            ),
        };
        let insecure_seed = private.insecure_seed.is_some();
        Self {
            private: private.noise && !insecure_seed,
            warnings,
            // Rounded up: it holds as it is written.
            epsilon: epsilon.filter(|e| e.is_finite()).map(|e| (e * 1e6).ceil() / 1e6),
            delta: budget.delta,
            unit: private.unit.clone(),
            adjacency: "add or remove one",
            cap: private.cap,
            accountant,
            target: private.epsilon.filter(|_| private.noise),
            method: private.method.name(),
            mode: budget.mode.name(),
            sigma: budget.sigma,
            rate: budget.rate,
            expected_batch: budget.batch,
            people: budget.people,
            steps: entries.len() as u64,
            hardened: private.hardened,
            insecure_seed,
            canaries: private.canaries.clone(),
            validation,
            not_covered: [
                "how long a step took",
                "settings that were chosen by looking at these rows, or at other runs on them",
                "other releases about the same persons: their epsilons add up",
            ],
        }
    }

    /// What `adapter_config.json` gets of it: the field `privacy`.
    pub fn notes(&self) -> Map<String, Value> {
        let gist = json!({
            "private": self.private,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "adjacency": self.adjacency,
            "steps": self.steps,
            "accountant": self.accountant,
            "more": FILE,
        });
        Map::from_iter([("privacy".to_owned(), gist)])
    }

    /// The file's content.
    ///
    /// # Errors
    /// [`Error::Fault`].
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Fault(format!("the promise has no JSON: {error}")))?;
        text.push(b'\n');
        Ok(text)
    }
}
