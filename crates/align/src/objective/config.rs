//! The objective of a run as its configuration has it, checked into [`Term`]s.

use serde::{Deserialize, Serialize};

use super::margin::Margin;
use super::nll::NllMean;
use super::sides::Sides;
use crate::error::in_range;
use crate::{Error, Result};

/// A weighted sum of objectives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveConfig {
    /// What is added up; at least one.
    pub terms: Vec<TermConfig>,
    /// LD-DPO (arXiv 2409.06411): the weight in [0, 1] of the log-probabilities of tokens past the
    /// shorter answer's length; 1, which is none of it, when absent. See [`super::ld_weight`].
    #[serde(default = "one")]
    pub ld_alpha: f64,
}

fn one() -> f64 {
    1.0
}

/// One objective, its weight and parameters. Parameters that are absent have the default that
/// [`Kind`] says; those an objective does not know are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TermConfig {
    /// Which one.
    pub objective: Kind,
    /// Factor of the whole term, above 0; 1 when absent.
    #[serde(default = "one")]
    pub weight: f64,
    /// Multiplies the rejected answer's score by the pair's Δ (MaPPO, arXiv 2507.21183, equations
    /// 8, 12, 14 and 16); off when absent. For dpo, ipo_mean, ipo_sum, simpo and cpo.
    #[serde(default)]
    pub mappo: bool,
    /// Steepness, above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// Margin that the scores must differ by, at least 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// Probability ε in [0, 0.5) that a label is wrong; above 0 for exo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f64>,
    /// Factor of the chosen answer's negative log-likelihood, at least 0.
    #[serde(alias = "cpo_alpha", skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Temperature of the mix, above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tau: Option<f64>,
    /// Factor of chosen answers, above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desirable_weight: Option<f64>,
    /// Factor of rejected answers, above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undesirable_weight: Option<f64>,
    /// Over what the negative log-likelihood is a mean; token_mean when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll: Option<NllMean>,
}

impl TermConfig {
    /// An objective with weight 1 and its own defaults.
    pub fn new(objective: Kind) -> Self {
        TermConfig {
            objective,
            weight: 1.0,
            mappo: false,
            beta: None,
            gamma: None,
            label_smoothing: None,
            lambda: None,
            tau: None,
            desirable_weight: None,
            undesirable_weight: None,
            nll: None,
        }
    }
}

/// The objectives. lw, ll are sums of log-probabilities of the chosen and the rejected answer, cw,
/// cl those of the reference, a = lw − cw, b = ll − cl, |w|, |l| numbers of tokens, σ the logistic
/// function, x = β(a − b). β is 0.1 when absent (TRL's default) but for simpo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// −ln σ(x) (arXiv 2305.18290, equation 7).
    Dpo,
    /// dpo with `mappo = true`: −ln σ(β(a − Δb)) (arXiv 2507.21183, equation 8).
    Mappo,
    /// −ln σ(β(a/|w| − b/|l|)), length-normalised DPO (arXiv 2411.15124; TRL's sigmoid_norm).
    DpoNorm,
    /// (a/|w| − b/|l| − 1/(2β))², IPO on means as in TRL.
    IpoMean,
    /// (a − b − 1/(2β))², IPO on sums (arXiv 2310.12036, equation 17).
    IpoSum,
    /// −ln σ(β·lw/|w| − β·ll/|l| − γ) (arXiv 2405.14734, equation 6); no reference. β = 2 and
    /// γ = 0.5 when absent, the authors' starting point (β 2, γ/β 0.25).
    Simpo,
    /// −ln σ(β·lw − β·ll) + λ·NLL of the chosen answer (arXiv 2401.08417); no
    /// reference. λ = 1 when absent (TRL's `cpo_alpha`).
    Cpo,
    /// max(0, 1 − x) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657).
    Hinge,
    /// ((1 − ε)(−ln σ(x)) − ε(−ln σ(−x)))/(1 − 2ε), unbiased under wrong labels (arXiv
    /// 2403.00409). ε must be given.
    Robust,
    /// (1 − ε)(−ln σ(x)) + ε(−ln σ(−x)), conservative DPO (Mitchell 2023). ε must be given.
    Cdpo,
    /// The reverse KL divergence from smoothed labels (arXiv 2402.00856, equation 16); ε = 10⁻³
    /// when absent (TRL).
    Exo,
    /// −ln σ(x)·(1 − m) + e⁻ˣ·m, m = σ(x/τ) (arXiv 2406.08414); τ = 0.05 when absent (the paper).
    Discopop,
    /// 1 − σ(βa) + σ(βb) (arXiv 2408.06266): the chosen answer up, the rejected down.
    ApoZero,
    /// σ(βa) + 1 − σ(x) (arXiv 2408.06266): both down, the rejected more.
    ApoDown,
    /// −ln σ(βa) − ln σ(−βb), binary classifiers (arXiv 2404.04656) without a running baseline, as
    /// TRL's bco_pair.
    Bco,
    /// −ln σ(βa) − ½ ln σ(−βa) − ½ ln σ(−βb) (arXiv 2402.05369).
    Nca,
    /// (a − 1/(2β))² + (b + 1/(2β))², with hard labels (arXiv 2405.00675, TRL's sppo_hard).
    Sppo,
    /// NLL of the chosen answer + β·(−ln σ(log-odds ratio)) on the means lw/|w|, ll/|l| (arXiv
    /// 2403.07691); no reference. The NLL is the answer's alone; TRL's runs over the prompt too.
    Orpo,
    /// ½(w_D(1 − σ(β(a − z))) + w_U(1 − σ(β(z − b)))) (arXiv 2402.01306): the mean over answers;
    /// z is [`super::StepTotals::kto_z`]. Both weights 1 when absent.
    Kto,
    /// The chosen answer's negative log-likelihood; no reference.
    Sft,
}

impl Kind {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Dpo => "dpo",
            Kind::Mappo => "mappo",
            Kind::DpoNorm => "dpo_norm",
            Kind::IpoMean => "ipo_mean",
            Kind::IpoSum => "ipo_sum",
            Kind::Simpo => "simpo",
            Kind::Cpo => "cpo",
            Kind::Hinge => "hinge",
            Kind::Robust => "robust",
            Kind::Cdpo => "cdpo",
            Kind::Exo => "exo",
            Kind::Discopop => "discopop",
            Kind::ApoZero => "apo_zero",
            Kind::ApoDown => "apo_down",
            Kind::Bco => "bco",
            Kind::Nca => "nca",
            Kind::Sppo => "sppo",
            Kind::Orpo => "orpo",
            Kind::Kto => "kto",
            Kind::Sft => "sft",
        }
    }

    fn takes_delta(self) -> bool {
        use Kind::*;
        matches!(self, Dpo | Mappo | IpoMean | IpoSum | Simpo | Cpo)
    }
}

/// What is made of each answer before the two are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Score {
    /// a, b.
    Ratio,
    /// a/|w|, b/|l|.
    RatioMean,
    /// lw, ll.
    Policy,
    /// lw/|w|, ll/|l|.
    PolicyMean,
}

/// How the two answers are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rule {
    /// `loss(w − [Δ]·l − γ)`.
    Margin { gamma: f64, delta: bool, loss: Margin },
    /// A function of both scores.
    Sides(Sides),
    /// ORPO's log-odds ratio of the means.
    Odds,
    /// Not at all.
    Nothing,
}

/// One checked term.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Term {
    pub(super) kind: Kind,
    pub(super) weight: f64,
    pub(super) beta: f64,
    pub(super) score: Score,
    /// Factor of the scores before they are compared: β or 1.
    pub(super) scale: f64,
    pub(super) rule: Rule,
    /// Factor of the chosen answer's NLL and over what it is a mean.
    pub(super) nll: Option<(f64, NllMean)>,
}

impl TermConfig {
    /// The checked term; `place` counts the terms from 0.
    pub(super) fn check(&self, place: usize) -> Result<Term> {
        let kind = self.objective;
        let name = kind.name();
        let key = |key: &str| format!("terms[{place}].{key} ({name})");
        let weight = in_range(key("weight"), self.weight, "a number above 0", |x| x > 0.0)?;
        if self.mappo && !kind.takes_delta() {
            let problem = "is not defined for this objective; dpo, ipo_mean, ipo_sum, simpo and \
                           cpo take it";
            return Err(Error::config(key("mappo"), problem));
        }
        self.refuse_unknown(&key)?;
        let above = "a number above 0";
        let positive = |name: &str, value: Option<f64>, default: f64| {
            in_range(key(name), value.unwrap_or(default), above, |x| x > 0.0)
        };
        let default_beta = if kind == Kind::Simpo { 2.0 } else { 0.1 };
        let beta = positive("beta", self.beta, default_beta)?;
        let not_negative = |name: &str, value: Option<f64>, default: f64| {
            in_range(key(name), value.unwrap_or(default), "a number of at least 0", |x| x >= 0.0)
        };
        let smoothing = || {
            let problem = "is missing; give the share of wrong labels, at least 0 and below 0.5";
            let value = self
                .label_smoothing
                .ok_or_else(|| Error::config(key("label_smoothing"), problem))?;
            let range = "a number of at least 0 and below 0.5";
            in_range(key("label_smoothing"), value, range, |x| (0.0..0.5).contains(&x))
        };
        let target = 0.5 / beta;
        let delta = self.mappo || kind == Kind::Mappo;
        let margin = |loss| Rule::Margin { gamma: 0.0, delta, loss };
        let (score, scale, rule) = match kind {
            Kind::Dpo | Kind::Mappo => (Score::Ratio, beta, margin(Margin::Logistic)),
            Kind::DpoNorm => (Score::RatioMean, beta, margin(Margin::Logistic)),
            Kind::IpoMean => (Score::RatioMean, 1.0, margin(Margin::Square { target })),
            Kind::IpoSum => (Score::Ratio, 1.0, margin(Margin::Square { target })),
            Kind::Simpo => {
                let gamma = not_negative("gamma", self.gamma, 0.5)?;
                let rule = Rule::Margin { gamma, delta, loss: Margin::Logistic };
                (Score::PolicyMean, beta, rule)
            }
            Kind::Cpo => (Score::Policy, beta, margin(Margin::Logistic)),
            Kind::Hinge => (Score::Ratio, beta, margin(Margin::Hinge)),
            Kind::Robust => {
                (Score::Ratio, beta, margin(Margin::Robust { smoothing: smoothing()? }))
            }
            Kind::Cdpo => {
                (Score::Ratio, beta, margin(Margin::Smoothed { smoothing: smoothing()? }))
            }
            Kind::Exo => {
                let value = self.label_smoothing.unwrap_or(1e-3);
                let range = "a number above 0 and below 0.5";
                let fits = |x| x > 0.0 && x < 0.5;
                let smoothing = in_range(key("label_smoothing"), value, range, fits)?;
                (Score::Ratio, beta, margin(Margin::Exo { smoothing }))
            }
            Kind::Discopop => {
                let tau = positive("tau", self.tau, 0.05)?;
                (Score::Ratio, beta, margin(Margin::Discopop { tau }))
            }
            Kind::ApoZero => (Score::Ratio, beta, Rule::Sides(Sides::ApoZero)),
            Kind::ApoDown => (Score::Ratio, beta, Rule::Sides(Sides::ApoDown)),
            Kind::Bco => (Score::Ratio, beta, Rule::Sides(Sides::Bco)),
            Kind::Nca => (Score::Ratio, beta, Rule::Sides(Sides::Nca)),
            Kind::Sppo => (Score::Ratio, 1.0, Rule::Sides(Sides::Sppo { target })),
            Kind::Kto => {
                let desirable = positive("desirable_weight", self.desirable_weight, 1.0)?;
                let undesirable = positive("undesirable_weight", self.undesirable_weight, 1.0)?;
                (Score::Ratio, beta, Rule::Sides(Sides::Kto { desirable, undesirable }))
            }
            Kind::Orpo => (Score::PolicyMean, 1.0, Rule::Odds),
            Kind::Sft => (Score::Policy, 1.0, Rule::Nothing),
        };
        let mean = self.nll.unwrap_or_default();
        let nll = match kind {
            Kind::Cpo => Some((not_negative("lambda", self.lambda, 1.0)?, mean)),
            Kind::Orpo | Kind::Sft => Some((1.0, mean)),
            _ => None,
        };
        let nll = nll.filter(|(factor, _)| *factor > 0.0);
        Ok(Term { kind, weight, beta, score, scale, rule, nll })
    }

    /// Refuses parameters that the objective does not know.
    fn refuse_unknown(&self, key: &dyn Fn(&str) -> String) -> Result<()> {
        use Kind::*;
        let kind = self.objective;
        let known = [
            ("beta", self.beta.is_some(), kind != Sft),
            ("gamma", self.gamma.is_some(), kind == Simpo),
            (
                "label_smoothing",
                self.label_smoothing.is_some(),
                matches!(kind, Robust | Cdpo | Exo),
            ),
            ("lambda", self.lambda.is_some(), kind == Cpo),
            ("tau", self.tau.is_some(), kind == Discopop),
            ("desirable_weight", self.desirable_weight.is_some(), kind == Kto),
            ("undesirable_weight", self.undesirable_weight.is_some(), kind == Kto),
            ("nll", self.nll.is_some(), matches!(kind, Cpo | Orpo | Sft)),
        ];
        match known.iter().find(|(_, given, known)| *given && !known) {
            Some((name, ..)) => {
                Err(Error::config(key(name), "is no parameter of this objective; remove it"))
            }
            None => Ok(()),
        }
    }
}
