//! Grammars that an answer keeps to: a JSON schema, a regular expression, a list of texts.
//!
//! `llguidance` compiles them, on a fixed amount of fuel, and says before each token which may
//! follow. Schemas and expressions come from strangers: their size is bounded before they reach
//! it, and what goes wrong inside is the request's error.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::panic_utils::catch_unwind;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::fields::{Fields, expected, list, parse, text};
use super::limits;
use super::text::Text;
use crate::engine::Constraint;

/// Characters of what the compiler says that are passed on.
const SAID: usize = 300;

/// What an answer has to look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Guide {
    /// JSON of this schema.
    Schema(Value),
    /// This regular expression, from end to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Guide {
    /// Takes what OpenAI's and vLLM's clients send; at most one of it.
    pub fn take(fields: &mut Fields) -> ApiResult<Option<Self>> {
        let mut guides = Vec::new();
        if let Some(format) = fields.inner("response_format")? {
            guides.extend(response_format(format)?);
        }
        if let Some(schema) = fields.take("guided_json") {
            guides.push(Self::schema("guided_json", schema)?);
        }
        if let Some(regex) = fields.text("guided_regex", limits::REGEX_BYTES)? {
            guides.push(Self::Regex(regex));
        }
        if let Some(choices) = fields.list("guided_choice", limits::GUIDED_CHOICES)? {
            guides.push(Self::choice("guided_choice", choices)?);
        }
        if let Some(mut inner) = fields.inner("structured_outputs")? {
            if let Some(schema) = inner.take("json") {
                guides.push(Self::schema("structured_outputs.json", schema)?);
            }
            if let Some(regex) = inner.text("regex", limits::REGEX_BYTES)? {
                guides.push(Self::Regex(regex));
            }
            if let Some(choices) = inner.take("choice") {
                let choices = list("structured_outputs.choice", choices, limits::GUIDED_CHOICES)?;
                guides.push(Self::choice("structured_outputs.choice", choices)?);
            }
            inner.finish()?;
        }
        if guides.len() > 1 {
            let message = "more than one shape is asked for: of `response_format`, `guided_json`, \
                           `guided_regex`, `guided_choice` and `structured_outputs` give one";
            return Err(ApiError::invalid(message));
        }
        Ok(guides.pop())
    }

    /// A schema that is an object or a boolean, written out or as JSON text, within bounds.
    pub fn schema(path: &str, value: Value) -> ApiResult<Self> {
        let value = match value {
            value @ Value::String(_) => {
                let text = text(path, value, limits::SCHEMA_BYTES)?;
                parse(&format!("`{path}`"), &text).map_err(|e| ApiError::field(path, e))?
            }
            other => other,
        };
        if !value.is_object() && !value.is_boolean() {
            return Err(expected(path, "a JSON schema", &value));
        }
        let bytes = value.to_string().len();
        if bytes > limits::SCHEMA_BYTES {
            let most = limits::SCHEMA_BYTES;
            let message = format!("`{path}` has {bytes} bytes; at most {most} are taken");
            return Err(ApiError::field(path, message));
        }
        Ok(Self::Schema(value))
    }

    fn choice(path: &str, choices: Vec<Value>) -> ApiResult<Self> {
        let texts = choices.into_iter().map(|c| text(path, c, limits::NAME_CHARS));
        let texts = texts.collect::<ApiResult<Vec<String>>>()?;
        if texts.is_empty() || texts.iter().any(String::is_empty) {
            return Err(ApiError::field(path, format!("`{path}` needs texts that are not empty")));
        }
        Ok(Self::Choice(texts))
    }

    fn grammar(&self) -> TopLevelGrammar {
        match self {
            Self::Schema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(texts) => {
                // A JSON text is a text of that grammar's language, too.
                let texts: Vec<String> = texts.iter().map(|t| json!(t).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
            }
        }
    }
}

fn response_format(mut format: Fields) -> ApiResult<Option<Guide>> {
    let kind = format.text("type", limits::NAME_CHARS)?.unwrap_or_default();
    let path = "response_format.json_schema";
    let guide = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Guide::Schema(json!({ "type": "object" }))),
        "json_schema" => {
            let mut inner = format
                .inner("json_schema")?
                .ok_or_else(|| ApiError::field(path, format!("`{path}` is missing")))?;
            inner.text("name", limits::NAME_CHARS)?;
            inner.text("description", limits::SCHEMA_BYTES)?;
            inner.flag("strict")?;
            let schema = inner.take("schema").ok_or_else(|| {
                ApiError::field(&format!("{path}.schema"), format!("`{path}.schema` is missing"))
            })?;
            inner.finish()?;
            Some(Guide::schema(&format!("{path}.schema"), schema)?)
        }
        _ => {
            let path = "response_format.type";
            let message = format!("`{path}` is not text, json_object or json_schema");
            return Err(ApiError::field(path, message));
        }
    };
    format.finish()?;
    Ok(guide)
}

/// What all grammars of a model share.
pub struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    fn new(text: &Text) -> Result<Self, String> {
        let mut words: Vec<Vec<u8>> = Vec::with_capacity(text.bytes.len());
        for token in &text.bytes {
            let mut word = token.bytes.clone();
            if token.special {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
            words.push(word);
        }
        let ends: Vec<u32> =
            text.ends.iter().copied().filter(|&id| (id as usize) < words.len()).collect();
        let Some(&first) = ends.first() else {
            return Err("this model has no token that ends a text, which a grammar needs".into());
        };
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&ends)));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        // Walks the whole vocabulary for each large expression: seconds, unmetered.
        factory.limits_mut().precompute_large_lexemes = false;
        Ok(Self { factory })
    }
}

/// A compiled grammar at its start, from which answers begin.
pub struct Grammar(Matcher);

impl Text {
    /// Compiles a grammar; may take long enough to be called off the threads that answer.
    pub fn grammar(&self, guide: &Guide) -> ApiResult<Grammar> {
        let grammars = self.grammars.get_or_init(|| {
            let make = || Grammars::new(self).map_err(|e| std::io::Error::other(e).into());
            catch_unwind(AssertUnwindSafe(make)).map_err(|e| short(&e.to_string()))
        });
        let grammars = grammars.as_ref().map_err(|e| ApiError::invalid(e.clone()))?;
        let compile = || {
            let mut matcher = Matcher::new(grammars.factory.create_parser(guide.grammar()));
            // Errors in what the grammar means show with the first mask only.
            matcher.compute_mask()?;
            Ok(matcher)
        };
        catch_unwind(AssertUnwindSafe(compile)).map(Grammar).map_err(|e| {
            let said = short(&e.to_string());
            ApiError::invalid(format!("the shape asked for cannot be followed: {said}"))
        })
    }
}

impl Grammar {
    /// A copy for one answer, which shares nothing with others.
    pub fn begin(&self) -> Box<dyn Constraint> {
        Box::new(Self(self.0.deep_clone()))
    }
}

impl Constraint for Grammar {
    fn mask(&mut self) -> Result<Option<Vec<u32>>, String> {
        let mask = self.0.compute_mask().map_err(|e| short(&e.to_string()))?;
        Ok(Some(mask.as_slice().to_vec()))
    }

    fn take(&mut self, token: u32) -> Result<(), String> {
        self.0.consume_token(token).map_err(|e| short(&e.to_string()))
    }

    fn is_done(&self) -> bool {
        self.0.is_stopped()
    }
}

/// The first line, cut: what follows is for the compiler's authors. A parser of expressions says
/// last what was wrong.
fn short(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    let cause = text.lines().find_map(|line| line.strip_prefix("error: "));
    first
        .chars()
        .chain(cause.into_iter().flat_map(|c| [" ", c]).flat_map(str::chars))
        .take(SAID)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_the_same_written_out_or_as_text() {
        for schema in [json!(true), json!(false), json!({ "type": "integer" }), json!({})] {
            let written = Guide::schema("s", schema.clone());
            assert_eq!(written, Ok(Guide::Schema(schema.clone())));
            assert_eq!(Guide::schema("s", schema.to_string().into()), written);
        }
    }

    #[test]
    fn what_is_no_schema_is_refused_by_its_own_name() {
        let deep = "[".repeat(limits::JSON_DEPTH + 1);
        let long = " ".repeat(limits::SCHEMA_BYTES + 1);
        for (text, word) in [
            ("", "is not JSON"),
            ("{\"a\":", "is not JSON"),
            ("true false", "is not JSON"),
            ("null", "is null; expected a JSON schema"),
            ("[true]", "is a list; expected a JSON schema"),
            ("\"true\"", "is a text; expected a JSON schema"),
            (&deep, "nested deeper"),
            (&long, "at most"),
        ] {
            let error = Guide::schema("guided_json", text.into()).unwrap_err();
            let said = &error.message;
            assert!(said.starts_with("`guided_json` ") && said.contains(word), "{said}");
            assert_eq!(error.param.as_deref(), Some("guided_json"));
        }
    }
}
