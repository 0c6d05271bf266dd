//! From logits to the next token.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::init::unit;
use crate::{Error, Result};

/// How the next token is chosen. The filters apply in the order of the fields, as in
/// transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits of tokens that were already seen, prompt included, when positive, and
    /// multiplies them when negative; 1 is off. 0.01..=100.
    pub repetition_penalty: f32,
    /// Divides the logits; 0 takes the most probable token. 0..=100.
    pub temperature: f32,
    /// Keeps the k most probable tokens; 0 is off.
    pub top_k: usize,
    /// Keeps the most probable tokens that together reach this probability; 1 is off. Above 0.
    pub top_p: f32,
    /// Keeps tokens at least this many times as probable as the most probable; 0 is off.
    pub min_p: f32,
    /// Same seed, same text.
    pub seed: u64,
    /// Tokens to write at most.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            temperature: 0.8,
            top_k: 0,
            top_p: 0.95,
            min_p: 0.0,
            seed: 0,
            max_tokens: 256,
            stop: Vec::new(),
        }
    }
}

impl Sampling {
    /// Always the most probable token.
    pub fn greedy(max_tokens: usize) -> Self {
        Self { temperature: 0.0, max_tokens, ..Self::default() }
    }

    /// Checks every range; the error names the field, its value and the range.
    pub fn validate(&self) -> Result<()> {
        let fail = |name: &str, value: f32, range: &str| {
            Err(Error::Generate(format!("{name} = {value} is outside {range}")))
        };
        if !(0.01..=100.0).contains(&self.repetition_penalty) {
            return fail("repetition_penalty", self.repetition_penalty, "0.01..=100");
        }
        if !(0.0..=100.0).contains(&self.temperature) {
            return fail("temperature", self.temperature, "0..=100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail("top_p", self.top_p, "0 (excluded) to 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return fail("min_p", self.min_p, "0..=1");
        }
        if self.max_tokens == 0 {
            return Err(Error::Generate("max_tokens = 0 leaves nothing to write".into()));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::Generate("an empty stop text would stop at once".into()));
        }
        Ok(())
    }
}

/// Chooses tokens one after the other.
pub struct Sampler<'s> {
    settings: &'s Sampling,
    rng: ChaCha8Rng,
    seen: Vec<bool>,
}

impl<'s> Sampler<'s> {
    /// A sampler at the start of its seed's stream.
    pub fn new(settings: &'s Sampling) -> Result<Self> {
        Self::seeded(settings, settings.seed)
    }

    /// As [`Sampler::new`], with another seed than the settings'.
    pub(crate) fn seeded(settings: &'s Sampling, seed: u64) -> Result<Self> {
        settings.validate()?;
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Ok(Self { settings, rng, seen: Vec::new() })
    }

    /// Counts a token as seen, for the repetition penalty.
    pub fn see(&mut self, token: u32) {
        let token = token as usize;
        if self.seen.len() <= token {
            self.seen.resize(token + 1, false);
        }
        self.seen[token] = true;
    }

    /// Chooses from logits `[vocab]` and counts the choice as seen.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        let mut logits = logits.to_vec();
        self.penalise(&mut logits);
        if logits.is_empty() || logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(Error::Generate(
                "the model's output is not a number; its weights are damaged or diverged".into(),
            ));
        }
        let token =
            if self.settings.temperature == 0.0 { argmax(&logits) } else { self.draw(&logits) };
        self.see(token);
        Ok(token)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let penalty = self.settings.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        for (logit, _) in logits.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = *self.settings;
        // Most probable first; ties by id, so that the order is one.
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by = |a: &u32, b: &u32| {
            let (x, y) = (logits[*a as usize], logits[*b as usize]);
            y.total_cmp(&x).then(a.cmp(b))
        };
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k, by);
            order.truncate(top_k);
        }
        order.sort_unstable_by(by);
        let most = f64::from(logits[order[0] as usize]);
        let weight = |id: &u32| {
            let above = f64::from(logits[*id as usize]) - most;
            libm::exp(above / f64::from(temperature))
        };
        let mut weights: Vec<f64> = order.iter().map(weight).collect();
        if top_p < 1.0 {
            let total: f64 = weights.iter().sum();
            let mut reached = 0.0;
            let enough = weights.iter().position(|w| {
                reached += w;
                reached >= f64::from(top_p) * total
            });
            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }
        // The most probable token weighs 1.
        let kept = weights.partition_point(|&w| w >= f64::from(min_p));
        weights.truncate(kept.max(1));

        let mut left = unit(&mut self.rng) * weights.iter().sum::<f64>();
        for (id, w) in order.iter().zip(&weights) {
            left -= w;
            if left < 0.0 {
                return *id;
            }
        }
        order[weights.len() - 1]
    }
}

/// The index of the largest value, the first of equals.
pub(crate) fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best as u32
}
