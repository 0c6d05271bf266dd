//! Whose rows are whose: what one person may ask to be protected for is decided here.
//!
//! Adding or removing a person adds or removes all rows of that person, of which a step sees at
//! most `cap`, always the same ones. Which they are depends on that person's own rows alone.
//!
//! Ids of text are the same when they are the same characters, however those are written in Unicode
//! (they are compared in normalization form C): an é of one code point or of two is one person. What
//! looks alike and is other characters, or differs in case, is another person.

use std::collections::HashMap;

use serde_json::{Map, Value};
use unicode_normalization_alignments::UnicodeNormalization;

use crate::{Error, Result};

/// What makes a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Every row is another person. Whoever wrote two rows is protected for one of them only.
    Row,
    /// Rows with equal values in this column are one person's.
    Column(String),
}

impl Unit {
    /// `"row"`, or the name of a column. There is no default: the unit is what the promise is
    /// about, and must be written out.
    ///
    /// # Errors
    /// [`Error::People`] for an empty name.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "" => Err(Error::People(
                "the unit is empty, expected the column that says whose row it is, or \"row\""
                    .into(),
            )),
            "row" => Ok(Self::Row),
            column => Ok(Self::Column(column.to_owned())),
        }
    }
}

/// Persons and their rows. All of it is private: neither the number of persons nor that of their
/// rows may leave, so a rate is made from a public number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct People {
    rows: Vec<Vec<usize>>,
    over_cap: usize,
}

impl People {
    /// Groups `rows`, each a JSON object, in their order; a person's first `cap` rows are kept.
    ///
    /// An id is text or a whole number, and all are of one kind: `7` and `"7"` could be the same
    /// person or not.
    ///
    /// # Errors
    /// [`Error::People`] names the row (counted from 1): one without the column, with an id of
    /// another kind, empty, or with spaces or characters that cannot be seen about it; rows that have a column called `row` when
    /// the unit is [`Unit::Row`]; a `cap` of 0; no rows.
    pub fn group<'a>(
        unit: &Unit,
        cap: usize,
        rows: impl IntoIterator<Item = &'a Map<String, Value>>,
    ) -> Result<Self> {
        if cap == 0 {
            return Err(Error::People("at most 0 rows a person leaves nothing to learn".into()));
        }
        let mut people = Self { rows: Vec::new(), over_cap: 0 };
        let mut known: HashMap<String, usize> = HashMap::new();
        let mut kind = None;
        for (at, row) in rows.into_iter().enumerate() {
            let person = match unit {
                Unit::Row if row.contains_key("row") => {
                    return Err(Error::People(format!(
                        "row {} has a column called \"row\", so that unit = \"row\" could mean it \
                         or every row by itself; rename the column",
                        at + 1
                    )));
                }
                Unit::Row => people.rows.len(),
                Unit::Column(column) => {
                    let (id, is_number) = id(row, column, at)?;
                    if *kind.get_or_insert(is_number) != is_number {
                        return Err(Error::People(format!(
                            "{column:?} of row {} is {}, that of the rows before it is not; the \
                             same person must not have two kinds of id",
                            at + 1,
                            if is_number { "a number" } else { "text" }
                        )));
                    }
                    *known.entry(id).or_insert(people.rows.len())
                }
            };
            if person == people.rows.len() {
                people.rows.push(Vec::new());
            }
            let own = &mut people.rows[person];
            if own.len() < cap { own.push(at) } else { people.over_cap += 1 }
        }
        if people.rows.is_empty() {
            return Err(Error::People("there are no rows".into()));
        }
        Ok(people)
    }

    /// Number of persons. Private.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Never: there is at least one person.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows of a person that are learnt from, by their place among all rows, ascending.
    pub fn rows(&self, person: usize) -> &[usize] {
        &self.rows[person]
    }

    /// Rows that were left out because their person has too many. Private.
    pub fn over_cap(&self) -> usize {
        self.over_cap
    }

    /// The persons without those of whose rows `keep` leaves none: rows may turn out to be unfit
    /// after they were grouped. What is kept of a person must depend on that row alone.
    pub fn retain(self, keep: impl Fn(usize) -> bool) -> Self {
        let rows = self.rows.into_iter().map(|mut rows| {
            rows.retain(|&row| keep(row));
            rows
        });
        Self { rows: rows.filter(|rows| !rows.is_empty()).collect(), over_cap: self.over_cap }
    }
}

/// An id of text in the one form in which ids are compared: Unicode's normalization form C.
pub fn composed(id: &str) -> String {
    id.nfc().map(|(character, _)| character).collect()
}

/// White space, control characters, and those of Unicode's general punctuation and format characters
/// that have no width (chapter 23.2 of the standard): before or after an id they are some program's.
fn is_unseen(c: char) -> bool {
    c.is_whitespace()
        || c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}')
        || matches!(c, '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// A person's id and whether it is a number.
fn id(row: &Map<String, Value>, column: &str, at: usize) -> Result<(String, bool)> {
    let refuse = |what: String| {
        Err(Error::People(format!(
            "row {} {what}; the column {column:?} says whose row it is and must be text or a whole \
             number in every row",
            at + 1
        )))
    };
    match row.get(column) {
        None => refuse(format!("has no {column:?}")),
        Some(Value::String(text)) if text.is_empty() => refuse("has an empty id".into()),
        // "P1 " and "P1" are one person more likely than two, and so is what begins with the mark of
        // a file's start or is filled up with zeros.
        Some(Value::String(text)) if text.trim_matches(is_unseen) != text => {
            refuse(format!("has the id {text:?} with spaces or unseen characters about it"))
        }
        Some(Value::String(text)) => Ok((composed(text), false)),
        Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
            Ok((number.to_string(), true))
        }
        Some(Value::Number(number)) => refuse(format!("has the id {number}")),
        Some(Value::Null) => refuse("has null for an id".into()),
        Some(_) => refuse("has an id that is neither text nor a number".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rows(values: Value) -> Vec<Map<String, Value>> {
        let Value::Array(list) = values else { panic!() };
        list.into_iter()
            .map(|value| match value {
                Value::Object(object) => object,
                _ => panic!(),
            })
            .collect()
    }

    fn grouped(unit: &str, cap: usize, values: Value) -> Result<People> {
        People::group(&Unit::parse(unit)?, cap, &rows(values))
    }

    #[test]
    fn rows_of_one_id_are_one_person_with_the_first_cap_of_them() {
        let values = json!([{"p": "b"}, {"p": "a"}, {"p": "b"}, {"p": "b"}, {"p": "c"}]);
        let people = grouped("p", 2, values.clone()).unwrap();
        assert_eq!((people.len(), people.over_cap()), (3, 1));
        assert_eq!([people.rows(0), people.rows(1), people.rows(2)], [&[0, 2][..], &[1], &[4]]);
        let all = grouped("p", 9, values.clone()).unwrap();
        assert_eq!((all.rows(0), all.over_cap()), (&[0, 2, 3][..], 0));
        let each = grouped("row", 1, values).unwrap();
        assert_eq!((each.len(), each.over_cap()), (5, 0));
        let numbers = grouped("p", 9, json!([{"p": 7}, {"p": -7}, {"p": 7}])).unwrap();
        assert_eq!(numbers.rows(0), [0, 2]);
        // Joiners inside a word are spelling, in Persian for one.
        grouped("p", 9, json!([{"p": "a\u{200c}b"}])).unwrap();
        let fewer = all.retain(|row| row != 1 && row != 2);
        assert_eq!((fewer.len(), fewer.rows(0), fewer.rows(1)), (2, &[0, 3][..], &[4][..]));
    }

    /// An id that came by way of two programs, one of which writes é as e and an accent.
    #[test]
    fn a_person_is_one_in_every_form_of_unicode() {
        let values = json!([{"p": "Ren\u{e9}e"}, {"p": "Rene\u{301}e"}, {"p": "Renee"}]);
        let people = grouped("p", 9, values).unwrap();
        assert_eq!((people.len(), people.rows(0), people.rows(1)), (2, &[0, 1][..], &[2][..]));
        // Hangul, whose syllables compose by rule, and two accents in either order of writing.
        for (one, other) in
            [("\u{1112}\u{1161}\u{11ab}", "\u{d55c}"), ("a\u{323}\u{302}", "a\u{302}\u{323}")]
        {
            assert_eq!(composed(one), composed(other));
        }
        // Lookalikes are others: a ligature, another alphabet, another case.
        for (one, other) in [("\u{fb01}", "fi"), ("\u{410}", "A"), ("a", "A")] {
            assert_ne!(composed(one), composed(other));
        }
    }

    #[test]
    fn rows_whose_person_is_in_doubt_are_refused_by_number() {
        for (bad, says) in [
            (json!([{"p": "a"}, {}]), "row 2 has no \"p\""),
            (json!([{"p": null}]), "null"),
            (json!([{"p": ""}]), "empty id"),
            (json!([{"p": "a "}]), "spaces"),
            (json!([{"p": "\u{feff}a"}]), "unseen"),
            (json!([{"p": "a\u{0}\u{0}"}]), "unseen"),
            (json!([{"p": "\u{200b}"}]), "unseen"),
            (json!([{"p": 1.5}]), "1.5"),
            (json!([{"p": 1e40}]), "id 1e"),
            (json!([{"p": ["a"]}]), "neither text"),
            (json!([{"p": true}]), "neither text"),
            (json!([{"p": "1"}, {"p": 1}]), "two kinds of id"),
            (json!([]), "no rows"),
        ] {
            let text = grouped("p", 3, bad).unwrap_err().to_string();
            assert!(text.contains(says), "{text}");
        }
        assert!(grouped("", 3, json!([{"p": 1}])).is_err());
        assert!(grouped("p", 0, json!([{"p": 1}])).is_err());
        let text = grouped("row", 1, json!([{"row": 1}])).unwrap_err().to_string();
        assert!(text.contains("rename the column"), "{text}");
    }
}
