//! Full and read-only disks: a clear error, and the last good checkpoint intact.

use std::path::Path;
use std::process::Command;

use tercet_train::newest_checkpoint;

use crate::common::{contents, run, run_until, tiny, write_corpus};

/// Set for the helper process: the folder it trains in.
const CHILD: &str = "TERCET_TEST_FULL";

/// Not a test: the process that has no space left.
#[test]
#[ignore = "helper process of the other tests"]
fn child() {
    if let Some(room) = std::env::var_os(CHILD) {
        let room = Path::new(&room);
        let config = tiny(&room.join("corpus"), &room.join("run"), &[]);
        println!("answer: {}", run(&config, true).unwrap_err());
    }
}

/// A limit on the size of a file stands for a full disk: the same error at the same call, and it
/// needs no rights.
#[cfg(unix)]
#[test]
fn a_full_disk_is_said_clearly_and_the_last_checkpoint_is_untouched() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &[]);
    let saved = run_until(&config, false, 5).unwrap().checkpoint.unwrap();
    let before = contents(&saved);
    // Weights do not fit; then weights fit, but the optimizer's state does not.
    let weights = std::fs::metadata(saved.join("model.safetensors")).unwrap().len() as usize;
    for (limit, file) in
        [(weights / 2, "model.safetensors"), (weights + 8192, "optimizer.safetensors")]
    {
        let text = run_limited(room.path(), limit);
        assert!(text.contains("could not write") && text.contains(file), "{text}");
        assert!(text.contains("Free some space") && text.contains("--resume"), "{text}");
        assert_eq!(newest_checkpoint(&config.output).unwrap().as_ref(), Some(&saved));
        assert!(contents(&saved) == before);
        let entries = std::fs::read_dir(config.output.join("checkpoints")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["step-00000004", "step-00000005"], "the space was not given back");
    }
    // With space again, the run ends as if nothing had happened.
    let whole = tiny(&corpus, &room.path().join("whole"), &[]);
    let expected = contents(&run(&whole, false).unwrap().checkpoint.unwrap());
    assert!(contents(&run(&config, true).unwrap().checkpoint.unwrap()) == expected);
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_while_tokenizing_keeps_nothing_half_written() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let bytes = 40 * std::fs::metadata(corpus.join("part-01.rs")).unwrap().len() as usize;
    // The tokens do not fit (each is about two bytes of text and two on disk); the rest does.
    let text = run_limited(room.path(), bytes / 2);
    assert!(text.contains("could not write") && text.contains("Free some space"), "{text}");
    let entries = std::fs::read_dir(room.path().join("run/tokens")).unwrap();
    for entry in entries {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == ".lock" || name.starts_with("tokenizer-"), "{name} was left");
    }
}

/// What the helper process says when no file may be longer than `bytes`.
#[cfg(unix)]
fn run_limited(room: &Path, bytes: usize) -> String {
    // POSIX counts blocks of 512 bytes; bash counts 1024.
    let shell = Command::new("sh").args(["-c", "echo ${BASH_VERSION:+yes}"]).output().unwrap();
    let blocks = bytes / if shell.stdout.starts_with(b"yes") { 1024 } else { 512 };
    // An ignored SIGXFSZ turns the limit into an error of the write.
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &script])
        .arg(std::env::current_exe().unwrap())
        .args(["disk::child", "--exact", "--ignored", "--nocapture"])
        .env(CHILD, room)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().find(|line| line.contains("answer: ")).unwrap_or(&text).to_owned()
}

#[test]
fn an_output_that_cannot_be_written_is_named_before_anything_is_done() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let output = corpus.join("part-00.rs").join("run");
    let error = run(&tiny(&corpus, &output, &[]), false).unwrap_err();
    assert!(error.is_users());
    let text = error.to_string();
    assert!(text.contains("could not create") && text.contains("part-00.rs"), "{text}");
    // The kernel's own files refuse even the superuser.
    if cfg!(target_os = "linux") {
        let error = run(&tiny(&corpus, Path::new("/proc/tercet/run"), &[]), false).unwrap_err();
        assert!(error.is_users() && error.to_string().contains("/proc/tercet"), "{error}");
    }
}
