//! What completions and chats have in common: how tokens are chosen, when an answer ends, what
//! is reported of it.

use std::hash::{BuildHasher, Hasher};

use serde_json::Value;
use tercet_model::Sampling;

use super::constraint::Guide;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, integer, text};
use super::limits;
use super::text::Text;

/// Tokens that may be asked for; more than any context has.
const MOST_TOKENS: i64 = i32::MAX as i64;

/// The settings of a request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The name in the request, if any.
    pub model: Option<String>,
    /// How tokens are chosen; each answer adds its number to the seed.
    pub sampling: Sampling,
    /// Tokens to write at most.
    pub max_tokens: Option<usize>,
    /// No end before so many.
    pub min_tokens: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Go on after the model's own ends.
    pub ignore_eos: bool,
    /// Answers to a prompt.
    pub n: usize,
    /// Whether pieces are sent as they come.
    pub stream: bool,
    /// Whether a stream ends with what it took.
    pub include_usage: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special: bool,
    /// Whether the stop text is part of the answer.
    pub include_stop: bool,
    /// Whether ids come with the text.
    pub return_ids: bool,
    /// Whether tokens in log-probabilities are written `token_id:N`.
    pub ids_as_tokens: bool,
    /// Whether selected blocks come with the text.
    pub return_reads: bool,
    /// Separates the prefix cache further than by key.
    pub salt: String,
    /// What an answer has to look like.
    pub guide: Option<Guide>,
}

impl Ask {
    /// Takes the common fields.
    pub fn take(fields: &mut Fields, known: &Text) -> ApiResult<Self> {
        let model = fields.text("model", limits::NAME_CHARS)?;
        let sampling = sampling(fields, known)?;
        let most = fields.count("max_tokens", 0..=MOST_TOKENS)?;
        let min_tokens = fields.count("min_tokens", 0..=MOST_TOKENS)?.unwrap_or(0);
        let n = fields.count("n", 1..=limits::N)?.unwrap_or(1);
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = stream_options(fields, stream)?;
        Ok(Self {
            model,
            sampling,
            max_tokens: most,
            min_tokens,
            stop: stop(fields)?,
            stop_tokens: stop_tokens(fields)?,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            n,
            stream,
            include_usage,
            skip_special: fields.flag("skip_special_tokens")?.unwrap_or(true),
            include_stop: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
            return_ids: fields.flag("return_token_ids")?.unwrap_or(false),
            ids_as_tokens: fields.flag("return_tokens_as_token_ids")?.unwrap_or(false),
            return_reads: fields.flag("return_reads")?.unwrap_or(false),
            salt: fields.text("cache_salt", limits::NAME_CHARS)?.unwrap_or_default(),
            guide: Guide::take(fields)?,
        })
    }
}

impl Ask {
    /// Bounds an answer that comes with what was read.
    pub fn bound_reads(&mut self) -> ApiResult<()> {
        if !self.return_reads {
            return Ok(());
        }
        let most = limits::READS_TOKENS;
        match self.max_tokens.get_or_insert(most) {
            tokens if *tokens <= most => Ok(()),
            tokens => Err(ApiError::field(
                "max_tokens",
                format!(
                    "`max_tokens` = {tokens} is more than {most}, the most with `return_reads`"
                ),
            )),
        }
    }
}

fn sampling(fields: &mut Fields, known: &Text) -> ApiResult<Sampling> {
    let base = known.sampling.clone();
    let or = |given: Option<f64>, own: f32| given.map_or(own, |x| x as f32);
    let top_k = fields.integer("top_k", -1..=MOST_TOKENS)?;
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    Ok(Sampling {
        temperature: or(fields.number("temperature", 0.0..=2.0)?, base.temperature),
        // OpenAI takes 0 here: the most probable token alone.
        top_p: or(fields.number("top_p", 0.0..=1.0)?, base.top_p).max(f32::MIN_POSITIVE),
        // vLLM takes −1 for all.
        top_k: top_k.map_or(base.top_k, |k| usize::try_from(k).unwrap_or(0)),
        min_p: or(fields.number("min_p", 0.0..=1.0)?, base.min_p),
        repetition_penalty: or(
            fields.number("repetition_penalty", 0.01..=100.0)?,
            base.repetition_penalty,
        ),
        presence_penalty: or(fields.number("presence_penalty", -2.0..=2.0)?, 0.0),
        frequency_penalty: or(fields.number("frequency_penalty", -2.0..=2.0)?, 0.0),
        logit_bias: logit_bias(fields, known.vocab)?,
        seed: seed.map_or_else(fresh_seed, |seed| seed as u64),
        ..base
    })
}

/// A seed nobody chose.
fn fresh_seed() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

fn logit_bias(fields: &mut Fields, vocab: usize) -> ApiResult<Vec<(u32, f32)>> {
    let name = "logit_bias";
    let Some(value) = fields.take(name) else { return Ok(Vec::new()) };
    let Value::Object(map) = value else {
        return Err(super::fields::expected(name, "an object of token ids and biases", &value));
    };
    if map.len() > limits::LOGIT_BIASES {
        let message = format!(
            "`{name}` has {} entries; at most {} are taken",
            map.len(),
            limits::LOGIT_BIASES
        );
        return Err(ApiError::field(name, message));
    }
    let one = |(key, bias): (&String, &Value)| {
        let id = key.parse().ok().filter(|&id: &u32| (id as usize) < vocab);
        let id = id.ok_or_else(|| {
            let shown: String = key.chars().take(32).collect();
            let message = format!("`{name}`: {shown:?} is no token id; ids are 0 to {}", vocab - 1);
            ApiError::field(name, message)
        })?;
        let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b)).ok_or_else(|| {
            ApiError::field(name, format!("`{name}`: the bias of {id} is outside -100 to 100"))
        })?;
        Ok((id, bias as f32))
    };
    map.iter().map(one).collect()
}

fn stop(fields: &mut Fields) -> ApiResult<Vec<String>> {
    let name = "stop";
    let texts = match fields.take(name) {
        None => Vec::new(),
        Some(Value::Array(texts)) => super::fields::list(name, texts.into(), limits::STOPS)?,
        Some(one) => vec![one],
    };
    let one = |value| {
        let stop = text(name, value, 4 * limits::STOP_CHARS)?;
        match stop.chars().count() {
            1..=limits::STOP_CHARS => Ok(stop),
            0 => Err(ApiError::field(name, "`stop`: an empty text would stop at once")),
            _ => {
                let most = limits::STOP_CHARS;
                Err(ApiError::field(name, format!("`stop` is longer than {most} characters")))
            }
        }
    };
    texts.into_iter().map(one).collect()
}

fn stop_tokens(fields: &mut Fields) -> ApiResult<Vec<u32>> {
    let name = "stop_token_ids";
    let ids = fields.list(name, limits::STOP_TOKENS)?.unwrap_or_default();
    ids.iter().map(|id| Ok(integer(name, id, 0..=u32::MAX.into())? as u32)).collect()
}

fn stream_options(fields: &mut Fields, stream: bool) -> ApiResult<bool> {
    let Some(mut options) = fields.inner("stream_options")? else { return Ok(false) };
    if !stream {
        let message = "`stream_options` is for streams; set `stream` to true or leave it out";
        return Err(ApiError::field("stream_options", message));
    }
    let usage = options.flag("include_usage")?.unwrap_or(false);
    // Padding against eavesdroppers who count bytes; a matter of whoever encrypts.
    options.flag("include_obfuscation")?;
    options.finish()?;
    Ok(usage)
}
