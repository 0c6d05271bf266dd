//! A task file's YAML as JSON, with the scalars of PyYAML, which is what lm-eval reads them with.
//!
//! `saphyr-parser` gives the events; what a plain word means is decided here, by YAML 1.1: `yes`
//! and `off` are booleans there, `010` is eight and `1e5` is a text. Quoted scalars are always
//! texts. Refused: tags (`!function` is Python), aliases, keys that are no texts or come twice,
//! more than one document.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

/// Deeper nesting is no task file.
const DEEPEST: usize = 64;

/// The document of a file; the error says what and where, without the file's name.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    let mut open: Vec<Open> = Vec::new();
    let mut whole: Option<Value> = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| format!("is not YAML: {e}"))?;
        let at = |reason: String| format!("line {}: {reason}", span.start.line());
        let done = match event {
            Event::DocumentStart(_) if whole.is_some() => {
                return Err(at("a second document begins; expected one".into()));
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => continue,
            Event::Alias(_) => return Err(at("aliases (*name) are not read; write it out".into())),
            Event::Scalar(_, _, _, Some(tag))
            | Event::SequenceStart(_, Some(tag))
            | Event::MappingStart(_, Some(tag)) => {
                let tag = format!("{}{}", tag.handle, tag.suffix);
                let why = if tag == "!function" { ": it is code in Python" } else { "" };
                return Err(at(format!("the tag {tag} is not supported{why}")));
            }
            Event::Scalar(text, style, _, None) => match style {
                ScalarStyle::Plain => plain(&text),
                _ => Value::String(text.into_owned()),
            },
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() == DEEPEST => {
                return Err(at(format!("nested more than {DEEPEST} deep")));
            }
            Event::SequenceStart(..) => {
                open.push(Open::List(Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                open.push(Open::Map(Map::new(), None));
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(list)) => Value::Array(list),
                Some(Open::Map(map, _)) => Value::Object(map),
                None => return Err(at("ends what was not begun".into())),
            },
        };
        match open.last_mut() {
            None => whole = Some(done),
            Some(Open::List(list)) => list.push(done),
            Some(Open::Map(map, key)) => match (key.take(), done) {
                (Some(key), value) => {
                    map.insert(key, value);
                }
                (None, Value::String(text)) if !map.contains_key(&text) => *key = Some(text),
                (None, Value::String(text)) => {
                    return Err(at(format!("the key {text} comes twice")));
                }
                (None, other) => return Err(at(format!("{other} is a key; keys are texts"))),
            },
        }
    }
    whole.ok_or_else(|| "is empty".into())
}

/// What has begun and not ended; a map with the key whose value comes next.
enum Open {
    List(Vec<Value>),
    Map(Map<String, Value>, Option<String>),
}

/// What YAML 1.1 makes of a word without quotes (<https://yaml.org/type/>, as PyYAML resolves it;
/// base 60 and dates excepted, which stay texts).
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Value::Bool(true);
        }
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    let number = integer(text).map(Number::from).or_else(|| real(text).and_then(Number::from_f64));
    number.map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text).replace('_', "");
    let (digits, base) = match digits.strip_prefix('0') {
        Some(rest) if rest.starts_with('x') => (&rest[1..], 16),
        Some(rest) if rest.starts_with('b') => (&rest[1..], 2),
        Some(rest) if !rest.is_empty() => (rest, 8),
        _ => (digits.as_str(), 10),
    };
    let plain = digits.starts_with(|c: char| c.is_digit(base));
    let value = i64::from_str_radix(digits, base).ok().filter(|_| plain)?;
    Some(if text.starts_with('-') { -value } else { value })
}

/// Digits, a point, digits and perhaps an exponent with its sign; infinities stay texts.
fn real(text: &str) -> Option<f64> {
    let body = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (whole, rest) = body.split_once('.')?;
    let (fraction, exponent) = match rest.split_once(['e', 'E']) {
        None => (rest, None),
        Some((fraction, exponent)) => (fraction, Some(exponent)),
    };
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let signed = |e: &str| e.len() > 1 && e.starts_with(['-', '+']) && digits(&e[1..]);
    let fine = digits(whole) && digits(fraction) && exponent.is_none_or(signed);
    (fine && !(whole.is_empty() && fraction.is_empty())).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_mean_what_they_mean_to_pyyaml() {
        // Each line is what PyYAML 6.0.3's safe_load makes of `a: WORD`.
        for (word, value) in [
            ("yes", json!(true)),
            ("Off", json!(false)),
            ("~", json!(null)),
            ("", json!(null)),
            ("010", json!(8)),
            ("0x1F", json!(31)),
            ("1_000", json!(1000)),
            ("-7", json!(-7)),
            ("0", json!(0)),
            ("1e5", json!("1e5")),
            ("1.0e+5", json!(1e5)),
            ("1.5", json!(1.5)),
            ("5.", json!(5.0)),
            ("089", json!("089")),
            ("1.2.3", json!("1.2.3")),
            ("'no'", json!("no")),
            ("\"a\\nb\"", json!("a\nb")),
            ("{{q}}", json!({})),
        ] {
            if word == "{{q}}" {
                // A flow mapping whose key is a mapping: lm-eval fails on it too.
                assert!(parse("a: {{q}}").is_err());
                continue;
            }
            assert_eq!(parse(&format!("a: {word}")), Ok(json!({ "a": value })), "{word}");
        }
    }

    #[test]
    fn what_a_task_file_looks_like_is_read() {
        let text = "task: t\nuntil: [\"\\n\", 'x']\nmetric_list:\n  - metric: acc\n    \
                    aggregation: mean\ntext: |\n  two\n  lines\nfolded: >-\n  one\n  line\n";
        assert_eq!(
            parse(text).unwrap(),
            json!({
                "task": "t", "until": ["\n", "x"],
                "metric_list": [{ "metric": "acc", "aggregation": "mean" }],
                "text": "two\nlines\n", "folded": "one line"
            })
        );
    }

    #[test]
    fn what_is_not_read_is_refused_by_name_and_line() {
        let deep = "[".repeat(100);
        for (text, part) in [
            ("a: 1\nb: !function utils.f", "line 2: the tag !function"),
            ("a: &x 1\nb: *x", "aliases"),
            ("a: 1\na: 2", "the key a comes twice"),
            ("1: x", "1 is a key"),
            ("a: 1\n---\nb: 2", "second document"),
            ("a: [1", "not YAML"),
            ("", "empty"),
            (deep.as_str(), "64 deep"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
