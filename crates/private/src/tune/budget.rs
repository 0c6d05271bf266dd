//! Noise, rate and ε of a whole run, from public numbers alone: what `tercet plan` shows and the
//! run holds itself to.

use serde::{Deserialize, Serialize};
use tercet_train::{Error, Result};

use super::config::PrivateConfig;
use super::planted::CanaryKind;
use crate::accounting::calibrate::{self, Accountant};
use crate::accounting::{Phase, pld, rdp};
use crate::method::Method;
use crate::rldp::agent::WARM_UP;

/// What is adapted from released values, and so which accountant's answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Nothing: fixed composition, accounted by privacy-loss distributions.
    M0,
    /// Thresholds, coordinates, the division of the noise; σ is fixed, so that every step has the
    /// same privacy parameters whatever was chosen, and the same accountant holds.
    M1,
    /// σ as well: a filter at one Rényi order, chosen before the run, stops it in time.
    M2,
    /// σ by a schedule declared before the run: fixed composition of different steps.
    M3,
}

impl Mode {
    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::M0 => "m0",
            Self::M1 => "m1",
            Self::M2 => "m2",
            Self::M3 => "m3",
        }
    }
}

/// Of δ, what hardened noise leaves to the accountant; the rest covers its distance from a Gaussian.
const HARDENED: f64 = 0.999;

/// What a run may spend and how it will.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// What is adapted.
    pub mode: Mode,
    /// Persons, as declared.
    pub people: u64,
    /// The expected batch.
    pub batch: f64,
    /// Probability with which each person is drawn.
    pub rate: f64,
    /// Steps of the run.
    pub steps: u64,
    /// δ of the promise.
    pub delta: f64,
    /// ε that must not be passed: as asked for, or what the given σ comes to; `None` without noise.
    pub epsilon: Option<f64>,
    /// Nominal noise multiplier of everything a step releases (a schedule multiplies it); 0 without
    /// noise.
    pub sigma: f64,
    /// σ that fixed noise would need for the same ε, in mode M2.
    pub fixed_sigma: Option<f64>,
    /// The Rényi order of the filter, and of a controller's costs.
    pub order: f64,
    /// What δ is for the accountant.
    pub accounted_delta: f64,
}

impl Budget {
    /// Calibrates the noise, or says what the given noise costs.
    ///
    /// # Errors
    /// [`Error::Config`] when ε cannot be reached (with the smallest that can), or a number is out
    /// of the accountant's range.
    pub fn plan(config: &PrivateConfig) -> Result<Self> {
        let private = &config.private;
        let (mode, delta, rate) = (private.mode(), private.delta(), config.rate());
        let mut budget = Self {
            mode,
            people: private.people,
            batch: config.train.batch as f64,
            rate,
            steps: config.steps(),
            delta,
            epsilon: None,
            sigma: 0.0,
            fixed_sigma: None,
            order: 2.0,
            accounted_delta: if private.hardened { HARDENED * delta } else { delta },
        };
        if !private.noise {
            // The accountant's range of rates and steps holds for a control, too.
            Phase::new(1.0, rate, budget.steps).map_err(refused)?;
            return Ok(budget);
        }
        budget.calibrate(config).map_err(refused)?;
        match budget.epsilon {
            Some(epsilon) if !epsilon.is_finite() => Err(Error::config(
                "private.sigma",
                format!(
                    "= {} leaves epsilon without a bound; give more noise, or private.epsilon",
                    budget.sigma
                ),
            )),
            _ => Ok(budget),
        }
    }

    fn calibrate(&mut self, config: &PrivateConfig) -> crate::Result<()> {
        let private = &config.private;
        let nominal = |sigma: f64| match private.method {
            Method::Schedule => private.schedule.phases(sigma, self.rate, self.steps),
            _ => Ok(vec![Phase::new(sigma, self.rate, self.steps)?]),
        };
        let delta = self.accounted_delta;
        match (private.epsilon, private.sigma) {
            (Some(epsilon), _) => {
                let by =
                    |accountant| calibrate::scaled(accountant, (epsilon, delta), &nominal(1.0)?);
                self.sigma = by(Accountant::Pld)?.sigma;
                if self.mode == Mode::M2 {
                    self.fixed_sigma = Some(self.sigma);
                    // A little more, so that the filter's rounding does not cost the last step.
                    self.sigma = by(Accountant::Rdp)?.sigma * (1.0 + 1e-9);
                }
                self.epsilon = Some(epsilon);
            }
            (None, sigma) => {
                self.sigma = sigma.unwrap_or(0.0);
                self.epsilon = Some(pld::epsilon_upper(&nominal(self.sigma)?, delta)?);
            }
        }
        if private.method.is_controlled() {
            let orders = rdp::default_orders();
            self.order = rdp::epsilon(&nominal(self.sigma)?, delta, &orders)?.order;
        }
        Ok(())
    }

    /// The noise that the statistics leave for the gradient is this much more than σ.
    pub fn price_of(share: f64) -> f64 {
        1.0 / (1.0 - share).sqrt() - 1.0
    }

    /// How much more noise adaptive noise needs than fixed noise; `None` where σ is fixed.
    pub fn price(&self) -> Option<f64> {
        self.fixed_sigma.map(|fixed| self.sigma / fixed - 1.0)
    }

    /// What will be spent, in lines for people.
    pub fn lines(&self, config: &PrivateConfig) -> Vec<(&'static str, String)> {
        let private = &config.private;
        let mut lines = Vec::new();
        let whose = match private.unit.as_str() {
            "row" => "each row by itself; whoever wrote several is protected for one".to_owned(),
            column => format!(
                "persons, by the column {column:?}; at most {} rows each, the rest are left out",
                private.cap
            ),
        };
        lines.push(("protected", whose));
        lines.push((
            "privacy",
            match self.epsilon {
                None => "NOT PRIVATE: private.noise = false, a control for audits".to_owned(),
                Some(epsilon) => format!(
                    "epsilon {}{}, delta {:.2e}, for adding or removing one",
                    if private.sigma.is_some() { "" } else { "at most " },
                    shown(epsilon),
                    self.delta
                ),
            },
        ));
        lines.push((
            "noise",
            format!(
                "sigma {:.4}{} of the sensitivity, {} steps, rate {:.3e}",
                self.sigma,
                if private.method == Method::Schedule { " times the schedule" } else { "" },
                self.steps,
                self.rate
            ),
        ));
        lines.push((
            "batch",
            format!(
                "{} of {} persons expected, each drawn by a coin of its own",
                self.batch, self.people
            ),
        ));
        if let Some(canaries) = &private.canaries {
            let kind = match canaries.kind {
                CanaryKind::Tokens => "rows of random tokens",
                CanaryKind::Gradient => "gradients along random coordinates",
            };
            lines.push((
                "canaries",
                format!("{}, {kind}, each planted by a fair coin; room for them", canaries.count)
                    + " must be in private.people",
            ));
        }
        let mode = match self.mode {
            Mode::M0 => "nothing is adapted; privacy-loss distributions".to_owned(),
            Mode::M1 => "thresholds follow what was released, sigma is fixed; privacy-loss \
                         distributions"
                .to_owned(),
            Mode::M2 => format!(
                "sigma is adapted; a filter at the Rényi order {} stops the run. This costs {:.1} % \
                 more noise than fixed sigma ({:.4})",
                self.order,
                100.0 * self.price().unwrap_or(0.0),
                self.fixed_sigma.unwrap_or(0.0)
            ),
            Mode::M3 => "sigma by the declared schedule; privacy-loss distributions".to_owned(),
        };
        let name = private.method.name();
        lines.push(("method", format!("{name}, mode {}: {mode}", self.mode.name())));
        if private.method == Method::Rldp {
            lines.push(("WARNING", few_decisions(self.steps, config.every())));
        }
        if private.insecure_seed.is_some() {
            lines.push(("WARNING", INSECURE.to_owned()));
        }
        if self.delta * self.people as f64 >= 1.0 {
            let text = "delta is not below one over the persons: giving one away whole is within \
                        the promise";
            lines.push(("WARNING", text.to_owned()));
        }
        lines
    }
}

/// What is said of a controller that learns while the run is on.
fn few_decisions(steps: u64, every: u64) -> String {
    format!(
        "the controller learns from {} decisions (one in {every} steps), the first {} of them \
         drawn evenly: few for such a policy. A gain counts only beside method = \
         \"random-action\" and \"quantile\"",
        steps / every,
        WARM_UP.min(steps / every)
    )
}

/// What is said of a run whose noise can be guessed.
pub const INSECURE: &str = "INSECURE SEED: whoever knows the seed can take the noise away; this run \
                            protects nobody";

/// An ε as it is shown: rounded up, so that it holds as printed.
pub fn shown(epsilon: f64) -> String {
    if epsilon.is_finite() {
        format!("{}", (epsilon * 1e4).ceil() / 1e4)
    } else {
        "unbounded".into()
    }
}

fn refused(error: crate::Error) -> Error {
    match error {
        crate::Error::Unreachable { .. } => Error::config("private.epsilon", error.to_string()),
        other => other.into(),
    }
}
