//! The training loop.
//!
//! A step is a pure function of the state before it and of the configuration: data order, learning
//! rate and samples depend on (seed, step) alone. A checkpoint holds that state, so a run that was
//! interrupted, or killed, ends with the same bits as one that was not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tercet_model::{Generator, Model, ModelConfig, Sampling};
use tercet_tensor::{DType, Device};

use crate::checkpoint::{self, Restored, RunState, Snapshot};
use crate::config::{ModelSource, Precision, RunConfig};
use crate::data::{self, Stream};
use crate::error::{Error, Result};
use crate::event::{Control, Event, Report, Summary};
use crate::files;
use crate::guard::{Guard, Verdict};
use crate::lock::FolderLock;
use crate::metrics::{self, Metrics, StepRecord};
use crate::pace::Pace;
use crate::prepare::{Prepared, prepare};
use crate::schedule::Schedule;
use crate::tensorboard::EventFile;
use crate::trainer::Trainer;

/// Below a run's output: the checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
const METRICS: &str = "metrics.jsonl";
const CURVE: &str = "curve.svg";

/// Trains as `config` says, until its last step or until `control.stop` is raised; either way the
/// newest checkpoint holds everything. Returns how it ended.
pub fn pretrain(
    config: &RunConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<Report> {
    let _lock = FolderLock::take(&config.output)?;
    files::remove_temporary(&config.output)?;
    checkpoint::remove_stale(&config.output.join(CHECKPOINTS))?;
    let from = starting_point(config, control.resume, observe)?;
    files::write_atomic(&config.output.join("config.toml"), config.to_toml().as_bytes())?;
    let prepared = prepare(config, from.as_deref(), control.stop, observe)?;
    let train = || {
        let mut run = Run::begin(config, control, prepared, from, observe)?;
        let finished = run.steps()?;
        run.end(finished)
    };
    train().map_err(|error: Error| error.with_advice(config))
}

/// The checkpoint to go on from. Refuses a folder that holds a run when not told to resume it, and
/// one whose checkpoints are all damaged when told so.
pub fn starting_point(
    config: &RunConfig,
    resume: bool,
    observe: &mut dyn FnMut(Event),
) -> Result<Option<PathBuf>> {
    let newest = checkpoint::newest(&config.output.join(CHECKPOINTS))?;
    let place = config.output.display();
    if !resume {
        if newest.path.is_some() || !newest.damaged.is_empty() {
            return Err(Error::Checkpoint(format!(
                "{place} already holds a run; --resume goes on with it, or choose another `output`"
            )));
        }
        return Ok(None);
    }
    if newest.path.is_none() && !newest.damaged.is_empty() {
        let problems = newest.damaged.join("; ");
        return Err(Error::Checkpoint(format!(
            "no checkpoint in {place} is whole: {problems}. Restore one from a copy, or choose \
             another `output` to begin again"
        )));
    }
    for damaged in &newest.damaged {
        observe(Event::Damaged(damaged));
    }
    if let Some(path) = &newest.path {
        checkpoint::check_config(path, config)?;
    }
    Ok(newest.path)
}

/// Storage type of a run's tensors.
pub fn dtype(config: &RunConfig) -> DType {
    match config.train.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

/// A run on its way.
struct Run<'a> {
    config: &'a RunConfig,
    control: &'a Control<'a>,
    observe: &'a mut dyn FnMut(Event),
    data: Prepared,
    trainer: Trainer,
    schedule: Schedule,
    metrics: Metrics,
    events: EventFile,
    pace: Pace,
    /// Steps done.
    step: u64,
    /// Newest checkpoint and its step.
    saved: Option<(u64, PathBuf)>,
    /// Newest evaluation and its step.
    evaluated: Option<(u64, f64)>,
    unigram: Option<f64>,
}

impl<'a> Run<'a> {
    fn begin(
        config: &'a RunConfig,
        control: &'a Control<'a>,
        data: Prepared,
        from: Option<PathBuf>,
        observe: &'a mut dyn FnMut(Event),
    ) -> Result<Self> {
        let restored = from.as_ref().map(|path| checkpoint::load(path, dtype(config)));
        let (trainer, step) = match restored.transpose()? {
            Some(restored) => resumed(config, &data, restored, control.device)?,
            None => (fresh(config, &data, control.device)?, 0),
        };
        let saved = from.map(|path| (step, path));
        if let Some((step, path)) = &saved {
            observe(Event::Resumed { step: *step, path });
        }
        let targets = || data.split.validation.iter().map(|batch| batch.targets.len() as u64);
        let unigram = (!data.split.validation.is_empty())
            .then(|| data::unigram_entropy(&data.split.validation));
        let summary = Summary {
            parameters: trainer.model.params().elements(),
            vocab_size: data.vocabulary.size(),
            train_documents: data.split.train_documents,
            train_tokens: data.split.train.positions(),
            validation_documents: data.split.validation_documents,
            validation_tokens: targets().sum(),
            unigram_entropy: unigram,
            tokens_cached: data.cached,
            steps: config.steps(),
            done: step,
            flops_per_token: flops_per_token(&data.model, &data.split.train, config.data.context),
        };
        observe(Event::Ready(&summary));
        Ok(Self {
            config,
            control,
            observe,
            data,
            trainer,
            schedule: Schedule::new(config),
            metrics: Metrics::open(&config.output.join(METRICS), step)?,
            events: EventFile::create(&config.output.join("tensorboard"), step + 1)?,
            pace: Pace::new(config, control, summary.flops_per_token),
            step,
            saved,
            evaluated: None,
            unigram,
        })
    }

    /// All steps that are left. False when the stop flag was raised before the last.
    fn steps(&mut self) -> Result<bool> {
        let last = self.config.steps();
        while self.step < last {
            if !self.one_step()? {
                self.save()?;
                return Ok(false);
            }
            let due = |every: u64| every > 0 && self.step.is_multiple_of(every);
            let (save, sample) =
                (due(self.config.checkpoint.every), due(self.config.train.sample_every));
            if save {
                self.save()?;
            }
            if sample {
                self.sample()?;
            }
        }
        self.save()?;
        Ok(true)
    }

    /// One step with its evaluation and records; false when the stop flag was raised on the way,
    /// which leaves everything as it was.
    fn one_step(&mut self) -> Result<bool> {
        let train = &self.config.train;
        let start = Instant::now();
        let (position, lr) = (self.position(self.step), self.schedule.lr(self.step));
        let micro = self.config.micro_tokens();
        let Self { data, trainer, .. } = self;
        let Prepared { split, shards, .. } = data;
        let mut part =
            |index: usize| split.train.batch(shards, position + (index * micro) as u64, micro);
        let Some(outcome) = trainer.step(&mut part, train, lr, self.control.stop)? else {
            return Ok(false);
        };
        let seconds = start.elapsed().as_secs_f64();
        self.step += 1;
        let (loss_z, grad_norm_z) = match outcome.verdict {
            Verdict::Outlier { loss_z, grad_norm_z } => (loss_z, grad_norm_z),
            _ => (None, None),
        };
        let finite = |value: f64| value.is_finite().then_some(value);
        let mut record = StepRecord {
            step: self.step,
            tokens: self.position(self.step),
            loss: finite(outcome.loss),
            lr,
            grad_norm: finite(outcome.grad_norm),
            skipped: matches!(outcome.verdict, Verdict::Skip | Verdict::Stop),
            loss_z,
            grad_norm_z,
            validation_loss: None,
            seconds,
        };
        if outcome.verdict == Verdict::Stop {
            self.metrics.push(&record)?;
            return Err(Error::Diverged {
                skipped: self.trainer.guard.skipped_in_a_row,
                step: self.step,
                place: outcome.place.unwrap_or_default(),
            });
        }
        let every = train.eval_every;
        if self.step == self.config.steps() || (every > 0 && self.step.is_multiple_of(every)) {
            record.validation_loss = self.evaluate()?;
        }
        self.record(record)?;
        Ok(true)
    }

    fn record(&mut self, record: StepRecord) -> Result<()> {
        self.metrics.push(&record)?;
        let progress = self.pace.after(record);
        let record = &progress.record;
        let curves = [
            ("train/loss", record.loss),
            ("train/lr", Some(record.lr)),
            ("train/grad_norm", record.grad_norm),
            ("train/tokens_per_second", Some(progress.tokens_per_second)),
            ("validation/loss", record.validation_loss),
        ];
        let points: Vec<(&str, f64)> =
            curves.iter().filter_map(|(tag, value)| Some((*tag, (*value)?))).collect();
        self.events.scalars(record.step, &points)?;
        (self.observe)(Event::Step(&progress));
        Ok(())
    }

    /// Loss on the held-out batches; `None` when nothing is held out.
    fn evaluate(&mut self) -> Result<Option<f64>> {
        if self.data.split.validation.is_empty() {
            return Ok(None);
        }
        let loss = self.trainer.evaluate(&self.data.split.validation)?;
        self.evaluated = Some((self.step, loss));
        (self.observe)(Event::Evaluated { step: self.step, loss });
        Ok(Some(loss))
    }

    /// Lets the model write; what it writes depends on its weights, the seed and the step.
    fn sample(&mut self) -> Result<()> {
        let train = &self.config.train;
        let vocabulary = &self.data.vocabulary;
        let prompt = vocabulary.encode_prompt(&train.sample_prompt)?;
        let sampling = Sampling {
            seed: train.seed.wrapping_add(self.step),
            max_tokens: train.sample_tokens,
            ..Sampling::default()
        };
        let ends = Some(vec![vocabulary.eos()]);
        let mut generator = Generator::new(&self.trainer.model, vocabulary.tokenizer(), ends)?;
        let written =
            generator.generate(&prompt, &sampling, &mut |_| std::ops::ControlFlow::Continue(()))?;
        let (prompt, text) = (train.sample_prompt.as_str(), written.text.as_str());
        (self.observe)(Event::Sample { step: self.step, prompt, text });
        Ok(())
    }

    /// Commits a checkpoint, unless the newest one is of this step.
    fn save(&mut self) -> Result<()> {
        if self.saved.as_ref().is_some_and(|(step, _)| *step == self.step) {
            return Ok(());
        }
        let optimizer = self.trainer.optimizer()?;
        let run = RunState {
            step: self.step,
            data_position: self.position(self.step),
            seed: self.config.train.seed,
            data_key: self.data.data_key.clone(),
            updates: optimizer.step,
            guard: self.trainer.guard.clone(),
        };
        let snapshot = Snapshot {
            model: &self.trainer.model,
            optimizer: &optimizer,
            run: &run,
            config: self.config,
            sidecars: &self.data.sidecars,
        };
        let folder = self.config.output.join(CHECKPOINTS);
        let path = checkpoint::save(&folder, self.config.checkpoint.keep, &snapshot)?;
        (self.observe)(Event::Saved { step: self.step, path: &path });
        self.saved = Some((self.step, path));
        Ok(())
    }

    /// The curve and the report.
    fn end(mut self, finished: bool) -> Result<Report> {
        // A run that was resumed after its last step has not looked yet.
        let stale = self.evaluated.is_none_or(|(step, _)| step != self.step);
        if finished && stale {
            self.evaluate()?;
        }
        let records = metrics::read(&self.config.output.join(METRICS))?;
        let curve = self.config.output.join(CURVE);
        files::write_atomic(&curve, crate::curve::draw(&records, self.unigram)?.as_bytes())?;
        let tail = records.len().div_ceil(10);
        let losses: Vec<f64> =
            records.iter().rev().take(tail).filter_map(|record| record.loss).collect();
        let (tokens_per_second, flops_per_second, gemm_share) = self.pace.overall();
        Ok(Report {
            finished,
            steps: self.step,
            tokens: self.position(self.step),
            train_loss: (!losses.is_empty())
                .then(|| losses.iter().sum::<f64>() / losses.len() as f64),
            validation_loss: self.evaluated.map(|(_, loss)| loss),
            unigram_entropy: self.unigram,
            skipped: self.trainer.guard.skipped,
            tokens_per_second,
            flops_per_second,
            gemm_share,
            checkpoint: self.saved.map(|(_, path)| path),
            curve,
        })
    }

    /// First position of the training stream that a step reads.
    fn position(&self, step: u64) -> u64 {
        step * self.config.train.batch_tokens as u64
    }
}

/// A trainer at step 0: a new model, or a folder's weights.
fn fresh(config: &RunConfig, data: &Prepared, device: &Device) -> Result<Trainer> {
    let mut model = match &config.model {
        ModelSource::Folder(path) => Model::load_as(path, dtype(config))?,
        ModelSource::New(_) => Model::new(data.model.clone(), config.train.seed, dtype(config))?,
    };
    model.to_device(device)?;
    Trainer::new(model, None, Guard::default(), &config.train)
}

/// A trainer at a checkpoint's step, once it is certain that the data are the same.
fn resumed(
    config: &RunConfig,
    data: &Prepared,
    restored: Restored,
    device: &Device,
) -> Result<(Trainer, u64)> {
    let Restored { mut model, optimizer, run } = restored;
    if run.data_key != data.data_key {
        return Err(Error::Checkpoint(format!(
            "the text or the tokenizer is not what step {} was trained on (data.paths, \
             data.tokenizer); bring it back, or start a new run in another `output`",
            run.step
        )));
    }
    if run.data_position != run.step * config.train.batch_tokens as u64 {
        return Err(Error::Checkpoint(format!(
            "its data position {} does not belong to step {}; it was not written by this program",
            run.data_position, run.step
        )));
    }
    model.to_device(device)?;
    let trainer = Trainer::new(model, Some(optimizer), run.guard, &config.train)?;
    Ok((trainer, run.step))
}

/// FLOP of the model per trained token: attention costs what the lengths of these sequences make
/// it cost, which in a corpus of short documents is far less than at full context.
fn flops_per_token(model: &ModelConfig, stream: &Stream, context: usize) -> f64 {
    // A few hundred different lengths tell the mean as well as all.
    let step = context.div_ceil(256);
    let mut tokens: BTreeMap<usize, usize> = BTreeMap::new();
    for len in stream.lengths() {
        *tokens.entry(len.div_ceil(step) * step).or_default() += len;
    }
    let flops = tokens.iter().map(|(&len, &count)| count as f64 * model.flops(len).training());
    flops.sum::<f64>() / stream.positions() as f64
}

/// The newest complete checkpoint of a run's output folder, every file of it verified.
pub fn newest_checkpoint(output: &Path) -> Result<Option<PathBuf>> {
    Ok(checkpoint::newest(&output.join(CHECKPOINTS))?.path)
}
