//! The rounds.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tercet_model::{LoraConfig, Model};
use tercet_train::config::{Precision, TuneModel, TuneTrain};
use tercet_train::run::{Place, check_config_in};
use tercet_train::tune::Encoder;
use tercet_train::tune::start::{self, Beside};
use tercet_train::{Control, Error, Event, Result, config, files, newest_checkpoint};

use super::config::IterativeConfig;
use super::measure::{Worth, worth};
use super::prompts::{Prompt, Prompts};
use super::report;
use super::samples::{Sampler, write_pairs};
use super::single::said;
use crate::align;
use crate::reward::RewardSource;
use crate::select::PickCounts;

/// What is known of a round when it is done; also kept as `round-K/round.json`. Round 0 is the
/// policy at its start, which was only measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Its number.
    pub round: usize,
    /// What its answers were worth that it was trained on; `None` for round 0.
    pub sampled: Option<Worth>,
    /// What became of its prompts.
    pub picks: PickCounts,
    /// What the policy is worth on held-out prompts after it; `None` when none are held out.
    pub held_out: Option<Worth>,
    /// Loss of the last tenth of its steps.
    pub train_loss: Option<f64>,
    /// The checkpoint of its training that is the policy after it, by name; `None` for round 0.
    pub policy: Option<String>,
}

/// How the loop ended.
#[derive(Clone, Debug)]
pub struct IterativeReport {
    /// False when it was interrupted; it can be resumed.
    pub finished: bool,
    /// The rounds that are done, round 0 first.
    pub rounds: Vec<Round>,
    /// The newest policy: a model folder, or an adapter's.
    pub policy: Option<PathBuf>,
    /// The report, when finished.
    pub report: Option<PathBuf>,
}

/// What all rounds share.
struct Loop<'a> {
    config: &'a IterativeConfig,
    control: &'a Control<'a>,
    beside: Beside,
    prompts: Prompts,
    /// The policy before the first round, for measuring how far it has moved.
    first: Model,
}

/// Runs all rounds, or those that are left.
pub fn iterate(
    config: &IterativeConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<IterativeReport> {
    let text = config::to_toml(config)?;
    check_folder(&config.output, &config.round(0), &text, control.resume)?;
    let _place = Place::open(&config.output, &text, control.resume, observe)?;
    let beside = Beside::load(&config.model.path)?;
    let mut first = start::first(&config.model, config.lora.as_ref(), &config.train)?;
    start::check_context(config.data.context, &first)?;
    let encoder = Encoder::new(&beside.tokenizer, first.config(), &beside.generation)?;
    let prompts = Prompts::read(&config.data, config.sampling.max_tokens, &encoder, control.stop)?;
    if prompts.train.len() < config.iterative.rounds {
        return Err(Error::config(
            "iterative.rounds",
            format!(
                "= {} is more than the {} prompts there are",
                config.iterative.rounds,
                prompts.train.len()
            ),
        ));
    }
    let all: Vec<&Prompt> = prompts.train.iter().chain(&prompts.held_out).collect();
    // Everything that can be refused is, before anything is written.
    let reward = RewardSource::new(&config.reward, control.device)?;
    for (i, prompt) in all.iter().enumerate() {
        reward.check_row(i as u64, &prompt.row)?;
    }
    check_key(&config.output, &all, &first)?;
    prompts.count.write(&config.output.join("rows.jsonl"))?;
    said(&prompts.count, observe);
    observe(Event::Note(&format!(
        "{} prompts in {} rounds, {} held out",
        prompts.train.len(),
        config.iterative.rounds,
        prompts.held_out.len()
    )));
    first.to_device(control.device)?;
    Loop { config, control, beside, prompts, first }.run(reward, observe)
}

impl Loop<'_> {
    fn run(
        &self,
        mut reward: RewardSource,
        observe: &mut dyn FnMut(Event),
    ) -> Result<IterativeReport> {
        let mut report =
            IterativeReport { finished: false, rounds: Vec::new(), policy: None, report: None };
        let (mut model, mut lora) = (self.config.model.clone(), self.config.lora.clone());
        for round in 0..=self.config.iterative.rounds {
            let done = match self.round(round, &mut model, &mut lora, &mut reward, observe) {
                // Whatever was under way is on disk as far as it came.
                Ok(None) | Err(Error::Interrupted) => return Ok(report),
                Ok(Some(done)) => done,
                Err(error) => return Err(error),
            };
            if round > 0 {
                report.policy = Some(model.adapter.clone().unwrap_or_else(|| model.path.clone()));
            }
            report.rounds.push(done);
        }
        report.report = Some(report::write(self.config, &report.rounds)?);
        report.finished = true;
        Ok(report)
    }

    /// One round from samples to the policy after it, which `model` and `lora` then name. `None`
    /// when stopped.
    fn round(
        &self,
        round: usize,
        model: &mut TuneModel,
        lora: &mut Option<LoraConfig>,
        reward: &mut RewardSource,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<Round>> {
        let folder = self.config.round(round);
        let kept = folder.join("round.json");
        files::create_folder(&folder)?;
        let mut done = Round {
            round,
            sampled: None,
            picks: PickCounts::default(),
            held_out: None,
            train_loss: None,
            policy: None,
        };
        let training = self.config.training(model.clone(), lora.clone(), round);
        if let Some(known) = read(&kept) {
            if round > 0 {
                (*model, *lora) = after(model, lora, &training.output)?;
                let found = name_of(model);
                if found != known.policy {
                    return Err(Error::Checkpoint(format!(
                        "round {round} ended with {}, but the newest whole checkpoint of {} is \
                         {}; restore it from a copy",
                        known.policy.unwrap_or_default(),
                        training.output.display(),
                        found.unwrap_or_default()
                    )));
                }
            }
            return Ok(Some(known));
        }
        let mut policy = match round {
            0 | 1 => self.first.clone(),
            _ => start::first(model, lora.as_ref(), &self.config.train)?,
        };
        if round > 0 {
            observe(Event::Note(&format!("round {round} of {}", self.config.iterative.rounds)));
            policy.to_device(self.control.device)?;
            let part =
                self.prompts.part(round, self.config.iterative.rounds, self.config.train.seed);
            let wanted = self.config.sampling.samples;
            let sampler = self.sampler(&policy, wanted, round as u64);
            let path = folder.join("samples.jsonl");
            let Some(samples) = sampler.run(&part, reward, &path, observe)? else {
                return Ok(None);
            };
            done.sampled = Some(worth(&part, &samples, wanted, None)?);
            let pairs = folder.join("pairs.jsonl");
            done.picks =
                write_pairs(&pairs, &part, &samples, wanted, Some(&self.config.align.delta))?;
            if done.picks.pairs == 0 {
                return Err(Error::Data(format!(
                    "round {round}: every prompt's answers scored the same, so that there is \
                     nothing to learn from; look at {}",
                    path.display()
                )));
            }
            observe(Event::Note(&format!(
                "mean reward {:.4}; {} pairs, {} prompts tied",
                done.sampled.map_or(0.0, |worth| worth.reward),
                done.picks.pairs,
                done.picks.tied,
            )));
            drop(policy);
            // A round that was begun goes on; one that was not begins.
            let control = Control { resume: training.output.exists(), ..*self.control };
            let trained = align(&training, &control, observe)?;
            if !trained.finished {
                return Ok(None);
            }
            done.train_loss = trained.train_loss;
            (*model, *lora) = after(model, lora, &training.output)?;
            done.policy = name_of(model);
            policy = start::first(model, lora.as_ref(), &self.config.train)?;
        }
        if !self.prompts.held_out.is_empty() {
            policy.to_device(self.control.device)?;
            let held_out: Vec<&Prompt> = self.prompts.held_out.iter().collect();
            let wanted = self.config.iterative.held_out_samples;
            let sampler = self.sampler(&policy, wanted, u64::MAX);
            let path = folder.join("held_out.jsonl");
            let Some(samples) = sampler.run(&held_out, reward, &path, observe)? else {
                return Ok(None);
            };
            let start = (&self.first, self.config.train.micro_tokens);
            let found = worth(&held_out, &samples, wanted, Some(start))?;
            observe(Event::Note(&format!(
                "held-out reward {:.4} ± {:.4}, {:.0} tokens an answer, KL from the start {:.3}",
                found.reward,
                found.interval,
                found.length,
                found.divergence.unwrap_or(0.0)
            )));
            done.held_out = Some(found);
        }
        let text = serde_json::to_string_pretty(&done)
            .map_err(|error| Error::Data(format!("a round has no JSON: {error}")))?;
        files::write_atomic(&kept, text.as_bytes())?;
        Ok(Some(done))
    }

    fn sampler<'a>(&'a self, model: &'a Model, samples: usize, part: u64) -> Sampler<'a> {
        Sampler {
            model,
            tokenizer: &self.beside.tokenizer,
            ends: ends(&self.beside, model),
            section: &self.config.sampling,
            samples,
            part,
            stop: self.control.stop,
        }
    }
}

/// The policy after a round's training: an adapter that goes on, or a model folder.
fn after(
    model: &TuneModel,
    lora: &Option<LoraConfig>,
    training: &Path,
) -> Result<(TuneModel, Option<LoraConfig>)> {
    let Some(newest) = newest_checkpoint(training)? else {
        return Err(Error::Checkpoint(format!(
            "{} holds no complete checkpoint, though its round is done; restore it from a copy",
            training.display()
        )));
    };
    let adapter = lora.is_some() || model.adapter.is_some();
    Ok(match adapter {
        true => (TuneModel { path: model.path.clone(), adapter: Some(newest) }, None),
        false => (TuneModel { path: newest, adapter: None }, None),
    })
}

/// The checkpoint that a policy stands on, by name.
fn name_of(model: &TuneModel) -> Option<String> {
    let folder = model.adapter.as_ref().unwrap_or(&model.path);
    folder.file_name().map(|name| name.to_string_lossy().into_owned())
}

/// Refuses a resumed run whose prompts, rows or first model are not what they were; a new one
/// writes down what they are.
pub(super) fn check_key(output: &Path, prompts: &[&Prompt], first: &Model) -> Result<()> {
    let mut hasher = Sha256::new();
    for prompt in prompts {
        let row = serde_json::to_vec(&prompt.row)
            .map_err(|error| Error::Data(format!("a row has no JSON: {error}")))?;
        for part in [prompt.text.as_bytes(), &row] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    let key = start::key(&files::hex(&hasher.finalize()), &[first])?;
    let path = output.join("key");
    match std::fs::read_to_string(&path) {
        Ok(known) if known == key => Ok(()),
        Ok(_) => Err(Error::Checkpoint(format!(
            "the prompts, their rows or the model are not what {} was begun with (data.paths, \
             model.path); bring them back, or choose another `output`",
            output.display()
        ))),
        Err(_) => files::write_atomic(&path, key.as_bytes()),
    }
}

/// Refuses a folder that holds an earlier run's `trace` when not told to resume it, and one of
/// another configuration when told so.
pub(super) fn check_folder(output: &Path, trace: &Path, text: &str, resume: bool) -> Result<()> {
    match (trace.exists(), resume) {
        (true, false) => Err(Error::Checkpoint(format!(
            "{} already holds a run; --resume goes on with it, or choose another `output`",
            output.display()
        ))),
        (true, true) => check_config_in(output, text),
        (false, _) => Ok(()),
    }
}

/// Tokens that end an answer.
pub(super) fn ends(beside: &Beside, model: &Model) -> Vec<u32> {
    beside.generation.eos_token_ids.clone().unwrap_or_else(|| model.config().eos_token_ids.clone())
}

/// How a model that is not trained is loaded.
pub(super) fn train_config(dtype: Precision, seed: u64) -> TuneTrain {
    TuneTrain { dtype, seed, ..TuneTrain::default() }
}

/// A round that is done; a damaged file counts as none, and its last stage is done again.
fn read(path: &Path) -> Option<Round> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
