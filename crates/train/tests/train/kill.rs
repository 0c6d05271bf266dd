//! SIGKILL at random moments, during saves too: a run always goes on from a complete checkpoint,
//! never from an older one than it had, and ends with the bits of a run that was left alone.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tercet_train::newest_checkpoint;

use crate::common::{contents, run, tiny, write_corpus};

/// Set for the helper process: the folder it trains in.
const CHILD: &str = "TERCET_TEST_CHILD";

/// Checkpoints at every step, so that many kills hit a save.
const OVERRIDES: [&str; 4] =
    ["train.steps=150", "checkpoint.every=1", "checkpoint.keep=3", "train.eval_every=0"];

/// Not a test: the process that is killed.
#[test]
#[ignore = "helper process of the other tests"]
fn child() {
    if let Some(room) = std::env::var_os(CHILD) {
        let room = Path::new(&room);
        run(&tiny(&room.join("corpus"), &room.join("run"), &OVERRIDES), true).unwrap();
    }
}

fn step_of(checkpoint: &Path) -> u64 {
    let name = checkpoint.file_name().unwrap().to_str().unwrap();
    name.strip_prefix("step-").unwrap().parse().unwrap()
}

#[test]
fn killed_at_random_moments_a_run_resumes_from_a_complete_checkpoint() {
    let kills = if std::env::var_os("TERCET_LONG").is_some() { 100 } else { 20 };
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let whole = tiny(&corpus, &room.path().join("whole"), &OVERRIDES);
    let expected = contents(&run(&whole, false).unwrap().checkpoint.unwrap());

    let config = tiny(&corpus, &room.path().join("run"), &OVERRIDES);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut newest, mut within_save, mut finished) = (0, 0, false);
    let mut killed = 0;
    while killed < kills {
        if finished {
            // Faster than the kills: begin again, so that every kill hits a running process.
            std::fs::remove_dir_all(&config.output).unwrap();
            newest = 0;
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["kill::child", "--exact", "--ignored", "--quiet"])
            .env(CHILD, room.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let delay = Duration::from_micros(rng.next_u64() % 250_000);
        let start = Instant::now();
        while start.elapsed() < delay {
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        let status = child.wait().unwrap();
        finished = status.success();
        killed += usize::from(!finished);
        let folder = config.output.join("checkpoints");
        let left = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        within_save += usize::from(left.into_iter().any(|entry| {
            let path = entry.path();
            path.is_dir() && !path.join("manifest.json").exists()
        }));
        // Complete, and never behind what was there before.
        let step = newest_checkpoint(&config.output).unwrap().map_or(0, |path| step_of(&path));
        assert!(step >= newest, "step {newest} was lost: {step} is the newest");
        newest = step;
    }
    println!("{kills} kills, {within_save} within a save; step {newest} reached");
    let report = run(&config, true).unwrap();
    assert!(contents(&report.checkpoint.unwrap()) == expected, "the bits differ");
}
