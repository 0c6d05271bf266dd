//! The kinds of rules: each reads its keys, and gives an answer a value in [0, 1].

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use super::Answer;
use super::arithmetic::{evaluate, last_number};
use super::error::{Result, excerpt};
use super::keys::{Keys, texts};

/// Largest compiled pattern in bytes. Matching takes time linear in the answer (times this at
/// worst) whatever the pattern.
const PATTERN_BYTES: usize = 1 << 20;

/// Deepest nesting of a pattern.
const PATTERN_DEPTH: u32 = 64;

/// Relative difference up to which numbers are equal: sums of decimals are not exact (a thousand
/// operations in f64 are wrong by 1e-13 at most), and whole numbers below 1e12 have to differ.
const TOLERANCE: f64 = 1e-12;

/// What a rule measures.
pub(super) enum Measure {
    /// 1 if the pattern is found (`match = true`) or is not (`match = false`).
    Regex { pattern: Regex, matches: bool },
    /// 1 within [min, max], falling linearly to 0 over `slack` on either side.
    Length { unit: Unit, min: usize, max: usize, slack: f64 },
    /// The share fulfilled of: the answer is JSON; each key is there and of its type.
    Json { keys: Vec<(String, JsonType)> },
    /// Words of the rule or of a column.
    Keywords { words: Words, need: Need, ignore_case: bool, whole_words: bool },
    /// 1 if the answer's last number is the column's number or expression.
    Arithmetic { column: String, tolerance: f64 },
    /// 1 if the answer is the column, white space around both aside.
    Equals { column: String, ignore_case: bool },
    /// 1 if the answer starts or ends with a text, white space around it aside.
    Affix { text: String, end: bool, ignore_case: bool },
    /// The share of lines that match, if they are min to max in number; blank ones do not count.
    Lines { pattern: Regex, min: usize, max: usize },
}

/// What a length counts.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    Characters,
    Words,
    Sentences,
    Tokens,
}

/// Types of JSON values.
#[derive(Clone, Copy)]
pub(super) enum JsonType {
    Any,
    Array,
    Boolean,
    Integer,
    Null,
    Number,
    Object,
    String,
}

const JSON_TYPES: [(&str, JsonType); 8] = [
    ("any", JsonType::Any),
    ("array", JsonType::Array),
    ("boolean", JsonType::Boolean),
    ("integer", JsonType::Integer),
    ("null", JsonType::Null),
    ("number", JsonType::Number),
    ("object", JsonType::Object),
    ("string", JsonType::String),
];

/// Where keywords come from.
pub(super) enum Words {
    Given(Vec<String>),
    Column(String),
}

/// Which keywords an answer needs.
#[derive(Clone, Copy)]
pub(super) enum Need {
    All,
    Any,
    None,
}

/// The kinds by name.
const KINDS: [&str; 9] = [
    "regex",
    "length",
    "json",
    "keywords",
    "arithmetic",
    "equals",
    "starts_with",
    "ends_with",
    "lines",
];

impl Measure {
    /// The `kind` of a rule's table.
    pub fn kind(keys: &mut Keys) -> Result<&'static str> {
        keys.choice("kind", true, &KINDS.map(|kind| (kind, kind)))
    }

    /// Reads the keys of a kind.
    pub fn read(kind: &'static str, keys: &mut Keys) -> Result<Self> {
        match kind {
            "regex" => {
                let whole = keys.flag("whole", false)?;
                let pattern = pattern(keys, whole)?;
                Ok(Self::Regex { pattern, matches: keys.flag("match", true)? })
            }
            "length" => length(keys),
            "json" => json(keys),
            "keywords" => keywords(keys),
            "arithmetic" => {
                let column = column(keys)?;
                let tolerance = keys.number("tolerance")?.unwrap_or(TOLERANCE);
                if !(0.0..1.0).contains(&tolerance) {
                    let problem = format!("= {tolerance} is outside [0, 1)");
                    return Err(keys.error("tolerance", problem));
                }
                Ok(Self::Arithmetic { column, tolerance })
            }
            "equals" => {
                let column = column(keys)?;
                Ok(Self::Equals { column, ignore_case: keys.flag("ignore_case", false)? })
            }
            "starts_with" | "ends_with" => {
                let text = keys.need_text("text", "what the answer starts or ends with")?;
                let ignore_case = keys.flag("ignore_case", false)?;
                let text = text.trim();
                if text.is_empty() {
                    return Err(keys.error("text", "is white space, which is not looked at"));
                }
                Ok(Self::Affix {
                    text: cased(text, ignore_case),
                    end: kind == "ends_with",
                    ignore_case,
                })
            }
            _ => {
                let pattern = pattern(keys, false)?;
                let (min, max) = keys.range()?;
                Ok(Self::Lines { pattern, min, max })
            }
        }
    }

    /// The value of an answer, in [0, 1], or what is wrong with its row.
    pub fn value(&self, answer: &Answer) -> std::result::Result<f64, String> {
        let text = answer.answer;
        Ok(match self {
            Self::Regex { pattern, matches } => truth(pattern.is_match(text) == *matches),
            Self::Length { unit, min, max, slack } => {
                closeness(count(*unit, answer), *min, *max, *slack)
            }
            Self::Json { keys } => json_share(text, keys),
            Self::Keywords { words, need, ignore_case, whole_words } => {
                let from_row;
                let words = match words {
                    Words::Given(words) => words,
                    Words::Column(name) => {
                        from_row = texts(cell(answer, name)?)
                            .map_err(|problem| format!("column `{name}` {problem}"))?;
                        &from_row
                    }
                };
                let text = cased(text, *ignore_case);
                let found = |word: &&String| holds(&text, &cased(word, *ignore_case), *whole_words);
                match need {
                    Need::All => share(words.iter().filter(found).count(), words.len()),
                    Need::Any => truth(words.iter().any(|word| found(&word))),
                    Need::None => truth(!words.iter().any(|word| found(&word))),
                }
            }
            Self::Arithmetic { column, tolerance } => {
                let want = expected_number(answer, column)?;
                let near = |got: f64| (got - want).abs() <= tolerance * want.abs().max(1.0);
                truth(last_number(text).is_some_and(near))
            }
            Self::Equals { column, ignore_case } => {
                let want = match cell(answer, column)? {
                    Value::String(text) => text.trim().to_owned(),
                    value @ (Value::Number(_) | Value::Bool(_)) => value.to_string(),
                    other => {
                        let other = excerpt(&other.to_string());
                        return Err(format!("column `{column}` = {other} is not a text or number"));
                    }
                };
                truth(cased(text.trim(), *ignore_case) == cased(&want, *ignore_case))
            }
            Self::Affix { text: affix, end, ignore_case } => {
                let text = cased(text.trim(), *ignore_case);
                truth(if *end { text.ends_with(affix) } else { text.starts_with(affix) })
            }
            Self::Lines { pattern, min, max } => {
                let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
                match lines.is_empty() || !(*min..=*max).contains(&lines.len()) {
                    true => 0.0,
                    false => {
                        let matching = lines.iter().filter(|line| pattern.is_match(line)).count();
                        share(matching, lines.len())
                    }
                }
            }
        })
    }
}

fn truth(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

fn cased(text: &str, ignore_case: bool) -> String {
    if ignore_case { text.to_lowercase() } else { text.to_owned() }
}

/// `pattern`, compiled; `whole` makes it match only the whole text.
fn pattern(keys: &mut Keys, whole: bool) -> Result<Regex> {
    let text = keys.need_text("pattern", "a regular expression in the syntax of Rust's regex")?;
    let build = |text: &str| {
        let mut builder = RegexBuilder::new(text);
        builder.size_limit(PATTERN_BYTES).dfa_size_limit(PATTERN_BYTES).nest_limit(PATTERN_DEPTH);
        builder.build()
    };
    // Alone first: what has a meaning of its own cannot get out of the group around it.
    let mut compiled = build(text);
    if whole && compiled.is_ok() {
        // A comment at the end of an (?x) pattern needs a line break before the parenthesis.
        compiled =
            build(&format!(r"\A(?:{text})\z")).or_else(|_| build(&format!("\\A(?:{text}\n)\\z")));
    }
    compiled.map_err(|e| keys.error("pattern", format!("= {text:?} is not usable: {e}")))
}

fn length(keys: &mut Keys) -> Result<Measure> {
    let units = [
        ("characters", Unit::Characters),
        ("words", Unit::Words),
        ("sentences", Unit::Sentences),
        ("tokens", Unit::Tokens),
    ];
    let unit = keys.choice("unit", true, &units)?;
    let (min, max) = keys.range()?;
    if (min, max) == (0, usize::MAX) {
        return Err(keys.error("max", "is missing, and so is min: give one of them"));
    }
    let slack = keys.number("slack")?.unwrap_or(0.0);
    if slack < 0.0 {
        return Err(keys.error("slack", format!("= {slack} is below 0")));
    }
    Ok(Measure::Length { unit, min, max, slack })
}

fn json(keys: &mut Keys) -> Result<Measure> {
    let Some(value) = keys.value("keys") else { return Ok(Measure::Json { keys: Vec::new() }) };
    let Some(table) = value.as_object() else {
        let problem = format!("= {value} is not a table from a key to its type");
        return Err(keys.error("keys", problem));
    };
    let mut types = Vec::with_capacity(table.len());
    for (name, kind) in table {
        match JSON_TYPES.iter().find(|(known, _)| kind.as_str() == Some(known)) {
            Some((_, kind)) => types.push((name.clone(), *kind)),
            None => {
                let known = JSON_TYPES.map(|(known, _)| known).join(", ");
                let problem = format!("{name} = {kind} is not a type; expected one of {known}");
                return Err(keys.error("keys", problem));
            }
        }
    }
    Ok(Measure::Json { keys: types })
}

fn keywords(keys: &mut Keys) -> Result<Measure> {
    let words = match (keys.texts("words")?, keys.text("column")?) {
        (Some(words), None) => Words::Given(words),
        (None, Some(column)) => Words::Column(column.to_owned()),
        (None, None) => {
            return Err(keys.error("words", "is missing: a list of texts, or name a column"));
        }
        (Some(_), Some(column)) => {
            let problem = format!("= {column:?}, but words are given too; keep one of the two");
            return Err(keys.error("column", problem));
        }
    };
    let needs = [("all", Need::All), ("any", Need::Any), ("none", Need::None)];
    Ok(Measure::Keywords {
        words,
        need: keys.choice("need", false, &needs)?,
        ignore_case: keys.flag("ignore_case", false)?,
        whole_words: keys.flag("whole_words", false)?,
    })
}

fn column(keys: &mut Keys) -> Result<String> {
    keys.need_text("column", "the column of the prompt's row to compare with").map(str::to_owned)
}

/// A cell of the answer's row.
fn cell<'a>(answer: &Answer<'a>, name: &str) -> std::result::Result<&'a Value, String> {
    answer.row.get(name).ok_or_else(|| {
        let names: Vec<&str> = answer.row.keys().map(String::as_str).collect();
        match names.is_empty() {
            true => format!("column `{name}` is missing; the row is empty"),
            false => format!("column `{name}` is missing; the row has {}", names.join(", ")),
        }
    })
}

/// The number in a cell, or the value of the expression in it.
fn expected_number(answer: &Answer, column: &str) -> std::result::Result<f64, String> {
    let wrong = |problem: String| format!("column `{column}`: {problem}");
    match cell(answer, column)? {
        Value::String(text) => evaluate(text).map_err(wrong),
        value => value
            .as_f64()
            .ok_or_else(|| wrong(format!("{} is not a number", excerpt(&value.to_string())))),
    }
}

fn count(unit: Unit, answer: &Answer) -> usize {
    match unit {
        Unit::Characters => answer.answer.chars().count(),
        Unit::Words => answer.answer.split_whitespace().count(),
        Unit::Sentences => sentences(answer.answer),
        Unit::Tokens => answer.tokens,
    }
}

/// 1 within [min, max], less by distance/slack outside, never below 0.
fn closeness(count: usize, min: usize, max: usize, slack: f64) -> f64 {
    let distance = match count {
        n if n < min => min - n,
        n if n > max => n - max,
        _ => return 1.0,
    };
    if slack == 0.0 { 0.0 } else { (1.0 - distance as f64 / slack).max(0.0) }
}

/// Stretches of text with a letter or digit that end in `.`, `!`, `?` or `…` before white space,
/// a closing mark or the end; in the full-width forms; or with the text. `e.g. this` is two.
fn sentences(text: &str) -> usize {
    let (mut count, mut open) = (0, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let ends = match c {
            '。' | '！' | '？' => true,
            '.' | '!' | '?' | '…' => chars.peek().is_none_or(|&next| {
                next.is_whitespace() || matches!(next, '"' | '\'' | ')' | ']' | '”' | '’' | '»')
            }),
            _ => false,
        };
        open |= c.is_alphanumeric();
        if ends && open {
            count += 1;
            open = false;
        }
    }
    count + usize::from(open)
}

fn json_share(text: &str, keys: &[(String, JsonType)]) -> f64 {
    // Nesting past 128 is refused by the parser, so that no answer exhausts the stack.
    let Ok(value) = serde_json::from_str::<Value>(text.trim()) else { return 0.0 };
    let right = |(name, kind): &&(String, JsonType)| value.get(name).is_some_and(|v| is(v, *kind));
    share(1 + keys.iter().filter(right).count(), 1 + keys.len())
}

fn is(value: &Value, kind: JsonType) -> bool {
    match kind {
        JsonType::Any => true,
        JsonType::Array => value.is_array(),
        JsonType::Boolean => value.is_boolean(),
        JsonType::Integer => value.is_i64() || value.is_u64(),
        JsonType::Null => value.is_null(),
        JsonType::Number => value.is_number(),
        JsonType::Object => value.is_object(),
        JsonType::String => value.is_string(),
    }
}

/// Whether `text` holds `word`; as a whole word, where no letter, digit or `_` goes on beyond an
/// edge of the word that is one itself.
fn holds(text: &str, word: &str, whole: bool) -> bool {
    if !whole {
        return text.contains(word);
    }
    let inner = |c: char| c.is_alphanumeric() || c == '_';
    let (first, last) = (word.starts_with(inner), word.ends_with(inner));
    let mut from = 0;
    while let Some(at) = text[from..].find(word).map(|at| from + at) {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        if !(first && before.ends_with(inner) || last && after.starts_with(inner)) {
            return true;
        }
        // The next find may overlap this one: one character on.
        from = at + text[at..].chars().next().map_or(1, char::len_utf8);
    }
    false
}
