//! Chat templates: Jinja as Hugging Face writes it, run on a fixed amount of fuel.
//!
//! A template comes with a model, from strangers. It cannot read files or the network, and what
//! it may compute (instructions and bytes alike) is bounded by fuel, so the worst it can do is
//! fail.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value};
use minijinja::{Environment, ErrorKind, State, context};

use crate::{Error, Result, chat_time};

/// Instructions and 64-byte pieces of data a template may cost; a conversation of a thousand
/// messages costs about 50,000.
const FUEL: u64 = 500_000;

/// Longest template in bytes; the longest published ones have about 20,000.
const LONGEST_TEMPLATE: usize = 1 << 20;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of a role.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// How a conversation becomes one text.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// `bos_token` and the like, as variables of the template.
    special: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Parses a template; `special` are names and texts of special tokens it may use.
    pub fn new(source: String, special: Vec<(String, String)>) -> Result<Self> {
        if source.len() > LONGEST_TEMPLATE {
            return Err(Error::Chat(format!(
                "is {} bytes long, more than {LONGEST_TEMPLATE}",
                source.len()
            )));
        }
        let mut environment = Environment::new();
        // As transformers sets its own Jinja up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Chat(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned("chat", without_generation_tags(&source))
            .map_err(|e| Error::Chat(format!("cannot be parsed: {e}")))?;
        Ok(Self { environment: Arc::new(environment), special })
    }

    /// The text of a conversation; `answer_next` adds the opening of the assistant's next turn.
    pub fn render(&self, messages: &[Message], answer_next: bool) -> Result<String> {
        let fail = |e: minijinja::Error| match e.kind() {
            ErrorKind::OutOfFuel => {
                Error::Chat("did not end within its limit of steps; it is broken or hostile".into())
            }
            _ => Error::Chat(format!("{e}")),
        };
        let message = |m: &Message| {
            Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())])
        };
        let variables = context! {
            messages => messages.iter().map(message).collect::<Vec<Value>>(),
            add_generation_prompt => answer_next,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_pairs(self.special.iter().map(|(k, v)| (k.as_str(), v.as_str())))
        };
        let template = self.environment.get_template("chat").map_err(fail)?;
        template.render(variables).map_err(fail)
    }
}

/// `{% generation %}` marks the assistant's words for training; for writing it is a plain block.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        let word = inside.trim_matches(['-', '+', ' ', '\n', '\t']);
        let replaced = match word {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => inside.to_owned(),
        };
        out.push_str("{%");
        out.push_str(&replaced);
        out.push_str("%}");
        rest = &tag[end + 2..];
    }
    out + rest
}

fn raise_exception(text: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
}

/// The current time in UTC.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    chat_time::strftime(format, now.map_or(0, |d| d.as_secs()))
        .map_err(|text| minijinja::Error::new(ErrorKind::InvalidOperation, text))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…)`: no HTML escapes, and a space
/// after each comma and colon when on one line.
fn tojson(
    state: &mut State,
    value: &Value,
    options: Kwargs,
    _rest: Rest<Value>,
) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let fail =
        |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let value = serde_json::to_value(value).map_err(fail)?;
    let mut out = String::new();
    write_json(&mut out, &value, indent.map(|n| n.min(16)), 0);
    // What the engine charges for data that it makes itself.
    state.consume_fuel(out.len() as u64 / 64)?;
    Ok(Value::from_safe_string(out))
}

fn write_json(out: &mut String, value: &serde_json::Value, indent: Option<usize>, depth: usize) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { comma });
                line(out, depth + 1);
                write_json(out, item, indent, depth + 1);
            }
            line(out, depth);
            out.push(']');
        }
        serde_json::Value::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { comma });
                line(out, depth + 1);
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(out, item, indent, depth + 1);
            }
            line(out, depth);
            out.push('}');
        }
        plain => out.push_str(&plain.to_string()),
    }
}
