//! One model's answers to prompts, with their worth: pairs for offline alignment, or a score.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tercet_train::run::Place;
use tercet_train::tune::start::{self, Beside};
use tercet_train::tune::{Encoder, RowCount};
use tercet_train::{Control, Error, Event, Result, config, files};

use super::config::SampleConfig;
use super::measure::{Worth, worth};
use super::prompts::{Prompt, Prompts};
use super::rounds::{ends, train_config};
use super::samples::{Sampler, write_pairs};
use crate::reward::RewardSource;
use crate::select::PickCounts;

/// What sampling came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SampleReport {
    /// False when it was interrupted; run it again with resume.
    pub finished: bool,
    /// Figures; `None` when it was interrupted.
    pub worth: Option<Worth>,
    /// Prompts that gave a pair, tied, or were too few.
    pub picks: PickCounts,
    /// Answers.
    pub samples: PathBuf,
    /// Best against worst.
    pub pairs: PathBuf,
}

/// Answers every prompt, scores the answers and writes `samples.jsonl`, `pairs.jsonl` and
/// `summary.json` into the output folder.
pub fn sample(
    sample: &SampleConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<SampleReport> {
    let text = config::to_toml(sample)?;
    let samples = sample.output.join("samples.jsonl");
    super::rounds::check_folder(&sample.output, &samples, &text, control.resume)?;
    let _place = Place::open(&sample.output, &text, control.resume, observe)?;
    let beside = Beside::load(&sample.model.path)?;
    let train = train_config(sample.sampling.dtype(), sample.sampling.seed);
    let mut model = start::first(&sample.model, None, &train)?;
    start::check_context(sample.data.context, &model)?;
    let encoder = Encoder::new(&beside.tokenizer, model.config(), &beside.generation)?;
    let prompts = Prompts::read(&sample.data, sample.sampling.max_tokens, &encoder, control.stop)?;
    said(&prompts.count, observe);
    let all: Vec<&Prompt> = prompts.train.iter().collect();
    // Everything that can be refused is, before anything is written.
    let mut reward = RewardSource::new(&sample.reward, control.device)?;
    for (i, prompt) in all.iter().enumerate() {
        reward.check_row(i as u64, &prompt.row)?;
    }
    let first = match &sample.start {
        None => None,
        Some(start) => {
            let mut first = start::first(start, None, &train)?;
            crate::run::check_reads_the_same(&start.path, &first, &sample.model.path, &model)
                .map_err(|problem| Error::config("start.path", &problem))?;
            first.to_device(control.device)?;
            Some(first)
        }
    };
    super::rounds::check_key(&sample.output, &all, &model)?;
    prompts.count.write(&sample.output.join("rows.jsonl"))?;
    model.to_device(control.device)?;
    let sampler = Sampler {
        model: &model,
        tokenizer: &beside.tokenizer,
        ends: ends(&beside, &model),
        section: &sample.sampling,
        samples: sample.sampling.samples,
        part: 0,
        stop: control.stop,
    };
    let pairs = sample.output.join("pairs.jsonl");
    let mut report = SampleReport {
        finished: false,
        worth: None,
        picks: PickCounts::default(),
        samples: samples.clone(),
        pairs: pairs.clone(),
    };
    let answers = match sampler.run(&all, &mut reward, &samples, observe) {
        Ok(Some(answers)) => answers,
        // Whatever was under way is on disk as far as it came.
        Ok(None) | Err(Error::Interrupted) => return Ok(report),
        Err(error) => return Err(error),
    };
    if sample.sampling.samples > 1 {
        report.picks = write_pairs(&pairs, &all, &answers, sample.sampling.samples, None)?;
    }
    let first = first.as_ref().map(|model| (model, train.micro_tokens));
    report.worth = Some(worth(&all, &answers, sample.sampling.samples, first)?);
    report.finished = true;
    let summary = serde_json::to_string_pretty(&report)
        .map_err(|error| Error::Data(format!("no JSON: {error}")))?;
    files::write_atomic(&sample.output.join("summary.json"), summary.as_bytes())?;
    Ok(report)
}

/// Says what became of the rows.
pub(super) fn said(count: &RowCount, observe: &mut dyn FnMut(Event)) {
    observe(Event::Note(&format!("prompts: {count}")));
}
