//! `POST /v1/chat/completions`: a conversation, and its next turn.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::answer::{Form, Job, Prompt};
use super::ask::Ask;
use super::body::Response;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, expected, list};
use super::text::{Served, Text};
use super::tools::{Tools, earlier_calls};
use super::{Front, limits};

/// Parts of a message's content.
const PARTS: usize = 256;

/// A checked request.
pub struct Chat {
    /// The common settings.
    pub ask: Ask,
    turns: Turns,
    log_probs: Option<usize>,
}

/// A conversation as a template takes it.
pub struct Turns {
    messages: Value,
    tools: Option<Tools>,
    answer_next: bool,
}

impl Chat {
    /// Takes the fields of a request.
    pub fn take(fields: &mut Fields, text: &Text) -> ApiResult<Self> {
        let mut ask = Ask::take(fields, text)?;
        if ask.max_tokens == Some(0) {
            let message = "`max_tokens` = 0 leaves nothing to write";
            return Err(ApiError::field("max_tokens", message));
        }
        let newer = fields.count("max_completion_tokens", 1..=i32::MAX.into())?;
        ask.max_tokens = newer.or(ask.max_tokens);
        ask.bound_reads()?;
        let turns = Turns::take(fields)?;
        let forced = turns.tools.as_ref().and_then(|tools| tools.forced.clone());
        if forced.is_some() && ask.guide.is_some() {
            let message = "a forced tool and another shape cannot both be followed; give one";
            return Err(ApiError::field("tool_choice", message));
        }
        ask.guide = forced.or(ask.guide);
        let wanted = fields.flag("logprobs")?.unwrap_or(false);
        let top = fields.count("top_logprobs", 0..=limits::TOP_LOGPROBS)?;
        if top.is_some() && !wanted {
            let message = "`top_logprobs` goes with `logprobs` set to true";
            return Err(ApiError::field("top_logprobs", message));
        }
        fields.refuse("audio", "this server writes text")?;
        fields.refuse("web_search_options", "this server reaches no network")?;
        if fields.take("modalities").is_some_and(|m| m != json!(["text"])) {
            let message = "`modalities` other than [\"text\"] are not offered";
            return Err(ApiError::field("modalities", message));
        }
        Ok(Self { ask, turns, log_probs: wanted.then_some(top.unwrap_or(0)) })
    }
}

impl Turns {
    /// Takes a conversation and its tools.
    pub fn take(fields: &mut Fields) -> ApiResult<Self> {
        fields.refuse("chat_template", "the model's own template is the only one that is run")?;
        let given = fields.list("messages", limits::MESSAGES)?;
        let given = given.filter(|given| !given.is_empty());
        let given = given
            .ok_or_else(|| ApiError::field("messages", "`messages` needs at least one message"))?;
        let one = |(at, value)| message(&format!("messages[{at}]"), value);
        let messages = given.into_iter().enumerate().map(one).collect::<ApiResult<Value>>()?;
        let tools = Tools::take(fields)?;
        let answer_next = fields.flag("add_generation_prompt")?.unwrap_or(true);
        Ok(Self { messages, tools, answer_next })
    }

    /// The conversation as tokens, by the model's template.
    pub fn tokens(&self, text: &Text) -> ApiResult<Vec<u32>> {
        let template = text.tokenizer.chat().ok_or_else(|| {
            ApiError::invalid(
                "this model has no chat template: it continues text; use \
                               /v1/completions",
            )
            .code("no_chat_template")
        })?;
        let tools = self.tools.as_ref().map(|tools| Value::from(tools.list.clone()));
        if tools.is_some() && !template.knows_tools() {
            let message = "this model's chat template has no place for tools";
            return Err(ApiError::field("tools", message));
        }
        let written =
            template.render_with_tools(&self.messages, tools.as_ref(), self.answer_next)?;
        let ids = text.tokenizer.encode(&written, false)?;
        if ids.is_empty() {
            return Err(ApiError::field("messages", "`messages` make no tokens"));
        }
        Ok(ids)
    }
}

/// A message as templates expect it.
fn message(path: &str, value: Value) -> ApiResult<Value> {
    let mut fields = Fields::object(path, value)?;
    let role = fields.text("role", limits::NAME_CHARS)?.unwrap_or_default();
    let role = match role.as_str() {
        // What newer clients call the system.
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => &role,
        _ => {
            let path = fields.path("role");
            let message =
                format!("`{path}` is none of system, developer, user, assistant and tool");
            return Err(ApiError::field(&path, message));
        }
    };
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    let calls = fields.take("tool_calls").filter(|_| role == "assistant");
    let content = match fields.take("content") {
        Some(content) => content_text(&fields.path("content"), content)?,
        None if role == "assistant" => String::new(),
        None => {
            let path = fields.path("content");
            return Err(ApiError::field(&path, format!("`{path}` is missing")));
        }
    };
    out.insert("content".into(), content.into());
    if let Some(calls) = calls {
        let calls = earlier_calls(&fields.path("tool_calls"), calls)?;
        if !calls.is_empty() {
            out.insert("tool_calls".into(), calls.into());
        }
    }
    for name in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(name, limits::NAME_CHARS)? {
            out.insert(name.into(), text.into());
        }
    }
    // What an answer of ours or OpenAI's carries, sent back.
    for name in ["annotations", "refusal", "reasoning_content", "function_call", "audio"] {
        fields.take(name);
    }
    fields.finish()?;
    Ok(Value::Object(out))
}

/// A content: a text, or a list of parts that are texts.
fn content_text(path: &str, content: Value) -> ApiResult<String> {
    match content {
        Value::String(text) => Ok(text),
        value @ Value::Array(_) => {
            let parts = list(path, value, PARTS)?;
            let mut text = String::new();
            for (at, part) in parts.iter().enumerate() {
                let path = format!("{path}[{at}]");
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(piece)) => text.push_str(piece),
                    (Some("text"), None) | (None, _) => {
                        return Err(expected(&path, "{\"type\": \"text\", \"text\": …}", part));
                    }
                    (Some(kind), _) => {
                        let kind: String = kind.chars().take(32).collect();
                        let message =
                            format!("`{path}` is of type {kind:?}; this model reads text");
                        return Err(ApiError::field(&path, message));
                    }
                }
            }
            Ok(text)
        }
        other => Err(expected(path, "a text or a list of parts", &other)),
    }
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
    let Chat { ask, turns, log_probs } = Chat::take(&mut fields, &served.text)?;
    fields.finish()?;
    let adapter = served.adapter(ask.model.as_deref())?;
    let (of, guide) = (served.clone(), ask.guide.clone());
    let (ids, grammar, tools) = front
        .compute(move || {
            let ids = turns.tokens(&of.text)?;
            let grammar = guide.map(|guide| of.text.grammar(&guide)).transpose()?;
            Ok((ids, grammar, turns.tools))
        })
        .await?;
    let namespace = super::namespace(key, &ask.salt);
    let prompts = vec![Prompt { ids, text: None }];
    let form = Form::Chat(tools);
    let front = front.clone();
    Job { front, served, adapter, namespace, ask, prompts, grammar, log_probs, form, _place: place }
        .answer()
        .await
}
