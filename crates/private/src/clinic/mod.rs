//! Pseudo-clinical records: text about people who do not exist, to try private training on.
//!
//! Patients shaped like those of a diabetes ward, each with one stay or several (how many is skewed:
//! most have one or two, a few have tens), as text: age band, conditions, drugs, laboratory values
//! that go together, discharge. All a pure function of a seed: each patient has a stream of words of
//! its own. Nothing is taken from any real record, and nothing medical may be concluded from them.
//!
//! [`write()`] makes a folder:
//!
//! | file | rows |
//! |---|---|
//! | `train.jsonl` | nine patients of ten, and the canaries whose coins say so |
//! | `heldout.jsonl` | the tenth patient: same population, nobody of `train` |
//! | `public.jsonl` | others, a tenth as many, from another population by the same templates |
//! | `canaries.jsonl` | every canary, where it is, or that it is nowhere |
//!
//! Rows are `{"person", "text"}`. The coins are part of the plan: whoever attacks must not look.

mod chance;
mod patient;
pub mod secret;
mod vocabulary;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use self::chance::Chance;
use self::patient::Population;
use self::secret::Secret;
use crate::{Error, Result};

/// Fewer patients would leave a split without anybody.
pub const LEAST_PATIENTS: u64 = 10;
/// More would fill a disk without being of use.
pub const MOST_PATIENTS: u64 = 10_000_000;
/// Of so many patients in a row one is held out.
const FOLD: u64 = 10;
/// Patients that are made at once.
const PORTION: u64 = 4096;

/// Streams of words: those of the patients, of the public ones, and of everything else.
const PUBLIC: u64 = 1 << 40;
const FOLDS: u64 = 2 << 40;
const PLACES: u64 = 3 << 40;

const PRIVATE_POPULATION: Population = Population {
    age: (63.0, 14.0),
    sugar: 2.4,
    creatinine: 1.0,
    stays: (-0.05, 0.85),
    illness: 0.0,
};
/// Younger, better controlled, seldom back.
const PUBLIC_POPULATION: Population = Population {
    age: (54.0, 16.0),
    sugar: 1.8,
    creatinine: 0.9,
    stays: (-0.6, 0.7),
    illness: -0.4,
};

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Patients of `train` and `heldout` together.
    pub patients: u64,
    /// Canaries that get a coin each, about half of which are planted.
    pub canaries: usize,
    /// All follows from it.
    pub seed: u64,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Different persons, canaries among them.
    pub persons: u64,
    /// Rows.
    pub encounters: u64,
    /// Words between spaces in all texts.
    pub words: u64,
    /// Rows of the person with most.
    pub most_encounters: u64,
}

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// `train.jsonl`.
    pub train: Counts,
    /// `heldout.jsonl`.
    pub heldout: Counts,
    /// `public.jsonl`.
    pub public: Counts,
    /// Canaries with a coin.
    pub canaries: u64,
    /// Canaries in `train.jsonl`.
    pub planted: u64,
}

#[derive(Serialize)]
struct Row<'a> {
    person: &'a str,
    text: &'a str,
}

/// Makes the folder, which must not exist; it appears whole or not at all.
///
/// # Errors
/// [`Error::Records`] for fewer than 10 or more than 10⁷ patients, more canaries than patients, a
/// folder that is there already; [`Error::Io`].
pub fn write(plan: &Plan, folder: &Path) -> Result<Statistics> {
    let Plan { patients, canaries, .. } = *plan;
    if !(LEAST_PATIENTS..=MOST_PATIENTS).contains(&patients) {
        return Err(Error::Records(format!(
            "{patients} patients are refused, expected from {LEAST_PATIENTS} to {MOST_PATIENTS}"
        )));
    }
    if canaries as u64 > patients || canaries > crate::audit::canary::MOST {
        return Err(Error::Records(format!(
            "{canaries} canaries among {patients} patients are refused: expected no more canaries \
             than patients, and at most {}",
            crate::audit::canary::MOST
        )));
    }
    if folder.symlink_metadata().is_ok() {
        return Err(Error::Records(format!(
            "{} is there already; choose a new folder, or remove it",
            folder.display()
        )));
    }
    let Some(name) = folder.file_name() else {
        return Err(Error::Records(format!("{} is not the name of a folder", folder.display())));
    };
    // Written beside, then renamed.
    let name = format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id());
    let beside = folder.with_file_name(name);
    // By the name that was asked for: nobody knows the other.
    fs::create_dir(&beside).map_err(Error::io("make", folder))?;
    let made = fill(plan, &beside).and_then(|made| {
        fs::rename(&beside, folder).map_err(Error::io("make", folder)).map(|()| made)
    });
    if made.is_err() {
        // The first error matters, not whether the remains could be removed.
        let _ = fs::remove_dir_all(&beside);
    }
    made
}

fn fill(plan: &Plan, folder: &Path) -> Result<Statistics> {
    let mut secrets = secret::plan(plan.canaries, plan.seed);
    let mut train = Rows::create(folder.join("train.jsonl"))?;
    let mut heldout = Rows::create(folder.join("heldout.jsonl"))?;
    // An included canary comes before the patient of its place; sorted, so that one pass meets all.
    let mut places = Chance::new(plan.seed, PLACES);
    let included = secrets.iter().enumerate().filter(|(_, secret)| secret.included);
    let mut waiting: Vec<(u64, usize)> =
        included.map(|(at, _)| ((places.unit() * plan.patients as f64) as u64, at)).collect();
    waiting.sort_unstable();
    let mut waiting = waiting.into_iter().peekable();
    for_each_patient(plan.seed, 0..plan.patients, &PRIVATE_POPULATION, |number, texts| {
        while let Some((_, at)) = waiting.next_if(|(place, _)| *place <= number) {
            let secret = &mut secrets[at];
            train.person(&secret.id, std::slice::from_ref(&secret.text))?;
            secret.line = Some(train.counts.encounters);
        }
        let file = if is_held_out(plan.seed, number) { &mut heldout } else { &mut train };
        file.person(&format!("patient-{number:08}"), texts)
    })?;
    let mut public = Rows::create(folder.join("public.jsonl"))?;
    let others = PUBLIC..PUBLIC + plan.patients.div_ceil(FOLD);
    for_each_patient(plan.seed, others, &PUBLIC_POPULATION, |number, texts| {
        public.person(&format!("public-{:08}", number - PUBLIC), texts)
    })?;
    let planted = secrets.iter().filter(|secret| secret.included).count() as u64;
    let statistics = Statistics {
        train: train.finish()?,
        heldout: heldout.finish()?,
        public: public.finish()?,
        canaries: secrets.len() as u64,
        planted,
    };
    write_secrets(&folder.join("canaries.jsonl"), &secrets)?;
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))?;
    }
    Ok(statistics)
}

/// One of each ten in a row, by a draw of its own, so that every ten have one.
fn is_held_out(seed: u64, number: u64) -> bool {
    Chance::new(seed, FOLDS + number / FOLD).below(FOLD as usize) as u64 == number % FOLD
}

/// Patients in order; made in portions by all threads.
fn for_each_patient(
    seed: u64,
    numbers: std::ops::Range<u64>,
    of: &Population,
    mut each: impl FnMut(u64, &[String]) -> Result<()>,
) -> Result<()> {
    let mut start = numbers.start;
    while start < numbers.end {
        let end = numbers.end.min(start + PORTION);
        let made: Vec<Vec<String>> = (start..end)
            .into_par_iter()
            .map(|number| patient::stays(of, &mut Chance::new(seed, number)))
            .collect();
        for (number, texts) in (start..end).zip(&made) {
            each(number, texts)?;
        }
        start = end;
    }
    Ok(())
}

/// A file of rows and what is in it.
struct Rows {
    path: PathBuf,
    file: BufWriter<File>,
    counts: Counts,
}

impl Rows {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create_new(&path).map_err(Error::io("write", &path))?;
        Ok(Self { path, file: BufWriter::with_capacity(1 << 18, file), counts: Counts::default() })
    }

    fn person(&mut self, person: &str, texts: &[String]) -> Result<()> {
        for text in texts {
            line(&mut self.file, &Row { person, text }).map_err(Error::io("write", &self.path))?;
            self.counts.words += text.split_ascii_whitespace().count() as u64;
        }
        let rows = texts.len() as u64;
        self.counts.persons += 1;
        self.counts.encounters += rows;
        self.counts.most_encounters = self.counts.most_encounters.max(rows);
        Ok(())
    }

    fn finish(mut self) -> Result<Counts> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(Error::io("write", &self.path))?;
        Ok(self.counts)
    }
}

fn line(file: &mut impl Write, row: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *file, row)?;
    file.write_all(b"\n")
}

fn write_secrets(path: &Path, secrets: &[Secret]) -> Result<()> {
    let file = File::create_new(path).map_err(Error::io("write", path))?;
    let mut file = BufWriter::new(file);
    let lines = secrets.iter().try_for_each(|secret| line(&mut file, secret));
    let synced = lines.and_then(|()| file.flush()).and_then(|()| file.get_ref().sync_all());
    synced.map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests;
