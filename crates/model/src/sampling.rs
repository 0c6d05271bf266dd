//! From logits to the next token.

use std::collections::HashMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use tercet_tensor::{Draw, exp_quantile, exp_sum};

use crate::init::unit;
use crate::{Error, Result};

/// How the next token is chosen. The filters apply in the order of the fields, as in
/// transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits of tokens that were already seen, prompt included, when positive, and
    /// multiplies them when negative; 1 is off. 0.01..=100.
    pub repetition_penalty: f32,
    /// Taken off the logit of a token for each time it was written, prompt not included, as in
    /// OpenAI's API; 0 is off. −2..=2.
    pub frequency_penalty: f32,
    /// Taken off the logit of a token that was written, prompt not included; 0 is off. −2..=2.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, each −100..=100; of a token that is named twice, both.
    pub logit_bias: Vec<(u32, f32)>,
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
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
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
        let penalties = [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
        ];
        for (name, value) in penalties {
            if !(-2.0..=2.0).contains(&value) {
                return fail(name, value, "-2..=2");
            }
        }
        if let Some((id, bias)) = self.logit_bias.iter().find(|b| !(-100.0..=100.0).contains(&b.1))
        {
            return fail(&format!("logit_bias of token {id}"), *bias, "-100..=100");
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
pub struct Sampler {
    settings: Sampling,
    rng: ChaCha8Rng,
    /// A number of the stream that a draw was promised and no token came of yet.
    promised: Option<f64>,
    seen: Vec<bool>,
    /// How often each token was written.
    written: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler at the start of its seed's stream.
    pub fn new(settings: &Sampling) -> Result<Self> {
        Self::seeded(settings, settings.seed)
    }

    /// As [`Sampler::new`], with another seed than the settings'.
    pub(crate) fn seeded(settings: &Sampling, seed: u64) -> Result<Self> {
        settings.validate()?;
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let settings = settings.clone();
        Ok(Self { settings, rng, promised: None, seen: Vec::new(), written: HashMap::new() })
    }

    /// Counts a token as seen, for the repetition penalty.
    pub fn see(&mut self, token: u32) {
        let token = token as usize;
        if self.seen.len() <= token {
            self.seen.resize(token + 1, false);
        }
        self.seen[token] = true;
    }

    /// Chooses from logits `[vocab]` and counts the choice as seen and written. A token of logit
    /// −∞ is never chosen.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        let token = if self.is_plain() {
            self.choose(logits)?
        } else {
            let mut logits = logits.to_vec();
            self.penalise(&mut logits);
            self.choose(&logits)?
        };
        self.count(token);
        Ok(token)
    }

    /// The draw of the next token, where it is one from all of the vocabulary by the logits as they
    /// are; `None` where a filter, penalty or bias is set. It is the same until
    /// [`Sampler::was_drawn`], and [`Sampler::next`] makes it too.
    pub fn ahead(&mut self) -> Option<Draw> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.settings;
        if !self.is_plain() {
            return None;
        }
        if temperature == 0.0 {
            // No filter takes away the most probable token.
            return Some(Draw { temperature, at: 0.0 });
        }
        if top_k > 0 || top_p < 1.0 || min_p > 0.0 {
            return None;
        }
        let at = self.uniform();
        self.promised = Some(at);
        Some(Draw { temperature, at })
    }

    /// Takes the token of the draw that [`Sampler::ahead`] gave, `None` if the logits were not
    /// numbers, and counts it as [`Sampler::next`] does.
    pub fn was_drawn(&mut self, token: Option<u32>) -> Result<u32> {
        self.promised = None;
        let token = token.ok_or_else(not_numbers)?;
        self.count(token);
        Ok(token)
    }

    fn is_plain(&self) -> bool {
        let settings = &self.settings;
        settings.repetition_penalty == 1.0
            && settings.frequency_penalty == 0.0
            && settings.presence_penalty == 0.0
            && settings.logit_bias.is_empty()
    }

    fn count(&mut self, token: u32) {
        self.see(token);
        *self.written.entry(token).or_default() += 1;
    }

    /// The next number of the stream, 0 to 1, or the one that was promised.
    fn uniform(&mut self) -> f64 {
        self.promised.take().unwrap_or_else(|| unit(&mut self.rng))
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.is_empty() || logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(not_numbers());
        }
        if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
            return Err(Error::Generate("no token is left to choose: all have p = 0".into()));
        }
        Ok(if self.settings.temperature == 0.0 { argmax(logits) } else { self.draw(logits) })
    }

    fn penalise(&self, logits: &mut [f32]) {
        let settings = &self.settings;
        let penalty = settings.repetition_penalty;
        if penalty != 1.0 {
            for (logit, _) in logits.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        if settings.frequency_penalty != 0.0 || settings.presence_penalty != 0.0 {
            for (&token, &times) in &self.written {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit -= settings.frequency_penalty * times as f32 + settings.presence_penalty;
                }
            }
        }
        for &(token, bias) in &settings.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.settings;
        let all = top_k == 0 || top_k >= logits.len();
        if all && top_p == 1.0 && min_p == 0.0 {
            // Nothing is filtered, so that no order is needed but that of the tokens.
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let place = exp_quantile(logits, most, 1.0 / temperature, self.uniform());
            return place.map_or_else(|| argmax(logits), |place| place as u32);
        }
        let kept = (!all).then(|| {
            let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
            ids.select_nth_unstable_by(top_k, |a, b| by_logit(logits, *a, *b));
            ids.truncate(top_k);
            ids.sort_unstable();
            ids
        });
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |id: &u32| {
            let above = f64::from(logits[*id as usize]) - f64::from(most);
            libm::exp(above / f64::from(temperature))
        };
        let (total, count) = match &kept {
            None => (exp_sum(logits, most, 1.0 / temperature), logits.len()),
            Some(ids) => (ids.iter().map(weight).sum(), ids.len()),
        };
        let at = self.uniform();
        // Sorting a vocabulary takes longer than a small model's pass: only its head is sorted,
        // and more of it when that did not decide.
        for depth in [4.0, 8.0, 16.0, f32::INFINITY] {
            let least = most - depth * temperature;
            let near = |id: &u32| logits[*id as usize] >= least;
            let mut head: Vec<u32> = match &kept {
                None => (0..logits.len() as u32).filter(near).collect(),
                Some(ids) => ids.iter().copied().filter(near).collect(),
            };
            // Most probable first; ties by id, so that the order is one.
            head.sort_unstable_by(|a, b| by_logit(logits, *a, *b));
            let weights: Vec<f64> = head.iter().map(weight).collect();
            if let Some(place) = self.place(at, total, &weights, head.len() == count) {
                return head[place];
            }
        }
        // The last head was whole.
        argmax(logits)
    }

    /// Where `at`, 0 to 1, falls among tokens that weigh `weights`, largest first, of `total`;
    /// `None` when what follows matters too, unless nothing does (`whole`).
    fn place(&self, at: f64, total: f64, weights: &[f64], whole: bool) -> Option<usize> {
        let Sampling { top_p, min_p, .. } = self.settings;
        let mut kept = weights.len();
        if top_p < 1.0 {
            let mut reached = 0.0;
            let enough = weights.iter().position(|w| {
                reached += w;
                reached >= f64::from(top_p) * total
            });
            kept = enough.map_or(kept, |last| last + 1);
            if enough.is_none() && !whole {
                return None;
            }
        }
        // The most probable token weighs 1.
        let likely = weights.partition_point(|&w| w >= f64::from(min_p)).max(1);
        let cut = kept.min(likely) < weights.len() || top_p < 1.0;
        if !cut && !whole && min_p > 0.0 {
            return None;
        }
        let kept = &weights[..kept.min(likely)];
        let mut left = at * if cut { kept.iter().sum() } else { total };
        for (place, w) in kept.iter().enumerate() {
            left -= w;
            if left < 0.0 {
                return Some(place);
            }
        }
        // Rounding took the sum past the end.
        (cut || whole).then(|| kept.iter().rposition(|&w| w > 0.0).unwrap_or(0))
    }
}

fn not_numbers() -> Error {
    let text = "the model's output is not a number; its weights are damaged or diverged";
    Error::Generate(text.into())
}

/// The larger logit first, then the smaller id.
fn by_logit(logits: &[f32], a: u32, b: u32) -> std::cmp::Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The filters over a sorted vocabulary, as they are defined.
    fn sorted_whole(settings: &Sampling, logits: &[f32], at: f64) -> u32 {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| by_logit(logits, *a, *b));
        if settings.top_k > 0 {
            order.truncate(settings.top_k);
        }
        let of = |id: &u32| {
            let above = f64::from(logits[*id as usize]) - f64::from(logits[order[0] as usize]);
            (above / f64::from(settings.temperature)).exp()
        };
        let mut weights: Vec<f64> = order.iter().map(of).collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let mut kept = 0;
        while kept < weights.len() && reached < f64::from(settings.top_p) * total {
            reached += weights[kept];
            kept += 1;
        }
        if settings.top_p < 1.0 {
            weights.truncate(kept);
        }
        weights.retain(|&w| w >= f64::from(settings.min_p));
        let mut left = at * weights.iter().sum::<f64>();
        let place = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[place.unwrap_or(weights.len() - 1)]
    }

    /// Flat and steep logits, so that the head that is sorted decides at every depth; sums in
    /// another order differ in the last places of f64, which none of these draws falls between.
    #[test]
    fn a_sorted_head_draws_what_the_sorted_whole_draws() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for spread in [0.5, 6.0, 20.0, 80.0] {
            for (top_k, top_p, min_p) in [
                (0, 0.9, 0.0),
                (0, 0.999, 0.0),
                (0, 1.0, 0.01),
                (0, 1.0, 1e-5),
                (40, 1.0, 0.0),
                (40, 0.8, 0.02),
                (600, 1.0, 0.0),
            ] {
                for temperature in [0.3, 1.0, 3.0] {
                    let settings =
                        Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
                    for seed in 0..20 {
                        let mut logits: Vec<f32> =
                            (0..700).map(|_| (unit(&mut rng) * spread) as f32).collect();
                        logits[seed as usize] = f32::NEG_INFINITY;
                        let mut sampler = Sampler::seeded(&settings, seed).unwrap();
                        let at = unit(&mut ChaCha8Rng::seed_from_u64(seed));
                        let want = sorted_whole(&settings, &logits, at);
                        assert_eq!(sampler.next(&logits).unwrap(), want, "{settings:?}");
                    }
                }
            }
        }
    }

    /// A promised number is kept until its token came, wherever that was chosen; nothing is promised
    /// where a filter or penalty has a say.
    #[test]
    fn a_draw_ahead_is_the_next_draw() {
        let logits: Vec<f32> = (0..50).map(|i| (i * 7 % 11) as f32 / 3.0).collect();
        let settings = Sampling { temperature: 1.3, top_p: 1.0, seed: 4, ..Sampling::default() };
        let (mut plain, mut ahead) =
            (Sampler::new(&settings).unwrap(), Sampler::new(&settings).unwrap());
        for turn in 0..60 {
            let want = plain.next(&logits).unwrap();
            let draw = ahead.ahead().unwrap();
            assert_eq!(ahead.ahead(), Some(draw), "promised once");
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let place = exp_quantile(&logits, most, 1.0 / draw.temperature, draw.at).unwrap();
            let token = match turn % 3 {
                0 => ahead.next(&logits).unwrap(),
                _ => ahead.was_drawn(Some(place as u32)).unwrap(),
            };
            assert_eq!((token, place as u32), (want, want));
        }
        assert!(ahead.was_drawn(None).is_err());
        let greedy = Sampling { top_k: 3, ..Sampling::greedy(1) };
        let draw = Sampler::new(&greedy).unwrap().ahead();
        assert_eq!(draw, Some(Draw { temperature: 0.0, at: 0.0 }));
        for other in [
            Sampling { top_k: 3, ..settings.clone() },
            Sampling { top_p: 0.9, ..settings.clone() },
            Sampling { min_p: 0.1, ..settings.clone() },
            Sampling { presence_penalty: 0.5, ..settings.clone() },
            Sampling { logit_bias: vec![(3, 1.0)], ..Sampling::greedy(1) },
        ] {
            assert_eq!(Sampler::new(&other).unwrap().ahead(), None, "{other:?}");
        }
    }

    /// χ² over a vocabulary of 40 with 100,000 draws: 39 degrees of freedom exceed 72.1 once in a
    /// thousand.
    #[test]
    fn without_filters_tokens_come_as_often_as_they_should() {
        let logits: Vec<f32> = (0..40).map(|i| (i * 7 % 11) as f32 / 3.0).collect();
        let settings = Sampling { temperature: 1.5, top_p: 1.0, ..Sampling::default() };
        let mut sampler = Sampler::seeded(&settings, 5).unwrap();
        let mut counts = [0.0; 40];
        for _ in 0..100_000 {
            counts[sampler.next(&logits).unwrap() as usize] += 1.0;
        }
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / 1.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        let square = |(count, weight): (&f64, &f64)| {
            let expected = 1e5 * weight / total;
            (count - expected).powi(2) / expected
        };
        let chi: f64 = counts.iter().zip(&weights).map(square).sum();
        assert!(chi < 72.1, "χ² = {chi}");
    }
}
