//! Tools: what a client offers, and the calls that a model writes.
//!
//! Two ways of writing a call are known: Hermes' and Qwen's, JSON between `<tool_call>` and
//! `</tool_call>`, and Llama's, an answer that is nothing but JSON.

use serde_json::{Map, Value, json};

use super::constraint::Guide;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, list};
use super::limits;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Characters of a tool's name: OpenAI's bound.
const NAME: usize = 64;

/// The tools of a request.
#[derive(Clone, Debug, Default)]
pub struct Tools {
    /// As the template sees them.
    pub list: Vec<Value>,
    names: Vec<String>,
    /// The shape of an answer that has to be a call.
    pub forced: Option<Guide>,
}

/// A call that a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// JSON text, as OpenAI's clients expect.
    pub arguments: String,
}

impl Tools {
    /// Takes `tools` and `tool_choice`; none when there are none, or none may be called.
    pub fn take(fields: &mut Fields) -> ApiResult<Option<Self>> {
        fields.refuse("functions", "use `tools`")?;
        fields.refuse("function_call", "use `tool_choice`")?;
        let given = fields.list("tools", limits::TOOLS)?.unwrap_or_default();
        let choice = fields.take("tool_choice");
        if let Some(choice) = choice.as_ref().filter(|c| given.is_empty() && *c != "none") {
            let message = format!("`tool_choice` is {choice}, but there are no `tools`");
            return Err(ApiError::field("tool_choice", message));
        }
        let mut tools = Self::default();
        let mut shapes = Vec::new();
        let mut bytes = 0;
        for (at, tool) in given.into_iter().enumerate() {
            bytes += tool.to_string().len();
            let path = format!("tools[{at}]");
            if bytes > limits::SCHEMA_BYTES {
                let most = limits::SCHEMA_BYTES;
                let message = format!("the tools together have more than {most} bytes");
                return Err(ApiError::field("tools", message));
            }
            let (name, parameters) = tool_parts(&path, &tool)?;
            if tools.names.contains(&name) {
                return Err(ApiError::field(&path, format!("there are two tools {name:?}")));
            }
            shapes.push(json!({
                "type": "object",
                "properties": { "name": { "const": &name }, "arguments": parameters },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            }));
            tools.names.push(name);
            tools.list.push(tool);
        }
        match choice {
            None => {}
            Some(Value::String(word)) if word == "auto" => {}
            Some(Value::String(word)) if word == "none" => return Ok(None),
            Some(Value::String(word)) if word == "required" => {
                tools.forced = Some(Guide::Schema(json!({ "anyOf": shapes })));
            }
            Some(choice) => {
                let name = choice["function"]["name"].as_str();
                let at = name.and_then(|name| tools.names.iter().position(|n| n == name));
                let Some(at) = at.filter(|_| choice["type"] == "function") else {
                    let message = "`tool_choice` is not \"none\", \"auto\", \"required\" or \
                                   {\"type\": \"function\", \"function\": {\"name\": one of the \
                                   tools}}";
                    return Err(ApiError::field("tool_choice", message));
                };
                tools.forced = Some(Guide::Schema(shapes.swap_remove(at)));
            }
        }
        Ok((!tools.list.is_empty()).then_some(tools))
    }

    /// Splits an answer into its text and its calls. Of what is no call to a tool that is there,
    /// nothing is lost: it stays text.
    pub fn parse(&self, answer: &str) -> (String, Vec<Call>) {
        let whole = answer.trim().trim_start_matches("<|python_tag|>");
        if let Some(calls) = self.calls(whole) {
            return (String::new(), calls);
        }
        let (mut text, mut calls) = (String::new(), Vec::new());
        let mut rest = answer;
        while let Some((before, after)) = rest.split_once(OPEN) {
            // The last call's end is often an end of text.
            let (inside, left) = after.split_once(CLOSE).unwrap_or((after, ""));
            text.push_str(before);
            match self.calls(inside.trim()) {
                Some(found) => calls.extend(found),
                None => text.push_str(&rest[before.len()..rest.len() - left.len()]),
            }
            rest = left;
        }
        text.push_str(rest);
        if !calls.is_empty() {
            text = text.trim().to_owned();
        }
        calls.truncate(limits::TOOLS);
        (text, calls)
    }

    /// The calls that a JSON text is, if it is nothing else: one, a list, or several with `;`.
    fn calls(&self, text: &str) -> Option<Vec<Call>> {
        if !text.starts_with(['{', '[']) {
            return None;
        }
        let values = match serde_json::from_str(text) {
            Ok(Value::Array(values)) => values,
            Ok(value) => vec![value],
            Err(_) => {
                let parts = text.split(';').map(|part| serde_json::from_str(part.trim()).ok());
                parts.collect::<Option<Vec<Value>>>()?
            }
        };
        let calls: Option<Vec<Call>> = values.iter().map(|value| self.call(value)).collect();
        calls.filter(|calls| !calls.is_empty())
    }

    fn call(&self, value: &Value) -> Option<Call> {
        let value = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
        let name = value["name"].as_str()?;
        let arguments = value.get("arguments").or_else(|| value.get("parameters"));
        let arguments = match arguments {
            None => "{}".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        };
        let known = self.names.iter().any(|n| n == name);
        known.then(|| Call { name: name.to_owned(), arguments })
    }
}

/// The name of a tool, and the schema of its parameters.
fn tool_parts(path: &str, tool: &Value) -> ApiResult<(String, Value)> {
    let wrong = |message: &str| ApiError::field(path, format!("`{path}` {message}"));
    if tool["type"] != "function" {
        return Err(wrong("is not of type \"function\", the one that is known"));
    }
    let function = &tool["function"];
    let name = function["name"].as_str().unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > NAME || !name.chars().all(plain) {
        return Err(wrong("needs a function.name of 1 to 64 letters, digits, _, - and ."));
    }
    if !matches!(function["description"], Value::Null | Value::String(_)) {
        return Err(wrong("has a function.description that is no text"));
    }
    let parameters = match &function["parameters"] {
        Value::Null => json!({ "type": "object" }),
        object @ Value::Object(_) => object.clone(),
        _ => return Err(wrong("has function.parameters that are no JSON schema")),
    };
    Ok((name.to_owned(), parameters))
}

/// The calls of an earlier answer as templates expect them: arguments as values, not as text.
pub fn earlier_calls(path: &str, value: Value) -> ApiResult<Vec<Value>> {
    let mut calls = list(path, value, limits::TOOLS)?;
    for (at, call) in calls.iter_mut().enumerate() {
        let path = format!("{path}[{at}]");
        let wrong = || {
            let message = format!("`{path}` needs a function with a name and arguments");
            ApiError::field(&path, message)
        };
        let function = call.get_mut("function").and_then(Value::as_object_mut).ok_or_else(wrong)?;
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong());
        }
        let arguments = function.entry("arguments").or_insert(Value::Null);
        let read = match arguments {
            Value::String(text) => serde_json::from_str(text).ok(),
            Value::Null => Some(Value::Object(Map::new())),
            Value::Object(_) => None,
            _ => return Err(wrong()),
        };
        if let Some(value) = read {
            *arguments = value;
        }
    }
    Ok(calls)
}

/// Passes an answer's text on while it cannot be a call.
pub struct CallFilter<'t> {
    tools: &'t Tools,
    held: String,
    /// Whether everything is held until the end.
    holds: bool,
    begun: bool,
}

impl<'t> CallFilter<'t> {
    /// A filter for calls of these tools.
    pub fn new(tools: &'t Tools) -> Self {
        Self { tools, held: String::new(), holds: false, begun: false }
    }

    /// Takes text; returns what can be shown.
    pub fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if !self.begun {
            let begins = self.held.trim_start();
            if begins.is_empty() {
                return String::new();
            }
            self.begun = true;
            self.holds = begins.starts_with(['{', '[']);
        }
        if self.holds {
            return String::new();
        }
        let keep = match self.held.find(OPEN) {
            Some(at) => {
                self.holds = true;
                self.held.len() - at
            }
            None => (1..OPEN.len()).rev().find(|&n| self.held.ends_with(&OPEN[..n])).unwrap_or(0),
        };
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The rest of the text, and the calls.
    pub fn finish(&mut self) -> (String, Vec<Call>) {
        self.tools.parse(&std::mem::take(&mut self.held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Tools {
        let body = json!({ "tools": [
            { "type": "function", "function": { "name": "sum", "parameters": { "type": "object" } } },
            { "type": "function", "function": { "name": "now" } },
        ]});
        Tools::take(&mut Fields::parse(body.to_string().as_bytes()).unwrap()).unwrap().unwrap()
    }

    fn call(name: &str, arguments: &str) -> Call {
        Call { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_are_found_as_models_write_them() {
        let sum = call("sum", r#"{"a":1}"#);
        for (answer, text, calls) in [
            ("hello", "hello", vec![]),
            (r#"{"name": "sum", "arguments": {"a": 1}}"#, "", vec![sum.clone()]),
            (r#"<|python_tag|>{"name": "sum", "parameters": {"a": 1}}"#, "", vec![sum.clone()]),
            (
                r#"{"name":"sum","parameters":{"a":1}}; {"name":"now"}"#,
                "",
                vec![sum.clone(), call("now", "{}")],
            ),
            (
                "Well:\n<tool_call>\n{\"name\": \"sum\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
                 <tool_call>{\"name\": \"now\", \"arguments\": {}}",
                "Well:",
                vec![sum.clone(), call("now", "{}")],
            ),
            // Nothing of what is no call is lost.
            (r#"{"name": "rm", "arguments": {}}"#, r#"{"name": "rm", "arguments": {}}"#, vec![]),
            ("<tool_call>oops</tool_call> x", "<tool_call>oops</tool_call> x", vec![]),
            ("a </tool_call> b", "a </tool_call> b", vec![]),
            ("[]", "[]", vec![]),
        ] {
            assert_eq!(tools().parse(answer), (text.to_owned(), calls), "{answer}");
        }
    }

    #[test]
    fn a_call_is_never_shown_as_text_wherever_pieces_are_cut() {
        let answer = "A < b <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
        let tools = tools();
        for cut in 1..6 {
            let mut filter = CallFilter::new(&tools);
            let mut shown = String::new();
            for piece in answer.as_bytes().chunks(cut) {
                shown.push_str(&filter.push(std::str::from_utf8(piece).unwrap()));
            }
            assert_eq!(shown, "A < b ");
            assert_eq!(filter.finish(), (String::new(), vec![call("now", "{}")]));
        }
        let mut filter = CallFilter::new(&tools);
        assert_eq!(filter.push("a <tool"), "a ");
        assert_eq!(filter.push("box"), "<toolbox");
    }
}
