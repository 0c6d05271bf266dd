//! One answer while it is being written: chooses tokens, turns them into text, knows when to end.

use std::ops::ControlFlow;

use tercet_tensor::Draw;

use crate::sampling::{Sampler, Sampling};
use crate::stop::StopFilter;
use crate::text_stream::TextStream;
use crate::{Error, Model, Result, Tokenizer};

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model wrote an end-of-text token.
    EndOfText,
    /// This stop text came.
    Stop(String),
    /// `max_tokens` were written.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The caller asked to stop.
    Cancelled,
}

/// Takes text that is certain; may stop the writing.
pub(crate) type OnText<'f> = &'f mut dyn FnMut(&str) -> ControlFlow<()>;

/// Everything that is one answer's own, but its cache.
pub(crate) struct Writer<'w> {
    sampler: Sampler,
    stream: TextStream<'w>,
    stop: StopFilter<'w>,
    end_of_text: &'w [u32],
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens that may be written, and that a cache may hold.
    most: usize,
    context: usize,
    tokens: Vec<u32>,
    ended: Option<u32>,
    text: String,
}

/// A finished answer.
pub(crate) struct Answer {
    /// The text, without the stop text.
    pub text: String,
    /// The tokens, an end-of-text token not included.
    pub tokens: Vec<u32>,
    /// The end-of-text token, when one was written.
    pub ended: Option<u32>,
    pub finish: Finish,
}

impl<'w> Writer<'w> {
    /// Begins the answer to a prompt that [`check_prompt`] let pass; `seed` replaces the
    /// settings' own.
    pub fn new(
        model: &Model,
        tokenizer: &'w Tokenizer,
        (sampling, seed): (&'w Sampling, u64),
        end_of_text: &'w [u32],
        prompt: &[u32],
    ) -> Result<Self> {
        let mut sampler = Sampler::seeded(sampling, seed)?;
        prompt.iter().for_each(|&token| sampler.see(token));
        Ok(Self {
            sampler,
            stream: tokenizer.stream(),
            stop: StopFilter::new(&sampling.stop),
            end_of_text,
            prompt: prompt.len(),
            most: sampling.max_tokens,
            context: model.config().max_position_embeddings,
            tokens: Vec::new(),
            ended: None,
            text: String::new(),
        })
    }

    /// Chooses the next token from the logits after the last one: the token to read next, or why
    /// there is none.
    pub fn take(&mut self, logits: &[f32], on_text: OnText) -> Result<ControlFlow<Finish, u32>> {
        let token = self.sampler.next(logits)?;
        self.settle(token, on_text)
    }

    /// See [`Sampler::ahead`].
    pub fn ahead(&mut self) -> Option<Draw> {
        self.sampler.ahead()
    }

    /// As [`Writer::take`], with the token of the draw that [`Writer::ahead`] gave.
    pub fn take_drawn(
        &mut self,
        token: Option<u32>,
        on_text: OnText,
    ) -> Result<ControlFlow<Finish, u32>> {
        let token = self.sampler.was_drawn(token)?;
        self.settle(token, on_text)
    }

    fn settle(&mut self, token: u32, on_text: OnText) -> Result<ControlFlow<Finish, u32>> {
        if self.end_of_text.contains(&token) {
            self.ended = Some(token);
            return Ok(ControlFlow::Break(Finish::EndOfText));
        }
        self.tokens.push(token);
        let piece = self.stream.push(token)?;
        if let Some(finish) = self.pass(&piece, on_text) {
            return Ok(ControlFlow::Break(finish));
        }
        if self.tokens.len() == self.most {
            return Ok(ControlFlow::Break(Finish::MaxTokens));
        }
        // The last token is chosen from a full cache.
        if self.prompt + self.tokens.len() > self.context {
            return Ok(ControlFlow::Break(Finish::ContextFull));
        }
        Ok(ControlFlow::Continue(token))
    }

    /// The token chosen last, an end-of-text token included.
    pub fn last(&self) -> Option<u32> {
        self.ended.or(self.tokens.last().copied())
    }

    /// Writes what was held back, unless a stop text ended the answer.
    pub fn finish(mut self, finish: Finish, on_text: OnText) -> Result<Answer> {
        let finish = match finish {
            Finish::Stop(_) | Finish::Cancelled => finish,
            finish => {
                let rest = self.stream.finish()?;
                match self.pass(&rest, on_text) {
                    Some(stopped) => stopped,
                    None => {
                        let held = self.stop.finish();
                        let _ = self.write(&held, on_text);
                        finish
                    }
                }
            }
        };
        Ok(Answer { text: self.text, tokens: self.tokens, ended: self.ended, finish })
    }

    fn pass(&mut self, piece: &str, on_text: OnText) -> Option<Finish> {
        let (certain, stopped) = self.stop.push(piece);
        if self.write(&certain, on_text).is_break() {
            return Some(Finish::Cancelled);
        }
        stopped.map(Finish::Stop)
    }

    fn write(&mut self, piece: &str, on_text: OnText) -> ControlFlow<()> {
        if piece.is_empty() {
            return ControlFlow::Continue(());
        }
        self.text.push_str(piece);
        on_text(piece)
    }
}

/// The prompt as the model takes it; refused when it is empty, leaves no room for an answer, or
/// has tokens outside the vocabulary.
pub(crate) fn check_prompt(model: &Model, prompt: &[u32]) -> Result<Vec<i32>> {
    let context = model.config().max_position_embeddings;
    if prompt.is_empty() {
        return Err(Error::Generate("the prompt has no tokens; give some text to continue".into()));
    }
    if prompt.len() >= context {
        return Err(Error::Generate(format!(
            "the prompt has {} tokens, but the model's context of {context} must hold it and at \
             least one more; shorten the prompt",
            prompt.len()
        )));
    }
    let vocab = model.config().vocab_size;
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Generate(format!(
            "token id {id} is outside the model's vocabulary of {vocab}"
        )));
    }
    Ok(prompt.iter().map(|&id| id as i32).collect())
}
