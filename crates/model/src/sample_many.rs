//! Answers to many prompts at once: for alignment, which wants n answers to each of thousands.
//!
//! Some answers are written side by side, a token each at a time ([`crate::slots::Slots`]); as
//! soon as one ends, the next prompt takes its place. What an answer is depends on its prompt and
//! seed alone, not on its neighbours.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use tercet_tensor::{Draw, Drawn};

use crate::log_probs::log_prob;
use crate::sampling::Sampling;
use crate::slots::{Slots, Stepped};
use crate::writer::{Finish, Writer, check_prompt};
use crate::{Error, Model, Result, Tokenizer};

/// A prompt to be answered once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// At least one token, and fewer than the model's context holds.
    pub prompt: Vec<u32>,
    /// Same prompt, same seed, same answer.
    pub seed: u64,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The tokens, an end-of-text token not included; those of a stop text are.
    pub tokens: Vec<u32>,
    /// The text, without the stop text.
    pub text: String,
    /// Why it ended; never [`Finish::Cancelled`].
    pub finish: Finish,
    /// The end-of-text token, when the model wrote one.
    pub ended: Option<u32>,
    /// `Σ ln p` in nats of the tokens, and of the end-of-text token when one was written, under
    /// the model's own distribution: no temperature, filter or penalty.
    pub log_prob: f64,
}

/// How [`sample_many`] works; nothing of it changes an answer on a CPU.
#[derive(Clone, Copy, Debug)]
pub struct Together<'s> {
    /// Answers written side by side, at least 1. Each has a slot, and one more holds the prompt
    /// that was read last while other asks have the same.
    pub at_once: usize,
    /// Looked at before each step: once it is set, answers that are not complete are dropped.
    pub stop: &'s AtomicBool,
}

/// Answers every ask, and hands over each answer as soon as it is complete, with the place of its
/// ask; the order is that of completion. Returns how many were answered: all of them, or fewer
/// when `stop` was raised.
///
/// `sampling.seed` is not used, each ask has its own. `end_of_text` replaces the model's own list
/// when given. Asks of the same prompt are answered one after the other, so that it is read once.
///
/// On a CPU an answer depends on its prompt, its seed, `sampling` and the weights alone, and is
/// that of [`crate::Generator`]. On a GPU products of other sizes may round otherwise, so that
/// `at_once` may change which of two nearly equal tokens is drawn.
///
/// Errors name the ask: a prompt that is empty, leaves no room or has tokens outside the
/// vocabulary, before anything is written; logits that are not numbers.
pub fn sample_many(
    model: &Model,
    tokenizer: &Tokenizer,
    asks: &[Ask],
    sampling: &Sampling,
    end_of_text: Option<&[u32]>,
    together: Together,
    on_done: &mut dyn FnMut(usize, Written),
) -> Result<usize> {
    sampling.validate()?;
    if together.at_once == 0 {
        return Err(Error::Generate("at_once = 0 answers nothing; give at least 1".into()));
    }
    tokenizer.check_fits(model.config().vocab_size)?;
    for (at, ask) in asks.iter().enumerate() {
        check_prompt(model, &ask.prompt).map_err(|error| named(at, error))?;
    }
    let end_of_text = end_of_text.unwrap_or(&model.config().eos_token_ids);
    let order = by_prompt(asks);
    let longest = asks.iter().map(|ask| ask.prompt.len()).max().unwrap_or(0);
    let tokens = longest.saturating_add(sampling.max_tokens);
    let tokens = tokens.min(model.config().max_position_embeddings);
    let at_once = together.at_once.min(asks.len());
    if at_once == 0 {
        return Ok(0);
    }
    let mut queue = Queue {
        model,
        asks,
        order: &order,
        slots: model.slots(at_once + 1, tokens)?,
        kept: at_once,
        read: None,
    };
    let mut free: Vec<usize> = (0..at_once).rev().collect();
    let mut writing: Vec<Writing> = Vec::new();
    let mut answered = 0;
    let stopped = || together.stop.load(Ordering::Relaxed);
    loop {
        // An answer may end with its first token, so that its place is free again at once.
        while let Some(&slot) = free.last()
            && !stopped()
        {
            let Some((at, logits)) = queue.next(slot)? else { break };
            let ask = &asks[at];
            let settings = (sampling, ask.seed);
            let writer = Writer::new(model, tokenizer, settings, end_of_text, &ask.prompt)?;
            let mut answer = Writing { at, slot, writer, next: 0, log_prob: 0.0 };
            match answer.choose(&logits)? {
                None => {
                    free.pop();
                    writing.push(answer);
                }
                Some(finish) => {
                    answer.hand_over(finish, on_done)?;
                    answered += 1;
                }
            }
        }
        if writing.is_empty() || stopped() {
            return Ok(answered);
        }
        let tokens: Vec<(usize, i32)> = writing.iter().map(|own| (own.slot, own.next)).collect();
        let draws: Vec<Option<Draw>> = match queue.slots.draws() {
            true => writing.iter_mut().map(|own| own.writer.ahead()).collect(),
            false => Vec::new(),
        };
        let wanted = draws.is_empty() || draws.contains(&None);
        let Stepped { drawn, logits } = queue.slots.step_drawing(model, &tokens, &draws, wanted)?;
        let vocab = model.config().vocab_size;
        let chosen: Vec<Result<Option<Finish>>> = (writing.par_iter_mut().enumerate())
            .map(|(row, own)| match drawn.get(row).copied().flatten() {
                Some(drawn) => own.take(drawn),
                None => own.choose(&logits[row * vocab..][..vocab]),
            })
            .collect();
        let mut going_on = Vec::with_capacity(writing.len());
        for (own, finish) in writing.into_iter().zip(chosen) {
            match finish? {
                None => going_on.push(own),
                Some(finish) => {
                    free.push(own.slot);
                    own.hand_over(finish, on_done)?;
                    answered += 1;
                }
            }
        }
        writing = going_on;
    }
}

/// An answer that is being written.
struct Writing<'w> {
    at: usize,
    slot: usize,
    writer: Writer<'w>,
    /// The token to read next.
    next: i32,
    log_prob: f64,
}

impl Writing<'_> {
    /// Chooses a token; why the answer ends, when it does.
    fn choose(&mut self, logits: &[f32]) -> Result<Option<Finish>> {
        let mut go_on = |_: &str| ControlFlow::Continue(());
        let next = self.writer.take(logits, &mut go_on).map_err(|error| named(self.at, error))?;
        self.log_prob += self.writer.last().map_or(0.0, |token| log_prob(logits, token));
        Ok(self.go_on(next))
    }

    /// As [`Writing::choose`], with a token that was drawn.
    fn take(&mut self, drawn: Drawn) -> Result<Option<Finish>> {
        let mut go_on = |_: &str| ControlFlow::Continue(());
        let next = self.writer.take_drawn(drawn.token, &mut go_on);
        let next = next.map_err(|error| named(self.at, error))?;
        self.log_prob += f64::from(drawn.log_prob);
        Ok(self.go_on(next))
    }

    fn go_on(&mut self, next: ControlFlow<Finish, u32>) -> Option<Finish> {
        match next {
            ControlFlow::Break(finish) => Some(finish),
            ControlFlow::Continue(token) => {
                self.next = token as i32;
                None
            }
        }
    }

    fn hand_over(self, finish: Finish, on_done: &mut dyn FnMut(usize, Written)) -> Result<()> {
        let mut go_on = |_: &str| ControlFlow::Continue(());
        let answer = self.writer.finish(finish, &mut go_on)?;
        on_done(
            self.at,
            Written {
                tokens: answer.tokens,
                text: answer.text,
                finish: answer.finish,
                ended: answer.ended,
                log_prob: self.log_prob,
            },
        );
        Ok(())
    }
}

/// Asks that wait, those of the same prompt one after the other.
struct Queue<'a> {
    model: &'a Model,
    asks: &'a [Ask],
    order: &'a [usize],
    slots: Slots,
    /// The slot of a prompt that was read and is wanted again, and the logits after it.
    kept: usize,
    read: Option<Vec<f32>>,
}

impl Queue<'_> {
    /// The next ask, whose prompt `slot` then holds, and the logits after it.
    fn next(&mut self, slot: usize) -> Result<Option<(usize, Vec<f32>)>> {
        let Some((&at, rest)) = self.order.split_first() else { return Ok(None) };
        self.order = rest;
        let prompt = &self.asks[at].prompt;
        let again = rest.first().is_some_and(|&next| self.asks[next].prompt == *prompt);
        let logits = match self.read.take() {
            Some(logits) => {
                self.slots.copy(self.kept, slot)?;
                logits
            }
            None => {
                let tokens = check_prompt(self.model, prompt).map_err(|e| named(at, e))?;
                self.slots.clear(slot)?;
                let logits = self.slots.read(self.model, slot, &tokens)?;
                if again {
                    self.slots.copy(slot, self.kept)?;
                }
                logits
            }
        };
        if again {
            self.read = Some(logits.clone());
        }
        Ok(Some((at, logits)))
    }
}

/// Places of the asks, prompts in the order they first come in.
fn by_prompt(asks: &[Ask]) -> Vec<usize> {
    let mut groups: HashMap<&[u32], usize> = HashMap::new();
    let mut order: Vec<(usize, usize)> = Vec::with_capacity(asks.len());
    for (at, ask) in asks.iter().enumerate() {
        let next = groups.len();
        order.push((*groups.entry(&ask.prompt).or_insert(next), at));
    }
    order.sort_unstable();
    order.into_iter().map(|(_, at)| at).collect()
}

fn named(at: usize, error: Error) -> Error {
    match error {
        Error::Generate(text) => Error::Generate(format!("ask {at}: {text}")),
        other => other,
    }
}
