//! Pretraining: a language model from text.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use tercet_model::{ForwardOptions, Generator, Model, ModelConfig, Sampling};
use tercet_tensor::{DType, Grads, Tape};

use crate::config::{ModelSource, Precision, RunConfig};
use crate::data::{self, Stream};
use crate::error::{Error, Result};
use crate::event::{Control, Event, Report, Summary};
use crate::prepare::{Prepared, prepare};
use crate::run::{Measured, Place, Plan, Start, Task, drive};

/// Trains as `config` says, until its last step or until `control.stop` is raised; either way the
/// newest checkpoint holds everything. Returns how it ended.
pub fn pretrain(
    config: &RunConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<Report> {
    let text = config.to_toml();
    let place = Place::open(&config.output, &text, control.resume, observe)?;
    let data = prepare(config, place.from.as_deref(), control.stop, observe)?;
    let train = || {
        let model = match (&place.from, &config.model) {
            (Some(folder), _) | (None, ModelSource::Folder(folder)) => {
                Model::load_as(folder, dtype(config))?
            }
            (None, ModelSource::New(_)) => {
                Model::new(data.model.clone(), config.train.seed, dtype(config))?
            }
        };
        let start = Start::new(model, place.from.as_deref())?;
        let done = start.state.as_ref().map_or(0, |state| state.run.step);
        let summary = summary(config, &data, &start.model, done);
        observe(Event::Ready(&summary));
        let (key, sidecars) = (data.data_key.clone(), data.sidecars.clone());
        let plan = Plan {
            output: &config.output,
            config: &text,
            train: &config.train,
            checkpoint: &config.checkpoint,
            steps: config.steps(),
            data_key: &key,
            sidecars: &sidecars,
            base: "",
            flops_per_token: summary.flops_per_token,
            unigram: summary.unigram_entropy,
            loss_unit: "nats per token",
        };
        let mut task = Pretrain { config, data };
        Ok(drive(&plan, start, place.from.clone(), &mut task, control, observe)?.0)
    };
    train().map_err(|error: Error| error.with_advice(config))
}

/// Storage type of a run's tensors.
pub fn dtype(config: &RunConfig) -> DType {
    config.train.dtype.dtype()
}

impl Precision {
    /// The tensors' type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

fn summary(config: &RunConfig, data: &Prepared, model: &Model, done: u64) -> Summary {
    let validation = &data.split.validation;
    Summary {
        parameters: model.params().elements(),
        vocab_size: data.vocabulary.size(),
        train_documents: data.split.train_documents,
        train_tokens: data.split.train.positions(),
        validation_documents: data.split.validation_documents,
        validation_tokens: validation.iter().map(|batch| batch.targets.len() as u64).sum(),
        unigram_entropy: (!validation.is_empty()).then(|| data::unigram_entropy(validation)),
        tokens_cached: data.cached,
        steps: config.steps(),
        done,
        flops_per_token: flops_per_token(&data.model, &data.split.train, config.data.context),
    }
}

/// Next-token prediction over packed documents.
struct Pretrain<'a> {
    config: &'a RunConfig,
    data: Prepared,
}

impl Task for Pretrain<'_> {
    /// Its parts have equally many targets each, so the mean of their means is the mean.
    fn step(
        &mut self,
        model: &Model,
        step: u64,
        grads: &mut Grads,
        stop: &AtomicBool,
    ) -> Result<Option<Measured>> {
        let train = &self.config.train;
        let options = ForwardOptions { recompute: train.recompute, ..ForwardOptions::default() };
        let share = 1.0 / train.accumulation as f64;
        let (position, micro) = (self.position(step), self.config.micro_tokens());
        // Read when all parts are done: a GPU would have nothing to do while its loss is waited for.
        let mut losses = Vec::with_capacity(train.accumulation);
        for part in 0..train.accumulation {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let Prepared { split, shards, .. } = &mut self.data;
            let batch = split.train.batch(shards, position + (part * micro) as u64, micro);
            let mut tape = Tape::recording();
            let parts = model.forward_loss(&mut tape, &batch, &options)?;
            tape.backward_scaled(&parts.loss, share as f32, grads)?;
            losses.push(parts.cross_entropy.value().clone());
        }
        let mut measured = Measured { tokens: train.batch_tokens as u64, ..Measured::default() };
        let mut total = 0.0;
        for (part, loss) in losses.iter().enumerate() {
            let loss = f64::from(loss.item()?);
            if !loss.is_finite() && measured.place.is_none() {
                let place = format!("loss {loss} in part {} of the batch", part + 1);
                measured.place = Some(place);
            }
            total += share * loss;
        }
        measured.loss = Some(total);
        Ok(Some(measured))
    }

    /// Mean cross-entropy over the held-out batches; each target counts the same.
    fn evaluate(&mut self, model: &Model) -> Result<Option<Measured>> {
        let batches = &self.data.split.validation;
        if batches.is_empty() {
            return Ok(None);
        }
        let (mut sum, mut targets) = (0.0, 0);
        for batch in batches {
            let mut tape = Tape::inference();
            let losses = model.forward_loss(&mut tape, batch, &ForwardOptions::default())?;
            sum += f64::from(losses.cross_entropy.value().item()?) * batch.targets.len() as f64;
            targets += batch.targets.len() as u64;
        }
        let loss = sum / targets as f64;
        Ok(Some(Measured { loss: Some(loss), tokens: targets, ..Measured::default() }))
    }

    fn sample(&mut self, model: &Model, step: u64) -> Result<Option<(String, String)>> {
        let train = &self.config.train;
        let vocabulary = &self.data.vocabulary;
        let prompt = vocabulary.encode_prompt(&train.sample_prompt)?;
        let sampling = Sampling {
            seed: train.seed.wrapping_add(step),
            max_tokens: train.sample_tokens,
            ..Sampling::default()
        };
        let ends = Some(vec![vocabulary.eos()]);
        let mut generator = Generator::new(model, vocabulary.tokenizer(), ends)?;
        let written = generator.generate(&prompt, &sampling, &mut |_| ControlFlow::Continue(()))?;
        Ok(Some((train.sample_prompt.clone(), written.text)))
    }

    /// First position of the training stream that a step reads.
    fn position(&self, step: u64) -> u64 {
        step * self.config.train.batch_tokens as u64
    }
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
