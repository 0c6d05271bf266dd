//! Chat templates: Jinja as Hugging Face writes it, run on a fixed amount of fuel.
//!
//! A template comes with a model, from strangers. It cannot read files or the network, and what
//! it may compute (instructions and bytes alike) is bounded by fuel, so the worst it can do is
//! fail.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, ErrorKind, context};

use crate::{Error, Result, chat_json, chat_methods, chat_time};

/// Instructions and 64-byte pieces of data a template may cost; a conversation of a thousand
/// messages costs about 50,000.
const FUEL: u64 = 500_000;

/// Stack of a running template: 500,000 units of fuel build values about 100,000 deep, and
/// printing one takes about a kilobyte a level. Only what is used is ever committed.
const STACK: usize = 1 << 28;

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
    /// Whether the template speaks of tools at all.
    tools: bool,
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
        environment.set_unknown_method_callback(chat_methods::call);
        // Printers for a template's author; on deeply nested values they take minutes.
        environment.remove_filter("pprint");
        environment.remove_global("debug");
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", chat_json::tojson);
        environment
            .add_template_owned("chat", without_generation_tags(&source))
            .map_err(|e| Error::Chat(format!("cannot be parsed: {e}")))?;
        Ok(Self { environment: Arc::new(environment), special, tools: source.contains("tools") })
    }

    /// The text of a conversation; `answer_next` adds the opening of the assistant's next turn.
    pub fn render(&self, messages: &[Message], answer_next: bool) -> Result<String> {
        let message = |m: &Message| {
            Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())])
        };
        let messages = messages.iter().map(message).collect::<Vec<Value>>();
        self.run(messages.into(), Value::from(()), answer_next)
    }

    /// As [`ChatTemplate::render`], for messages with more than a role and a text: `messages` is
    /// a list of objects, `tools` a list of tools as OpenAI describes them, both as the template
    /// is to see them.
    pub fn render_with_tools(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        answer_next: bool,
    ) -> Result<String> {
        self.run(Serde(messages).into(), Serde(tools).into(), answer_next)
    }

    /// Whether the template has a place for tools.
    pub fn knows_tools(&self) -> bool {
        self.tools
    }

    fn run(&self, messages: Value, tools: Value, answer_next: bool) -> Result<String> {
        let fail = |e: minijinja::Error| match e.kind() {
            ErrorKind::OutOfFuel => {
                Error::Chat("did not end within its limit of steps; it is broken or hostile".into())
            }
            _ => Error::Chat(format!("{e}")),
        };
        let variables = context! {
            messages => messages,
            add_generation_prompt => answer_next,
            tools => tools,
            documents => Value::from(()),
            ..Value::from_pairs(self.special.iter().map(|(k, v)| (k.as_str(), v.as_str())))
        };
        let run = || {
            self.environment.get_template("chat").and_then(|t| t.render(variables)).map_err(fail)
        };
        // A template can build a value as deep as its fuel lasts, and dropping it recurses.
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, run);
            let thread = thread.map_err(|e| Error::Chat(format!("cannot be run: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(Error::Chat("made its engine fail".into())))
        })
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
