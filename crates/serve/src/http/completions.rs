//! `POST /v1/completions`: a prompt, continued.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::answer::{Form, Job, Prompt};
use super::ask::Ask;
use super::body::Response;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, expected, integer, list};
use super::text::{Served, Text};
use super::{Front, limits};

/// OpenAI's default.
const MAX_TOKENS: usize = 16;

/// A checked request.
pub struct Completion {
    /// The common settings.
    pub ask: Ask,
    prompts: Vec<Given>,
    echo: bool,
    log_probs: Option<usize>,
    add_special: bool,
}

/// A prompt as it came.
enum Given {
    Text(String),
    Ids(Vec<u32>),
}

impl Completion {
    /// Takes the fields of a request.
    pub fn take(fields: &mut Fields, text: &Text) -> ApiResult<Self> {
        let mut ask = Ask::take(fields, text)?;
        let prompt = fields.take("prompt");
        let prompt = prompt.ok_or_else(|| ApiError::field("prompt", "`prompt` is missing"))?;
        let prompts = prompts(prompt, text.vocab)?;
        if prompts.len() * ask.n > limits::CHOICES {
            let most = limits::CHOICES;
            let message = format!("`prompt` times `n` asks for more than {most} answers");
            return Err(ApiError::field("prompt", message));
        }
        let echo = fields.flag("echo")?.unwrap_or(false);
        let best_of = fields.count("best_of", 1..=limits::N)?;
        if best_of.is_some_and(|best| best != ask.n) {
            let message = "`best_of` other than `n` is not offered: ask for `n` answers and choose";
            return Err(ApiError::field("best_of", message));
        }
        fields.refuse("suffix", "this server continues prompts, it does not fill gaps")?;
        ask.max_tokens.get_or_insert(MAX_TOKENS);
        ask.bound_reads()?;
        if ask.max_tokens == Some(0) && !echo {
            let message = "`max_tokens` = 0 leaves nothing to write; it goes with `echo` only";
            return Err(ApiError::field("max_tokens", message));
        }
        Ok(Self {
            ask,
            prompts,
            echo,
            log_probs: fields.count("logprobs", 0..=limits::TOP_LOGPROBS)?,
            add_special: fields.flag("add_special_tokens")?.unwrap_or(true),
        })
    }
}

fn prompts(value: Value, vocab: usize) -> ApiResult<Vec<Given>> {
    let path = "prompt";
    match value {
        Value::String(text) => Ok(vec![Given::Text(text)]),
        Value::Array(list) if list.is_empty() => {
            Err(ApiError::field(path, "`prompt` is an empty list"))
        }
        Value::Array(ids) if ids[0].is_number() => {
            Ok(vec![Given::Ids(token_ids(path, &ids, vocab)?)])
        }
        value @ Value::Array(_) => {
            let list = list(path, value, limits::PROMPTS)?;
            let one = |(at, value): (usize, Value)| match value {
                Value::String(text) => Ok(Given::Text(text)),
                Value::Array(ids) => {
                    token_ids(&format!("prompt[{at}]"), &ids, vocab).map(Given::Ids)
                }
                other => Err(expected(&format!("prompt[{at}]"), "a text or a list of ids", &other)),
            };
            list.into_iter().enumerate().map(one).collect()
        }
        other => Err(expected(path, "a text, a list of texts, token ids or lists of them", &other)),
    }
}

/// Ids of a vocabulary.
pub fn token_ids(path: &str, ids: &[Value], vocab: usize) -> ApiResult<Vec<u32>> {
    let last = vocab as i64 - 1;
    ids.iter().map(|id| Ok(integer(path, id, 0..=last)? as u32)).collect()
}

/// Bounds the log-probabilities of `tokens` tokens of prompts, each answered `n` times.
fn bound_scores(tokens: usize, top: usize, n: usize) -> ApiResult<()> {
    let (scores, most) = (tokens.saturating_mul(top + 1).saturating_mul(n), limits::ECHO_SCORES);
    if scores <= most {
        return Ok(());
    }
    let message = format!(
        "`echo` with `logprobs` = {top} asks for {scores} log-probabilities of prompts ({tokens} \
         tokens × {} × `n` = {n}); at most {most} are given at once: send fewer or shorter prompts",
        top + 1
    );
    Err(ApiError::field("logprobs", message))
}

/// Answers a request.
pub async fn answer(
    front: &Arc<Front>,
    served: Arc<Served>,
    key: usize,
    body: &[u8],
    place: OwnedSemaphorePermit,
) -> ApiResult<Response> {
    let mut fields = Fields::parse(body)?;
    let request = Completion::take(&mut fields, &served.text)?;
    fields.finish()?;
    let Completion { ask, prompts, echo, log_probs, add_special } = request;
    let adapter = served.adapter(ask.model.as_deref())?;
    let (of, guide) = (served.clone(), ask.guide.clone());
    let (prompts, grammar) = front
        .compute(move || {
            let one = |given| match given {
                Given::Ids(ids) => Ok(Prompt { ids, text: None }),
                Given::Text(text) => {
                    let ids = of.text.tokenizer.encode(&text, add_special)?;
                    Ok(Prompt { ids, text: Some(text) })
                }
            };
            let prompts = prompts.into_iter().map(one).collect::<ApiResult<Vec<Prompt>>>()?;
            let grammar = guide.map(|guide| of.text.grammar(&guide)).transpose()?;
            Ok((prompts, grammar))
        })
        .await?;
    if prompts.iter().any(|p| p.ids.is_empty()) {
        return Err(ApiError::field("prompt", "`prompt` has no tokens; give it at least one"));
    }
    if let Some(top) = log_probs.filter(|_| echo) {
        bound_scores(prompts.iter().map(|p| p.ids.len()).sum(), top, ask.n)?;
    }
    let namespace = super::namespace(key, &ask.salt);
    let form = Form::Completion(echo);
    let front = front.clone();
    Job { front, served, adapter, namespace, ask, prompts, grammar, log_probs, form, _place: place }
        .answer()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_of_prompts_are_taken_at_their_bound_and_refused_beyond() {
        let most = limits::ECHO_SCORES;
        for (tokens, top, n, fine) in [
            (most, 0, 1, true),
            (most + 1, 0, 1, false),
            (most / 2, 1, 1, true),
            (most / 2, 1, 2, false),
            (most / 21, 20, 1, true),
            (most / 21 + 1, 20, 1, false),
            (usize::MAX, 20, 8, false),
        ] {
            let bounded = bound_scores(tokens, top, n);
            assert_eq!(bounded.is_ok(), fine, "{tokens} {top} {n}: {bounded:?}");
        }
    }
}
