//! Every kind of rule, with values computed by hand.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tercet_align::reward::{Answer, Error, RewardSource};

use super::{GO, row, says, score, source};

/// One rule, without its heading.
fn rule(keys: &str) -> RewardSource {
    source(&format!("[[rules]]\n{keys}")).unwrap()
}

/// The values of answers, whose prompt's row is `columns`.
#[track_caller]
fn values(keys: &str, columns: Value, cases: &[(&str, f64)]) {
    let (mut rule, row) = (rule(keys), row(columns));
    for (answer, want) in cases {
        let scored = score(&mut rule, answer, &row).unwrap();
        assert_eq!(scored.total, *want, "{answer:?}");
    }
}

#[test]
fn regex_matches_or_must_not() {
    let keys = "kind = 'regex'\npattern = 'a|ab'";
    let none = || json!({});
    values(keys, none(), &[("ab", 1.0), ("xaby", 1.0), ("b", 0.0), ("", 0.0)]);
    let keys = "kind = 'regex'\npattern = 'a|ab'\nwhole = true";
    values(keys, none(), &[("ab", 1.0), ("a", 1.0), ("xab", 0.0), ("ab\n", 0.0)]);
    let keys = "kind = 'regex'\npattern = '(?i)sorry'\nmatch = false";
    values(keys, none(), &[("I am SORRY", 0.0), ("Fine", 1.0)]);
    let keys = "kind = 'regex'\npattern = '(?x) \\d+ # digits'\nwhole = true";
    values(keys, none(), &[("12", 1.0), ("12 ", 0.0)]);
}

#[test]
fn length_falls_linearly_beside_its_range() {
    let keys = "kind = 'length'\nunit = 'words'\nmin = 2\nmax = 3\nslack = 4";
    values(
        keys,
        json!({}),
        &[
            ("", 0.5),
            ("a", 0.75),
            ("a b", 1.0),
            (" a\n b\tc ", 1.0),
            ("a b c d", 0.75),
            ("a b c d e f g", 0.0),
            ("a b c d e f g h", 0.0),
        ],
    );
    let keys = "kind = 'length'\nunit = 'characters'\nmax = 3";
    values(keys, json!({}), &[("日本語", 1.0), ("日本語.", 0.0), ("", 1.0)]);
    // The helper counts a token for each word and its space.
    let keys = "kind = 'length'\nunit = 'tokens'\nmin = 3\nslack = 2";
    values(keys, json!({}), &[("a b c", 1.0), ("a b", 0.5), ("a", 0.0)]);
}

#[test]
fn sentences_are_counted_as_they_are_read() {
    let keys = "kind = 'length'\nunit = 'sentences'\nmin = 2\nmax = 2";
    values(
        keys,
        json!({}),
        &[
            ("One. Two!", 1.0),
            ("One... Two", 1.0),
            ("One ? ! Two", 1.0),
            ("Pi is 3.14. Yes", 1.0),
            ("He said \"No.\" Then left.", 1.0),
            ("日本。語！", 1.0),
            ("What?! One.", 1.0),
            ("One", 0.0),
            (". . .", 0.0),
            ("A. B. C.", 0.0),
        ],
    );
}

#[test]
fn json_counts_validity_and_each_key() {
    values("kind = 'json'", json!({}), &[(" [1, 2] ", 1.0), ("{", 0.0), ("", 0.0), ("{} x", 0.0)]);
    let keys = "kind = 'json'\nkeys = { name = 'string', age = 'integer', more = 'any' }";
    values(
        keys,
        json!({}),
        &[
            (r#"{"name": "x", "age": 3, "more": null}"#, 1.0),
            (r#"{"name": "x", "age": 3.5, "more": []}"#, 0.75),
            (r#"{"name": 1}"#, 0.25),
            ("[]", 0.25),
            ("null", 0.25),
            ("name", 0.0),
        ],
    );
    let types = "kind = 'json'\nkeys = { a = 'array', b = 'boolean', n = 'number', z = 'null', o = 'object' }";
    values(types, json!({}), &[(r#"{"a": [], "b": true, "n": 1, "z": null, "o": {}}"#, 1.0)]);
    values(types, json!({}), &[(r#"{"a": 1, "b": 1, "n": "1", "z": 1, "o": 1}"#, 1.0 / 6.0)]);
    let deep = "[".repeat(100_000);
    values("kind = 'json'", json!({}), &[(&deep, 0.0)]);
}

#[test]
fn keywords_are_shared_or_all_or_nothing() {
    let words = "kind = 'keywords'\nwords = ['red', 'blue', 'green', 'grey']";
    let cases = [("red and blue", 0.5), ("Red", 0.0), ("redgreengreyblue", 1.0), ("", 0.0)];
    values(words, json!({}), &cases);
    let any = format!("{words}\nneed = 'any'");
    values(&any, json!({}), &[("red and blue", 1.0), ("Red", 0.0), ("", 0.0)]);
    let none = format!("{words}\nneed = 'none'");
    values(&none, json!({}), &[("red and blue", 0.0), ("Red", 1.0), ("", 1.0)]);
    let either = format!("{words}\nignore_case = true\nwhole_words = true");
    values(&either, json!({}), &[("Red, BLUE; grey.", 0.75), ("reddish blue_green", 0.0)]);
}

#[test]
fn whole_words_end_where_words_end() {
    let keys = "kind = 'keywords'\nwords = ['C++', 'a a']\nwhole_words = true";
    values(
        keys,
        json!({}),
        &[("C++11", 0.5), ("objC++", 0.0), ("ba a a", 0.5), ("é C++, a a", 1.0), ("éa a", 0.0)],
    );
}

#[test]
fn keywords_may_come_from_the_row() {
    let keys = "kind = 'keywords'\ncolumn = 'must'\nignore_case = true";
    values(keys, json!({ "must": ["Ärger", "oh"] }), &[("ärger", 0.5), ("OH ÄRGER", 1.0)]);
    for (columns, part) in [
        (json!({}), "the row is empty"),
        (json!({ "a": 1, "b": 2 }), "the row has a, b"),
        (json!({ "must": "oh" }), "= \"oh\" is not a list"),
        (json!({ "must": [] }), "= [] is not a list"),
        (json!({ "must": ["x", ""] }), "is not a list"),
        (json!({ "must": ["x", 3] }), "is not a list"),
    ] {
        let (mut rule, row) = (rule(keys), row(columns));
        let parts = ["row of prompt 7", "column `must`", part, "rule keywords_0"];
        says(&score(&mut rule, "oh", &row).unwrap_err(), &parts);
        says(&rule.check_row(7, &row).unwrap_err(), &parts);
    }
}

#[test]
fn arithmetic_reads_the_last_number() {
    let keys = "kind = 'arithmetic'\ncolumn = 'expected'";
    let cases = [("6 * 7 = 42", 1.0), ("42 or 43", 0.0), ("forty-two", 0.0), ("42.0!", 1.0)];
    values(keys, json!({ "expected": 42 }), &cases);
    values(keys, json!({ "expected": "(1 + 5) * 7" }), &cases);
    values(keys, json!({ "expected": "42" }), &cases);
    values(keys, json!({ "expected": "0.1 + 0.2" }), &[("0.3", 1.0), ("0.30001", 0.0)]);
    values(keys, json!({ "expected": "1,234,567" }), &[("$1,234,567.", 1.0), ("1e999", 0.0)]);
    let near = [("123456789012", 1.0), ("123456789013", 0.0), ("123,456,789,012", 1.0)];
    values(keys, json!({ "expected": "123456 * 1000000 + 789012" }), &near);
    let keys = "kind = 'arithmetic'\ncolumn = 'expected'\ntolerance = 0.01";
    values(keys, json!({ "expected": "200 / 3" }), &[("66.6", 1.0), ("66.1", 1.0), ("65.9", 0.0)]);
    for (columns, part) in [
        (json!({}), "column `expected` is missing"),
        (json!({ "expected": "2 +" }), "\"2 +\" is not a simple expression"),
        (json!({ "expected": "1/0" }), "no finite value"),
        (json!({ "expected": null }), "null is not a number"),
        (json!({ "expected": [1] }), "[1] is not a number"),
    ] {
        says(&rule(keys).check_row(7, &row(columns)).unwrap_err(), &[part, "rule arithmetic_0"]);
    }
}

#[test]
fn equals_compares_what_stands_between_the_spaces() {
    let keys = "kind = 'equals'\ncolumn = 'expected'";
    values(keys, json!({ "expected": " Paris\n" }), &[(" Paris ", 1.0), ("paris", 0.0)]);
    values(keys, json!({ "expected": 42 }), &[("42", 1.0), ("42.0", 0.0)]);
    values(keys, json!({ "expected": true }), &[("true", 1.0)]);
    let keys = "kind = 'equals'\ncolumn = 'expected'\nignore_case = true";
    values(keys, json!({ "expected": "PARIS" }), &[("paris", 1.0), ("pari", 0.0)]);
    says(&rule(keys).check_row(1, &row(json!({ "expected": [] }))).unwrap_err(), &["= []"]);
}

#[test]
fn beginnings_and_ends_are_found() {
    let keys = "kind = 'starts_with'\ntext = 'Dear '";
    values(keys, json!({}), &[(" Dear Sir", 1.0), ("dear Sir", 0.0), ("Oh Dear", 0.0)]);
    let keys = "kind = 'ends_with'\ntext = 'Yours'\nignore_case = true";
    values(keys, json!({}), &[("ever yours\n", 1.0), ("Yours ever", 0.0), ("", 0.0)]);
}

#[test]
fn lines_match_and_are_counted() {
    let keys = "kind = 'lines'\npattern = '^- '\nmin = 2\nmax = 4";
    values(
        keys,
        json!({}),
        &[
            ("- a\n- b\n", 1.0),
            ("- a\r\n\n- b", 1.0),
            ("List:\n- a\n- b\n - c", 0.5),
            ("- a", 0.0),
            ("- a\n- b\n- c\n- d\n- e", 0.0),
            ("", 0.0),
        ],
    );
}

/// (3·1 + 1·0.5 + 1·0) / 5 = 0.7.
#[test]
fn the_reward_is_the_weighted_mean_of_named_parts() {
    let mut source = source(
        "[[rules]]\nkind = 'starts_with'\ntext = 'a'\nweight = 3\nname = 'opening'\n\
         [[rules]]\nkind = 'length'\nunit = 'words'\nmax = 1\nslack = 2\n\
         [[rules]]\nkind = 'ends_with'\ntext = 'z'",
    )
    .unwrap();
    let scored = score(&mut source, "a b", &Map::new()).unwrap();
    assert!((scored.total - 0.7).abs() <= f64::EPSILON, "{}", scored.total);
    let parts: Vec<(&str, f64)> = scored.parts.iter().map(|(n, v)| (n.as_str(), *v)).collect();
    assert_eq!(parts, [("opening", 1.0), ("length_1", 0.5), ("ends_with_2", 0.0)]);
}

/// Every refusal names the rule, the key, the value and what is allowed.
#[test]
fn a_rule_that_cannot_be_meant_is_refused() {
    let first = "kind = 'equals'\ncolumn = 'x'\nname = 'same'";
    for (keys, parts) in [
        ("", &["rules[1].kind`", "missing", "regex, length, json, keywords"][..]),
        ("kind = 'regexp'", &["rules[1].kind`", "\"regexp\"", "one of regex, "]),
        ("kind = 3", &["rules[1].kind`", "= 3"]),
        ("kind = 'regex'", &["rules[1].pattern`", "missing"]),
        ("kind = 'regex'\npattern = '('", &["rules[1].pattern`", "\"(\"", "unclosed group"]),
        ("kind = 'regex'\npattern = 'a)(b'\nwhole = true", &["rules[1].pattern`", "unopened"]),
        ("kind = 'regex'\npattern = '(\\w{99}){99}'", &["rules[1].pattern`", "size limit"]),
        ("kind = 'regex'\npattern = 4", &["rules[1].pattern`", "= 4 is not a text"]),
        ("kind = 'regex'\npattern = 'a'\nwhole = 1", &["rules[1].whole`", "true or false"]),
        ("kind = 'regex'\npattern = 'a'\npatern = 'b'", &["patern`", "known here: kind, name"]),
        ("kind = 'length'\nmax = 3", &["rules[1].unit`", "characters, words, sentences, tokens"]),
        ("kind = 'length'\nunit = 'words'", &["rules[1].max`", "min", "missing"]),
        ("kind = 'length'\nunit = 'words'\nmin = 4\nmax = 3", &["rules[1].min`", "= 4", "= 3"]),
        ("kind = 'length'\nunit = 'words'\nmin = -4", &["rules[1].min`", "= -4", "whole number"]),
        ("kind = 'length'\nunit = 'words'\nmax = 1\nslack = -1", &["slack`", "= -1", "below 0"]),
        ("kind = 'length'\nunit = 'words'\nmax = 1\nslack = nan", &["slack`", "finite number"]),
        ("kind = 'json'\nkeys = ['a']", &["rules[1].keys`", "table"]),
        ("kind = 'json'\nkeys = { a = 'text' }", &["keys`", "a = \"text\"", "one of any, array"]),
        ("kind = 'keywords'", &["rules[1].words`", "missing"]),
        ("kind = 'keywords'\nwords = []", &["rules[1].words`", "= []", "one or more"]),
        ("kind = 'keywords'\nwords = ['a']\ncolumn = 'b'", &["rules[1].column`", "\"b\""]),
        ("kind = 'keywords'\nwords = ['a']\nneed = 'some'", &["need`", "all, any, none"]),
        ("kind = 'arithmetic'", &["rules[1].column`", "missing"]),
        ("kind = 'arithmetic'\ncolumn = 'x'\ntolerance = 1", &["tolerance`", "= 1", "[0, 1)"]),
        ("kind = 'equals'\ncolumn = ''", &["rules[1].column`", "empty"]),
        ("kind = 'starts_with'", &["rules[1].text`", "missing"]),
        ("kind = 'ends_with'\ntext = ' '", &["rules[1].text`", "white space"]),
        ("kind = 'lines'", &["rules[1].pattern`", "missing"]),
        ("kind = 'equals'\ncolumn = 'x'\nweight = 0", &["weight`", "= 0", "(0, 1000000]"]),
        ("kind = 'equals'\ncolumn = 'x'\nweight = inf", &["weight`", "finite"]),
        ("kind = 'equals'\ncolumn = 'x'\nname = 'same'", &["rules[1].name`", "\"same\""]),
    ] {
        let section = format!("[[rules]]\n{first}\n[[rules]]\n{keys}");
        says(&source(&section).err().unwrap(), parts);
    }
}

/// Nested quantifiers, which make a backtracking engine take years.
#[test]
fn no_pattern_takes_for_ever() {
    let mut rule = rule("kind = 'regex'\npattern = '^(a+)+$'");
    let text = "a".repeat(1 << 20) + "b";
    assert_eq!(score(&mut rule, &text, &Map::new()).unwrap().total, 0.0);
}

#[test]
fn a_raised_flag_ends_the_scoring() {
    let mut rule = rule("kind = 'json'");
    let (row, stop) = (Map::new(), AtomicBool::new(true));
    let answer = Answer { id: 0, prompt: "", answer: "", tokens: 0, row: &row };
    assert!(matches!(rule.score(&[answer], &stop), Err(Error::Interrupted)));
    assert_eq!(rule.score(&[], &GO).unwrap(), []);
}

/// Every kind at once; `expected` and `must` are in the row.
const ALL: &str = "
[[rules]]
kind = 'regex'
pattern = '\\d+$'
weight = 0.1
[[rules]]
kind = 'regex'
pattern = '(a|b)*'
whole = true
match = false
weight = 1e6
[[rules]]
kind = 'length'
unit = 'characters'
min = 3
max = 9
slack = 7.3
[[rules]]
kind = 'length'
unit = 'words'
max = 2
slack = 0.1
weight = 1e-300
[[rules]]
kind = 'length'
unit = 'sentences'
min = 2
slack = 3
[[rules]]
kind = 'length'
unit = 'tokens'
min = 3
max = 3
slack = 1e300
[[rules]]
kind = 'json'
keys = { a = 'number', b = 'any' }
weight = 0.3
[[rules]]
kind = 'keywords'
words = ['a', 'é', '1 ']
ignore_case = true
whole_words = true
[[rules]]
kind = 'keywords'
column = 'must'
need = 'none'
[[rules]]
kind = 'arithmetic'
column = 'expected'
[[rules]]
kind = 'equals'
column = 'expected'
ignore_case = true
[[rules]]
kind = 'starts_with'
text = 'ǅ'
ignore_case = true
[[rules]]
kind = 'ends_with'
text = '.'
[[rules]]
kind = 'lines'
pattern = '^[-*] '
max = 3
weight = 0.7
";

proptest! {
    /// Any characters at all, and texts dense in those that mean something to some rule.
    #[test]
    fn any_answer_has_a_value_between_0_and_1(
        text in prop_oneof![
            any::<String>(),
            "[-+.,eE0-9 ()\u{2212}日é\"{}:a_\r\n*İ。!?]{0,80}",
        ],
        expected in prop_oneof![Just(json!(3)), Just(json!("-2 * (1 + .5)"))],
    ) {
        let mut all = source(ALL).unwrap();
        let scored = score(&mut all, &text, &row(json!({ "expected": expected, "must": ["e", "."] })));
        let scored = scored.unwrap();
        prop_assert!((0.0..=1.0).contains(&scored.total), "{scored:?}");
        prop_assert_eq!(scored.parts.len(), 14);
        for (name, value) in &scored.parts {
            prop_assert!((0.0..=1.0).contains(value), "{} = {}", name, value);
        }
    }

    /// Any cell of a row gives a score or an error, never a panic.
    #[test]
    fn any_row_is_scored_or_refused(cell in "[-+*/.,eE0-9 ()x日]{0,60}") {
        let mut all = source(ALL).unwrap();
        let row = row(json!({ "expected": cell, "must": [cell] }));
        if let Err(error) = score(&mut all, "3", &row) {
            prop_assert!(matches!(error, Error::Row { id: 7, .. }), "{}", error);
        }
    }

    /// A score is that of its answer, wherever it stands.
    #[test]
    fn the_order_of_answers_does_not_matter(texts in proptest::collection::vec("[a-c1-3. ]{0,9}", 1..8)) {
        let mut all = source(ALL).unwrap();
        let row = row(json!({ "expected": 3, "must": ["e"] }));
        let answer = |(i, text): (usize, &'_ String)| (i as u64, text.clone());
        let list: Vec<(u64, String)> = texts.iter().enumerate().map(answer).collect();
        let mut answers: Vec<Answer> = list
            .iter()
            .map(|(id, text)| Answer { id: *id, prompt: "p", answer: text, tokens: 3, row: &row })
            .collect();
        let mut forwards = all.score(&answers, &GO).unwrap();
        answers.reverse();
        let backwards = all.score(&answers, &GO).unwrap();
        forwards.reverse();
        prop_assert_eq!(forwards, backwards);
    }
}
