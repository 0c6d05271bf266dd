//! What sampling, and the loop around it, are asked.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tercet_model::{LoraConfig, Sampling};
use tercet_train::config::{
    CheckpointConfig, Precision, RowsConfig, Sections, TuneModel, TuneTrain, real, within,
};
use tercet_train::{Error, Result};

use crate::config::{AlignConfig, AlignSection};
use crate::delta::DeltaSource;
use crate::reward::RewardConfig;

const SAMPLE_SECTIONS: [&str; 6] = ["output", "model", "start", "data", "sampling", "reward"];
const ITERATE_SECTIONS: [&str; 10] = [
    "output",
    "model",
    "lora",
    "data",
    "align",
    "train",
    "checkpoint",
    "sampling",
    "reward",
    "iterative",
];

/// `[sampling]`: how answers are written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingSection {
    /// Answers to each prompt.
    pub samples: usize,
    /// Divides the logits; 0 takes the most probable token always.
    pub temperature: f32,
    /// Keeps the most probable tokens that together reach this probability; 1 is off.
    pub top_p: f32,
    /// Keeps the k most probable tokens; 0 is off.
    pub top_k: usize,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    /// Sequences that are written at the same time.
    pub at_once: usize,
    /// Same seed, same answers.
    pub seed: u64,
    /// Storage type of weights and activations; f32 when absent, in the loop `train.dtype`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
}

impl Default for SamplingSection {
    fn default() -> Self {
        Self {
            samples: 8,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            max_tokens: 256,
            at_once: 32,
            seed: 0,
            dtype: None,
        }
    }
}

impl SamplingSection {
    /// Checks every number.
    pub fn check(&self) -> Result<()> {
        within("sampling.samples", self.samples as u64, 1, 1 << 16, "")?;
        within("sampling.max_tokens", self.max_tokens as u64, 1, 1 << 24, "")?;
        within("sampling.at_once", self.at_once as u64, 1, 1 << 16, "")?;
        within("sampling.seed", self.seed, 0, i64::MAX as u64, "")?;
        real("sampling.temperature", f64::from(self.temperature), 0.0, 100.0)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config(
                "sampling.top_p",
                format!("= {} is outside (0, 1]", self.top_p),
            ));
        }
        Ok(())
    }

    /// Storage type of weights and activations.
    pub fn dtype(&self) -> Precision {
        self.dtype.unwrap_or(Precision::F32)
    }

    /// What a sampler is told.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            max_tokens: self.max_tokens,
            ..Sampling::default()
        }
    }
}

/// Answers of one model to prompts, and what a reward says of them: `tercet sample`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampleConfig {
    /// `output`: the folder that receives samples, pairs and the summary.
    pub output: PathBuf,
    /// `[model]`: who answers.
    pub model: TuneModel,
    /// `[start]`: the model that the divergence is measured from; none when absent.
    pub start: Option<TuneModel>,
    /// `[data]`: the prompts.
    pub data: RowsConfig,
    /// `[sampling]`: how.
    pub sampling: SamplingSection,
    /// `[reward]`: what the answers are worth.
    pub reward: RewardConfig,
}

impl SampleConfig {
    /// Reads a file, applies `key=value` overrides and checks the result.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::load(path, overrides, &SAMPLE_SECTIONS)?)
    }

    fn from_sections(mut sections: Sections) -> Result<Self> {
        let config = Self {
            output: sections.output()?,
            model: sections.take("model")?,
            start: sections.take_if_there("start")?,
            data: sections.take("data")?,
            sampling: sections.take("sampling")?,
            reward: sections.take("reward")?,
        };
        config.model.check()?;
        if config.start.as_ref().is_some_and(|start| start.check().is_err()) {
            return Err(Error::config("start.path", "is missing: the folder to measure from"));
        }
        config.data.check()?;
        if config.data.validation > 0.0 || !config.data.validation_paths.is_empty() {
            return Err(Error::config(
                "data.validation",
                "holds nothing out here; name all prompts in data.paths",
            ));
        }
        config.sampling.check()?;
        config.reward.check()?;
        Ok(config)
    }
}

/// `[iterative]`: the loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IterativeSection {
    /// Parts that the prompts are cut into: one round of sampling and training each.
    pub rounds: usize,
    /// Answers to each held-out prompt before the first and after every round.
    pub held_out_samples: usize,
}

impl Default for IterativeSection {
    fn default() -> Self {
        Self { rounds: 3, held_out_samples: 1 }
    }
}

/// The iterative loop: `tercet align --iterative`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IterativeConfig {
    /// `output`: the folder that receives every round.
    pub output: PathBuf,
    /// `[model]`: the policy at its start.
    pub model: TuneModel,
    /// `[lora]`: train an adapter, the same through all rounds.
    pub lora: Option<LoraConfig>,
    /// `[data]`: prompts; `validation_paths` (or a share, `validation`) are held out.
    pub data: RowsConfig,
    /// `[align]`: objective and Δ.
    pub align: AlignSection,
    /// `[train]`: how each round trains on its pairs.
    pub train: TuneTrain,
    /// `[checkpoint]`: what is kept of each round's training.
    pub checkpoint: CheckpointConfig,
    /// `[sampling]`: how answers are written.
    pub sampling: SamplingSection,
    /// `[reward]`: what they are worth.
    pub reward: RewardConfig,
    /// `[iterative]`: how often.
    pub iterative: IterativeSection,
}

impl IterativeConfig {
    /// Reads a file, applies `key=value` overrides and checks the result.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::load(path, overrides, &ITERATE_SECTIONS)?)
    }

    /// Like [`load`](Self::load), from TOML text.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::parse(text, overrides, &ITERATE_SECTIONS)?)
    }

    fn from_sections(mut sections: Sections) -> Result<Self> {
        let config = Self {
            output: sections.output()?,
            model: sections.take("model")?,
            lora: sections.take_if_there("lora")?,
            data: sections.take("data")?,
            align: sections.take("align")?,
            train: sections.take("train")?,
            checkpoint: sections.take("checkpoint")?,
            sampling: sections.take("sampling")?,
            reward: sections.take("reward")?,
            iterative: sections.take("iterative")?,
        };
        config.data.check()?;
        config.sampling.check()?;
        config.reward.check()?;
        // Answers come from the model that is trained, stored as it is trained.
        if config.sampling.dtype.is_some_and(|dtype| dtype != config.train.dtype) {
            return Err(Error::config(
                "sampling.dtype",
                "is not train.dtype; leave it out: what is trained is what answers",
            ));
        }
        if config.align.delta.source == DeltaSource::Column {
            return Err(Error::config(
                "align.delta.source",
                "= \"column\" cannot be used here: Δ is made of the answers' rewards; use \
                 identity or logistic",
            ));
        }
        if config.sampling.samples < 2 {
            return Err(Error::config(
                "sampling.samples",
                "= 1 makes no pair; a best and a worst answer need at least 2",
            ));
        }
        if config.sampling.temperature == 0.0 {
            return Err(Error::config(
                "sampling.temperature",
                "= 0 writes the same answer to a prompt every time, which makes no pair",
            ));
        }
        within("iterative.rounds", config.iterative.rounds as u64, 1, 1 << 10, "")?;
        let held_out = config.iterative.held_out_samples as u64;
        within("iterative.held_out_samples", held_out, 1, 1 << 10, "")?;
        if config.align.reference.is_some() {
            return Err(Error::config(
                "align.reference",
                "cannot be set here: the reference of a round is its policy as it begins",
            ));
        }
        config.training(config.model.clone(), config.lora.clone(), 1).check()?;
        Ok(config)
    }

    /// The folder of a round, counted from 1.
    pub fn round(&self, round: usize) -> PathBuf {
        self.output.join(format!("round-{round}"))
    }

    /// How round `round` trains its policy on its pairs.
    pub fn training(
        &self,
        model: TuneModel,
        lora: Option<LoraConfig>,
        round: usize,
    ) -> AlignConfig {
        let folder = self.round(round);
        let pairs = folder.join("pairs.jsonl").to_string_lossy().into_owned();
        AlignConfig {
            output: folder.join("train"),
            model,
            lora,
            data: RowsConfig {
                paths: vec![pairs],
                validation_paths: Vec::new(),
                validation: 0.0,
                ..self.data.clone()
            },
            align: self.align.clone(),
            train: self.train.clone(),
            checkpoint: self.checkpoint.clone(),
        }
    }
}
