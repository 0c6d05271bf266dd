//! Python's string and list methods in Jinja templates (`text.strip()`, `map.items()`), at a price.
//!
//! `minijinja_contrib` computes them, but for nothing: `text.replace(a, b)` may make a text a
//! million times longer in one step. Each call pays in fuel for what it reads and makes.

use minijinja::value::Value;
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one unit of fuel lets a method pass over. Splitting makes a value of a few words
/// out of as little as one byte, so it is less than the 64 of the engine's own filters.
const BYTES: u64 = 8;

/// Calls a method of a template's value: for `Environment::set_unknown_method_callback`.
pub fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let size = value.as_str().map(str::len).or_else(|| value.len()).unwrap_or(0);
    state.consume_fuel(size as u64 / BYTES)?;
    match (value.as_str(), method, args) {
        // A width in the text asks for any amount of padding; no published template formats so.
        (Some(_), "format", _) => return Err(Error::from(ErrorKind::UnknownMethod)),
        (Some(text), "join", [values]) => return join(state, text, values),
        (Some(text), "replace", [old, new, ..]) => {
            let (old, new) = (old.as_str().unwrap_or_default(), new.as_str().unwrap_or_default());
            let made = text.matches(old).count().saturating_mul(new.len());
            state.consume_fuel(made as u64 / BYTES)?;
        }
        _ => {}
    }
    unknown_method_callback(state, value, method, args)
}

fn join(state: &State, separator: &str, values: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for (i, value) in values.try_iter()?.enumerate() {
        let Some(text) = value.as_str() else {
            let text = format!("join needs texts, not a {}", value.kind());
            return Err(Error::new(ErrorKind::InvalidOperation, text));
        };
        state.consume_fuel(1 + (separator.len() + text.len()) as u64 / BYTES)?;
        if i > 0 {
            out.push_str(separator);
        }
        out.push_str(text);
    }
    Ok(Value::from(out))
}
