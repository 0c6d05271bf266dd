//! What an audit needs of a run: how well its newest checkpoint knows canaries, rows that it learnt
//! from, and others.
//!
//! A score is the mean loss of a row's tokens less that under the model the run started from: what
//! a row is worth by itself goes out, what was learnt of it stays. The lower, the likelier was the
//! row learnt from.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value, json};
use tercet_model::Model;
use tercet_tensor::Device;
use tercet_train::data::{Row, is_held_out, read_rows};
use tercet_train::run::{check_data, newest_checkpoint};
use tercet_train::tune::sft::example;
use tercet_train::tune::start::{self, Beside};
use tercet_train::tune::{Encoder, Example, portions};
use tercet_train::{Error, Result, files};

use super::budget::Budget;
use super::config::PrivateConfig;
use super::planted::{self, Canaries};
use super::report;
use super::rows::{Person, hash, rows, whose};
use super::run::{SALT, canaries, of_canaries, recipe};
use super::task::{layout, sums};
use crate::audit::canary::{self, Planted};
use crate::audit::report::{Kind, Scored};
use crate::clinic::secret::{self, Secret};
use crate::mechanism::people::{People, Unit};
use crate::method::Steering;

/// Below a run's output: the scores. They are about the rows and belong with them.
pub const SCORES: &str = "scores.jsonl";
/// What each planted canary is ranked among: ten bits with itself.
const CANDIDATES: usize = 1023;
/// Of the candidates; any would do.
const SEED: u64 = 0;

/// Whose losses are wanted.
#[derive(Clone, Debug, Default)]
pub struct Suspects {
    /// A manifest of `tercet private records --canaries`; without it those that the run planted itself.
    pub canaries: Option<PathBuf>,
    /// Rows that the run learnt from; canaries among them are passed over.
    pub members: Option<PathBuf>,
    /// Rows of the same kind, of persons whom it never saw.
    pub nonmembers: Option<PathBuf>,
    /// Of members and of nonmembers at most so many, chosen by a hash of what they say; two or more
    /// where there are any.
    pub rows: usize,
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Attacked {
    /// A line for each row.
    pub scores: Vec<Scored>,
    /// The checkpoint that was attacked.
    pub checkpoint: PathBuf,
    /// ε that was proven for it; `None` without noise.
    pub epsilon: Option<f64>,
    /// δ of that.
    pub delta: f64,
}

/// Attacks the newest checkpoint of a run; `scores.jsonl` below `output` holds the scores then.
///
/// # Errors
/// [`Error::Checkpoint`] for a folder without a private run, or one whose rows or model are not
/// those it was trained with; [`Error::Data`] for canaries, members or nonmembers that are not what
/// they are said to be; [`Error::Interrupted`].
pub fn attack(
    output: &Path,
    suspects: &Suspects,
    (stop, device): (&AtomicBool, &Device),
) -> Result<Attacked> {
    if suspects.rows < 2 && (suspects.members.is_some() || suspects.nonmembers.is_some()) {
        return Err(Error::Data(format!(
            "at most {} members and nonmembers cannot be compared; expected two or more of each",
            suspects.rows
        )));
    }
    let config = PrivateConfig::of_run(output)?;
    let checkpoint = newest_checkpoint(output)?.ok_or_else(|| {
        Error::Checkpoint(format!("{} has no whole checkpoint to audit", output.display()))
    })?;
    let (epsilon, delta) = promise(&checkpoint)?;
    let beside = Beside::load(&config.model.path)?;
    let mut first = start::first(&config.model, config.lora.as_ref(), &config.train)?;
    let encoder = Encoder::new(&beside.tokenizer, first.config(), &beside.generation)?;
    let salt = output.join(SALT);
    let salt = std::fs::read(&salt).map_err(Error::io("read", &salt))?;
    let mut rows = rows(&config, &encoder, &salt, stop)?;
    let planted = match config.private.canaries {
        Some(_) => {
            let budget = Budget::plan(&config)?;
            let (_, layout) = layout(&first, config.private.freeze_a)?;
            let steering = Steering::new(recipe(&config, &budget, &layout)?, layout)?;
            canaries(&config, &first, &steering, false)?
        }
        None => None,
    };
    if let Some(planted) = &planted {
        rows.plant(planted, &config)?;
    }
    if planted.is_none() && suspects.canaries.is_none() && suspects.members.is_none() {
        return Err(Error::Data(
            "there is nothing to audit with: the run planted no canaries (private.canaries). Give \
             --canaries, or --members and --nonmembers"
                .into(),
        ));
    }
    let key = start::key(&rows.key, &[&first])?;
    check_data(&checkpoint, &key).map_err(|error| of_canaries(&config, error))?;
    let mut tuned = start::resumed(&first, &checkpoint, &config.train)?;
    first.to_device(device)?;
    tuned.to_device(device)?;
    let attack = Attack { config: &config, encoder, models: [&tuned, &first], stop };

    let learnt = Learnt::read(&config, stop)?;
    let mut scores = Vec::new();
    let mut ids = HashSet::new();
    if let Some(path) = &suspects.canaries {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let secrets = secret::read(&text)?;
        if secrets.is_empty() {
            return Err(Error::Data(format!("{} names no canaries", path.display())));
        }
        secrets.iter().try_for_each(|secret| learnt.check(secret, path))?;
        scores = attack.canaries(&secrets)?;
        ids = secrets.into_iter().map(|secret| secret.id).collect();
    } else if let Some(planted) = &planted {
        scores = attack.planted(planted, &checkpoint)?;
    }
    for (path, kind) in [(&suspects.members, Kind::Member), (&suspects.nonmembers, Kind::Nonmember)]
    {
        if let Some(path) = path {
            let rows = learnt.suspects(path, kind, &ids, stop)?;
            scores.extend(attack.rows(rows, kind, suspects.rows)?);
        }
    }
    let mut text = Vec::new();
    for scored in &scores {
        serde_json::to_writer(&mut text, scored)
            .map_err(|error| Error::Fault(format!("a score has no JSON: {error}")))?;
        text.push(b'\n');
    }
    files::write_atomic(&output.join(SCORES), &text)?;
    Ok(Attacked { scores, checkpoint, epsilon, delta })
}

/// ε and δ of a checkpoint.
fn promise(checkpoint: &Path) -> Result<(Option<f64>, f64)> {
    let path = checkpoint.join(report::FILE);
    let refuse = |problem: &str| Error::Checkpoint(format!("{}: {problem}", path.display()));
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let promise: Value =
        serde_json::from_slice(&bytes).map_err(|error| refuse(&error.to_string()))?;
    let delta = promise["delta"].as_f64().ok_or_else(|| refuse("names no delta"))?;
    Ok((promise["epsilon"].as_f64(), delta))
}

/// The models, and how rows go through them.
struct Attack<'a> {
    config: &'a PrivateConfig,
    encoder: Encoder<'a>,
    /// Tuned, and as it started.
    models: [&'a Model; 2],
    stop: &'a AtomicBool,
}

impl Attack<'_> {
    fn canaries(&self, secrets: &[Secret]) -> Result<Vec<Scored>> {
        let taken: HashSet<&str> = secrets.iter().map(|secret| &secret.text[..]).collect();
        // One more for each that is somebody else's canary.
        let others = secret::alternatives("", CANDIDATES + secrets.len(), SEED);
        let others = others.iter().filter(|text| !taken.contains(&text[..])).take(CANDIDATES);
        let texts = secrets.iter().map(|secret| &secret.text).chain(others);
        let examples = texts.map(|text| {
            let mut object = Map::new();
            object.insert("text".into(), json!(text));
            let row = Row { file: "canary".into(), line: 1, object };
            // None may be left out: who is left out must not depend on who was planted.
            self.example(&row)
                .ok_or_else(|| Error::Data(format!("canary {text:?} has nothing to be learnt")))
        });
        let named = secrets.iter().map(|secret| (secret.id.clone(), secret.included));
        self.ranked(named.collect(), examples.collect::<Result<_>>()?)
    }

    /// Canaries that the run planted itself.
    fn planted(&self, planted: &Canaries, checkpoint: &Path) -> Result<Vec<Scored>> {
        let (named, mut examples): (Vec<_>, Vec<_>) = planted
            .examples()
            .map(|(canary, example)| ((canary.id.clone(), canary.included), example))
            .unzip();
        let Some(length) = examples.first().map(|example| example.ids.len()) else {
            return planted.scored(checkpoint);
        };
        // Rows as they could have been, one more for each that is somebody's own.
        let taken: HashSet<Vec<i32>> = examples.iter().map(|own| own.ids.clone()).collect();
        let all: Vec<u32> = (0..self.models[0].config().vocab_size as u32).collect();
        let others = canary::new_tokens(CANDIDATES + named.len(), &all, length, SEED)?;
        let others = others.into_iter().filter_map(|other| match other.planted {
            Planted::NewToken { tokens } => Some(planted::example(&tokens)),
            Planted::Gradient { .. } => None,
        });
        examples.extend(others.filter(|other| !taken.contains(&other.ids)).take(CANDIDATES));
        self.ranked(named, examples)
    }

    /// Scores of canaries: names with coins, then their examples and those of what each included
    /// one is ranked among.
    fn ranked(&self, named: Vec<(String, bool)>, examples: Vec<Example>) -> Result<Vec<Scored>> {
        let mut losses = self.losses(examples)?;
        let candidates = losses.split_off(named.len());
        let scored = |((id, included), score): ((String, bool), f64)| Scored {
            id,
            included,
            score,
            kind: Kind::Canary,
            candidates: if included { candidates.clone() } else { Vec::new() },
        };
        Ok(named.into_iter().zip(losses).map(scored).collect())
    }

    /// At most `most` of the rows from which something can be learnt.
    fn rows(&self, mut rows: Vec<Row>, kind: Kind, most: usize) -> Result<Vec<Scored>> {
        rows.sort_by_cached_key(|row| hash(row, &Unit::Row));
        let examples = rows.into_iter().filter_map(|row| {
            let example = self.example(&row)?;
            Some((row, example))
        });
        let (rows, examples): (Vec<Row>, Vec<Example>) = examples.take(most).unzip();
        let name = if kind == Kind::Member { "member" } else { "nonmember" };
        let scored = |(row, score): (Row, f64)| Scored {
            id: format!("{name} {}:{}", row.file, row.line),
            included: kind == Kind::Member,
            score,
            kind,
            candidates: Vec::new(),
        };
        Ok(rows.into_iter().zip(self.losses(examples)?).map(scored).collect())
    }

    /// As training would see it.
    fn example(&self, row: &Row) -> Option<Example> {
        let mut example = example(row, &self.encoder).ok()?;
        example.truncate(self.config.data.context);
        (example.counted() > 0).then_some(example)
    }

    fn losses(&self, examples: Vec<Example>) -> Result<Vec<f64>> {
        let each = |example| Person { examples: vec![example] };
        let people: Vec<Person> = examples.into_iter().map(each).collect();
        let cut = (self.config.rows()?, self.config.data.context);
        let mut losses = Vec::with_capacity(people.len());
        for portion in portions(people.iter().map(Person::tokens), cut.0) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let people: Vec<&Person> = people[portion].iter().collect();
            let [tuned, first] = self.models.map(|model| sums(model, &people, cut));
            let both = tuned?.into_iter().zip(first?).zip(people);
            losses.extend(both.map(|((tuned, first), own)| (tuned - first) / own.counted() as f64));
        }
        Ok(losses)
    }
}

/// What a run learnt from, row by row.
struct Learnt {
    unit: Unit,
    rows: HashSet<String>,
    /// Everybody in the run's rows, learnt from or not.
    persons: HashSet<String>,
}

impl Learnt {
    fn read(config: &PrivateConfig, stop: &AtomicBool) -> Result<Self> {
        let unit = config.private.unit()?;
        let all = read_rows(&config.data.paths, stop)?;
        let persons = all.iter().map(|row| whose(row, &unit)).collect();
        let held_out = |row: &Row| is_held_out(hash(row, &unit), config.data.validation);
        let train: Vec<&Row> = all.iter().filter(|row| !held_out(row)).collect();
        let objects = train.iter().map(|row| &row.object);
        let people = People::group(&unit, config.private.cap, objects)?;
        let within = (0..people.len()).flat_map(|person| people.rows(person));
        let rows = within.map(|&row| said(&train[row].object)).collect();
        Ok(Self { unit, rows, persons })
    }

    /// Refuses a canary that is not where its coin says.
    fn check(&self, secret: &Secret, manifest: &Path) -> Result<()> {
        let Secret { id, included, text, .. } = secret;
        let row = json!({"person": id, "text": text});
        let is_in = row.as_object().is_some_and(|row| self.rows.contains(&said(row)));
        let problem = match (included, is_in, self.persons.contains(id)) {
            (true, true, _) | (false, false, false) => return Ok(()),
            (true, false, true) => {
                "is in the run's rows with another text, or held out by data.validation; hold out \
                 persons by data.validation_paths"
            }
            (true, false, false) => "was planted, but the run's rows do not have it",
            (false, ..) => "was not planted, but the run's rows have it",
        };
        Err(Error::Data(format!(
            "{}: {id} {problem}. Give the canaries.jsonl that belongs to the run's rows",
            manifest.display()
        )))
    }

    /// The rows of a file that are what `kind` says: learnt from, or of persons never seen.
    fn suspects(
        &self,
        path: &Path,
        kind: Kind,
        canaries: &HashSet<String>,
        stop: &AtomicBool,
    ) -> Result<Vec<Row>> {
        let mut rows = read_rows(&[path.to_string_lossy().into_owned()], stop)?;
        rows.retain(|row| !canaries.contains(&whose(row, &self.unit)));
        if kind == Kind::Member {
            // Past the cap, or held out: in the data and not learnt from.
            let strange = rows.iter().find(|row| !self.persons.contains(&whose(row, &self.unit)));
            if let Some(Row { file, line, .. }) = strange {
                return Err(Error::Data(format!(
                    "{file}, line {line} is of nobody in the run's rows; members are rows that it \
                     was trained on"
                )));
            }
            rows.retain(|row| self.rows.contains(&said(&row.object)));
        } else if let Some(Row { file, line, .. }) =
            rows.iter().find(|row| self.persons.contains(&whose(row, &self.unit)))
        {
            return Err(Error::Data(format!(
                "{file}, line {line} is of somebody in the run's rows; nonmembers are others"
            )));
        }
        if rows.len() < 2 {
            return Err(Error::Data(format!(
                "{} has {} rows that can be compared, expected two or more",
                path.display(),
                rows.len()
            )));
        }
        Ok(rows)
    }
}

/// What a row says, whatever the order of its columns.
fn said(object: &Map<String, Value>) -> String {
    let sorted: BTreeMap<&String, &Value> = object.iter().collect();
    json!(sorted).to_string()
}
