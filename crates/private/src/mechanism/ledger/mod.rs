//! What was spent: a line for every step, on disk before its noise is used.
//!
//! The first line says which run it is, every further one a step: its noise multiplier, its rate
//! and the stream of random words it used. Each line holds the SHA-256 of the line before it and
//! its own, so that a line that was changed, moved or taken out is seen. Lines taken from the end
//! leave a whole chain: that is what [`Mark`] is for, which a checkpoint keeps.
//!
//! # After a crash
//!
//! A step whose line was written counts as spent, whether its noise was used or not. A run that
//! goes on from a checkpoint does the steps after it again: as further attempts, with streams of
//! their own, and they are accounted on top. Using the first attempt's words again would cost
//! nothing if the sum came out the same bits, and everything if it did not: the difference of two
//! sums under one noise is a difference without noise. A step that was given up before its line
//! was written has released nothing, costs nothing, and may draw the same persons again.
//!
//! The stream of a step is the number of its line, so that under one key no two lines have one.

mod chain;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::chain::{Previous, changed, lines, locked, opened, sealed, sync_folder};
use super::key::Key;
use crate::accounting::Phase;
use crate::{Error, Result};

/// Version of the file's form.
const FORM: u32 = 1;
/// No name of a run, key of data or digest is longer.
const MOST_NAME: usize = 1 << 12;

/// Whose ledger it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The run's own name, not used by another run.
    pub run: String,
    /// Key of the data.
    pub data: String,
    /// Digest of the configuration.
    pub config: String,
}

/// How far a ledger had come: what a checkpoint keeps of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Attempts written.
    pub attempts: u64,
    /// SHA-256 of the last line.
    pub hash: String,
}

/// One attempt at a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Number of the line after the first, and of the stream of random words.
    pub stream: u64,
    /// The step, counted from 0.
    pub step: u64,
    /// How often this step was written before.
    pub attempt: u64,
    /// Probability with which each person was drawn.
    pub rate: f64,
    /// Effective noise multiplier of all that was released.
    pub sigma: f64,
    /// Fingerprint of the key.
    pub key: String,
}

#[derive(Serialize, Deserialize)]
struct First {
    ledger: u32,
    #[serde(flatten)]
    identity: Identity,
    previous: String,
}

#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    entry: Entry,
    previous: String,
}

impl Previous for First {
    fn previous(&self) -> &str {
        &self.previous
    }
}

impl Previous for Line {
    fn previous(&self) -> &str {
        &self.previous
    }
}

/// The receipt for a step that is on disk: what opens [`super::clip::ClippedSum::release`], once.
#[derive(Debug)]
#[must_use = "the step is spent, whether its noise is used or not"]
pub struct Spent {
    stream: u64,
    sigma: f64,
}

impl Spent {
    /// The stream of random words.
    pub fn stream(&self) -> u64 {
        self.stream
    }

    /// The noise multiplier that was written.
    pub fn sigma(&self) -> f64 {
        self.sigma
    }

    #[cfg(test)]
    pub(super) fn of(stream: u64, sigma: f64) -> Self {
        Self { stream, sigma }
    }
}

/// An open ledger; nobody else can open it meanwhile.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    entries: Vec<Entry>,
    /// How often each step was written, from step 0 on.
    attempts: Vec<u64>,
    hash: String,
    /// A write failed: what is in the file is not known.
    broken: bool,
}

impl Ledger {
    /// Begins a ledger.
    ///
    /// # Errors
    /// [`Error::Ledger`] when there is one already, [`Error::Io`].
    pub fn create(path: &Path, identity: &Identity) -> Result<Self> {
        check_identity(identity)?;
        let refuse = |problem: &str| Error::Ledger { path: path.into(), problem: problem.into() };
        if path.exists() {
            return Err(refuse("is there already: go on with it, or begin another run elsewhere"));
        }
        // Beside, and then under its name: a ledger without its first line never is.
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}.tmp", std::process::id()));
        let beside = PathBuf::from(beside);
        let first = First { ledger: FORM, identity: identity.clone(), previous: String::new() };
        let (text, hash) = sealed(&first)?;
        let written = File::create(&beside)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            // Not over one that came meanwhile.
            .and_then(|()| {
                fs::hard_link(&beside, path).or_else(|error| match path.exists() {
                    true => Err(error),
                    // A file system without links.
                    false => fs::rename(&beside, path),
                })
            });
        // What is left of it does not matter.
        let _ = fs::remove_file(&beside);
        written.map_err(Error::io("write", path))?;
        sync_folder(path)?;
        let file = locked(path)?;
        Ok(Self { path: path.into(), file, entries: vec![], attempts: vec![], hash, broken: false })
    }

    /// Goes on with a ledger, after `mark` when a checkpoint has one.
    ///
    /// A last line without its end is what a power cut leaves of a write that never returned; its
    /// noise was not used, and it is cut off.
    ///
    /// # Errors
    /// [`Error::Ledger`] when it is missing, held by another process, of another run, changed, or
    /// shorter or other than `mark`; [`Error::Io`].
    pub fn open(path: &Path, identity: &Identity, mark: Option<&Mark>) -> Result<Self> {
        let refuse = |problem: String| Error::Ledger { path: path.into(), problem };
        if !path.exists() {
            return Err(refuse(
                "is missing: what this run has spent is not known without it. Bring it back, or \
                 begin another run with a budget of its own"
                    .into(),
            ));
        }
        let file = locked(path)?;
        let (lines, whole) = lines(path, &file)?;
        let mut lines = lines.iter().enumerate();
        let Some((_, first)) = lines.next() else {
            return Err(refuse("is empty; bring it back from a copy".into()));
        };
        let (first, mut hash) = opened::<First>(first, "").map_err(|p| refuse(changed(1, &p)))?;
        if first.ledger != FORM {
            let got = first.ledger;
            return Err(refuse(format!("has form {got}, this program knows {FORM}")));
        }
        for (what, got, expected) in [
            ("run", &first.identity.run, &identity.run),
            ("data", &first.identity.data, &identity.data),
            ("config", &first.identity.config, &identity.config),
        ] {
            if got != expected {
                return Err(refuse(format!(
                    "is of another run: its {what} is {got:?}, expected {expected:?}. Use the one \
                     that belongs to this run"
                )));
            }
        }
        let (mut entries, mut attempts) = (Vec::<Entry>::new(), Vec::new());
        let mut marked = mark.is_none_or(|mark| mark.attempts == 0 && mark.hash == hash);
        for (at, line) in lines {
            let (line, own) =
                opened::<Line>(line, &hash).map_err(|p| refuse(changed(at + 1, &p)))?;
            let entry = line.entry;
            let next = next(&attempts, entry.step);
            if entry.stream != entries.len() as u64 || next != Some(entry.attempt) {
                return Err(refuse(changed(at + 1, "is out of turn")));
            }
            hash = own;
            count(&mut attempts, entry.step);
            entries.push(entry);
            marked |= mark.is_some_and(|m| m.attempts == entries.len() as u64 && m.hash == hash);
        }
        if let Some(mark) = mark
            && !marked
        {
            return Err(refuse(format!(
                "does not go with the checkpoint, which knows {} attempts at steps: the ledger \
                 has {}{}. Bring the newer one back; an older one would hide what was spent",
                mark.attempts,
                entries.len(),
                if (entries.len() as u64) < mark.attempts { "" } else { ", and others" },
            )));
        }
        file.set_len(whole).and_then(|()| file.sync_all()).map_err(Error::io("write", path))?;
        Ok(Self { path: path.into(), file, entries, attempts, hash, broken: false })
    }

    /// The stream of the next line: what coins of the next attempt are drawn from.
    pub fn next_stream(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Writes a step and waits until the disk has it; only then may its noise be used. `sigma` is
    /// the effective multiplier of everything the step releases, statistics included.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a rate or multiplier out of range (a multiplier of 0 is written:
    /// no noise, and no privacy); [`Error::Step`] for a step beyond the one after the last;
    /// [`Error::Io`], after which nothing more can be spent until it is opened again.
    pub fn spend(&mut self, step: u64, rate: f64, sigma: f64, key: &Key) -> Result<Spent> {
        if self.broken {
            return Err(Error::Ledger {
                path: self.path.clone(),
                problem: "could not be written before; free the disk and go on with the run".into(),
            });
        }
        // The accountant's own rules.
        Phase::new(if sigma == 0.0 { 1.0 } else { sigma }, rate, 1)?;
        let Some(attempt) = next(&self.attempts, step) else {
            return Err(Error::Step(format!(
                "step {step} was to be spent, but no step was left out before: {} come first",
                self.attempts.len()
            )));
        };
        let stream = self.next_stream();
        let entry = Entry { stream, step, attempt, rate, sigma, key: key.fingerprint() };
        let (text, hash) = sealed(&Line { entry: entry.clone(), previous: self.hash.clone() })?;
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_all());
        if let Err(error) = written {
            self.broken = true;
            return Err(Error::io("write", &self.path)(error));
        }
        self.hash = hash;
        count(&mut self.attempts, step);
        self.entries.push(entry);
        Ok(Spent { stream, sigma })
    }

    /// Every attempt, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What a checkpoint must keep.
    pub fn mark(&self) -> Mark {
        Mark { attempts: self.entries.len() as u64, hash: self.hash.clone() }
    }

    /// What was spent, for an accountant: every attempt is a step of its own; equal ones together,
    /// in the order of their first.
    ///
    /// # Errors
    /// [`Error::Parameter`] when a step had no noise: no (ε, δ) can be named.
    pub fn spent(&self) -> Result<Vec<Phase>> {
        let mut phases: Vec<(f64, f64, u64)> = Vec::new();
        for entry in &self.entries {
            match phases.iter_mut().find(|(s, r, _)| (*s, *r) == (entry.sigma, entry.rate)) {
                Some((_, _, steps)) => *steps += 1,
                None => phases.push((entry.sigma, entry.rate, 1)),
            }
        }
        phases.into_iter().map(|(sigma, rate, steps)| Phase::new(sigma, rate, steps)).collect()
    }
}

/// The attempt that a step would be, given how often each was written; `None` when one before it is
/// missing.
fn next(attempts: &[u64], step: u64) -> Option<u64> {
    let step = usize::try_from(step).ok()?;
    if step == attempts.len() { Some(0) } else { attempts.get(step).copied() }
}

/// Counts an attempt that [`next`] has let through.
fn count(attempts: &mut Vec<u64>, step: u64) {
    match attempts.get_mut(step as usize) {
        Some(count) => *count += 1,
        None => attempts.push(1),
    }
}

fn check_identity(identity: &Identity) -> Result<()> {
    for text in [&identity.run, &identity.data, &identity.config] {
        if text.is_empty() || text.len() > MOST_NAME {
            return Err(Error::Step(
                "a ledger's run, data and config are 1 to 4096 bytes each".into(),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { run: "a".into(), data: "b".into(), config: "c".into() }
    }

    struct Place {
        _folder: tempfile::TempDir,
        path: PathBuf,
    }

    fn place() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.jsonl");
        Place { _folder: folder, path }
    }

    fn key() -> Key {
        Key::insecure(1)
    }

    /// A ledger of `steps` steps, closed.
    fn written(steps: u64) -> (Place, Mark) {
        let place = place();
        let mut ledger = Ledger::create(&place.path, &identity()).unwrap();
        for step in 0..steps {
            let spent = ledger.spend(step, 0.25, 1.5, &key()).unwrap();
            assert_eq!((spent.stream(), spent.sigma()), (step, 1.5));
        }
        let mark = ledger.mark();
        (place, mark)
    }

    fn refusal(path: &Path, mark: Option<&Mark>) -> String {
        Ledger::open(path, &identity(), mark).unwrap_err().to_string()
    }

    #[test]
    fn lines_are_there_before_a_receipt_is_and_come_back() {
        let place = place();
        let mut ledger = Ledger::create(&place.path, &identity()).unwrap();
        let start = ledger.mark();
        for step in 0..3 {
            let rate = 1.0 / 3.0;
            let _spent = ledger.spend(step, rate, 0.7 + step as f64 / 10.0, &key()).unwrap();
            let text = fs::read_to_string(&place.path).unwrap();
            assert_eq!(text.lines().count() as u64, step + 2);
            assert!(text.ends_with('\n'));
        }
        let (entries, mark) = (ledger.entries().to_vec(), ledger.mark());
        drop(ledger);
        for mark in [None, Some(&start), Some(&mark)] {
            let again = Ledger::open(&place.path, &identity(), mark).unwrap();
            assert_eq!(again.entries(), entries);
            assert_eq!(again.next_stream(), 3);
        }
        assert!(Ledger::create(&place.path, &identity()).is_err());
        let left: Vec<_> = fs::read_dir(place.path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing else is left in the folder");
    }

    #[test]
    fn attempts_have_streams_of_their_own_and_all_are_spent() {
        let (place, _) = written(4);
        let mut ledger = Ledger::open(&place.path, &identity(), None).unwrap();
        // From a checkpoint after step 1: steps 2 and 3 again, then on.
        for (step, attempt) in [(2, 1), (3, 1), (3, 2), (4, 0), (5, 0), (0, 1), (6, 0)] {
            let stream = ledger.next_stream();
            assert_eq!(ledger.spend(step, 0.25, 1.5, &key()).unwrap().stream(), stream);
            let last = ledger.entries().last().unwrap();
            assert_eq!((last.step, last.attempt), (step, attempt));
        }
        assert!(ledger.spend(8, 0.25, 1.5, &key()).is_err(), "a step was left out");
        let _spent = ledger.spend(7, 0.25, 2.5, &key()).unwrap();
        let expected = [Phase::new(1.5, 0.25, 11).unwrap(), Phase::new(2.5, 0.25, 1).unwrap()];
        assert_eq!(ledger.spent().unwrap(), expected);
        let mut streams: Vec<u64> = ledger.entries().iter().map(|e| e.stream).collect();
        streams.dedup();
        assert_eq!(streams, (0..12).collect::<Vec<_>>());
        drop(ledger);
        assert_eq!(Ledger::open(&place.path, &identity(), None).unwrap().entries().len(), 12);
    }

    #[test]
    fn a_missing_ledger_or_another_runs_is_refused() {
        let (place, mark) = written(2);
        for (what, other) in [
            ("run", Identity { run: "x".into(), ..identity() }),
            ("data", Identity { data: "x".into(), ..identity() }),
            ("config", Identity { config: "x".into(), ..identity() }),
        ] {
            let text = Ledger::open(&place.path, &other, Some(&mark)).unwrap_err().to_string();
            assert!(text.contains("another run") && text.contains(what), "{text}");
        }
        let text = refusal(&place.path.with_extension("none"), None);
        assert!(text.contains("is missing"), "{text}");
        assert!(Ledger::create(&place.path, &Identity { run: "".into(), ..identity() }).is_err());
    }

    #[test]
    fn a_ledger_that_is_held_is_refused() {
        let (place, _) = written(1);
        let held = Ledger::open(&place.path, &identity(), None).unwrap();
        let text = refusal(&place.path, None);
        assert!(text.contains("another process"), "{text}");
        drop(held);
        Ledger::open(&place.path, &identity(), None).unwrap();
    }

    #[test]
    fn an_older_or_shorter_ledger_than_the_checkpoints_is_refused() {
        let (place, mark) = written(3);
        let text = fs::read_to_string(&place.path).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        fs::write(&place.path, lines[..3].concat()).unwrap();
        assert!(
            refusal(&place.path, Some(&mark)).contains("3 attempts at steps: the ledger has 2")
        );
        // Without the checkpoint's word a cut at a line's end cannot be seen.
        Ledger::open(&place.path, &identity(), None).unwrap();
        // As long, but with another end: another run's of the same name.
        let mut other = Ledger::open(&place.path, &identity(), None).unwrap();
        let _spent = other.spend(2, 0.25, 9.0, &key()).unwrap();
        drop(other);
        assert!(refusal(&place.path, Some(&mark)).contains("does not go with the checkpoint"));
    }

    /// Every byte of every line, one after the other: nothing can be changed unseen.
    #[test]
    fn a_change_anywhere_is_seen() {
        let (place, mark) = written(3);
        let whole = fs::read(&place.path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] = if bytes[at] == b'7' { b'8' } else { b'7' };
            fs::write(&place.path, &bytes).unwrap();
            refusal(&place.path, Some(&mark));
        }
        let text = String::from_utf8(whole.clone()).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        for (without, says) in [
            ([0, 2, 3], "line 2 does not follow"),
            ([0, 1, 3], "line 3 does not follow"),
            ([0, 2, 1], "line 2 does not follow"),
            ([0, 1, 1], "line 3 does not follow"),
            ([1, 2, 3], "line 1"),
        ] {
            let some: String = without.iter().map(|&i| lines[i]).collect();
            fs::write(&place.path, some).unwrap();
            let text = refusal(&place.path, None);
            assert!(text.contains("was changed") && text.contains(says), "{text}");
        }
        for garbage in [&b""[..], b"\n", b"{}\n", &[0xff, b'\n'], &[b'a'; 1 << 17]] {
            fs::write(&place.path, garbage).unwrap();
            refusal(&place.path, None);
        }
        fs::write(&place.path, whole).unwrap();
        Ledger::open(&place.path, &identity(), Some(&mark)).unwrap();
    }

    #[test]
    fn what_a_power_cut_leaves_of_a_line_is_cut_off() {
        let (place, mark) = written(3);
        let whole = fs::read(&place.path).unwrap();
        let end = whole[..whole.len() - 1].iter().rposition(|&b| b == b'\n').unwrap() + 1;
        for torn in [1, 40, whole.len() - end - 1] {
            fs::write(&place.path, &whole[..end + torn]).unwrap();
            let ledger = Ledger::open(&place.path, &identity(), None).unwrap();
            assert_eq!(ledger.entries().len(), 2);
            drop(ledger);
            assert_eq!(fs::read(&place.path).unwrap(), whole[..end]);
            // Not when a checkpoint knows that it was whole.
            fs::write(&place.path, &whole[..end + torn]).unwrap();
            refusal(&place.path, Some(&mark));
            assert_eq!(fs::read(&place.path).unwrap(), whole[..end + torn]);
        }
        let mut ledger = Ledger::open(&place.path, &identity(), None).unwrap();
        let _spent = ledger.spend(2, 0.25, 1.5, &key()).unwrap();
        assert_eq!(ledger.mark(), mark, "the same line is the same hash");
    }

    #[test]
    fn steps_without_noise_are_written_and_cannot_be_accounted() {
        let (place, _) = written(1);
        let mut ledger = Ledger::open(&place.path, &identity(), None).unwrap();
        for (rate, sigma) in [(0.0, 1.0), (f64::NAN, 1.0), (2.0, 1.0), (0.5, f64::NAN), (0.5, -1.0)]
        {
            assert!(ledger.spend(1, rate, sigma, &key()).is_err(), "{rate} {sigma}");
        }
        assert_eq!(ledger.entries().len(), 1);
        let _spent = ledger.spend(1, 0.5, 0.0, &key()).unwrap();
        assert!(ledger.spent().is_err());
    }
}
