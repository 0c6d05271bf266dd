//! What is spent stays spent.

use std::fs;

use crate::common::{Room, attempts, error, json, read, records, result, run, run_until};

#[test]
fn an_empty_draw_releases_noise_and_costs_a_step() {
    let room = Room::new();
    let mut config = room.config("run", &["private.people=1000000000", "train.batch=1"]);
    (config.private.epsilon, config.private.sigma) = (None, Some(1.0));
    // Of twelve persons one is drawn in six steps with a probability of 7e-8.
    (config.private.epsilon, config.private.sigma) = (None, Some(1.0));
    let report = run(&config, false).unwrap();
    assert_eq!((report.steps, attempts(&config)), (6, 6));
    let norms: Vec<f64> = records(&config).iter().map(|r| r.grad_norm.unwrap()).collect();
    assert!(norms.iter().all(|&norm| norm > 0.0), "no noise was released: {norms:?}");
    let promise = json(&config.output.join("privacy.json"));
    assert_eq!(promise["steps"], 6);
    // The noise is σ·C/B on every number.
    let model = tercet_model::Model::load(&room.at("model")).unwrap();
    let adapter = tercet_model::Adapter::load(&report.checkpoint.unwrap(), &model).unwrap();
    let elements = adapter.params().elements() as f64;
    for norm in norms {
        // Five standard errors of a norm of n numbers: 5/√(2n).
        let off = norm / (0.1 * elements.sqrt()) - 1.0;
        assert!(off.abs() < 5.0 / (2.0 * elements).sqrt(), "{norm} {elements}");
    }
}

#[test]
fn steps_that_are_done_again_cost_again_and_end_the_run_early() {
    let room = Room::new();
    let config = room.config("run", &["checkpoint.every=2"]);
    let whole = run_until(&config, false, 5).unwrap();
    assert_eq!((whole.steps, attempts(&config)), (5, 5));
    // As if the machine had died before the last two checkpoints were written.
    for step in [4, 5] {
        fs::remove_dir_all(config.output.join(format!("checkpoints/step-0000000{step}"))).unwrap();
    }
    let end = run(&config, true).unwrap();
    assert!(end.finished);
    // Five are spent; of the four that are left one fits.
    assert_eq!((end.steps, attempts(&config)), (3, 6));
    let promise = json(&config.output.join("privacy.json"));
    assert!(promise["epsilon"].as_f64().unwrap() <= 8.0 && promise["steps"] == 6);
    // Asked again, it spends nothing more.
    let again = run(&config, true).unwrap();
    assert_eq!((again.steps, attempts(&config)), (3, 6));
    assert!(result(&again) == result(&end));
    // No stream was used twice.
    let text = fs::read_to_string(config.output.join("ledger.jsonl")).unwrap();
    let streams: Vec<u64> = text
        .lines()
        .skip(1)
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["stream"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(streams, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_ledger_of_fewer_steps_than_the_folder_shows_is_refused() {
    let room = Room::new();
    let config = room.config("run", &["checkpoint.every=2"]);
    run_until(&config, false, 5).unwrap();
    let (ledger, checkpoints) =
        (config.output.join("ledger.jsonl"), config.output.join("checkpoints"));
    for step in [4, 5] {
        fs::remove_dir_all(checkpoints.join(format!("step-0000000{step}"))).unwrap();
    }
    let whole = fs::read_to_string(&ledger).unwrap();
    // Three attempts: more than the checkpoint of step 2 asks for, fewer than were released.
    let older: String = whole.lines().take(4).map(|line| format!("{line}\n")).collect();
    fs::write(&ledger, &older).unwrap();
    let text = error(&config, true);
    assert!(text.contains("shows 5 steps") && text.contains("holds 3"), "{text}");
    assert_eq!(fs::read_to_string(&ledger).unwrap(), older, "and nothing is changed");
    // Neither is a new one begun where the first was.
    fs::remove_dir_all(&checkpoints).unwrap();
    fs::remove_file(&ledger).unwrap();
    for resume in [false, true] {
        let text = error(&config, resume);
        assert!(text.contains("shows 5 steps") && !ledger.exists(), "{text}");
    }
}

#[test]
fn a_filter_stops_a_run_that_does_steps_again() {
    let room = Room::new();
    let more = [
        "private.method=\"random-action\"",
        "private.mode=\"m2\"",
        "private.every=1",
        "train.steps=40",
        "checkpoint.every=5",
        "checkpoint.keep=99",
    ];
    let config = room.config("run", &more);
    run_until(&config, false, 14).unwrap();
    for step in [10, 14] {
        fs::remove_dir_all(config.output.join(format!("checkpoints/step-000000{step}"))).unwrap();
    }
    let end = run(&config, true).unwrap();
    assert!(end.finished && end.steps < 40, "{}", end.steps);
    let records = records(&config);
    let last = records.last().unwrap();
    assert!(last.measures["budget"] <= 1.0 && last.measures["budget"] > 0.8, "{last:?}");
    assert!(records.iter().all(|r| r.measures["epsilon"] == 8.0));
    let sigmas: Vec<f64> = records.iter().map(|r| r.measures["sigma"]).collect();
    assert!(sigmas.iter().any(|&s| s != sigmas[0]), "sigma was not adapted");
}

#[test]
fn a_ledger_that_is_missing_older_or_edited_ends_the_resume_with_nothing_lost() {
    let room = Room::new();
    let config = room.config("run", &[]);
    run_until(&config, false, 3).unwrap();
    let path = config.output.join("ledger.jsonl");
    let whole = read(&path);
    let text = String::from_utf8(whole.clone()).unwrap();
    let shorter: String = text.split_inclusive('\n').take(3).collect();
    let edited = text.replacen("\"rate\":0.3", "\"rate\":0.1", 1);
    for (content, says) in [
        (None, "is missing"),
        (Some(shorter), "does not go with the checkpoint"),
        (Some(edited), "was changed"),
        (Some(String::new()), "is empty"),
    ] {
        match &content {
            None => fs::remove_file(&path).unwrap(),
            Some(content) => fs::write(&path, content).unwrap(),
        }
        let error = error(&config, true);
        assert!(error.contains(says), "{error}");
        let left = fs::read_to_string(&path).ok();
        assert_eq!(left, content, "a refused ledger was touched");
    }
    fs::write(&path, &whole).unwrap();
    let end = run(&config, true).unwrap();
    assert_eq!((end.steps, attempts(&config)), (6, 6));
    // From another run, of the same folder's name.
    let other = room.config("other", &[]);
    run_until(&other, false, 3).unwrap();
    fs::copy(other.output.join("ledger.jsonl"), &path).unwrap();
    assert!(error(&config, true).contains("another run"));
}

#[test]
fn a_run_that_was_killed_before_its_first_checkpoint_goes_on_spending() {
    let room = Room::new();
    let config = room.config("run", &[]);
    run_until(&config, false, 2).unwrap();
    fs::remove_dir_all(config.output.join("checkpoints")).unwrap();
    assert!(error(&config, false).contains("is there already"));
    let end = run(&config, true).unwrap();
    assert_eq!((end.steps, attempts(&config)), (4, 6));
}

/// A new salt would make every key another, and the refusal would blame the rows.
#[test]
fn a_salt_that_is_missing_is_named_and_none_is_made_in_its_stead() {
    let room = Room::new();
    let config = room.config("run", &[]);
    run_until(&config, false, 2).unwrap();
    let path = config.output.join("data.salt");
    let whole = read(&path);
    fs::remove_file(&path).unwrap();
    let missing = || {
        let text = error(&config, true);
        assert!(text.contains("data.salt cannot be read") && text.contains("copy"), "{text}");
        assert!(!path.exists());
    };
    missing();
    // Nor where a ledger alone is left.
    fs::rename(config.output.join("checkpoints"), room.at("aside")).unwrap();
    missing();
    fs::rename(room.at("aside"), config.output.join("checkpoints")).unwrap();
    fs::write(&path, whole).unwrap();
    assert!(run(&config, true).unwrap().finished);
}

#[test]
fn another_seed_or_a_changed_promise_is_refused_on_resume() {
    let room = Room::new();
    let config = room.config("run", &[]);
    run_until(&config, false, 2).unwrap();
    for (key, value) in [("insecure_seed", None), ("insecure_seed", Some(6))] {
        let mut other = config.clone();
        other.private.insecure_seed = value;
        let error = error(&other, true);
        assert!(error.contains(key), "{error}");
    }
    for more in [
        "private.people=30",
        "private.epsilon=9.0",
        "train.batch=5",
        "private.cap=2",
        "train.steps=9",
        "private.method=\"auto-s\"",
    ] {
        let error = error(&room.config("run", &[more]), true);
        assert!(error.contains("was written with"), "{error}");
    }
    assert_eq!(attempts(&config), 2);
}
