//! Δ, the prior reward gap of a pair that MaPPO multiplies the rejected answer's term with
//! (arXiv 2507.21183, equation 8): `Δ = r_w − r_l` of two prior rewards in [0, 1].
//!
//! A pair whose Δ is missing is an error: taken for 1 it would silently be trained by DPO.

use serde::{Deserialize, Serialize};

use crate::error::in_range;
use crate::{Error, Result, maths};

const WHAT: &str = "delta";

/// Where Δ comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeltaSource {
    /// Each pair brings its Δ in [−1, 1].
    Column,
    /// Each answer brings a reward in [0, 1], taken as it is.
    Identity,
    /// Each answer brings a reward model's raw score s; `r = σ(scale·(s − offset))`. With scale 1
    /// and offset 0, the defaults, this is the paper's map (appendix D.2.4).
    #[default]
    Logistic,
    /// The same `value` for every pair, written out: for ablations. 0 learns the chosen answers
    /// alone.
    Constant,
}

/// What happens to a pair with Δ < 0, whose label disagrees with the prior: as it stands the loss
/// would raise the rejected answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NegativeDelta {
    /// An error.
    #[default]
    Error,
    /// Δ = 0: the rejected answer is left alone.
    Clip,
    /// The pair is left out.
    Drop,
    /// Chosen and rejected change places, Δ its sign.
    Swap,
}

/// How Δ is made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeltaConfig {
    /// Where it comes from; logistic when absent.
    pub source: DeltaSource,
    /// What a negative one does; an error when absent.
    pub negative: NegativeDelta,
    /// Of `constant`: Δ in [0, 1].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// Of `logistic`: steepness, above 0; 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Of `logistic`: the score whose reward is ½; 0 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<f64>,
}

/// The columns of one pair that Δ may be made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairScores {
    /// Δ itself.
    pub delta: Option<f64>,
    /// Reward or raw score of the chosen answer.
    pub chosen: Option<f64>,
    /// Reward or raw score of the rejected answer.
    pub rejected: Option<f64>,
}

/// What becomes of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// It is trained on with this Δ in [0, 1].
    Keep(f64),
    /// It is trained on with this Δ in (0, 1] and with chosen and rejected exchanged.
    Swap(f64),
    /// It is left out.
    Drop,
}

/// What became of the pairs whose Δ was negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeltaCounts {
    /// Those whose negative Δ became 0.
    pub clipped: usize,
    /// Left out.
    pub dropped: usize,
    /// Exchanged.
    pub swapped: usize,
}

impl DeltaConfig {
    /// Refuses a scale or offset that is out of range or that the source does not take.
    pub fn check(&self) -> Result<()> {
        match (self.source == DeltaSource::Constant, self.value) {
            (true, None) => {
                return Err(Error::config(
                    "delta.value",
                    "is missing: the Δ of every pair, from 0 to 1",
                ));
            }
            (true, Some(value)) => {
                in_range("delta.value", value, "a number from 0 to 1", |x| {
                    (0.0..=1.0).contains(&x)
                })?;
            }
            (false, Some(_)) => {
                let problem = "belongs to source = \"constant\"; remove it or change `source`";
                return Err(Error::config("delta.value", problem));
            }
            (false, None) => {}
        }
        if self.source != DeltaSource::Logistic {
            for (key, value) in [("scale", self.scale), ("offset", self.offset)] {
                if value.is_some() {
                    let problem = "belongs to source = \"logistic\"; remove it or change `source`";
                    return Err(Error::config(format!("delta.{key}"), problem));
                }
            }
        }
        in_range("delta.scale", self.scale.unwrap_or(1.0), "a number above 0", |x| x > 0.0)?;
        in_range("delta.offset", self.offset.unwrap_or(0.0), "a finite number", |_| true)?;
        Ok(())
    }

    /// Δ = r_w − r_l of one pair as it is, in [−1, 1], whatever its sign.
    pub fn raw(&self, pair: &PairScores) -> Result<f64> {
        self.check()?;
        if let Some(value) = self.value {
            return Ok(value);
        }
        let reward = |score: Option<f64>, answer: &str| -> Result<f64> {
            let score = score.ok_or_else(|| missing(&format!("the {answer} answer's score")))?;
            match self.source {
                DeltaSource::Logistic if !score.is_finite() => {
                    Err(wrong(&format!("the {answer} answer's score"), score, "a finite number"))
                }
                DeltaSource::Logistic => {
                    let (scale, offset) = (self.scale.unwrap_or(1.0), self.offset.unwrap_or(0.0));
                    Ok(maths::sigmoid(scale * (score - offset)))
                }
                _ if (0.0..=1.0).contains(&score) => Ok(score),
                _ => Err(wrong(
                    &format!("the {answer} answer's reward"),
                    score,
                    "a number from 0 to 1 (source = \"logistic\" takes raw scores)",
                )),
            }
        };
        if self.source != DeltaSource::Column {
            return Ok(reward(pair.chosen, "chosen")? - reward(pair.rejected, "rejected")?);
        }
        let delta = pair.delta.ok_or_else(|| missing("Δ"))?;
        if (-1.0..=1.0).contains(&delta) {
            return Ok(delta);
        }
        Err(wrong("Δ", delta, "a number from -1 to 1"))
    }

    /// What becomes of one pair; counted.
    pub fn read(&self, pair: &PairScores, counts: &mut DeltaCounts) -> Result<Verdict> {
        let delta = self.raw(pair)?;
        let verdict = match self.negative {
            _ if delta >= 0.0 => Verdict::Keep(delta),
            NegativeDelta::Clip => Verdict::Keep(0.0),
            NegativeDelta::Drop => Verdict::Drop,
            NegativeDelta::Swap => Verdict::Swap(-delta),
            NegativeDelta::Error => {
                let problem = format!(
                    "Δ is {delta}: the prior prefers the rejected answer; set negative = \
                     \"clip\", \"drop\" or \"swap\" to go on"
                );
                return Err(Error::value(WHAT, problem));
            }
        };
        match verdict {
            Verdict::Drop => counts.dropped += 1,
            Verdict::Swap(_) => counts.swapped += 1,
            Verdict::Keep(_) if delta < 0.0 => counts.clipped += 1,
            Verdict::Keep(_) => {}
        }
        Ok(verdict)
    }
}

fn missing(what: &str) -> Error {
    let problem = format!("{what} is missing; every pair needs it, as Δ is never guessed");
    Error::value(WHAT, problem)
}

fn wrong(what: &str, got: f64, expected: &str) -> Error {
    Error::value(WHAT, format!("{what} is {got}, expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(chosen: f64, rejected: f64) -> PairScores {
        PairScores { delta: None, chosen: Some(chosen), rejected: Some(rejected) }
    }

    fn config(source: DeltaSource, negative: NegativeDelta) -> DeltaConfig {
        DeltaConfig { source, negative, ..Default::default() }
    }

    #[test]
    fn the_sources_give_the_gap_of_rewards() {
        let column = PairScores { delta: Some(0.625), ..Default::default() };
        let error = NegativeDelta::Error;
        assert_eq!(config(DeltaSource::Column, error).raw(&column).unwrap(), 0.625);
        assert_eq!(config(DeltaSource::Identity, error).raw(&scores(0.875, 0.25)).unwrap(), 0.625);
        let mut logistic = config(DeltaSource::Logistic, error);
        let plain = logistic.raw(&scores(0.0, -1000.0)).unwrap();
        assert_eq!(plain, 0.5);
        (logistic.scale, logistic.offset) = (Some(2.0), Some(3.0));
        let want = maths::sigmoid(2.0) - maths::sigmoid(-4.0);
        assert_eq!(logistic.raw(&scores(4.0, 1.0)).unwrap(), want);
    }

    #[test]
    fn a_constant_is_written_out_or_refused() {
        let of = |text: &str| toml::from_str::<DeltaConfig>(text).unwrap();
        let half = of("source = \"constant\"\nvalue = 0.5");
        assert_eq!(half.raw(&PairScores::default()), Ok(0.5));
        for (text, expected) in [
            ("source = \"constant\"", "`delta.value` is missing"),
            ("source = \"constant\"\nvalue = 1.5", "is 1.5, expected a number from 0 to 1"),
            ("value = 0.5", "`delta.value` belongs to"),
        ] {
            let text = of(text).raw(&PairScores::default()).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn a_negative_delta_does_what_was_asked_and_is_counted() {
        let wrong_way = scores(0.25, 0.75);
        let mut counts = DeltaCounts::default();
        let mut read = |negative, pair: &PairScores| {
            config(DeltaSource::Identity, negative).read(pair, &mut counts)
        };
        assert_eq!(read(NegativeDelta::Clip, &wrong_way), Ok(Verdict::Keep(0.0)));
        assert_eq!(read(NegativeDelta::Drop, &wrong_way), Ok(Verdict::Drop));
        assert_eq!(read(NegativeDelta::Swap, &wrong_way), Ok(Verdict::Swap(0.5)));
        assert_eq!(read(NegativeDelta::Error, &scores(0.5, 0.5)), Ok(Verdict::Keep(0.0)));
        assert_eq!(read(NegativeDelta::Swap, &scores(1.0, 0.0)), Ok(Verdict::Keep(1.0)));
        let text = read(NegativeDelta::Error, &wrong_way).unwrap_err().to_string();
        assert!(text.contains("Δ is -0.5") && text.contains("\"swap\""), "{text}");
        let expected = DeltaCounts { clipped: 1, dropped: 1, swapped: 1 };
        assert_eq!(counts, expected);
    }

    #[test]
    fn what_is_missing_or_out_of_range_is_an_error_never_one() {
        let none = PairScores::default();
        for source in [DeltaSource::Column, DeltaSource::Identity, DeltaSource::Logistic] {
            let config = config(source, NegativeDelta::Clip);
            assert!(config.raw(&none).unwrap_err().to_string().contains("missing"));
            for bad in [f64::NAN, f64::INFINITY] {
                let pair = PairScores { delta: Some(bad), ..scores(0.5, bad) };
                assert!(config.raw(&pair).is_err(), "{source:?} {bad}");
            }
        }
        let identity = config(DeltaSource::Identity, NegativeDelta::Clip);
        let text = identity.raw(&scores(1.5, 0.0)).unwrap_err().to_string();
        assert!(text.contains("the chosen answer's reward is 1.5"), "{text}");
        assert!(identity.raw(&scores(0.5, -0.1)).is_err());
        let column = config(DeltaSource::Column, NegativeDelta::Clip);
        assert!(column.raw(&PairScores { delta: Some(1.01), ..none }).is_err());
    }

    #[test]
    fn keys_are_checked() {
        let of = |text| toml::from_str::<DeltaConfig>(text);
        assert_eq!(of("").unwrap(), DeltaConfig::default());
        assert!(of("negativ = \"clip\"").is_err() && of("negative = \"flip\"").is_err());
        for (text, expected) in [
            ("scale = 0.0", "`delta.scale` is 0, expected a number above 0"),
            ("scale = nan", "`delta.scale` is NaN"),
            ("offset = inf", "`delta.offset` is inf"),
            ("source = \"column\"\nscale = 1.0", "`delta.scale` belongs to"),
        ] {
            let text = of(text).unwrap().check().unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }
}
