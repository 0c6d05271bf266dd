//! The table of one rule, read key by key: what is asked for is what is allowed.

use serde_json::{Map, Value};

use super::error::{Error, Result, excerpt};

/// A rule's table and the keys that were asked for.
pub(super) struct Keys<'a> {
    /// Where the table stands: `reward.rules[0]`.
    at: String,
    table: &'a Map<String, Value>,
    asked: Vec<&'static str>,
}

impl<'a> Keys<'a> {
    pub fn new(at: String, table: &'a Map<String, Value>) -> Self {
        Self { at, table, asked: Vec::new() }
    }

    /// The error of a key; `problem` follows its name.
    pub fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::config(format!("{}.{key}", self.at), problem)
    }

    pub fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.asked.push(key);
        self.table.get(key)
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        what: &str,
        as_type: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match as_type(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.error(key, format!("= {value} is not {what}"))),
        }
    }

    pub fn text(&mut self, key: &'static str) -> Result<Option<&'a str>> {
        let text = self.read(key, "a text", Value::as_str)?;
        match text {
            Some("") => Err(self.error(key, "is empty")),
            text => Ok(text),
        }
    }

    /// `meaning` says what a missing text is for.
    pub fn need_text(&mut self, key: &'static str, meaning: &str) -> Result<&'a str> {
        let text = self.text(key)?;
        text.ok_or_else(|| self.error(key, format!("is missing: {meaning}")))
    }

    pub fn flag(&mut self, key: &'static str, default: bool) -> Result<bool> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn count(&mut self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, "a whole number from 0", |v| v.as_u64()?.try_into().ok())
    }

    /// A finite number; NaN and infinities of TOML arrive as null.
    pub fn number(&mut self, key: &'static str) -> Result<Option<f64>> {
        self.read(key, "a finite number", Value::as_f64)
    }

    /// `min` and `max`, which may not cross; none leaves that side open.
    pub fn range(&mut self) -> Result<(usize, usize)> {
        let (min, max) = (self.count("min")?.unwrap_or(0), self.count("max")?);
        let max = max.unwrap_or(usize::MAX);
        if min > max {
            return Err(self.error("min", format!("= {min} is more than max = {max}")));
        }
        Ok((min, max))
    }

    /// One of some words, each with its meaning; the first when the key is absent and optional.
    pub fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        needed: bool,
        choices: &[(&str, T)],
    ) -> Result<T> {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let Some(value) = self.value(key) else {
            if needed {
                let problem = format!("is missing: one of {}", names.join(", "));
                return Err(self.error(key, problem));
            }
            return Ok(choices[0].1);
        };
        let found = choices.iter().find(|(name, _)| value.as_str() == Some(name));
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            self.error(key, format!("= {value} is not known; expected one of {}", names.join(", ")))
        })
    }

    /// A list of texts that are not empty; one at least.
    pub fn texts(&mut self, key: &'static str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match texts(value) {
            Ok(texts) => Ok(Some(texts)),
            Err(problem) => Err(self.error(key, problem)),
        }
    }

    /// Refuses keys that nothing asked for.
    pub fn done(self) -> Result<()> {
        match self.table.keys().find(|key| !self.asked.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let problem =
                    format!("is not a key of this rule; known here: {}", self.asked.join(", "));
                Err(self.error(key, problem))
            }
        }
    }
}

/// A JSON list of texts that are not empty, or what is wrong with it.
pub(super) fn texts(value: &Value) -> std::result::Result<Vec<String>, String> {
    let wrong = || {
        let value = excerpt(&value.to_string());
        format!("= {value} is not a list of one or more texts that are not empty")
    };
    let items = value.as_array().filter(|items| !items.is_empty()).ok_or_else(wrong)?;
    let text = |item: &Value| item.as_str().filter(|t| !t.is_empty()).map(str::to_owned);
    items.iter().map(text).collect::<Option<_>>().ok_or_else(wrong)
}
