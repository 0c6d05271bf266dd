//! One private run, declared: a TOML file and `key=value` overrides become a checked
//! [`PrivateConfig`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tercet_model::LoraConfig;
use tercet_train::config::{
    CheckpointConfig, RowsConfig, Sections, TuneModel, TuneTrain, check_lora, real, within,
};
use tercet_train::{Error, Result};

use super::budget::Mode;
use super::planted::CanarySection;
use crate::mechanism::noise::Split;
use crate::mechanism::people::Unit;
use crate::method::Method;
use crate::method::quantile::QuantileConfig;
use crate::method::schedule::ScheduleConfig;
use crate::rldp;

/// Keys and sections at the top of the file.
pub const SECTIONS: [&str; 7] =
    ["output", "model", "lora", "data", "private", "train", "checkpoint"];

/// Everything that decides a private run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrivateConfig {
    /// `output`: the folder that receives checkpoints, logs, the ledger and `privacy.json`.
    pub output: PathBuf,
    /// `[model]`: what is tuned; its weights must not have seen the rows.
    pub model: TuneModel,
    /// `[lora]`: the adapter that is trained, or `model.adapter`.
    pub lora: Option<LoraConfig>,
    /// `[data]`: the rows. `validation` holds out persons, not rows.
    pub data: RowsConfig,
    /// `[private]`: who is protected, how well, and by which method.
    pub private: PrivateSection,
    /// `[train]`: how; `batch` counts persons, and is what a step has on average.
    pub train: TuneTrain,
    /// `[checkpoint]`: what is kept.
    pub checkpoint: CheckpointConfig,
}

/// How noise is divided among thresholds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Division {
    /// The same noise everywhere.
    #[default]
    Flat,
    /// The same share of the budget for each threshold.
    Equal,
    /// The least noise in all.
    LeastEnergy,
    /// By shares of the budget that the controller moves, even at first.
    Controlled,
}

impl Division {
    /// For the mechanism; `None` where it is a controller's.
    pub fn split(self) -> Option<Split> {
        match self {
            Self::Flat => Some(Split::Flat),
            Self::Equal => Some(Split::Equal),
            Self::LeastEnergy => Some(Split::LeastEnergy),
            Self::Controlled => None,
        }
    }
}

/// What has a threshold of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Thresholds {
    /// The whole gradient.
    One,
    /// Each adapter, A and B together.
    Adapters,
}

/// `[private]`: who is protected, how well, and by which method.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrivateSection {
    /// The column that says whose row it is, or `"row"` when every row is another person's.
    pub unit: String,
    /// Rows of one person that are learnt from, at most: the first ones.
    pub cap: usize,
    /// How many persons there are, as a public number: not below the true one, which must not
    /// be told.
    pub people: u64,
    /// ε that the whole run must not pass. Give this or `sigma`.
    pub epsilon: Option<f64>,
    /// Noise multiplier: standard deviation over sensitivity.
    pub sigma: Option<f64>,
    /// δ; the smaller of 10⁻⁵ and `people^−1.1` when absent.
    pub delta: Option<f64>,
    /// Go on although δ is 1/people or more, which allows that somebody is given away whole.
    pub weak_delta: bool,
    /// What steers clipping and noise.
    pub method: Method,
    /// What may be adapted, and so how it is accounted; by the method when absent.
    pub mode: Option<Mode>,
    /// Clipping threshold C of everything together; by the method when absent. It is public: do not
    /// choose it by looking at these rows.
    pub threshold: Option<f64>,
    /// What has a threshold of its own; by the method when absent.
    pub thresholds: Option<Thresholds>,
    /// How the gradient's noise is divided among thresholds.
    pub division: Division,
    /// Share of the budget for statistics: the noisy loss, and counts for a method that needs
    /// them. Without it only such a method has any.
    pub share: Option<f64>,
    /// Steps between a controller's decisions; a 32nd of the run, at most 112, when absent.
    pub every: Option<u64>,
    /// Leave the As as they are and train the Bs (FFA-LoRA, arXiv 2403.12313).
    pub freeze_a: bool,
    /// Clip and add noise as if A and B of every pair had equal norms.
    pub balance: bool,
    /// Clip and add noise to what gradients do to the products BA, whatever their factors (after
    /// PRISM, arXiv 2606.00944).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tangent: bool,
    /// Noise of integers on a grid: what rounding of doubles could give away is not there.
    pub hardened: bool,
    /// `false`: no noise at all, and no privacy. A negative control for audits.
    pub noise: bool,
    /// Persons that go through the model at once, at most: memory, nothing else. `None`: as many as
    /// have gradients of a gibibyte together ([`PrivateConfig::people_at_once`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_people: Option<usize>,
    /// The held-out rows (`data.validation_paths`) are public: nobody in them is to be protected.
    pub public_validation: bool,
    /// Canaries to plant for an audit; they are persons beside those of the rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canaries: Option<CanarySection>,
    /// Numbers of `quantile`.
    pub quantile: QuantileConfig,
    /// Numbers of `schedule`.
    pub schedule: ScheduleConfig,
    /// Noise that anybody who knows this number can take away; only from the command line.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    pub insecure_seed: Option<u64>,
}

impl Default for PrivateSection {
    fn default() -> Self {
        Self {
            unit: String::new(),
            cap: 8,
            people: 0,
            epsilon: None,
            sigma: None,
            delta: None,
            weak_delta: false,
            method: Method::default(),
            mode: None,
            threshold: None,
            thresholds: None,
            division: Division::default(),
            share: None,
            every: None,
            freeze_a: false,
            balance: false,
            tangent: false,
            hardened: false,
            noise: true,
            micro_people: None,
            public_validation: false,
            canaries: None,
            quantile: QuantileConfig::default(),
            schedule: ScheduleConfig::default(),
            insecure_seed: None,
        }
    }
}

/// Rows of every portion are a multiple of this, and at least [`LEAST_ROWS`].
const ROWS: usize = 128;
/// From here on no product takes a path for few rows.
const LEAST_ROWS: usize = 1024;

impl PrivateConfig {
    /// Reads a run file, applies `key=value` overrides and checks the result.
    ///
    /// # Errors
    /// [`Error::Config`] names the key.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::load(path, overrides, &SECTIONS)?)
    }

    /// Like [`load`](Self::load), from TOML text.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::parse(text, overrides, &SECTIONS)?)
    }

    /// The configuration of a run, from its folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a folder without one; as [`load`](Self::load).
    pub fn of_run(output: &Path) -> Result<Self> {
        let path = output.join("config.toml");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::Checkpoint(format!(
                "{} is not the output folder of `tercet private tune`: {}: {error}",
                output.display(),
                path.display()
            ))
        })?;
        // A known seed stands in a run's own file and is taken from no other.
        let lines = text.lines().filter(|line| !line.starts_with("insecure_seed = "));
        Self::parse(&lines.collect::<Vec<_>>().join("\n"), &[])
    }

    fn from_sections(mut sections: Sections) -> Result<Self> {
        let config = Self {
            output: sections.output()?,
            model: sections.take("model")?,
            lora: sections.take_if_there("lora")?,
            data: sections.take("data")?,
            private: sections.take("private")?,
            train: sections.take("train")?,
            checkpoint: sections.take("checkpoint")?,
        };
        config.check()?;
        Ok(config)
    }

    /// Checks everything that needs no file.
    ///
    /// # Errors
    /// [`Error::Config`] names the key.
    pub fn check(&self) -> Result<()> {
        self.model.check()?;
        check_lora(self.lora.as_ref())?;
        self.data.check()?;
        self.train.check()?;
        self.checkpoint.check()?;
        self.private.check()?;
        if self.lora.is_none() && self.model.adapter.is_none() {
            return Err(Error::config(
                "lora",
                "is missing, and so is model.adapter: persons' gradients are kept apart for \
                 adapters only; add a [lora] section",
            ));
        }
        if self.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0) {
            return Err(Error::config(
                "lora.dropout",
                "must be 0: what is dropped depends on who else is in the step",
            ));
        }
        let (batch, people) = (self.train.batch as u64, self.private.people);
        if batch >= people {
            return Err(Error::config(
                "train.batch",
                format!(
                    "= {batch} of private.people = {people} draws everybody in every step; take a \
                     smaller batch, so that the rate is below 1"
                ),
            ));
        }
        if self.data.validation > 0.0 && !self.data.validation_paths.is_empty() {
            return Err(Error::config(
                "data.validation",
                "has no effect beside data.validation_paths; keep one of the two",
            ));
        }
        if self.private.public_validation && self.data.validation_paths.is_empty() {
            return Err(Error::config(
                "private.public_validation",
                "is set, but data.validation_paths names no rows: a share of the training rows \
                 cannot be public",
            ));
        }
        self.rows().map(drop)
    }

    /// Steps of the run, of public numbers alone.
    pub fn steps(&self) -> u64 {
        self.train.steps(usize::try_from(self.private.people).unwrap_or(usize::MAX))
    }

    /// Steps between a controller's decisions.
    pub fn every(&self) -> u64 {
        self.private.every.unwrap_or((self.steps() / 32).clamp(1, 112))
    }

    /// Probability with which each person is drawn.
    pub fn rate(&self) -> f64 {
        self.train.batch as f64 / self.private.people as f64
    }

    /// Rows of every portion: room for whoever has most, as far as that is public.
    ///
    /// # Errors
    /// [`Error::Config`] when a person could fill more than 2³⁰ rows.
    pub fn rows(&self) -> Result<usize> {
        let person = self.data.context.saturating_mul(self.private.cap);
        within("private.cap", person as u64, 1, 1 << 30, "tokens of one person (cap × context)")?;
        let most = person.max(self.train.micro_tokens).max(LEAST_ROWS);
        Ok(most.next_multiple_of(ROWS))
    }

    /// Persons that go through the model at once, at most, when each has a gradient of so many
    /// elements. Portions are filled up to [`PrivateConfig::rows`], so that one of fewer persons
    /// than fit costs as much as a full one.
    pub fn people_at_once(&self, elements: usize) -> usize {
        let gradient = elements.max(1).saturating_mul(size_of::<f32>());
        self.private.micro_people.unwrap_or(((1 << 30) / gradient).max(1))
    }
}

impl PrivateSection {
    /// Checks everything that needs no file.
    ///
    /// # Errors
    /// [`Error::Config`] names the key.
    pub fn check(&self) -> Result<()> {
        if self.unit.is_empty() {
            return Err(Error::config(
                "private.unit",
                "is missing: the column that says whose row it is, such as \"patient\". Who wrote \
                 several rows is protected as a whole only by that; \"row\" protects each row by \
                 itself",
            ));
        }
        if self.people == 0 {
            return Err(Error::config(
                "private.people",
                "is missing: how many persons there are, as a number that may be known",
            ));
        }
        within("private.people", self.people, 2, 1 << 40, "")?;
        within("private.cap", self.cap as u64, 1, 1 << 20, "rows")?;
        if let Some(people) = self.micro_people {
            within("private.micro_people", people as u64, 1, 1 << 20, "")?;
        }
        self.check_target()?;
        self.check_method()?;
        if let Some(canaries) = &self.canaries {
            canaries.check()?;
            if canaries.count as u64 >= self.people {
                return Err(Error::config(
                    "private.canaries.count",
                    format!(
                        "= {} of private.people = {} leaves no room for the persons of the rows; \
                         declare so many more, as a public number",
                        canaries.count, self.people
                    ),
                ));
            }
        }
        if let Some(threshold) = self.threshold {
            real("private.threshold", threshold, 1e-6, 1e6)?;
        }
        if let Some(share) = self.share {
            real("private.share", share, 1e-6, 0.9)?;
        }
        if let Some(every) = self.every {
            within("private.every", every, 1, 1 << 40, "steps")?;
        }
        self.quantile.check().map_err(|error| named("private.quantile", &error))?;
        self.schedule.check().map_err(|error| named("private.schedule", &error))
    }

    fn check_target(&self) -> Result<()> {
        match (self.noise, self.epsilon, self.sigma) {
            // A control: nothing is promised, and what was asked for does not matter.
            (false, ..) => {}
            (true, None, None) => {
                return Err(Error::config(
                    "private.epsilon",
                    "is missing: what the run may give away, such as 4.0 (or private.sigma)",
                ));
            }
            (true, Some(_), Some(_)) => {
                return Err(Error::config(
                    "private.sigma",
                    "and private.epsilon both say how much noise there is; keep one of the two",
                ));
            }
            (true, Some(epsilon), None) => real("private.epsilon", epsilon, 1e-6, 1e4)?,
            (true, None, Some(0.0)) => {
                return Err(Error::config(
                    "private.sigma",
                    "= 0 is no noise, and no privacy; for an audit's negative control say \
                     private.noise = false",
                ));
            }
            (true, None, Some(sigma)) => real("private.sigma", sigma, 1e-2, 1e6)?,
        }
        let delta = self.delta();
        if !(1e-100..1.0).contains(&delta) {
            return Err(Error::config("private.delta", format!("= {delta} is outside 1e-100..1")));
        }
        if delta * self.people as f64 >= 1.0 && !self.weak_delta {
            return Err(Error::config(
                "private.delta",
                format!(
                    "= {delta:e} is not below 1/{}: giving one person away whole would be within \
                     the promise. Take a smaller one (people^-1.1 is {:.1e}), or say \
                     private.weak_delta = true",
                    self.people,
                    libm::pow(self.people as f64, -1.1)
                ),
            ));
        }
        Ok(())
    }

    fn check_method(&self) -> Result<()> {
        let name = self.method.name();
        let coordinates = matches!(self.method, Method::Adaclip | Method::Geoclip);
        if self.balance && (coordinates || self.freeze_a) {
            let what = if coordinates { name } else { "freeze_a" };
            return Err(Error::config(
                "private.balance",
                format!("cannot be used with {what}, which leaves nothing to balance"),
            ));
        }
        if self.tangent && (coordinates || self.freeze_a || self.balance) {
            let what = match (coordinates, self.freeze_a) {
                (true, _) => name,
                (_, true) => "freeze_a",
                _ => "balance",
            };
            return Err(Error::config(
                "private.tangent",
                format!("cannot be used with {what}: each says in which coordinates is clipped"),
            ));
        }
        if self.division == Division::Controlled
            && !(self.method.is_controlled() && self.by_adapter())
        {
            return Err(Error::config(
                "private.division",
                "= \"controlled\" needs a controller with a threshold for each adapter: method = \
                 \"rldp\" or \"random-action\"",
            ));
        }
        if coordinates && self.thresholds == Some(Thresholds::Adapters) {
            return Err(Error::config(
                "private.thresholds",
                format!("= \"adapters\" cannot be used with {name}, which has one threshold"),
            ));
        }
        if self.method == Method::PerLayer && self.thresholds == Some(Thresholds::One) {
            return Err(Error::config(
                "private.thresholds",
                "= \"one\" is dp-sgd, not per-layer; change one of the two",
            ));
        }
        if self.method != Method::Schedule && self.schedule != ScheduleConfig::default() {
            return Err(Error::config(
                "private.schedule",
                format!("is set, but the method is {name}; say private.method = \"schedule\""),
            ));
        }
        if self.method != Method::Quantile && self.quantile != QuantileConfig::default() {
            return Err(Error::config(
                "private.quantile",
                format!("is set, but the method is {name}; say private.method = \"quantile\""),
            ));
        }
        if self.share.is_some() && self.quantile.count_noise.is_some() {
            return Err(Error::config(
                "private.share",
                "and private.quantile.count_noise both say what the counts cost; keep one",
            ));
        }
        let range = rldp::LEAST_THRESHOLD..=rldp::MOST_THRESHOLD;
        if self.method.is_controlled() && self.threshold.is_some_and(|c| !range.contains(&c)) {
            return Err(Error::config(
                "private.threshold",
                "is outside 0.001..=10, the box in which a controller moves it",
            ));
        }
        let (mode, natural) = (self.mode(), self.natural_mode());
        let fits = mode == natural || (mode == Mode::M2 && self.method.is_controlled());
        if !fits {
            return Err(Error::config(
                "private.mode",
                format!(
                    "= \"{}\" does not go with {name}, which is \"{}\"; leave it out",
                    mode.name(),
                    natural.name()
                ),
            ));
        }
        if mode == Mode::M2 && self.epsilon.is_none() {
            return Err(Error::config(
                "private.epsilon",
                "is missing: in mode m2 a filter holds it, whatever the noise becomes",
            ));
        }
        Ok(())
    }

    /// δ, or what it is when nothing is said.
    pub fn delta(&self) -> f64 {
        self.delta.unwrap_or_else(|| libm::pow(self.people as f64, -1.1).min(1e-5))
    }

    /// The mode, or what it is when nothing is said.
    pub fn mode(&self) -> Mode {
        self.mode.unwrap_or(self.natural_mode())
    }

    fn natural_mode(&self) -> Mode {
        match self.method {
            Method::DpSgd | Method::AutoS | Method::PerLayer => Mode::M0,
            Method::Schedule if self.schedule.keeps_sigma() => Mode::M0,
            Method::Schedule => Mode::M3,
            _ => Mode::M1,
        }
    }

    /// Whether each adapter has a threshold of its own.
    pub fn by_adapter(&self) -> bool {
        match self.thresholds {
            Some(thresholds) => thresholds == Thresholds::Adapters,
            None => self.method == Method::PerLayer || self.method.is_controlled(),
        }
    }

    /// Who is protected.
    ///
    /// # Errors
    /// [`Error::Data`] for an empty unit.
    pub fn unit(&self) -> Result<Unit> {
        Ok(Unit::parse(&self.unit)?)
    }
}

/// An error of a room of this crate in the name of a section.
fn named(section: &str, error: &crate::Error) -> Error {
    match error {
        crate::Error::Parameter { name, value, expected } => {
            Error::config(format!("{section}.{name}"), format!("= {value} is refused: {expected}"))
        }
        other => Error::config(section, other.to_string()),
    }
}
