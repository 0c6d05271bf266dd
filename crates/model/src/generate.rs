//! Writing text: prompt in, tokens out one by one, until something says stop.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::cache::Cache;
use crate::sampling::{Sampler, Sampling};
use crate::stop::StopFilter;
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

/// A written text and what it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text, without the stop text.
    pub text: String,
    /// The tokens, an end-of-text token not included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that had to be read; the rest was still in the cache.
    pub read_tokens: usize,
    /// Seconds until the prompt was read.
    pub prefill_seconds: f64,
    /// Passes through the model after the prompt.
    pub decode_steps: usize,
    /// Seconds of those passes, sampling included.
    pub decode_seconds: f64,
}

impl Generation {
    /// Prompt tokens read per second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.read_tokens, self.prefill_seconds)
    }

    /// Tokens written per second, after the first.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decode_steps, self.decode_seconds)
    }
}

fn rate(count: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// A model, its tokenizer, and the cache of one conversation.
pub struct Generator<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    end_of_text: Vec<u32>,
    cache: Cache,
    /// The tokens in the cache.
    held: Vec<i32>,
}

impl<'m> Generator<'m> {
    /// A generator with an empty cache. `end_of_text` replaces the model's own list when given
    /// (see [`crate::GenerationConfig`]).
    pub fn new(
        model: &'m Model,
        tokenizer: &'m Tokenizer,
        end_of_text: Option<Vec<u32>>,
    ) -> Result<Self> {
        tokenizer.check_fits(model.config().vocab_size)?;
        let end_of_text = end_of_text.unwrap_or_else(|| model.config().eos_token_ids.clone());
        let cache = model.cache()?;
        Ok(Self { model, tokenizer, end_of_text, cache, held: Vec::new() })
    }

    /// Bytes of keys and values in the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Continues `prompt` (at least one token). `on_text` gets each piece of text as soon as it
    /// is certain, in correct UTF-8, and may stop the writing. A prompt that begins with what
    /// the cache holds, such as the next turn of a conversation, is read from there on only.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampling: &Sampling,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut sampler = Sampler::new(sampling)?;
        let tokens = self.check_prompt(prompt)?;
        prompt.iter().for_each(|&token| sampler.see(token));

        let start = Instant::now();
        // At least one token must be read again to have logits to choose from.
        let known = self.held.len();
        let rest = tokens.len().saturating_sub(known);
        let goes_on = rest == 1 || !self.cache.only_steps();
        let read = if known < tokens.len() && goes_on && tokens.starts_with(&self.held) {
            &tokens[known..]
        } else {
            self.cache = self.model.cache()?;
            self.held.clear();
            &tokens[..]
        };
        let mut logits = self.extend(read)?;
        let read_tokens = read.len();
        let prefill_seconds = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let mut writer = Writer::new(self.tokenizer, sampling, on_text);
        let (mut written, mut decode_steps) = (Vec::new(), 0);
        let finish = loop {
            let token = sampler.next(&logits)?;
            if self.end_of_text.contains(&token) {
                break Finish::EndOfText;
            }
            written.push(token);
            if let Some(finish) = writer.push(token)? {
                break finish;
            }
            if written.len() == sampling.max_tokens {
                break Finish::MaxTokens;
            }
            if self.held.len() == self.model.config().max_position_embeddings {
                break Finish::ContextFull;
            }
            logits = self.extend(&[token as i32])?;
            decode_steps += 1;
        };
        let (text, finish) = writer.finish(finish)?;
        Ok(Generation {
            text,
            tokens: written,
            finish,
            prompt_tokens: prompt.len(),
            read_tokens,
            prefill_seconds,
            decode_steps,
            decode_seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn extend(&mut self, tokens: &[i32]) -> Result<Vec<f32>> {
        let logits = self.model.extend(&mut self.cache, tokens)?;
        self.held.extend_from_slice(tokens);
        Ok(logits)
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<Vec<i32>> {
        let context = self.model.config().max_position_embeddings;
        if prompt.is_empty() {
            return Err(Error::Generate(
                "the prompt has no tokens; give some text to continue".into(),
            ));
        }
        if prompt.len() >= context {
            return Err(Error::Generate(format!(
                "the prompt has {} tokens, but the model's context of {context} must hold it and \
                 at least one more; shorten the prompt",
                prompt.len()
            )));
        }
        let vocab = self.model.config().vocab_size;
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::Generate(format!(
                "token id {id} is outside the model's vocabulary of {vocab}"
            )));
        }
        Ok(prompt.iter().map(|&id| id as i32).collect())
    }
}

/// Turns tokens into text for the caller, holding back what may become a stop text.
struct Writer<'w> {
    stream: crate::text_stream::TextStream<'w>,
    stop: StopFilter<'w>,
    on_text: &'w mut dyn FnMut(&str) -> ControlFlow<()>,
    text: String,
}

impl<'w> Writer<'w> {
    fn new(
        tokenizer: &'w Tokenizer,
        sampling: &'w Sampling,
        on_text: &'w mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Self {
        let stop = StopFilter::new(&sampling.stop);
        Self { stream: tokenizer.stream(), stop, on_text, text: String::new() }
    }

    fn push(&mut self, token: u32) -> Result<Option<Finish>> {
        let piece = self.stream.push(token)?;
        Ok(self.pass(&piece))
    }

    fn pass(&mut self, piece: &str) -> Option<Finish> {
        let (certain, stopped) = self.stop.push(piece);
        if self.write(&certain).is_break() {
            return Some(Finish::Cancelled);
        }
        stopped.map(Finish::Stop)
    }

    fn write(&mut self, piece: &str) -> ControlFlow<()> {
        if piece.is_empty() {
            return ControlFlow::Continue(());
        }
        self.text.push_str(piece);
        (self.on_text)(piece)
    }

    /// Writes what was held back, unless a stop text ended the answer.
    fn finish(mut self, finish: Finish) -> Result<(String, Finish)> {
        if matches!(finish, Finish::Stop(_) | Finish::Cancelled) {
            return Ok((self.text, finish));
        }
        let rest = self.stream.finish()?;
        if let Some(stopped) = self.pass(&rest) {
            return Ok((self.text, stopped));
        }
        let held = self.stop.finish();
        let _ = self.write(&held);
        Ok((self.text, finish))
    }
}
