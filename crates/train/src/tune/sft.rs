//! Supervised tuning: prompts and their completions, conversations, or plain text.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tercet_model::{ForwardOptions, LoraConfig, Model};
use tercet_tensor::{Grads, Tape};

use super::count::{RowCount, bad_row};
use super::encode::{Encoder, Part, messages, part};
use super::example::{Example, pack, portions};
use super::order::Order;
use super::start::{self, Beside};
use crate::config::{
    BadRow, CheckpointConfig, RowsConfig, Sections, TuneModel, TuneTrain, check_lora,
};
use crate::data::{Row, is_held_out, read_rows};
use crate::error::{Error, Result};
use crate::event::{Control, Event, Report};
use crate::files;
use crate::run::{Measured, Place, Plan, Start, Task, drive};

/// Keys and sections at the top of the file.
const SECTIONS: [&str; 6] = ["output", "model", "lora", "data", "train", "checkpoint"];

/// Everything that decides a supervised tuning run.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SftConfig {
    /// `output`: the folder that receives checkpoints, logs and the curve.
    pub output: PathBuf,
    /// `[model]`: what is tuned.
    pub model: TuneModel,
    /// `[lora]`: train a new adapter and leave the weights; every weight is trained without it.
    pub lora: Option<LoraConfig>,
    /// `[data]`: the rows.
    pub data: RowsConfig,
    /// `[train]`: how.
    pub train: TuneTrain,
    /// `[checkpoint]`: what is kept.
    pub checkpoint: CheckpointConfig,
}

impl SftConfig {
    /// Reads a run file, applies `key=value` overrides and checks the result.
    pub fn load(path: &std::path::Path, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::load(path, overrides, &SECTIONS)?)
    }

    /// Like [`load`](Self::load), from TOML text.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_sections(Sections::parse(text, overrides, &SECTIONS)?)
    }

    fn from_sections(mut sections: Sections) -> Result<Self> {
        let config = Self {
            output: sections.output()?,
            model: sections.take("model")?,
            lora: sections.take_if_there("lora")?,
            data: sections.take("data")?,
            train: sections.take("train")?,
            checkpoint: sections.take("checkpoint")?,
        };
        config.model.check()?;
        check_lora(config.lora.as_ref())?;
        config.data.check()?;
        config.train.check()?;
        config.checkpoint.check()?;
        Ok(config)
    }
}

/// Rows made ready for training.
pub struct SftRows {
    /// Trained on.
    pub train: Vec<Example>,
    /// Held out.
    pub validation: Vec<Example>,
    /// What became of the rows.
    pub count: RowCount,
    /// SHA-256 of all examples, in hexadecimal.
    pub key: String,
}

/// Tunes as `config` says, until its last step or until `control.stop` is raised; either way the
/// newest checkpoint holds everything. Returns how it ended.
pub fn sft(
    config: &SftConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<Report> {
    let text = crate::config::to_toml(config)?;
    let place = Place::open(&config.output, &text, control.resume, observe)?;
    let beside = Beside::load(&config.model.path)?;
    let first = start::first(&config.model, config.lora.as_ref(), &config.train)?;
    start::check_context(config.data.context, &first)?;
    let encoder = Encoder::new(&beside.tokenizer, first.config(), &beside.generation)?;
    let rows = rows(&config.data, &encoder, control.stop)?;
    // An adapter's weights stay beside it and are read anew on every resume.
    let adapted = first.active_adapter().map(|_| &first);
    let key = start::key(&rows.key, adapted.as_slice())?;
    place.check_data(&key)?;
    rows.count.write(&config.output.join("rows.jsonl"))?;
    observe(Event::Note(&said(&rows, &first)));
    let model = match &place.from {
        Some(checkpoint) => start::resumed(&first, checkpoint, &config.train)?,
        None => first,
    };
    let total = rows.train.iter().map(|example| example.ids.len()).sum::<usize>();
    let mean = total / rows.train.len().max(1);
    let train = config.train.loop_config();
    let plan = Plan {
        output: &config.output,
        config: &text,
        train: &train,
        checkpoint: &config.checkpoint,
        steps: config.train.steps(rows.train.len()),
        data_key: &key,
        sidecars: &beside.sidecars,
        base: &config.model.path.to_string_lossy(),
        flops_per_token: start::flops_per_token(&model, mean),
        unigram: None,
        loss_unit: "nats per learnt token",
    };
    let start = Start::new(model, place.from.as_deref())?;
    let order = Order::new(rows.train.len(), &config.train);
    let mut task = Sft { config, train: &rows.train, validation: &rows.validation, order };
    let outcome = drive(&plan, start, place.from.clone(), &mut task, control, observe);
    Ok(outcome.map_err(|error| error.advised(|| config.train.advice()))?.0)
}

/// What the rows came to, in a line.
fn said(rows: &SftRows, model: &Model) -> String {
    let counted: usize = rows.train.iter().map(Example::counted).sum();
    let tokens: usize = rows.train.iter().map(|example| example.ids.len()).sum();
    format!(
        "{}; {} held out; {counted} of {tokens} training tokens are learnt; {} parameters train",
        rows.count,
        rows.validation.len(),
        model.trained().elements(),
    )
}

/// Reads and tokenizes the rows of a run.
pub fn rows(config: &RowsConfig, encoder: &Encoder, stop: &AtomicBool) -> Result<SftRows> {
    let mut count = RowCount::default();
    let mut examples = |paths: &[String]| -> Result<Vec<Example>> {
        let rows = read_rows(paths, stop)?;
        count.rows += rows.len();
        let mut kept = Vec::with_capacity(rows.len());
        for row in &rows {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            match example(row, encoder) {
                Ok(mut example) => {
                    let whole = example.ids.len();
                    let cut = example.truncate(config.context);
                    if example.counted() == 0 {
                        count.drop(row, "has a prompt that fills data.context");
                        continue;
                    }
                    if cut {
                        count.cut(row, format!("has {whole} tokens"));
                    }
                    kept.push(example);
                }
                Err(reason) if config.bad_rows == BadRow::Drop => count.drop(row, reason),
                Err(reason) => return Err(bad_row(row, &reason)),
            }
        }
        count.kept += kept.len();
        Ok(kept)
    };
    let all = examples(&config.paths)?;
    let (validation, train) = if config.validation_paths.is_empty() {
        held_out(all, config.validation)
    } else {
        (examples(&config.validation_paths)?, all)
    };
    if train.is_empty() {
        return Err(Error::Data(format!("nothing is left to train on: {count}")));
    }
    let mut hasher = Sha256::new();
    train.iter().for_each(|example| example.absorb(&mut hasher));
    let key = files::hex(&hasher.finalize());
    Ok(SftRows { train, validation, count, key })
}

/// Splits by the hash of each example: (held out, trained on).
fn held_out(examples: Vec<Example>, share: f64) -> (Vec<Example>, Vec<Example>) {
    examples.into_iter().partition(|example| is_held_out(example.hash(), share))
}

/// What a row says: `{messages}`, `{prompt, completion}` or `{text}`; the reason when it says none
/// of them.
pub fn example(row: &Row, encoder: &Encoder) -> Result<Example, String> {
    let object = &row.object;
    if let Some(value) = object.get("messages") {
        let Value::Array(list) = value else {
            return Err("has `messages` that are not a list".into());
        };
        return encoder.messages(&messages(list, "messages")?);
    }
    if object.contains_key("prompt") || object.contains_key("completion") {
        return encoder.pair(&part(object, "prompt")?, &part(object, "completion")?);
    }
    match part(object, "text") {
        Ok(Part::Text(text)) => encoder.text(&text),
        _ => Err("has neither `messages` nor `prompt` and `completion` nor `text`".into()),
    }
}

/// Cross-entropy of the learnt tokens, each counting the same over the whole step.
struct Sft<'a> {
    config: &'a SftConfig,
    train: &'a [Example],
    validation: &'a [Example],
    order: Order,
}

impl Task for Sft<'_> {
    fn step(
        &mut self,
        model: &Model,
        step: u64,
        grads: &mut Grads,
        stop: &AtomicBool,
    ) -> Result<Option<Measured>> {
        let examples: Vec<&Example> =
            self.order.step(step).into_iter().map(|i| &self.train[i]).collect();
        self.losses(model, &examples, Some((step, grads, stop)))
    }

    fn evaluate(&mut self, model: &Model) -> Result<Option<Measured>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let examples: Vec<&Example> = self.validation.iter().collect();
        self.losses(model, &examples, None)
    }

    fn position(&self, step: u64) -> u64 {
        self.order.positions(step).start
    }
}

impl Sft<'_> {
    /// Mean loss over the learnt tokens of `examples`, portion by portion; with a step its
    /// gradient, too. `None` when stopped.
    fn losses(
        &self,
        model: &Model,
        examples: &[&Example],
        mut into: Option<(u64, &mut Grads, &AtomicBool)>,
    ) -> Result<Option<Measured>> {
        let all: usize = examples.iter().map(|example| example.counted()).sum();
        let lengths = examples.iter().map(|example| example.ids.len());
        let mut losses = Vec::new();
        let mut measured = Measured::default();
        for (i, portion) in
            portions(lengths, self.config.train.micro_tokens).into_iter().enumerate()
        {
            let options = match &into {
                Some((_, _, stop)) if stop.load(Ordering::Relaxed) => return Ok(None),
                Some((step, ..)) => start::options(&self.config.train, *step, i),
                None => ForwardOptions::default(),
            };
            let part = &examples[portion];
            let batch = pack(part.iter().copied());
            measured.tokens += batch.input_ids.len() as u64;
            let counted: usize = part.iter().map(|example| example.counted()).sum();
            let share = counted as f64 / all as f64;
            let mut tape = if into.is_some() { Tape::recording() } else { Tape::inference() };
            let parts = model.forward_loss(&mut tape, &batch, &options)?;
            if let Some((_, grads, _)) = &mut into {
                tape.backward_scaled(&parts.loss, share as f32, grads)?;
            }
            losses.push((share, parts.cross_entropy.value().clone()));
        }
        let mut total = 0.0;
        for (i, (share, loss)) in losses.iter().enumerate() {
            let loss = f64::from(loss.item()?);
            if !loss.is_finite() && measured.place.is_none() {
                measured.place = Some(format!("loss {loss} in part {} of the batch", i + 1));
            }
            total += share * loss;
        }
        measured.loss = Some(total);
        Ok(Some(measured))
    }
}
