//! Exact resume: k steps + resume + (N−k) steps end with the same bits as N steps.

use std::path::Path;

use crate::common::{contents, run, run_until, tiny, write_corpus};

/// The history without the wall time, which no run repeats.
fn history(output: &Path) -> Vec<String> {
    let records = tercet_train::metrics::read(&output.join("metrics.jsonl")).unwrap();
    records
        .into_iter()
        .map(|mut record| {
            record.seconds = 0.0;
            format!("{record:?}")
        })
        .collect()
}

fn interrupted_runs_end_alike(overrides: &[&str]) {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let whole = tiny(&corpus, &room.path().join("whole"), overrides);
    let report = run(&whole, false).unwrap();
    assert!(report.finished);
    let expected = contents(&report.checkpoint.unwrap());

    let parts = tiny(&corpus, &room.path().join("parts"), overrides);
    // Stops between checkpoints, then on one, then goes to the end.
    let report = run_until(&parts, false, 3).unwrap();
    assert_eq!((report.finished, report.steps), (false, 3));
    let report = run_until(&parts, true, 8).unwrap();
    assert_eq!((report.finished, report.steps), (false, 8));
    let report = run(&parts, true).unwrap();
    assert!(report.finished);
    let found = contents(&report.checkpoint.unwrap());
    assert_eq!(found.len(), expected.len());
    for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
        assert_eq!(name, expected_name);
        assert!(found == expected, "{name} differs");
    }
    assert_eq!(history(&parts.output), history(&whole.output));
    assert_eq!(history(&whole.output).len(), 12);
}

#[test]
fn a_run_in_three_parts_ends_with_the_bits_of_one_in_f32() {
    interrupted_runs_end_alike(&[]);
}

#[test]
fn a_run_in_three_parts_ends_with_the_bits_of_one_in_bf16() {
    interrupted_runs_end_alike(&["train.dtype=bf16", "train.schedule=wsd"]);
}

#[test]
fn a_run_in_three_parts_ends_with_the_bits_of_one_with_recomputation_and_dense_attention() {
    interrupted_runs_end_alike(&[
        "train.recompute=true",
        "model.nsa={compress_block=4, compress_stride=2, select_block=4, select_count=4, window=8, compressor='mlp'}",
    ]);
}

#[test]
fn threads_do_not_change_the_bits() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let checkpoints: Vec<_> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let config =
                tiny(&corpus, &room.path().join(format!("t{threads}")), &["train.steps=3"]);
            let report = pool.install(|| run(&config, false)).unwrap();
            contents(&report.checkpoint.unwrap())
        })
        .collect();
    assert!(checkpoints[0] == checkpoints[1], "1 and 2 threads differ");
    assert!(checkpoints[0] == checkpoints[2], "1 and 5 threads differ");
}
