//! Tasks on a model: questions are made first, so that a wrong row is told before any is answered.

use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};
use tercet_model::{Ask, Model, Sampling, Together, Tokenizer, sample_many};

use crate::error::{Error, Result};
use crate::item::{self, Item, Target};
use crate::measure::{self, Answer, Score};
use crate::request::{Cut, Request};
use crate::rows::{self, Row};
use crate::score::likelihoods;
use crate::task::{Output, Task};

/// Texts that are written side by side; a CPU's answers do not depend on it.
const AT_ONCE: usize = 16;

/// How tasks are asked.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only the first rows of each task.
    pub limit: Option<usize>,
    /// Tokens the model reads at most; its own context when not given.
    pub max_length: Option<usize>,
    /// Let the tokenizer add its own marks, such as a first token.
    pub special: bool,
    /// Tokens that end a text, instead of the model's own.
    pub end_of_text: Option<Vec<u32>>,
}

/// A task whose questions are ready.
pub struct Ready<'t> {
    task: &'t Task,
    rows: Vec<Row>,
    /// Rows of the data before the limit.
    all: usize,
    items: Vec<Item>,
    work: Work,
}

enum Work {
    /// As many of each row as it has continuations.
    Score(Vec<Request>),
    Write(Vec<Ask>),
}

/// How far all tasks have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Continuations scored and texts written.
    pub done: usize,
    /// Of how many.
    pub total: usize,
    /// Tokens read and written so far.
    pub tokens: usize,
}

/// A row, what was answered, and what that is worth.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its place in the data, from 0 on.
    pub row: usize,
    /// The row.
    pub doc: Map<String, Value>,
    /// What stood before the answer.
    pub context: String,
    /// The continuations that were scored; of a written text none.
    pub continuations: Vec<String>,
    /// Right choices, as numbers, or right texts.
    pub target: Vec<Value>,
    /// The answer.
    pub answer: Answer,
    /// One value for each metric of the task; of a perplexity the log-likelihood.
    pub values: Vec<f64>,
}

/// What a task came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The task's name.
    pub task: String,
    /// What it asked for.
    pub output: Output,
    /// Rows of its data.
    pub rows: usize,
    /// One for each metric.
    pub scores: Vec<Score>,
    /// The rows that were asked.
    pub samples: Vec<Sample>,
}

impl<'t> Ready<'t> {
    /// Makes the questions of a task for a model. Errors name the row.
    pub fn new(
        task: &'t Task,
        model: &Model,
        tokenizer: &Tokenizer,
        options: &Options,
    ) -> Result<Self> {
        tokenizer.check_fits(model.config().vocab_size)?;
        let mut rows = rows::read(&task.data)?;
        let (all, columns) = (rows.len(), rows::columns(&rows));
        rows.truncate(options.limit.unwrap_or(all));
        if rows.is_empty() {
            return Err(Error::Ask(format!("task {}: there is no row to ask about", task.name)));
        }
        let items = item::items(task, &rows, &columns)?;
        let context = model.config().max_position_embeddings;
        let max_length = options.max_length.unwrap_or(context);
        if !(1..=context).contains(&max_length) {
            return Err(Error::Ask(format!(
                "a length of {max_length} tokens is outside 1 to {context}, the model's context"
            )));
        }
        let config = model.config();
        let prefix = config.bos_token_id.or_else(|| config.eos_token_ids.first().copied());
        let cut = Cut { tokenizer, special: options.special, prefix, max_length };
        let named =
            |row: usize| move |reason: String| Error::Row { task: task.name.clone(), row, reason };
        let work = if task.output == Output::GenerateUntil {
            let ask = |item: &Item| {
                let prompt = cut.prompt(&item.context, task.max_tokens);
                Ok(Ask { prompt: prompt.map_err(named(item.row))?, seed: 0 })
            };
            Work::Write(items.iter().map(ask).collect::<Result<_>>()?)
        } else {
            let mut requests = Vec::new();
            for item in &items {
                for continuation in continuations(task, item) {
                    let request = cut.request(&item.context, &continuation);
                    requests.push(request.map_err(named(item.row))?);
                }
            }
            Work::Score(requests)
        };
        Ok(Self { task, rows, all, items, work })
    }

    /// Continuations to score, or texts to write.
    pub fn requests(&self) -> usize {
        match &self.work {
            Work::Score(requests) => requests.len(),
            Work::Write(asks) => asks.len(),
        }
    }

    fn answers(
        &self,
        model: &Model,
        tokenizer: &Tokenizer,
        end_of_text: Option<&[u32]>,
        done: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Answer>> {
        match &self.work {
            Work::Score(requests) => {
                let found = likelihoods(model, requests, done)?;
                let mut rest = &found[..];
                let mut answers = Vec::with_capacity(self.items.len());
                for item in &self.items {
                    let (own, later) = rest.split_at(item.choices.len().max(1));
                    if own.iter().any(|own| !own.log_prob.is_finite()) {
                        return Err(Error::Row {
                            task: self.task.name.clone(),
                            row: item.row,
                            reason: "the model gives no finite log-likelihood: its weights are \
                                     damaged"
                                .into(),
                        });
                    }
                    answers.push(Answer::Likelihoods(own.to_vec()));
                    rest = later;
                }
                Ok(answers)
            }
            Work::Write(asks) => {
                let sampling = Sampling {
                    temperature: 0.0,
                    max_tokens: self.task.max_tokens,
                    stop: self.task.until.clone(),
                    ..Sampling::default()
                };
                let mut answers = vec![Answer::Text(String::new()); asks.len()];
                let never = AtomicBool::new(false);
                let together = Together { at_once: AT_ONCE, stop: &never };
                let mut write = |at: usize, written: tercet_model::Written| {
                    done(1, asks[at].prompt.len() + written.tokens.len());
                    answers[at] = Answer::Text(written.text);
                };
                let ends = end_of_text;
                sample_many(model, tokenizer, asks, &sampling, ends, together, &mut write)?;
                Ok(answers)
            }
        }
    }

    fn outcome(&self, answers: Vec<Answer>) -> Outcome {
        let task = self.task;
        let sample = |((item, doc), answer): ((&Item, &Row), Answer)| Sample {
            row: item.row,
            doc: doc.clone(),
            context: item.context.clone(),
            continuations: match task.output {
                Output::GenerateUntil => Vec::new(),
                _ => continuations(task, item),
            },
            target: match &item.target {
                Target::Choices(right) => right.iter().map(|&at| at.into()).collect(),
                Target::Texts(texts) => texts.iter().map(|text| text.as_str().into()).collect(),
            },
            values: task
                .metrics
                .iter()
                .map(|&metric| measure::value(metric, task.output, item, &answer))
                .collect(),
            answer,
        };
        let samples: Vec<Sample> =
            self.items.iter().zip(&self.rows).zip(answers).map(sample).collect();
        let scores = task.metrics.iter().enumerate().map(|(i, &metric)| {
            let values: Vec<f64> = samples.iter().map(|sample| sample.values[i]).collect();
            measure::score(metric, &values)
        });
        Outcome {
            task: task.name.clone(),
            output: task.output,
            rows: self.all,
            scores: scores.collect(),
            samples,
        }
    }
}

/// Asks the questions of all tasks, one task after the other.
///
/// On a CPU a text depends on its prompt and the weights alone; a log-likelihood may differ in its
/// last bits with what stands beside it in the data, since passes of other sizes sum in another
/// order. The same tasks give the same bits on every run and any number of threads.
pub fn evaluate(
    model: &Model,
    tokenizer: &Tokenizer,
    tasks: &[Ready],
    options: &Options,
    observe: &mut dyn FnMut(Progress),
) -> Result<Vec<Outcome>> {
    let total = tasks.iter().map(Ready::requests).sum();
    let mut progress = Progress { total, ..Progress::default() };
    let mut done = |requests: usize, tokens: usize| {
        progress.done += requests;
        progress.tokens += tokens;
        observe(progress);
    };
    let ends = options.end_of_text.as_deref();
    let ask = |task: &Ready| Ok(task.outcome(task.answers(model, tokenizer, ends, &mut done)?));
    tasks.iter().map(ask).collect()
}

fn continuations(task: &Task, item: &Item) -> Vec<String> {
    match &item.target {
        // lm-eval puts no delimiter before the target of `loglikelihood`.
        Target::Texts(texts) => texts.clone(),
        Target::Choices(_) => {
            item.choices.iter().map(|choice| format!("{}{choice}", task.delimiter)).collect()
        }
    }
}
