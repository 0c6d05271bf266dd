//! The `tojson` filter of chat templates: Python's `json.dumps(value, ensure_ascii=False, indent=…)`.
//!
//! Unlike Jinja's own, it escapes nothing for HTML, and it puts a space after each comma and colon
//! when all is on one line; models were trained on exactly this text.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Values inside values; beyond this a template is playing.
const DEEPEST: usize = 100;

/// Widest indentation.
const WIDEST: usize = 16;

/// The filter. `indent` is followed; the options that do not change what we write are accepted.
pub(crate) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let mut writer = Writer { state, out: String::new(), indent: indent.map(|n| n.min(WIDEST)) };
    writer.value(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct Writer<'s, 't, 'e> {
    state: &'s State<'t, 'e>,
    out: String,
    indent: Option<usize>,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // A value may hold itself many times over: pay for each writing, before it.
        self.state.consume_fuel(1)?;
        if depth > DEEPEST {
            return Err(Error::new(ErrorKind::BadSerialization, "tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.text(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut count = 0;
                for item in value.try_iter()? {
                    self.separate(count, depth + 1);
                    self.value(&item, depth + 1)?;
                    count += 1;
                }
                self.close(']', count, depth);
            }
            ValueKind::Map => {
                self.out.push('{');
                let mut count = 0;
                for key in value.try_iter()? {
                    self.separate(count, depth + 1);
                    self.text(&key.to_string())?;
                    self.out.push_str(": ");
                    self.value(&value.get_item(&key)?, depth + 1)?;
                    count += 1;
                }
                self.close('}', count, depth);
            }
            other => {
                let text = format!("tojson: a {other} has no JSON form");
                return Err(Error::new(ErrorKind::BadSerialization, text));
            }
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 64)?;
        self.out.push_str(&serde_json::Value::from(text).to_string());
        Ok(())
    }

    fn separate(&mut self, before: usize, depth: usize) {
        if before > 0 {
            self.out.push_str(if self.indent.is_some() { "," } else { ", " });
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, count: usize, depth: usize) {
        if count > 0 {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}
