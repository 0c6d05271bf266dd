//! Answers to prompts, scored, kept as JSON lines that a killed run goes on from.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tercet_model::{Ask, Model, Together, Tokenizer, sample_many};
use tercet_train::{Error, Event, Result, files};

use super::config::SamplingSection;
use super::prompts::Prompt;
use crate::delta::{DeltaConfig, PairScores};
use crate::reward::{Answer, RewardSource};
use crate::select::{Pick, PickCounts, best_and_worst};

/// One scored answer: a line of `samples.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Which prompt of the part it answers.
    pub prompt: usize,
    /// Which answer to it.
    pub sample: usize,
    /// The prompt's text.
    pub prompt_text: String,
    /// What was written.
    pub answer: String,
    /// Its tokens, the end token included when one was written.
    pub tokens: Vec<i32>,
    /// Whether the model ended it, and not a limit.
    pub ended: bool,
    /// Log-probability of these tokens under the model itself, in nats.
    pub log_prob: f64,
    /// The reward.
    pub score: f64,
    /// What the reward is made of.
    pub parts: Map<String, Value>,
}

/// How a part is sampled.
pub struct Sampler<'a> {
    /// Who answers.
    pub model: &'a Model,
    /// Its words.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
    /// How.
    pub section: &'a SamplingSection,
    /// Answers to each prompt.
    pub samples: usize,
    /// Keeps the seeds of different parts apart.
    pub part: u64,
    /// Raised to stop.
    pub stop: &'a AtomicBool,
}

impl Sampler<'_> {
    /// Samples and scores every prompt, in portions that are each on disk before the next begins;
    /// what `path` holds already is not made again. `None` when stopped.
    pub fn run(
        &self,
        prompts: &[&Prompt],
        reward: &mut RewardSource,
        path: &Path,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<Vec<Sample>>> {
        let mut samples = self.kept(path, prompts)?;
        let done = samples.len() / self.samples;
        let mut file =
            OpenOptions::new().append(true).open(path).map_err(Error::io("write", path))?;
        let start = Instant::now();
        let at_once = (4 * self.section.at_once).div_ceil(self.samples);
        let mut tokens = 0;
        for first in (done..prompts.len()).step_by(at_once) {
            let portion = &prompts[first..(first + at_once).min(prompts.len())];
            let Some(written) = self.portion(portion, first, reward)? else { return Ok(None) };
            tokens += written.iter().map(|sample| sample.tokens.len()).sum::<usize>();
            let lines = lines(&written)?;
            // Forced to disk: the next portion counts on it.
            let kept = file.write_all(&lines).and_then(|()| file.sync_data());
            kept.map_err(Error::io("write", path))?;
            samples.extend(written);
            let ready = first + portion.len();
            let seconds = start.elapsed().as_secs_f64().max(1e-9);
            let left = seconds * (prompts.len() - ready) as f64 / (ready - done) as f64;
            observe(Event::Note(&format!(
                "{ready} of {} prompts answered · {:.0} tok/s · {left:.0} s left",
                prompts.len(),
                tokens as f64 / seconds,
            )));
        }
        Ok(Some(samples))
    }

    /// Complete prompts of an earlier, interrupted run; the file then holds exactly these.
    fn kept(&self, path: &Path, prompts: &[&Prompt]) -> Result<Vec<Sample>> {
        let text = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let mut samples: Vec<Sample> = Vec::new();
        let mut found = text.split(|&byte| byte == b'\n').peekable();
        while let Some(line) = found.next() {
            let sample: Sample = match serde_json::from_slice(line) {
                Ok(sample) => sample,
                // Cut short by a crash, or what follows the last end of a line.
                Err(_) if found.peek().is_none() => break,
                Err(error) => {
                    return Err(Error::Data(format!(
                        "{}: line {} is no sample ({error}), and others follow; mend it, or take \
                         the file away to sample again",
                        path.display(),
                        samples.len() + 1
                    )));
                }
            };
            let place = (samples.len() / self.samples, samples.len() % self.samples);
            let fits = prompts.get(place.0).is_some_and(|prompt| {
                place == (sample.prompt, sample.sample) && prompt.text == sample.prompt_text
            });
            if !fits {
                return Err(Error::Data(format!(
                    "{}: line {} answers another prompt than this run asks; take the file away to \
                     sample again",
                    path.display(),
                    samples.len() + 1
                )));
            }
            samples.push(sample);
        }
        samples.truncate(samples.len() / self.samples * self.samples);
        files::write_atomic(path, &lines(&samples)?)?;
        Ok(samples)
    }

    /// Answers to some prompts, of which the first is number `first`, in order.
    fn portion(
        &self,
        prompts: &[&Prompt],
        first: usize,
        reward: &mut RewardSource,
    ) -> Result<Option<Vec<Sample>>> {
        let asks: Vec<Ask> = prompts
            .iter()
            .enumerate()
            .flat_map(|(i, prompt)| {
                (0..self.samples).map(move |sample| (first + i, sample, *prompt))
            })
            .map(|(i, sample, prompt)| Ask {
                prompt: prompt.ids.iter().map(|&id| id as u32).collect(),
                seed: self.seed(i, sample),
            })
            .collect();
        let mut samples: Vec<Option<Sample>> = vec![None; asks.len()];
        let together = Together { at_once: self.section.at_once, stop: self.stop };
        sample_many(
            self.model,
            self.tokenizer,
            &asks,
            &self.section.sampling(),
            Some(&self.ends),
            together,
            &mut |index, written| {
                let (i, sample) = (index / self.samples, index % self.samples);
                samples[index] = Some(Sample {
                    prompt: first + i,
                    sample,
                    prompt_text: prompts[i].text.clone(),
                    answer: written.text,
                    tokens: written
                        .tokens
                        .iter()
                        .chain(&written.ended)
                        .map(|&id| id as i32)
                        .collect(),
                    ended: written.ended.is_some(),
                    log_prob: written.log_prob,
                    score: 0.0,
                    parts: Map::new(),
                });
            },
        )?;
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut samples: Vec<Sample> = samples.into_iter().flatten().collect();
        let answers: Vec<Answer> = samples
            .iter()
            .map(|sample| Answer {
                id: (sample.prompt * self.samples + sample.sample) as u64,
                prompt: &sample.prompt_text,
                answer: &sample.answer,
                tokens: sample.tokens.len(),
                row: &prompts[sample.prompt - first].row,
            })
            .collect();
        let scores = reward.score(&answers, self.stop)?;
        for (sample, scored) in samples.iter_mut().zip(scores) {
            sample.score = scored.total;
            sample.parts =
                scored.parts.into_iter().map(|(name, value)| (name, json!(value))).collect();
        }
        Ok(Some(samples))
    }

    /// A seed for each answer; odd constants keep neighbours apart.
    fn seed(&self, prompt: usize, sample: usize) -> u64 {
        self.section
            .seed
            .wrapping_add(self.part.wrapping_mul(0x9E37_79B9_7F4A_7C15))
            .wrapping_add((prompt as u64).wrapping_mul(0xD1B5_4A32_D192_ED03))
            .wrapping_add((sample as u64).wrapping_mul(0x8CB9_2BA7_2F3D_8DD7))
    }
}

fn lines(samples: &[Sample]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for sample in samples {
        serde_json::to_writer(&mut text, sample)
            .map_err(|error| Error::Data(format!("a sample has no JSON: {error}")))?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Writes the best against the worst answer of every prompt, with their scores and, where it is
/// said how, raw Δ, as rows
/// that alignment reads; prompts whose answers all scored the same give none. Returns the counts.
pub fn write_pairs(
    path: &Path,
    prompts: &[&Prompt],
    samples: &[Sample],
    wanted: usize,
    delta: Option<&DeltaConfig>,
) -> Result<PickCounts> {
    let mut counts = PickCounts::default();
    let mut text = String::new();
    for (prompt, answers) in prompts.iter().zip(samples.chunks(wanted)) {
        let scores: Vec<f64> = answers.iter().map(|sample| sample.score).collect();
        let pick = best_and_worst(&scores, wanted)?;
        counts.add(pick);
        let Pick::Pair { best, worst } = pick else { continue };
        let (best, worst) = (&answers[best], &answers[worst]);
        let pair =
            PairScores { delta: None, chosen: Some(best.score), rejected: Some(worst.score) };
        let mut row = prompt.row.clone();
        for (key, value) in [
            ("chosen", json!(best.answer)),
            ("rejected", json!(worst.answer)),
            ("score_chosen", json!(best.score)),
            ("score_rejected", json!(worst.score)),
            ("prompt_tokens", json!(prompt.ids)),
            ("chosen_tokens", json!(best.tokens)),
            ("rejected_tokens", json!(worst.tokens)),
        ] {
            row.insert(key.into(), value);
        }
        // The prompt's own would be taken for this pair's.
        row.remove("delta");
        if let Some(Ok(raw)) = delta.map(|delta| delta.raw(&pair)) {
            row.insert("delta".into(), json!(raw));
        }
        text += &format!("{}\n", Value::Object(row));
    }
    files::write_atomic(path, text.as_bytes())?;
    Ok(counts)
}
