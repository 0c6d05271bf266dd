//! What the folder promises.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::*;

const PLAN: Plan = Plan { patients: 3000, canaries: 200, seed: 5 };

fn made(plan: &Plan) -> (tempfile::TempDir, Statistics) {
    let folder = tempfile::tempdir().unwrap();
    let statistics = write(plan, &folder.path().join("records")).unwrap();
    (folder, statistics)
}

/// (person, text) by line.
fn rows(folder: &tempfile::TempDir, name: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(folder.path().join("records").join(name)).unwrap();
    let field = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
    text.lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            assert_eq!(row.as_object().unwrap().len(), 2);
            (field(&row, "person"), field(&row, "text"))
        })
        .collect()
}

#[test]
fn a_seed_makes_the_same_bytes_on_any_number_of_threads() {
    let bytes = |plan: &Plan, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (folder, statistics) = pool.install(|| made(plan));
        let file = |name: &str| fs::read(folder.path().join("records").join(name)).unwrap();
        let files = ["train", "heldout", "public", "canaries"];
        (files.map(|name| file(&format!("{name}.jsonl"))), statistics)
    };
    let once = bytes(&PLAN, 1);
    assert_eq!(once, bytes(&PLAN, 3));
    let other = bytes(&Plan { seed: 6, ..PLAN }, 1);
    assert!(once.0.iter().zip(&other.0).all(|(a, b)| a != b));
    // A patient is the same however many there are.
    let fewer = bytes(&Plan { patients: 1000, canaries: 0, ..PLAN }, 1);
    assert!(once.0[1].starts_with(&fewer.0[1]));
}

#[test]
fn nobody_is_in_two_files() {
    let (folder, statistics) = made(&PLAN);
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let counts = [
        ("train.jsonl", statistics.train),
        ("heldout.jsonl", statistics.heldout),
        ("public.jsonl", statistics.public),
    ];
    for (name, counts) in counts {
        let rows = rows(&folder, name);
        let mut persons = BTreeMap::new();
        for (person, _) in &rows {
            *persons.entry(person.clone()).or_insert(0u64) += 1;
            assert_eq!(*seen.entry(person.clone()).or_insert(name), name, "{person}");
        }
        let words = rows.iter().map(|(_, text)| text.split_whitespace().count() as u64).sum();
        let expected = Counts {
            persons: persons.len() as u64,
            encounters: rows.len() as u64,
            words,
            most_encounters: *persons.values().max().unwrap(),
        };
        assert_eq!(counts, expected, "{name}");
    }
    assert_eq!(statistics.heldout.persons, PLAN.patients / FOLD);
    assert_eq!(statistics.train.persons, PLAN.patients * 9 / 10 + statistics.planted);
    // Skewed: the mean is above two, most have fewer, somebody has ten times the mean or so.
    let heldout = statistics.heldout;
    let mean = heldout.encounters as f64 / heldout.persons as f64;
    assert!((1.8..3.0).contains(&mean), "{mean}");
    assert!(statistics.train.most_encounters > 12);
}

#[test]
fn canaries_are_where_their_manifest_says_and_nowhere_else() {
    let (folder, statistics) = made(&PLAN);
    let manifest = fs::read_to_string(folder.path().join("records/canaries.jsonl")).unwrap();
    let secrets = secret::read(&manifest).unwrap();
    let train = rows(&folder, "train.jsonl");
    assert_eq!(secrets.len(), PLAN.canaries);
    let mut lines = HashSet::new();
    for secret in secrets.iter().filter(|secret| secret.included) {
        let line = secret.line.unwrap();
        assert!(lines.insert(line));
        assert_eq!(train[line as usize - 1], (secret.id.clone(), secret.text.clone()));
    }
    assert_eq!(lines.len() as u64, statistics.planted);
    // 200 fair coins: five standard deviations are 36.
    assert!(lines.len().abs_diff(100) < 36);
    // Not in a heap at one end.
    assert!(lines.iter().min().unwrap() < &500 && *lines.iter().max().unwrap() > 6000);
    let ids: HashSet<&str> = secrets.iter().map(|secret| secret.id.as_str()).collect();
    let texts: HashSet<&str> = secrets.iter().map(|secret| secret.text.as_str()).collect();
    assert_eq!(texts.len(), secrets.len());
    for name in ["train.jsonl", "heldout.jsonl", "public.jsonl"] {
        for (at, (person, text)) in rows(&folder, name).iter().enumerate() {
            let planted = ids.contains(person.as_str()) || texts.contains(text.as_str());
            let expected = name == "train.jsonl" && lines.contains(&(at as u64 + 1));
            assert_eq!(planted, expected, "{name} {at}");
        }
    }
}

#[test]
fn no_patient_is_made_of_the_words_that_the_coins_are() {
    // Else a record would tell who was planted. Coins are first bits of 32-bit words; the patient's
    // 64-bit words have theirs in two.
    let coins: Vec<bool> = crate::audit::canary::coins(128, PLAN.seed).collect();
    for stream in [0, 1, PUBLIC, FOLDS, PLACES] {
        let mut chance = Chance::new(PLAN.seed, stream);
        let upper = (0..64).map(|_| chance.unit() >= 0.5);
        let same = upper.zip(coins.chunks(2)).filter(|(upper, pair)| *upper == pair[1]).count();
        assert!(same < 56, "{stream}: {same} of 64");
    }
}

#[test]
fn codes_that_could_have_been_planted_have_the_canaries_form() {
    let text = &secret::plan(1, 3)[0].text;
    let others = secret::alternatives(text, 500, 4);
    assert!(others.len() == 500 && !others.contains(text));
    assert!(others.iter().all(|other| other.len() == text.len()));
    assert!(others.iter().all(|other| other[..36] == text[..36]));
}

#[test]
fn what_the_text_says_goes_together() {
    let (folder, _) = made(&Plan { canaries: 0, ..PLAN });
    let number = |text: &str, after: &str| -> f64 {
        let rest = &text[text.find(after).unwrap() + after.len()..];
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    let rows = rows(&folder, "train.jsonl");
    let correlation = |a: &str, b: &str| {
        let pairs = rows.iter().map(|(_, text)| (number(text, a), number(text, b)));
        let pairs: Vec<(f64, f64)> = pairs.collect();
        let n = pairs.len() as f64;
        let (x, y) = (
            pairs.iter().map(|p| p.0).sum::<f64>() / n,
            pairs.iter().map(|p| p.1).sum::<f64>() / n,
        );
        let sum = |f: &dyn Fn(&(f64, f64)) -> f64| pairs.iter().map(f).sum::<f64>();
        sum(&|p| (p.0 - x) * (p.1 - y))
            / (sum(&|p| (p.0 - x).powi(2)) * sum(&|p| (p.1 - y).powi(2))).sqrt()
    };
    assert!(correlation("HbA1c ", "glucose ") > 0.4);
    assert!(correlation("creatinine ", "eGFR ") < -0.6);
    assert!(correlation("eGFR ", "potassium ") < -0.2);
    for (_, text) in &rows {
        assert!(text.is_ascii() && !text.contains("NaN") && !text.contains("inf "));
        assert!((30..400).contains(&text.split_whitespace().count()), "{text}");
    }
    // All the words are used.
    let all: String = rows.iter().map(|(_, text)| text.as_str()).collect();
    for condition in vocabulary::CONDITIONS {
        assert!(all.contains(condition.name), "{}", condition.name);
    }
}

#[test]
fn sizes_and_folders_that_cannot_be_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records");
    let plan = |patients, canaries| Plan { patients, canaries, seed: 1 };
    for plan in [plan(0, 0), plan(9, 0), plan(u64::MAX, 0), plan(100, 101), plan(100, usize::MAX)] {
        assert!(matches!(write(&plan, &path), Err(Error::Records(_))), "{plan:?}");
    }
    let small = plan(10, 10);
    let orphan = write(&small, &folder.path().join("no/records")).unwrap_err().to_string();
    assert!(orphan.contains("no/records:") && !orphan.contains("tmp:"), "{orphan}");
    assert!(matches!(write(&small, Path::new("/")), Err(Error::Records(_))));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let made = write(&small, &path).unwrap();
    assert_eq!((made.heldout.persons, made.public.persons), (1, 1));
    assert!(matches!(write(&small, &path), Err(Error::Records(_))));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    for line in ["", "{}", "\u{0}", r#"{"id":"a","included":true,"text":"b","line":null}"#] {
        assert!(secret::read(&format!("{line}\n")).is_err(), "{line}");
    }
}
