//! A request's fields, taken one by one: each has a type and a range, and none is left over.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, ApiResult};
use super::limits;

/// What OpenAI documents and this server has no use for: accepted, without effect.
const WITHOUT_EFFECT: [&str; 11] = [
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

/// An object of a request's body. Each field is taken once; null is as good as absent.
pub struct Fields {
    /// Where the object stands, "" or `stream_options.` and the like.
    path: String,
    map: Map<String, Value>,
    /// Names that were asked for, for "did you mean" and for the OpenAPI document's test.
    asked: Vec<&'static str>,
}

impl Fields {
    /// Reads a body: UTF-8, JSON no deeper than [`limits::JSON_DEPTH`], an object.
    pub fn parse(body: &[u8]) -> ApiResult<Self> {
        let text = std::str::from_utf8(body)
            .map_err(|e| ApiError::invalid(format!("the body is not UTF-8: {e}")))?;
        match parse("the body", text).map_err(ApiError::invalid)? {
            Value::Object(map) => Ok(Self::of(String::new(), map)),
            other => {
                let kind = kind(&other);
                Err(ApiError::invalid(format!("the body is {kind}; expected a JSON object")))
            }
        }
    }

    fn of(path: String, map: Map<String, Value>) -> Self {
        Self { path, map, asked: Vec::new() }
    }

    /// The object in `value`, which stands at `path`.
    pub fn object(path: &str, value: Value) -> ApiResult<Self> {
        match value {
            Value::Object(map) => Ok(Self::of(format!("{path}."), map)),
            other => Err(expected(path, "an object", &other)),
        }
    }

    /// The field's value, unless it is absent or null.
    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.asked.push(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Where a field stands.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// A finite number in a range.
    pub fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<f64>,
    ) -> ApiResult<Option<f64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let Some(number) = value.as_f64() else { return Err(expected(&path, "a number", &value)) };
        if range.contains(&number) {
            return Ok(Some(number));
        }
        let (least, most) = range.into_inner();
        let message = format!("`{path}` = {value} is outside {least} to {most}");
        Err(ApiError::field(&path, message))
    }

    /// A whole number in a range.
    pub fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> ApiResult<Option<i64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        integer(&self.path(name), &value, range).map(Some)
    }

    /// A count that fits the machine, `least` to `most`.
    pub fn count(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> ApiResult<Option<usize>> {
        let count = self.integer(name, range)?;
        Ok(count.map(|n| usize::try_from(n).unwrap_or(0)))
    }

    /// True or false.
    pub fn flag(&mut self, name: &'static str) -> ApiResult<Option<bool>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let wrong = || expected(&self.path(name), "true or false", &value);
        value.as_bool().map(Some).ok_or_else(wrong)
    }

    /// A text of at most so many bytes.
    pub fn text(&mut self, name: &'static str, most: usize) -> ApiResult<Option<String>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        text(&self.path(name), value, most).map(Some)
    }

    /// A list of at most so many values.
    pub fn list(&mut self, name: &'static str, most: usize) -> ApiResult<Option<Vec<Value>>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        list(&self.path(name), value, most).map(Some)
    }

    /// An object inside this one.
    pub fn inner(&mut self, name: &'static str) -> ApiResult<Option<Self>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        Self::object(&self.path(name), value).map(Some)
    }

    /// Refuses a field whose meaning is not offered, with what to do instead.
    pub fn refuse(&mut self, name: &'static str, instead: &str) -> ApiResult<()> {
        match self.take(name) {
            None => Ok(()),
            Some(_) => Err(ApiError::field(name, format!("`{name}` is not offered: {instead}"))),
        }
    }

    /// Names that were asked for.
    #[cfg(test)]
    pub fn asked(&self) -> &[&'static str] {
        &self.asked
    }

    /// Refuses what was not asked for. On the outermost object, fields that OpenAI documents and
    /// we have no use for are let pass.
    pub fn finish(mut self) -> ApiResult<()> {
        self.map.retain(|_, value| !value.is_null());
        if self.path.is_empty() {
            self.map.retain(|name, _| !WITHOUT_EFFECT.contains(&name.as_str()));
        }
        let Some(name) = self.map.keys().next() else { return Ok(()) };
        let near = self
            .asked
            .iter()
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
        let near = near.filter(|near| strsim::jaro_winkler(near, name) > 0.85);
        let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        let path: String = self.path(name).chars().take(100).collect();
        Err(ApiError::field(&path, format!("`{path}` is not a field that is known here{hint}")))
    }
}

/// JSON no deeper than [`limits::JSON_DEPTH`]; the error says it of `what`.
pub fn parse(what: &str, text: &str) -> Result<Value, String> {
    if depth(text.as_bytes()) > limits::JSON_DEPTH {
        return Err(format!("{what} is nested deeper than {}", limits::JSON_DEPTH));
    }
    serde_json::from_str(text).map_err(|e| format!("{what} is not JSON: {e}"))
}

/// A whole number in a range.
pub fn integer(path: &str, value: &Value, range: RangeInclusive<i64>) -> ApiResult<i64> {
    let (least, most) = range.into_inner();
    if !value.is_number() {
        return Err(expected(path, "a whole number", value));
    }
    // 3.0 is a whole number, as in JSON Schema; past 2^53 a float may be none of what was meant.
    let exact = |x: &f64| x.fract() == 0.0 && x.abs() <= (1u64 << 53) as f64;
    let floated = value.as_f64().filter(exact).filter(|_| value.is_f64());
    match value.as_i64().or(floated.map(|x| x as i64)) {
        Some(n) if (least..=most).contains(&n) => Ok(n),
        None if value.is_f64() => {
            Err(ApiError::field(path, format!("`{path}` = {value} is not a whole number")))
        }
        _ => {
            let message = format!("`{path}` = {value} is outside {least} to {most}");
            Err(ApiError::field(path, message))
        }
    }
}

/// A text of at most so many bytes.
pub fn text(path: &str, value: Value, most: usize) -> ApiResult<String> {
    match value {
        Value::String(text) if text.len() <= most => Ok(text),
        Value::String(text) => Err(ApiError::field(
            path,
            format!("`{path}` has {} bytes; at most {most} are taken", text.len()),
        )),
        other => Err(expected(path, "a text", &other)),
    }
}

/// A list of at most so many values.
pub fn list(path: &str, value: Value, most: usize) -> ApiResult<Vec<Value>> {
    match value {
        Value::Array(list) if list.len() <= most => Ok(list),
        Value::Array(list) => Err(ApiError::field(
            path,
            format!("`{path}` has {} entries; at most {most} are taken", list.len()),
        )),
        other => Err(expected(path, "a list", &other)),
    }
}

/// The error of a value of the wrong type.
pub fn expected(path: &str, wanted: &str, got: &Value) -> ApiError {
    ApiError::field(path, format!("`{path}` is {}; expected {wanted}", kind(got)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// How deep arrays and objects stand inside each other, texts left out.
fn depth(body: &[u8]) -> usize {
    let (mut now, mut most, mut quoted, mut escaped) = (0usize, 0, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                now += 1;
                most = most.max(now);
            }
            b']' | b'}' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn numbers_are_taken_at_their_bounds_and_refused_beyond() {
        for (text, fine) in [
            ("0", true),
            ("2", true),
            ("-0.0", true),
            ("2.0000001", false),
            ("-1e-300", false),
            ("1e308", false),
            ("\"1\"", false),
            ("[1]", false),
            ("true", false),
        ] {
            let got = fields(&format!("{{\"x\":{text}}}")).number("x", 0.0..=2.0);
            assert_eq!(got.is_ok(), fine, "{text}: {got:?}");
        }
        for (text, fine) in [
            ("1", true),
            ("8", true),
            ("0", false),
            ("9", false),
            ("3.0", true),
            ("1.5", false),
            ("1e3", false),
            ("18446744073709551615", false),
            ("99999999999999999999999999", false),
            ("-9223372036854775808", false),
        ] {
            let got = fields(&format!("{{\"x\":{text}}}")).integer("x", 1..=8);
            assert_eq!(got.is_ok(), fine, "{text}: {got:?}");
        }
        assert_eq!(fields("{\"x\":null}").number("x", 0.0..=1.0), Ok(None));
        assert!(Fields::parse(b"{\"x\":1e999}").is_err());
        assert!(Fields::parse(b"{\"x\":NaN}").is_err());
    }

    #[test]
    fn what_is_left_over_is_refused_with_a_hint() {
        let mut fields = fields("{\"temprature\":1,\"user\":\"x\"}");
        assert_eq!(fields.number("temperature", 0.0..=2.0), Ok(None));
        let error = fields.finish().unwrap_err();
        assert!(error.message.contains("did you mean `temperature`"), "{}", error.message);
        assert_eq!(error.param.as_deref(), Some("temprature"));
    }

    #[test]
    fn depth_is_counted_outside_of_texts() {
        assert_eq!(depth(br#"{"a":"[[[[\"[["}"#), 1);
        assert_eq!(depth(b"[[[]]][[]]"), 3);
        let deep = "[".repeat(100_000);
        assert!(Fields::parse(deep.as_bytes()).is_err());
        assert!(Fields::parse(&[0x7b, 0xff, 0x7d]).is_err());
    }
}
