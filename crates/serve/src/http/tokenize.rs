//! `/tokenize`, `/detokenize` and `/tokenizer_info`: vLLM's routes, which evaluation harnesses
//! use in place of a tokenizer of their own.

use std::sync::Arc;

use hyper::StatusCode;
use serde_json::{Value, json};

use super::body::{Response, json_response};
use super::chat::Turns;
use super::completions::token_ids;
use super::error::{ApiError, ApiResult};
use super::fields::Fields;
use super::text::Served;
use super::{Front, limits};

/// What `/tokenize` is asked.
pub struct Tokenize {
    what: What,
    names: bool,
}

enum What {
    Text(String, bool),
    Turns(Turns),
}

impl Tokenize {
    /// Takes the fields of a request: a `prompt`, or `messages`.
    pub fn take(fields: &mut Fields, served: &Served) -> ApiResult<Self> {
        served.adapter(fields.text("model", limits::NAME_CHARS)?.as_deref())?;
        let prompt = fields.text("prompt", usize::MAX)?;
        let special = fields.flag("add_special_tokens")?;
        let names = fields.flag("return_token_strs")?.unwrap_or(false);
        let what = match prompt {
            Some(text) => What::Text(text, special.unwrap_or(true)),
            None => What::Turns(Turns::take(fields).map_err(|e| match e.param.as_deref() {
                Some("messages") => ApiError::field("prompt", "give a `prompt` or `messages`"),
                _ => e,
            })?),
        };
        Ok(Self { what, names })
    }
}

/// Text to ids.
pub async fn tokenize(front: &Arc<Front>, served: Arc<Served>, body: &[u8]) -> ApiResult<Response> {
    let mut fields = Fields::parse(body)?;
    let Tokenize { what, names } = Tokenize::take(&mut fields, &served)?;
    fields.finish()?;
    let of = served.clone();
    let ids = front.compute(move || match what {
        What::Text(text, special) => Ok(of.text.tokenizer.encode(&text, special)?),
        What::Turns(turns) => turns.tokens(&of.text),
    });
    let ids = ids.await?;
    let mut answer = json!({
        "count": ids.len(),
        "max_model_len": served.engine.context(),
        "tokens": ids,
        "token_strs": null,
    });
    if names {
        answer["token_strs"] = ids.iter().map(|&id| Value::from(served.text.token(id))).collect();
    }
    Ok(json_response(StatusCode::OK, &answer))
}

/// Takes the fields of a request to `/detokenize`.
pub fn take_ids(fields: &mut Fields, served: &Served) -> ApiResult<Vec<u32>> {
    served.adapter(fields.text("model", limits::NAME_CHARS)?.as_deref())?;
    let ids = fields.list("tokens", usize::MAX)?;
    let ids = ids.ok_or_else(|| ApiError::field("tokens", "`tokens` is missing"))?;
    token_ids("tokens", &ids, served.text.vocab)
}

/// Ids to text, special tokens written out.
pub async fn detokenize(
    front: &Arc<Front>,
    served: Arc<Served>,
    body: &[u8],
) -> ApiResult<Response> {
    let mut fields = Fields::parse(body)?;
    let ids = take_ids(&mut fields, &served)?;
    fields.finish()?;
    let text = front.compute(move || Ok(served.text.tokenizer.decode_all(&ids)?)).await?;
    Ok(json_response(StatusCode::OK, &json!({ "prompt": text })))
}

/// What `tokenizer_config.json` says, and the end of text where it says nothing.
pub fn info(served: &Served) -> Response {
    let mut info = served.text.config.clone();
    for role in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        let text = served.text.special(role);
        let end = served.text.ends.first().and_then(|&id| served.text.tokenizer.token(id));
        let text = text.or(end.filter(|_| role == "eos_token"));
        info.insert(role.into(), text.into());
    }
    info.entry("tokenizer_class").or_insert("PreTrainedTokenizerFast".into());
    info.entry("chat_template").or_insert(Value::Null);
    info.insert("has_chat_template".into(), served.text.tokenizer.chat().is_some().into());
    json_response(StatusCode::OK, &Value::Object(info))
}
