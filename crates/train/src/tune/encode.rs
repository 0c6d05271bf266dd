//! Rows to examples: strings and conversations become token ids with a mark on what is learnt.
//!
//! A whole text is tokenized at once and its tokens are marked by where they begin, so that no
//! boundary is tokenized in a way the model never sees. Conversations go through the model's chat
//! template turn by turn: what the template adds after the opening of an assistant's turn is
//! that turn, and it alone is learnt.

use serde_json::{Map, Value};
use tercet_model::{ChatTemplate, GenerationConfig, Message, ModelConfig, Tokenizer};

use super::example::Example;
use crate::error::{Error, Result};

/// Pieces of a text: whether each is learnt.
type Segments = Vec<(String, bool)>;

/// A tokenizer, the chat template beside it, and the token that ends a text.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    eos: i32,
    vocab_size: usize,
}

/// A prompt or a completion: a string, or messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Plain text.
    Text(String),
    /// Turns of a conversation.
    Messages(Vec<Message>),
}

impl<'a> Encoder<'a> {
    /// For a model's tokenizer. The end token is that of `settings`, or of the model.
    pub fn new(
        tokenizer: &'a Tokenizer,
        model: &ModelConfig,
        settings: &GenerationConfig,
    ) -> Result<Self> {
        tokenizer.check_fits(model.vocab_size)?;
        let named = settings.eos_token_ids.as_ref().and_then(|ids| ids.first());
        let Some(&eos) = named.or(model.eos_token_ids.first()) else {
            return Err(Error::Tokenizer(
                "the model names no token that ends a text; set eos_token_id in its config.json"
                    .into(),
            ));
        };
        if eos as usize >= model.vocab_size {
            return Err(Error::Tokenizer(format!(
                "the eos_token_id of generation_config.json is {eos}, which the model's vocabulary \
                 of {} does not have; put it right",
                model.vocab_size
            )));
        }
        Ok(Self { tokenizer, eos: eos as i32, vocab_size: model.vocab_size })
    }

    /// The token that ends a text.
    pub fn eos(&self) -> i32 {
        self.eos
    }

    /// Token ids that the model knows lie below this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// A plain text, all of it learnt, with the end token.
    pub fn text(&self, text: &str) -> Result<Example, String> {
        self.plain(vec![(text.to_owned(), true)])
    }

    /// A conversation; the assistant's turns are learnt.
    pub fn messages(&self, messages: &[Message]) -> Result<Example, String> {
        self.turns(messages, 0)
    }

    /// A prompt and its completion; the completion is learnt, of several turns the assistant's. A
    /// plain one gets the end token. A string that answers messages is the assistant's turn.
    pub fn pair(&self, prompt: &Part, completion: &Part) -> Result<Example, String> {
        let answer = match (prompt, completion) {
            (Part::Text(prompt), Part::Text(completion)) => {
                return self.plain(vec![(prompt.clone(), false), (completion.clone(), true)]);
            }
            (Part::Messages(_), Part::Text(text)) => vec![Message::new("assistant", text)],
            (Part::Messages(_), Part::Messages(answer)) => answer.clone(),
            (Part::Text(_), Part::Messages(_)) => {
                return Err("answers a string with a list of messages".into());
            }
        };
        let Part::Messages(prompt) = prompt else { return Err("has no messages".into()) };
        if answer.first().is_none_or(|turn| turn.role != "assistant") {
            return Err("has an answer whose first message is not the assistant's".into());
        }
        self.turns(&[prompt.clone(), answer].concat(), prompt.len())
    }

    /// A conversation of which the assistant's turns from number `from` on are learnt.
    fn turns(&self, messages: &[Message], from: usize) -> Result<Example, String> {
        let template = self.template()?;
        let mut segments: Segments = Vec::new();
        let mut covered = String::new();
        for (i, message) in messages.iter().enumerate().skip(from) {
            if message.role != "assistant" {
                continue;
            }
            let before = render(template, &messages[..i], true)?;
            let after = render(template, &messages[..=i], false)?;
            let rewritten = || {
                format!(
                    "the turns before number {} are rendered differently once others follow: this \
                     chat template cannot say which tokens are the assistant's",
                    i + 1
                )
            };
            let Some(turn) = after.strip_prefix(&before) else {
                if !after.starts_with(&render(template, &messages[..i], false)?) {
                    return Err(rewritten());
                }
                return Err(format!(
                    "turn {} does not begin with what this chat template writes before an answer \
                     (such as <think>), so that its tokens cannot be told from the prompt's",
                    i + 1
                ));
            };
            let opening = before.strip_prefix(&covered).ok_or_else(rewritten)?;
            segments.push((opening.to_owned(), false));
            segments.push((turn.to_owned(), true));
            covered = after;
        }
        if segments.is_empty() {
            return Err("has no turn of the assistant to learn from".into());
        }
        self.marked(&segments, false)
    }

    /// The ids of a prompt as generation reads it.
    pub fn prompt(&self, prompt: &Part) -> Result<Vec<i32>, String> {
        let ids = match prompt {
            Part::Text(text) => self.tokenizer.encode(text, true),
            Part::Messages(messages) => {
                self.tokenizer.encode(&render(self.template()?, messages, true)?, false)
            }
        };
        Ok(ids.map_err(|e| e.to_string())?.into_iter().map(|id| id as i32).collect())
    }

    fn template(&self) -> Result<&ChatTemplate, String> {
        self.tokenizer.chat().ok_or_else(|| {
            "holds messages, but the model has no chat template; put chat_template.jinja beside \
             its tokenizer.json, or give strings"
                .to_owned()
        })
    }

    fn plain(&self, segments: Segments) -> Result<Example, String> {
        let mut example = self.marked(&segments, true)?;
        // A tokenizer may add the end token itself, as one that nothing marks.
        if example.ids.last() == Some(&self.eos) {
            if let Some(last) = example.learnt.last_mut() {
                *last = true;
            }
        } else {
            example.ids.push(self.eos);
            example.learnt.push(true);
        }
        Ok(example)
    }

    /// Tokens of the joined segments, each marked as the segment in which it begins.
    fn marked(&self, segments: &[(String, bool)], special: bool) -> Result<Example, String> {
        if segments.iter().all(|(text, learnt)| !learnt || text.trim().is_empty()) {
            return Err("has an empty completion".into());
        }
        let text: String = segments.iter().map(|(text, _)| text.as_str()).collect();
        let mut ends = Vec::with_capacity(segments.len());
        let mut end = 0;
        for (text, learnt) in segments {
            end += text.len();
            ends.push((end, *learnt));
        }
        let tokens = self.tokenizer.encode_at(&text, special).map_err(|e| e.to_string())?;
        let mut example = Example::default();
        for (id, at) in tokens {
            let segment = ends.partition_point(|(end, _)| *end <= at);
            example.ids.push(id as i32);
            example.learnt.push(ends.get(segment).is_some_and(|(_, learnt)| *learnt));
        }
        Ok(example)
    }
}

fn render(template: &ChatTemplate, messages: &[Message], answer: bool) -> Result<String, String> {
    template.render(messages, answer).map_err(|error| error.to_string())
}

/// A string or a list of messages under `key`.
pub fn part(object: &Map<String, Value>, key: &str) -> Result<Part, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(Part::Text(text.clone())),
        Some(Value::Array(list)) => messages(list, key).map(Part::Messages),
        Some(_) => Err(format!("has a `{key}` that is neither a string nor a list of messages")),
        None => Err(format!("has no `{key}`")),
    }
}

/// Messages as `[{"role": …, "content": …}]`; a content may be a list of text parts.
pub fn messages(list: &[Value], key: &str) -> Result<Vec<Message>, String> {
    let wrong = |i: usize, what: &str| format!("has in `{key}` a message {} {what}", i + 1);
    let one = |(i, value): (usize, &Value)| {
        let role = value.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| wrong(i, "without a `role`"))?;
        let content = match value.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => {
                let text = |part: &Value| Some(part.get("text")?.as_str()?.to_owned());
                let texts: Option<Vec<String>> = parts.iter().map(text).collect();
                texts.ok_or_else(|| wrong(i, "whose content is not only text"))?.concat()
            }
            _ => return Err(wrong(i, "without a `content` that is text")),
        };
        Ok(Message::new(role, &content))
    };
    list.iter().enumerate().map(one).collect()
}
