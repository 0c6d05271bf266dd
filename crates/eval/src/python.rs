//! Python's way of writing values, and of reading them back: lm-eval's templates give lists as
//! text (`str(list)`), which it parses again (`ast.literal_eval`).

use minijinja::value::{Value, ValueKind};
use serde_json::Value as Json;

/// Deeper values are refused; Python itself gives up at some hundred.
const DEEPEST: usize = 100;

/// `str(value)`: what Jinja prints.
pub(crate) fn print(value: &Value) -> Result<String, String> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => {
            let mut out = String::new();
            write(value, 0, &mut out)?;
            Ok(out)
        }
    }
}

/// `repr(value)`, appended.
fn write(value: &Value, depth: usize, out: &mut String) -> Result<(), String> {
    if depth > DEEPEST {
        return Err(format!("prints a value more than {DEEPEST} deep"));
    }
    let fail = |e: minijinja::Error| e.to_string();
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
        ValueKind::Number => {
            let number = f64::try_from(value.clone()).map_err(fail)?;
            out.push_str(&float(number));
        }
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter().map_err(fail)?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write(&item, depth + 1, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().map_err(fail)?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write(&key, depth + 1, out)?;
                out.push_str(": ");
                write(&value.get_item(&key).map_err(fail)?, depth + 1, out)?;
            }
            out.push('}');
        }
        kind => return Err(format!("prints a value of kind {kind}, which has no text")),
    }
    Ok(())
}

/// `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
pub(crate) fn float(number: f64) -> String {
    let size = number.abs();
    if !number.is_finite() {
        return format!("{number}").to_lowercase();
    }
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{number:?}")
}

/// `repr` of a text: single quotes, unless only those are inside. Of the characters that Python
/// does not print as they are, the controls are escaped; the parser here takes all of them.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(mark);
}

/// `ast.literal_eval`, of texts, numbers, `True`, `False`, `None` and lists or tuples of them; a
/// tuple comes as a list. None for anything else.
pub(crate) fn literal(text: &str) -> Option<Json> {
    let mut reader = Reader { rest: text.trim_matches([' ', '\t']) };
    let value = reader.value(0)?;
    reader.space();
    reader.rest.is_empty().then_some(value)
}

struct Reader<'t> {
    rest: &'t str,
}

impl Reader<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn take(&mut self, mark: char) -> bool {
        self.space();
        let rest = self.rest.strip_prefix(mark);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        self.space();
        match self.rest.chars().next()? {
            _ if depth > DEEPEST => None,
            '[' => self.list(']', depth),
            '(' => self.list(')', depth),
            '\'' | '"' => {
                let mut whole = self.text()?;
                // Texts side by side are one.
                loop {
                    self.space();
                    if !self.rest.starts_with(['\'', '"']) {
                        return Some(Json::String(whole));
                    }
                    whole.push_str(&self.text()?);
                }
            }
            _ => {
                let end = self.rest.find(|c: char| ",]) \n\t\r".contains(c));
                let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
                self.rest = rest;
                match word {
                    "True" => Some(Json::Bool(true)),
                    "False" => Some(Json::Bool(false)),
                    "None" => Some(Json::Null),
                    _ => number(word),
                }
            }
        }
    }

    fn list(&mut self, end: char, depth: usize) -> Option<Json> {
        self.rest = &self.rest[1..];
        let mut items = Vec::new();
        let mut comma = true;
        while !self.take(end) {
            if !comma {
                return None;
            }
            items.push(self.value(depth + 1)?);
            comma = self.take(',');
        }
        // `(x)` is x.
        if end == ')' && items.len() == 1 && !comma {
            return items.pop();
        }
        Some(Json::Array(items))
    }

    fn text(&mut self) -> Option<String> {
        let mark = self.rest.chars().next()?;
        let mut chars = self.rest[1..].chars();
        let mut out = String::new();
        loop {
            match chars.next()? {
                c if c == mark => break,
                '\n' => return None,
                '\\' => match chars.next()? {
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    '0' => out.push('\0'),
                    c @ ('\\' | '\'' | '"') => out.push(c),
                    '\n' => {}
                    kind @ ('x' | 'u' | 'U') => {
                        let digits = match kind {
                            'x' => 2,
                            'u' => 4,
                            _ => 8,
                        };
                        let hex: String = chars.by_ref().take(digits).collect();
                        let whole = hex.len() == digits;
                        let code = u32::from_str_radix(&hex, 16).ok().filter(|_| whole)?;
                        out.push(char::from_u32(code)?);
                    }
                    _ => return None,
                },
                c => out.push(c),
            }
        }
        self.rest = chars.as_str();
        // An empty text before another quote would begin one of three quotes.
        (!(out.is_empty() && self.rest.starts_with(mark))).then_some(out)
    }
}

fn number(word: &str) -> Option<Json> {
    let body = word.strip_prefix(['-', '+']).unwrap_or(word);
    if !body.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let digits = body.bytes().all(|b| b.is_ascii_digit());
    if digits {
        let padded = body.len() > 1 && body.starts_with('0');
        return (!padded).then(|| word.parse::<i64>().ok()).flatten().map(Json::from);
    }
    word.parse::<f64>().ok().and_then(serde_json::Number::from_f64).map(Json::Number)
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn values_print_as_python_prints_them() {
        // repr() of Python 3.11.
        for (value, text) in [
            (
                json!(["a", "it's", "say \"x\"", "both ' and \""]),
                r#"['a', "it's", 'say "x"', 'both \' and "']"#,
            ),
            (
                json!([true, false, null, 1, -2.5, 1e20, 1e-5, 1.0]),
                "[True, False, None, 1, -2.5, 1e+20, 1e-05, 1.0]",
            ),
            (json!({ "k": ["\n\\", "é"] }), r"{'k': ['\n\\', 'é']}"),
            (json!("plain"), "plain"),
        ] {
            assert_eq!(print(&Value::from(Serde(&value))).unwrap(), text);
        }
    }

    #[test]
    fn literals_are_read_as_python_reads_them() {
        for (text, value) in [
            ("['a', \"b\",]", Some(json!(["a", "b"]))),
            ("('a', 'b')", Some(json!(["a", "b"]))),
            ("('a')", Some(json!("a"))),
            ("[1, 2.5, -3, True, None]", Some(json!([1, 2.5, -3, true, null]))),
            ("['a' 'b']", Some(json!(["ab"]))),
            (r"['\x41\u00e9\n']", Some(json!(["Aé\n"]))),
            ("[]", Some(json!([]))),
            ("['', 'x']", Some(json!(["", "x"]))),
            ("['a'", None),
            ("[a]", None),
            ("[1,,2]", None),
            ("['a'] x", None),
            ("'''x'''", None),
            ("007", None),
            ("nan", None),
            ("", None),
        ] {
            assert_eq!(literal(text), value, "{text}");
        }
        assert_eq!(literal(&"[".repeat(100_000)), None);
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(texts in prop::collection::vec(".*", 0..6)) {
            let value = json!(texts);
            let printed = print(&Value::from(Serde(&value))).unwrap();
            prop_assert_eq!(literal(&printed), Some(value));
        }
    }
}
