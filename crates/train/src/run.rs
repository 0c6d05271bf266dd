//! The training loop, the same for every kind of training.
//!
//! A step is a pure function of the state before it and of the configuration: which examples it
//! sees, its learning rate and what is sampled depend on (seed, step) alone. A checkpoint holds
//! that state, so a run that was interrupted, or killed, ends with the same bits as one that was
//! not. What a step learns from, and how its loss is made, is a [`Task`]'s business.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde_json::{Map, Value};
use tercet_model::Model;
use tercet_tensor::Grads;

use crate::checkpoint::{self, RunState, Snapshot};
use crate::config::{CheckpointConfig, TrainConfig};
use crate::error::{Error, Result};
use crate::event::{Control, Event, Report};
use crate::files;
use crate::guard::{Guard, Verdict};
use crate::lock::FolderLock;
use crate::metrics::{self, Metrics, StepRecord};
use crate::pace::Pace;
use crate::schedule::Schedule;
use crate::tensorboard::EventFile;
use crate::trainer::Trainer;

/// Below a run's output: the checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// Below a run's output: one line a step.
pub const METRICS: &str = "metrics.jsonl";
const CURVE: &str = "curve.svg";
/// What stands in a run's folder before its first step, and can be made again at once.
const BEFORE: [&str; 6] =
    [".lock", "config.toml", "rows.jsonl", "delta.svg", "data.salt", "canaries.jsonl"];
/// What a run writes over without asking.
const OWN: [&str; 8] = [
    "config.toml",
    "rows.jsonl",
    METRICS,
    CURVE,
    "delta.svg",
    "squeezing.svg",
    "canaries.jsonl",
    "privacy.json",
];

/// What a loop trains on.
pub trait Task {
    /// Adds the gradient of step `step` (counted from 0) to `grads`, which are empty. `None` when
    /// `stop` was raised on the way.
    fn step(
        &mut self,
        model: &Model,
        step: u64,
        grads: &mut Grads,
        stop: &AtomicBool,
    ) -> Result<Option<Measured>>;

    /// The held-out examples; `None` when nothing is held out.
    fn evaluate(&mut self, model: &Model) -> Result<Option<Measured>>;

    /// What the model writes after `step` steps: the prompt and its continuation, a function of
    /// weights, seed and step. `None` for a task that writes none.
    fn sample(&mut self, _model: &Model, _step: u64) -> Result<Option<(String, String)>> {
        Ok(None)
    }

    /// First example (or position) that step `step` reads; kept in checkpoints.
    fn position(&self, step: u64) -> u64;

    /// What the task itself must find again in a checkpoint: names (such as `state/NAME`) and
    /// contents, asked for at every save.
    fn sidecars(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(Vec::new())
    }

    /// Fields that `adapter_config.json` of a checkpoint gets besides PEFT's, where there is an
    /// adapter; asked for at every save.
    fn adapter_notes(&self) -> Result<Map<String, Value>> {
        Ok(Map::new())
    }

    /// Whether the run ends here, before its last step, such as when a budget is used up.
    fn is_done(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// Whether what a step saw is nobody's business: then no record says how many tokens went
    /// through the model, nor how long a step took, which says the same.
    fn is_discreet(&self) -> bool {
        false
    }
}

/// What a step, or an evaluation, came to.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// What was descended; `None` when it may not be told.
    pub loss: Option<f64>,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Where the first number that is not finite was found, if there is one.
    pub place: Option<String>,
    /// Further numbers by name, such as `rewards/margins`; those that are not finite are left
    /// out of the records.
    pub measures: Vec<(&'static str, f64)>,
}

/// What the loop needs to know of a run besides its task.
pub struct Plan<'a> {
    /// Folder of the run.
    pub output: &'a Path,
    /// The configuration as TOML, kept in checkpoints.
    pub config: &'a str,
    /// Learning rate, clipping, patience, intervals.
    pub train: &'a TrainConfig,
    /// How often, and how many.
    pub checkpoint: &'a CheckpointConfig,
    /// Steps of the whole run.
    pub steps: u64,
    /// Key of the examples: a checkpoint goes on only with the same.
    pub data_key: &'a str,
    /// Files that go into every checkpoint: name and content.
    pub sidecars: &'a [(String, Vec<u8>)],
    /// The folder of the weights, named in the checkpoints of an adapter; empty without one.
    pub base: &'a str,
    /// Floating-point operations per token of a step.
    pub flops_per_token: f64,
    /// Drawn into the curve as a dashed line: what a model without context would reach.
    pub unigram: Option<f64>,
    /// Unit of the loss; empty for one that has none.
    pub loss_unit: &'static str,
}

/// A run's folder, held until this is dropped.
pub struct Place {
    /// The checkpoint to go on from.
    pub from: Option<PathBuf>,
    /// The folder, if it was not there before.
    made: Option<PathBuf>,
    _lock: FolderLock,
}

impl Place {
    /// Takes the folder, clears what killed writers left, finds the checkpoint to go on from and
    /// writes the configuration.
    pub fn open(
        output: &Path,
        config: &str,
        resume: bool,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Self> {
        let made = (!output.exists()).then(|| output.to_owned());
        refuse_others_files(output)?;
        let _lock = FolderLock::take(output)?;
        files::remove_temporary(output)?;
        checkpoint::remove_stale(&output.join(CHECKPOINTS))?;
        let from = starting_point(output, config, resume, observe)?;
        files::write_atomic(&output.join("config.toml"), config.as_bytes())?;
        Ok(Self { from, made, _lock })
    }

    /// Refuses to go on with other examples, before anything in the folder is written anew.
    pub fn check_data(&self, key: &str) -> Result<()> {
        self.from.as_deref().map_or(Ok(()), |path| check_data(path, key))
    }
}

/// Refuses a folder that no run has had yet and that holds a file of a name that runs write, which
/// then is somebody's own: training rows may well be called `rows.jsonl`.
fn refuse_others_files(output: &Path) -> Result<()> {
    if output.join(".lock").exists() || output.join(CHECKPOINTS).exists() {
        return Ok(());
    }
    let Some(name) = OWN.iter().find(|name| output.join(name).exists()) else { return Ok(()) };
    Err(Error::config(
        "output",
        format!(
            "= {} holds a {name} that no run has written, and a run would write over it; choose a \
             folder of its own",
            output.display()
        ),
    ))
}

impl Drop for Place {
    /// A run that was refused before its first step leaves no folder that it made.
    fn drop(&mut self) {
        let Some(folder) = &self.made else { return };
        let Ok(left) = files::read_folder(folder) else { return };
        let is_early = |path: &PathBuf| {
            path.file_name().is_some_and(|name| BEFORE.iter().any(|early| name == *early))
        };
        if left.iter().all(is_early) {
            // The error on its way says more than one of tidying up would.
            left.iter().for_each(|path| drop(std::fs::remove_file(path)));
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// The checkpoint to go on from. Refuses a folder that holds a run when not told to resume it, one
/// whose checkpoints are all damaged when told so, and one of another configuration.
pub fn starting_point(
    output: &Path,
    config: &str,
    resume: bool,
    observe: &mut dyn FnMut(Event),
) -> Result<Option<PathBuf>> {
    let newest = checkpoint::newest(&output.join(CHECKPOINTS))?;
    let place = output.display();
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

/// Refuses other examples than those that a checkpoint was trained on.
pub fn check_data(checkpoint: &Path, key: &str) -> Result<()> {
    let (then, step) = checkpoint::data_key(checkpoint)?;
    if then == key { Ok(()) } else { Err(other_data(step)) }
}

/// Refuses a folder whose `config.toml` differs from `config` (TOML) in a key that matters.
pub fn check_config_in(folder: &Path, config: &str) -> Result<()> {
    match checkpoint::differing_key(folder, config)? {
        None => Ok(()),
        Some(problem) => Err(Error::Checkpoint(format!("{} {problem}", folder.display()))),
    }
}

/// The newest complete checkpoint of a run's output folder, every file of it verified.
pub fn newest_checkpoint(output: &Path) -> Result<Option<PathBuf>> {
    Ok(checkpoint::newest(&output.join(CHECKPOINTS))?.path)
}

/// Where a loop begins: a model at step 0, or what a checkpoint holds.
pub struct Start {
    /// The model.
    pub model: Model,
    /// The checkpoint's counters and optimizer; `None` at step 0.
    pub state: Option<checkpoint::State>,
}

impl Start {
    /// `model` as step 0, or, with the checkpoint `from`, at that checkpoint's step; `model` then
    /// must hold the checkpoint's weights already.
    pub fn new(model: Model, from: Option<&Path>) -> Result<Self> {
        let state = from.map(|path| checkpoint::load_state(path, &model)).transpose()?;
        Ok(Self { model, state })
    }
}

/// Trains until the last step or until `control.stop` is raised; either way the newest checkpoint
/// holds everything. Returns how it ended and the model.
pub fn drive(
    plan: &Plan,
    start: Start,
    from: Option<PathBuf>,
    task: &mut dyn Task,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<(Report, Model)> {
    let mut run = Run::begin(plan, start, from, task, control, observe)?;
    let finished = run.steps()?;
    run.end(finished)
}

/// A run on its way.
struct Run<'a> {
    plan: &'a Plan<'a>,
    task: &'a mut dyn Task,
    control: &'a Control<'a>,
    observe: &'a mut dyn FnMut(Event),
    trainer: Trainer,
    schedule: Schedule,
    metrics: Metrics,
    events: EventFile,
    pace: Pace,
    /// Steps done, and tokens they trained on.
    step: u64,
    tokens: u64,
    /// Newest checkpoint and its step.
    saved: Option<(u64, PathBuf)>,
    /// Newest evaluation and its step.
    evaluated: Option<(u64, Measured)>,
}

impl<'a> Run<'a> {
    fn begin(
        plan: &'a Plan<'a>,
        start: Start,
        from: Option<PathBuf>,
        task: &'a mut dyn Task,
        control: &'a Control<'a>,
        observe: &'a mut dyn FnMut(Event),
    ) -> Result<Self> {
        let Start { mut model, state } = start;
        model.to_device(control.device)?;
        let (mut step, mut tokens, mut guard, mut optimizer) = (0, 0, Guard::default(), None);
        if let Some(state) = state {
            check_state(plan, task, &state.run)?;
            (step, tokens, guard) = (state.run.step, state.run.tokens, state.run.guard);
            optimizer = Some(state.optimizer);
        }
        let trainer = Trainer::new(model, optimizer, guard, plan.train)?;
        let discreet = task.is_discreet();
        let saved = from.map(|path| (step, path));
        if let Some((step, path)) = &saved {
            observe(Event::Resumed { step: *step, path });
        }
        observe(Event::Begin { steps: plan.steps, done: step });
        Ok(Self {
            plan,
            task,
            control,
            observe,
            trainer,
            schedule: Schedule::new(plan.train, plan.steps),
            metrics: Metrics::open(&plan.output.join(METRICS), step)?,
            events: EventFile::create(&plan.output.join("tensorboard"), step + 1, !discreet)?,
            pace: Pace::new(plan.steps, plan.flops_per_token, control.gemm_flops),
            step,
            tokens,
            saved,
            evaluated: None,
        })
    }

    /// All steps that are left. False when the stop flag was raised before the last.
    fn steps(&mut self) -> Result<bool> {
        while self.step < self.plan.steps && !self.task.is_done()? {
            if !self.one_step()? {
                self.save()?;
                return Ok(false);
            }
            let due = |every: u64| every > 0 && self.step.is_multiple_of(every);
            let (save, sample) =
                (due(self.plan.checkpoint.every), due(self.plan.train.sample_every));
            if save {
                self.save()?;
            }
            if sample
                && let Some((prompt, text)) = self.task.sample(&self.trainer.model, self.step)?
            {
                (self.observe)(Event::Sample { step: self.step, prompt: &prompt, text: &text });
            }
        }
        self.save()?;
        Ok(true)
    }

    /// One step with its evaluation and records; false when the stop flag was raised on the way,
    /// which leaves everything as it was.
    fn one_step(&mut self) -> Result<bool> {
        let train = self.plan.train;
        let start = Instant::now();
        let lr = self.schedule.lr(self.step);
        let outcome = self.trainer.step(self.task, self.step, train, lr, self.control.stop)?;
        let Some(outcome) = outcome else {
            return Ok(false);
        };
        let seconds = start.elapsed().as_secs_f64();
        let seconds = if self.task.is_discreet() { 0.0 } else { seconds };
        self.step += 1;
        self.tokens += outcome.measured.tokens;
        let (loss_z, grad_norm_z) = match outcome.verdict {
            Verdict::Outlier { loss_z, grad_norm_z } => (loss_z, grad_norm_z),
            _ => (None, None),
        };
        let finite = |value: f64| value.is_finite().then_some(value);
        let mut record = StepRecord {
            step: self.step,
            tokens: self.tokens,
            loss: outcome.measured.loss.and_then(finite),
            lr,
            grad_norm: finite(outcome.grad_norm),
            skipped: matches!(outcome.verdict, Verdict::Skip | Verdict::Stop),
            loss_z,
            grad_norm_z,
            validation_loss: None,
            seconds,
            measures: finite_measures(&outcome.measured, ""),
        };
        if outcome.verdict == Verdict::Stop {
            self.metrics.push(&record)?;
            return Err(Error::Diverged {
                skipped: self.trainer.guard.skipped_in_a_row,
                step: self.step,
                place: outcome.measured.place.unwrap_or_default(),
            });
        }
        let every = train.eval_every;
        if (self.step == self.plan.steps || (every > 0 && self.step.is_multiple_of(every)))
            && let Some(measured) = self.evaluate()?
        {
            record.validation_loss = measured.loss;
            record.measures.extend(finite_measures(&measured, "eval_"));
        }
        self.record(record, outcome.measured.tokens)?;
        Ok(true)
    }

    fn record(&mut self, record: StepRecord, tokens: u64) -> Result<()> {
        self.metrics.push(&record)?;
        let progress = self.pace.after(record, tokens);
        let record = &progress.record;
        let curves = [
            ("train/loss", record.loss),
            ("train/lr", Some(record.lr)),
            ("train/grad_norm", record.grad_norm),
            ("train/tokens_per_second", Some(progress.tokens_per_second)),
            ("validation/loss", record.validation_loss),
        ];
        let measures = record.measures.iter().map(|(tag, value)| (tag.as_str(), *value));
        let points: Vec<(&str, f64)> = curves
            .iter()
            .filter_map(|(tag, value)| Some((*tag, (*value)?)))
            .chain(measures)
            .collect();
        self.events.scalars(record.step, &points)?;
        (self.observe)(Event::Step(&progress));
        Ok(())
    }

    /// What the held-out examples give; `None` when nothing is held out.
    fn evaluate(&mut self) -> Result<Option<Measured>> {
        let Some(measured) = self.task.evaluate(&self.trainer.model)? else { return Ok(None) };
        self.evaluated = Some((self.step, measured.clone()));
        if let Some(loss) = measured.loss {
            let (step, unit) = (self.step, self.plan.loss_unit);
            (self.observe)(Event::Evaluated { step, loss, unit });
        }
        Ok(Some(measured))
    }

    /// Commits a checkpoint, unless the newest one is of this step.
    fn save(&mut self) -> Result<()> {
        if self.saved.as_ref().is_some_and(|(step, _)| *step == self.step) {
            return Ok(());
        }
        let optimizer = self.trainer.optimizer()?;
        let sidecars = [self.plan.sidecars, &self.task.sidecars()?].concat();
        let notes = self.task.adapter_notes()?;
        let run = RunState {
            step: self.step,
            data_position: self.task.position(self.step),
            tokens: self.tokens,
            seed: self.plan.train.seed,
            data_key: self.plan.data_key.to_owned(),
            updates: optimizer.step,
            guard: self.trainer.guard.clone(),
        };
        let snapshot = Snapshot {
            model: &self.trainer.model,
            base: self.plan.base,
            notes: &notes,
            optimizer: &optimizer,
            run: &run,
            config: self.plan.config,
            sidecars: &sidecars,
        };
        let folder = self.plan.output.join(CHECKPOINTS);
        let path = checkpoint::save(&folder, self.plan.checkpoint.keep, &snapshot)?;
        (self.observe)(Event::Saved { step: self.step, path: &path });
        self.saved = Some((self.step, path));
        Ok(())
    }

    /// The curve and the report.
    fn end(mut self, finished: bool) -> Result<(Report, Model)> {
        // A run that was resumed after its last step has not looked yet.
        let stale = self.evaluated.as_ref().is_none_or(|(step, _)| *step != self.step);
        if finished && stale {
            self.evaluate()?;
        }
        let records = metrics::read(&self.plan.output.join(METRICS))?;
        let curve = self.plan.output.join(CURVE);
        let drawn = crate::curve::draw(&records, self.plan.unigram, self.plan.loss_unit)?;
        files::write_atomic(&curve, drawn.as_bytes())?;
        let tail = records.len().div_ceil(10);
        let losses: Vec<f64> =
            records.iter().rev().take(tail).filter_map(|record| record.loss).collect();
        let (tokens_per_second, flops_per_second, gemm_share) = self.pace.overall();
        let report = Report {
            finished,
            steps: self.step,
            tokens: self.tokens,
            train_loss: (!losses.is_empty())
                .then(|| losses.iter().sum::<f64>() / losses.len() as f64),
            validation_loss: self.evaluated.and_then(|(_, measured)| measured.loss),
            unigram_entropy: self.plan.unigram,
            loss_unit: self.plan.loss_unit,
            skipped: self.trainer.guard.skipped,
            tokens_per_second,
            flops_per_second,
            gemm_share,
            checkpoint: self.saved.map(|(_, path)| path),
            curve,
        };
        Ok((report, self.trainer.model))
    }
}

fn other_data(step: u64) -> Error {
    Error::Checkpoint(format!(
        "the text, the tokenizer or the model it starts from is not what step {step} was trained \
         on (data.paths, data.tokenizer, model.path); bring it back, or start a new run in another \
         `output`"
    ))
}

/// Refuses a checkpoint of other examples.
fn check_state(plan: &Plan, task: &dyn Task, run: &RunState) -> Result<()> {
    if run.data_key != plan.data_key {
        return Err(other_data(run.step));
    }
    if run.data_position != task.position(run.step) {
        return Err(Error::Checkpoint(format!(
            "its data position {} does not belong to step {}; it was not written by this program",
            run.data_position, run.step
        )));
    }
    Ok(())
}

fn finite_measures(measured: &Measured, prefix: &str) -> BTreeMap<String, f64> {
    let finite = measured.measures.iter().filter(|(_, value)| value.is_finite());
    finite.map(|(name, value)| (format!("{prefix}{name}"), *value)).collect()
}
