//! Checkpoints that are damaged, half written, or of another run.

use std::fs;
use std::path::{Path, PathBuf};

use tercet_train::newest_checkpoint;

use crate::common::{contents, run, run_until, tiny, write_corpus};

/// Every file of a checkpoint, the manifest included.
fn files(checkpoint: &Path) -> Vec<PathBuf> {
    let list = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    [list(checkpoint), list(&checkpoint.join("state"))].concat()
}

#[test]
fn damage_to_any_file_of_the_newest_checkpoint_falls_back_to_the_one_before() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &[]);
    let newest = run(&config, false).unwrap().checkpoint.unwrap();
    let expected = contents(&newest);
    let before = newest.with_file_name("step-00000008");
    let files = files(&newest);
    assert_eq!(files.len(), 9, "{files:?}");
    for path in files {
        let bytes = fs::read(&path).unwrap();
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 0x20;
        let longer = [&bytes[..], b"x"].concat();
        for damage in [Some(&bytes[..bytes.len() / 2]), Some(&flipped), Some(&longer), None] {
            match damage {
                Some(damage) => fs::write(&path, damage).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let found = newest_checkpoint(&config.output).unwrap();
            assert_eq!(found.as_ref(), Some(&before), "{}", path.display());
        }
        fs::write(&path, &bytes).unwrap();
        assert_eq!(newest_checkpoint(&config.output).unwrap().as_ref(), Some(&newest));
    }
    // From the one before, the run ends with the same bits.
    let weights = newest.join("model.safetensors");
    fs::write(&weights, &fs::read(&weights).unwrap()[..1000]).unwrap();
    let report = run(&config, true).unwrap();
    assert_eq!(report.checkpoint.as_ref(), Some(&newest));
    assert!(contents(&newest) == expected);

    for checkpoint in [&newest, &before] {
        fs::write(checkpoint.join("tokenizer.json"), "{}").unwrap();
    }
    let text = run(&config, true).unwrap_err().to_string();
    assert!(
        text.contains("no checkpoint in") && text.contains("tokenizer.json has 2 bytes"),
        "{text}"
    );
}

#[test]
fn what_a_killed_save_leaves_is_removed_and_never_used() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &["checkpoint.every=0"]);
    let saved = run_until(&config, false, 5).unwrap().checkpoint.unwrap();
    let folder = saved.parent().unwrap();
    // Killed while writing, and between the rename and the manifest.
    let writing = folder.join(".writing-step-00000006");
    let renamed = folder.join("step-00000007");
    for copy in [&writing, &renamed] {
        fs::create_dir_all(copy.join("state")).unwrap();
        fs::copy(saved.join("model.safetensors"), copy.join("model.safetensors")).unwrap();
    }
    assert_eq!(newest_checkpoint(&config.output).unwrap().as_ref(), Some(&saved));
    let report = run_until(&config, true, 6).unwrap();
    assert_eq!(report.steps, 6);
    assert!(!writing.exists() && !renamed.exists());
    let metrics = tercet_train::metrics::read(&config.output.join("metrics.jsonl")).unwrap();
    let steps: Vec<u64> = metrics.iter().map(|record| record.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_manifest_that_points_outside_its_folder_is_no_checkpoint() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &["train.steps=1"]);
    let saved = run(&config, false).unwrap().checkpoint.unwrap();
    let manifest = saved.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"config.json\"", "\"../../config.toml\"")).unwrap();
    assert_eq!(newest_checkpoint(&config.output).unwrap(), None);
    let text = run(&config, true).unwrap_err().to_string();
    assert!(text.contains("outside the folder"), "{text}");
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused_by_the_differing_key() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let output = room.path().join("run");
    run_until(&tiny(&corpus, &output, &[]), false, 2).unwrap();
    for (change, words) in [
        ("train.lr=0.5", "train.lr = 0.003, but this run has 0.5"),
        ("train.seed=9", "train.seed = 0, but this run has 9"),
        ("train.steps=20", "train.steps = 12"),
        ("model.hidden_size=64", "model.hidden_size = 32, but this run has 64"),
        ("model.nsa.window=8", "model.nsa.window = 16"),
        ("model.rope_theta=500.0", "model.rope_theta = not set, but this run has 500.0"),
        ("data.vocab_size=280", "data.vocab_size = 300"),
        ("data.context=32", "data.context = 64"),
        ("data.validation=0.2", "data.validation = 0.1"),
    ] {
        let error = run(&tiny(&corpus, &output, &[change]), true).unwrap_err();
        assert!(error.is_users() && error.to_string().contains(words), "{change}: {error}");
    }
    // Other text is found by its content, wherever it says it is.
    let moved = room.path().join("moved");
    fs::rename(&corpus, &moved).unwrap();
    run_until(&tiny(&moved, &output, &["train.eval_every=1", "checkpoint.keep=5"]), true, 3)
        .unwrap();
    fs::write(moved.join("part-00.rs"), "other text").unwrap();
    let text = run(&tiny(&moved, &output, &[]), true).unwrap_err().to_string();
    assert!(text.contains("not what step 3 was trained on (data.paths, data.tokenizer"), "{text}");
}
