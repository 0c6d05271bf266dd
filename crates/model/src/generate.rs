//! Writing text: prompt in, tokens out one by one, until something says stop.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::cache::Cache;
use crate::sampling::Sampling;
use crate::writer::{Finish, Writer, check_prompt};
use crate::{Model, Result, Tokenizer};

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
        sampling.validate()?;
        let tokens = check_prompt(self.model, prompt)?;
        // A copy of the short list, since the cache is changed while the writer reads it.
        let ends = self.end_of_text.clone();
        let settings = (sampling, sampling.seed);
        let mut writer = Writer::new(self.model, self.tokenizer, settings, &ends, prompt)?;

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
        let mut decode_steps = 0;
        let finish = loop {
            match writer.take(&logits, on_text)? {
                ControlFlow::Break(finish) => break finish,
                ControlFlow::Continue(token) => logits = self.extend(&[token as i32])?,
            }
            decode_steps += 1;
        };
        let answer = writer.finish(finish, on_text)?;
        Ok(Generation {
            text: answer.text,
            tokens: answer.tokens,
            finish: answer.finish,
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
}
