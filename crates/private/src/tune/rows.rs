//! Rows to persons to examples. Whatever is decided here of a person depends on that person's own
//! rows alone, or is an error that ends the run.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tercet_train::config::BadRow;
use tercet_train::data::{Row, is_held_out, read_rows};
use tercet_train::tune::sft::example;
use tercet_train::tune::{Encoder, Example, RowCount, bad_row};
use tercet_train::{Error, Result, files};

use super::config::PrivateConfig;
use super::planted::Canaries;
use crate::mechanism::people::{People, Unit, composed};

/// What one person wrote, or is told of.
#[derive(Clone, Debug, PartialEq)]
pub struct Person {
    /// At least one, each with something to learn.
    pub examples: Vec<Example>,
}

impl Person {
    /// Tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|example| example.ids.len()).sum()
    }

    /// Tokens that count.
    pub fn counted(&self) -> usize {
        self.examples.iter().map(Example::counted).sum()
    }
}

/// Persons made ready. Their number, and everything else here, is private.
pub struct PrivateRows {
    /// Trained on.
    pub train: Vec<Person>,
    /// Held out: other persons, or public rows.
    pub validation: Vec<Person>,
    /// What became of the rows.
    pub count: RowCount,
    /// Rows left out since their person has more than `private.cap`.
    pub over_cap: usize,
    /// SHA-256 of a salt and of all training examples, in hexadecimal.
    pub key: String,
}

/// Reads, groups and tokenizes the rows of a run. `salt` keeps the key from telling who was in it.
///
/// # Errors
/// [`Error::Data`] for rows whose person is in doubt, for more persons than were declared, for
/// held-out rows of persons who are trained on, and when nothing is left; bad rows as configured.
pub fn rows(
    config: &PrivateConfig,
    encoder: &Encoder,
    salt: &[u8],
    stop: &AtomicBool,
) -> Result<PrivateRows> {
    let unit = config.private.unit()?;
    let mut reader = Reading { config, encoder, stop, count: RowCount::default(), over_cap: 0 };
    let all = read_rows(&config.data.paths, stop)?;
    let (held_out, train): (Vec<Row>, Vec<Row>) = {
        // Whole persons fall on one side; every id is looked at before one is believed.
        People::group(&unit, 1, all.iter().map(|row| &row.object))?;
        all.into_iter().partition(|row| is_held_out(hash(row, &unit), config.data.validation))
    };
    if train.is_empty() {
        return Err(Error::Data("every person is held out; lower data.validation".into()));
    }
    let people = reader.people(&train, &unit)?;
    if people.len() as u64 > config.private.people {
        return Err(Error::Data(format!(
            "private.people = {} is less than the persons there are: the rate would be another than \
             the one that is accounted for. Declare a public number that is surely not too small",
            config.private.people
        )));
    }
    let validation = if config.data.validation_paths.is_empty() {
        match held_out.is_empty() {
            true => Vec::new(),
            false => reader.people(&held_out, &unit)?,
        }
    } else {
        let rows = read_rows(&config.data.validation_paths, stop)?;
        let unit = if config.private.public_validation { Unit::Row } else { unit.clone() };
        refuse_overlap(&train, &rows, &unit)?;
        match config.private.public_validation {
            true => reader.each(&rows)?,
            false => reader.people(&rows, &unit)?,
        }
    };
    let (count, over_cap) = (reader.count, reader.over_cap);
    if people.is_empty() {
        return Err(Error::Data(format!("nothing is left to train on: {count}")));
    }
    let mut hasher = Sha256::new();
    hasher.update(salt);
    for person in &people {
        hasher.update((person.examples.len() as u64).to_le_bytes());
        person.examples.iter().for_each(|example| example.absorb(&mut hasher));
    }
    let key = files::hex(&hasher.finalize());
    Ok(PrivateRows { train: people, validation, count, over_cap, key })
}

impl PrivateRows {
    /// Adds the included canaries to the persons, and all of them to the key.
    ///
    /// # Errors
    /// [`Error::Data`] when there would be more persons than were declared if all were included: a
    /// refusal that depended on the coins would leave them fair no longer, once it is tried again.
    pub(super) fn plant(&mut self, canaries: &Canaries, config: &PrivateConfig) -> Result<()> {
        if (self.train.len() + canaries.all.len()) as u64 > config.private.people {
            return Err(Error::Data(format!(
                "private.people = {} is less than the persons and the canaries; declare a public \
                 number that has room for private.canaries.count = {} more",
                config.private.people,
                canaries.all.len()
            )));
        }
        self.train.extend(canaries.persons());
        self.key = canaries.key(&self.key);
        Ok(())
    }
}

struct Reading<'a> {
    config: &'a PrivateConfig,
    encoder: &'a Encoder<'a>,
    stop: &'a AtomicBool,
    count: RowCount,
    over_cap: usize,
}

impl Reading<'_> {
    /// Rows as persons with what can be learnt of each.
    fn people(&mut self, rows: &[Row], unit: &Unit) -> Result<Vec<Person>> {
        let cap = self.config.private.cap;
        let people = People::group(unit, cap, rows.iter().map(|row| &row.object))?;
        self.over_cap += people.over_cap();
        let within: HashSet<usize> =
            (0..people.len()).flat_map(|person| people.rows(person).iter().copied()).collect();
        for (at, row) in rows.iter().enumerate() {
            if !within.contains(&at) {
                self.count.drop(row, "is past private.cap of its person");
            }
        }
        self.count.rows += rows.len() - within.len();
        let mut examples: Vec<Option<Example>> = vec![None; rows.len()];
        for (at, row) in rows.iter().enumerate().filter(|(at, _)| within.contains(at)) {
            examples[at] = self.example(row)?;
        }
        let people = people.retain(|row| examples[row].is_some());
        let mut own = |person| {
            let rows = people.rows(person).iter();
            Person { examples: rows.filter_map(|&row| examples[row].take()).collect() }
        };
        Ok((0..people.len()).map(&mut own).collect())
    }

    /// Public rows: nobody's.
    fn each(&mut self, rows: &[Row]) -> Result<Vec<Person>> {
        let mut all = Vec::new();
        for row in rows {
            all.extend(self.example(row)?.map(|example| Person { examples: vec![example] }));
        }
        Ok(all)
    }

    fn example(&mut self, row: &Row) -> Result<Option<Example>> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.count.rows += 1;
        match example(row, self.encoder) {
            Ok(mut example) => {
                let whole = example.ids.len();
                let cut = example.truncate(self.config.data.context);
                if example.counted() == 0 {
                    self.count.drop(row, "has a prompt that fills data.context");
                    return Ok(None);
                }
                if cut {
                    self.count.cut(row, format!("has {whole} tokens"));
                }
                self.count.kept += 1;
                Ok(Some(example))
            }
            Err(reason) if self.config.data.bad_rows == BadRow::Drop => {
                self.count.drop(row, reason);
                Ok(None)
            }
            Err(reason) => Err(bad_row(row, &reason)),
        }
    }
}

/// Whose row it is, in one word; the row itself where every row is another person's.
pub(super) fn whose(row: &Row, unit: &Unit) -> String {
    match unit {
        Unit::Row => Value::Object(row.object.clone()).to_string(),
        Unit::Column(column) => match row.object.get(column) {
            Some(Value::String(text)) => composed(text),
            other => other.map(Value::to_string).unwrap_or_default(),
        },
    }
}

pub(super) fn hash(row: &Row, unit: &Unit) -> u64 {
    let digest: [u8; 32] = Sha256::digest(whose(row, unit)).into();
    u64::from_le_bytes([
        digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7],
    ])
}

/// Refuses held-out rows of persons who are trained on.
fn refuse_overlap(train: &[Row], held_out: &[Row], unit: &Unit) -> Result<()> {
    let known: HashSet<String> = train.iter().map(|row| whose(row, unit)).collect();
    match held_out.iter().find(|row| known.contains(&whose(row, unit))) {
        None => Ok(()),
        Some(row) => Err(Error::Data(format!(
            "{}, line {} of the held-out rows is of somebody who is trained on; hold out other \
             persons",
            row.file, row.line
        ))),
    }
}
