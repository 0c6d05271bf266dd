//! Metrics, event files and the guard.

use std::fs;

use tercet_train::guard::{Guard, Verdict, WINDOW};
use tercet_train::metrics::{self, Metrics, StepRecord};
use tercet_train::tensorboard::{EventFile, crc32c};

fn record(step: u64) -> StepRecord {
    StepRecord {
        step,
        tokens: step * 10,
        loss: Some(1.0 / 3.0 + step as f64),
        lr: 0.1 + 0.2,
        grad_norm: None,
        skipped: false,
        loss_z: None,
        grad_norm_z: None,
        validation_loss: None,
        seconds: 0.1,
        measures: Default::default(),
    }
}

#[test]
fn metrics_of_a_resumed_run_keep_their_first_lines_byte_for_byte() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("metrics.jsonl");
    let mut log = Metrics::open(&path, 0).unwrap();
    (1..=5).for_each(|step| log.push(&record(step)).unwrap());
    let before = fs::read_to_string(&path).unwrap();
    assert_eq!(before.lines().count(), 5);
    // A crash cut the last line short, and the checkpoint is of step 3.
    fs::write(&path, &before[..before.len() - 9]).unwrap();
    let mut log = Metrics::open(&path, 3).unwrap();
    log.push(&record(4)).unwrap();
    let after = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = before.lines().take(4).collect();
    assert_eq!(after.lines().collect::<Vec<_>>(), lines);
    assert_eq!(metrics::read(&path).unwrap().len(), 4);
}

/// A reader of TFRecords that believes nothing.
fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let unmask = |value: u32| value.wrapping_sub(0xA282_EAD8).rotate_left(15);
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(unmask(number(at + 8)), crc32c(&bytes[at..at + 8]));
        let data = &bytes[at + 12..at + 12 + length];
        assert_eq!(unmask(number(at + 12 + length)), crc32c(data));
        found.push(data.to_vec());
        at += length + 16;
    }
    found
}

#[test]
fn an_event_file_is_whole_records_with_the_right_fields() {
    let room = tempfile::tempdir().unwrap();
    let mut file = EventFile::create(room.path(), 7, true).unwrap();
    file.scalars(8, &[("train/loss", 2.5), ("train/lr", 0.001)]).unwrap();
    let path = fs::read_dir(room.path()).unwrap().next().unwrap().unwrap().path();
    assert!(path.file_name().unwrap().to_str().unwrap().contains("tfevents"));
    let found = records(&fs::read(path).unwrap());
    assert_eq!(found.len(), 3);
    // After the time (9 bytes) and the step: version, session start, summary.
    assert!(found[0].ends_with(b"\x1a\x0dbrain.Event:2"));
    assert_eq!(found[1][9..], [0x10, 7, 0x3a, 2, 8, 1]);
    let mut point = b"\x0a\x0atrain/loss\x15".to_vec();
    point.extend(2.5f32.to_le_bytes());
    assert_eq!(found[2][9..13], [0x10, 8, 0x2a, 17 + 2 + 15 + 2]);
    assert_eq!(found[2][13..15], [0x0a, 17]);
    assert_eq!(found[2][15..15 + 17], point);
}

#[test]
fn the_guard_skips_what_is_not_finite_and_stops_after_its_patience() {
    let mut guard = Guard::default();
    let mut judge = |loss, norm| guard.judge(Some(loss), norm, 3, 5.0);
    assert_eq!(judge(1.0, 1.0), Verdict::Fine);
    assert_eq!(judge(f64::NAN, 1.0), Verdict::Skip);
    assert_eq!(judge(1.0, f64::INFINITY), Verdict::Skip);
    assert_eq!(judge(1.0, 1.0), Verdict::Fine);
    assert_eq!(judge(f64::NAN, f64::NAN), Verdict::Skip);
    assert_eq!(judge(f64::NAN, f64::NAN), Verdict::Skip);
    assert_eq!(judge(f64::NAN, f64::NAN), Verdict::Stop);
    assert_eq!((guard.skipped, guard.skipped_in_a_row), (5, 3));
}

#[test]
fn outliers_are_judged_against_the_last_128_steps_only() {
    let mut guard = Guard::default();
    // Far away at first, then around 2 with deviation 0.1.
    for _ in 0..40 {
        guard.judge(Some(100.0), 1.0, 3, 5.0);
    }
    for step in 0..WINDOW {
        let loss = if step % 2 == 0 { 1.9 } else { 2.1 };
        assert_eq!(guard.judge(Some(loss), 1.0, 3, 5.0), Verdict::Fine, "a fall is no outlier");
    }
    assert_eq!(guard.judge(Some(2.45), 1.0, 3, 5.0), Verdict::Fine);
    match guard.judge(Some(2.7), 1.0, 3, 5.0) {
        Verdict::Outlier { loss_z: Some(z), grad_norm_z: None } => {
            // (2.7 − 2.0) / 0.1, shifted a little by the 2.45 in the window.
            assert!((6.0..7.5).contains(&z), "{z}");
        }
        other => panic!("{other:?}"),
    }
    // A task may keep its loss to itself; its gradient is looked at all the same.
    assert_eq!(guard.judge(None, 1.0, 3, 5.0), Verdict::Fine);
    assert_eq!(guard.judge(None, f64::NAN, 3, 5.0), Verdict::Skip);
    assert_eq!(guard.judge(Some(1e9), 1.0, 3, 0.0), Verdict::Fine, "0 switches it off");
}
