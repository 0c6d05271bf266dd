//! One alignment run, declared: a TOML file and `key=value` overrides become a checked
//! [`AlignConfig`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tercet_model::LoraConfig;
use tercet_train::config::{
    CheckpointConfig, RowsConfig, Sections, TuneModel, TuneTrain, check_lora,
};
use tercet_train::{Error, Result};

use crate::delta::DeltaConfig;
use crate::objective::{ObjectiveConfig, Objectives, TermConfig};

/// Keys and sections at the top of the file.
const SECTIONS: [&str; 7] = ["output", "model", "lora", "data", "align", "train", "checkpoint"];

/// Everything that decides an alignment run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AlignConfig {
    /// `output`: the folder that receives checkpoints, logs and pictures.
    pub output: PathBuf,
    /// `[model]`: the policy at its start.
    pub model: TuneModel,
    /// `[lora]`: train a new adapter and leave the weights; every weight is trained without it.
    pub lora: Option<LoraConfig>,
    /// `[data]`: the pairs.
    pub data: RowsConfig,
    /// `[align]`: what is made of them.
    pub align: AlignSection,
    /// `[train]`: how; `batch` counts pairs.
    pub train: TuneTrain,
    /// `[checkpoint]`: what is kept.
    pub checkpoint: CheckpointConfig,
}

/// `[align]`: objective, Δ and reference.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlignSection {
    /// What is added up; at least one.
    pub terms: Vec<TermConfig>,
    /// LD-DPO: the weight of tokens past the shorter answer's length; 1, none of it, when absent.
    pub ld_alpha: Option<f64>,
    /// How Δ is made; looked at when a term has `mappo = true`.
    pub delta: DeltaConfig,
    /// Whose log-probabilities the answers are measured against; the policy as the run begins
    /// (weights, or weights and adapter) when absent.
    pub reference: Option<PathBuf>,
    /// The reference is meant to differ from the policy as the run begins, so that rewards do not
    /// begin at 0; without this such a run stops before its first step.
    pub reference_differs: bool,
    /// Ask the reference once, before training, and keep its answers in a file, instead of at
    /// every step: less time and memory for more than one epoch, and on resume.
    pub precompute: bool,
}

impl AlignConfig {
    /// Reads a run file, applies `key=value` overrides and checks the result.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::load(path, overrides, &SECTIONS)?)
    }

    /// Like [`load`](Self::load), from TOML text.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::parse(text, overrides, &SECTIONS)?)
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
        };
        config.check()?;
        Ok(config)
    }

    /// Checks everything that needs no file.
    pub fn check(&self) -> Result<()> {
        self.model.check()?;
        check_lora(self.lora.as_ref())?;
        self.data.check()?;
        self.train.check()?;
        self.checkpoint.check()?;
        self.align.check()?;
        if self.train.batch == 1 && self.align.objectives()?.needs_kto_z() {
            return Err(Error::config(
                "train.batch",
                "is 1, but kto puts each prompt's answer to another prompt of the step; give it at \
                 least 2 pairs",
            ));
        }
        if self.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0) {
            return Err(Error::config(
                "lora.dropout",
                "must be 0: with dropout the policy would differ from its reference before the \
                 first step",
            ));
        }
        Ok(())
    }
}

impl AlignSection {
    /// Checks objective, Δ and reference.
    pub fn check(&self) -> Result<()> {
        let objectives = self.objectives()?;
        if objectives.needs_delta() {
            self.delta.check().map_err(in_section)?;
        }
        let needless = !objectives.needs_reference();
        for (key, given) in
            [("reference", self.reference.is_some()), ("precompute", self.precompute)]
        {
            if given && needless {
                return Err(Error::config(
                    format!("align.{key}"),
                    "is set, but no term of align.terms looks at a reference; remove it",
                ));
            }
        }
        if self.precompute && objectives.needs_kto_z() {
            return Err(Error::config(
                "align.precompute",
                "cannot be used with kto, which measures other answers at every step; remove one \
                 of the two",
            ));
        }
        if self.reference_differs && self.reference.is_none() {
            return Err(Error::config(
                "align.reference_differs",
                "is set, but align.reference is not: the policy as the run begins is its own \
                 reference",
            ));
        }
        Ok(())
    }

    /// The checked objective.
    pub fn objectives(&self) -> Result<Objectives> {
        let ld_alpha = self.ld_alpha.unwrap_or(1.0);
        let config = ObjectiveConfig { terms: self.terms.clone(), ld_alpha };
        Objectives::new(&config).map_err(in_section)
    }
}

/// An error of the objective in the name of its section.
fn in_section(error: crate::Error) -> Error {
    match error {
        crate::Error::Config { key, problem } => Error::config(format!("align.{key}"), &problem),
        other => other.into(),
    }
}
