//! External programs, honest and hostile: each failure is told with the program's name, what it
//! did and its last words, in time, and leaves no process behind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tercet_align::reward::{Answer, Error, RewardConfig, RewardSource, Scored};
use tercet_tensor::Device;

use super::{GO, row, says};

/// A source whose program is this Python; none, and told, where there is no Python.
fn python(code: &str, timeout: u64) -> Option<RewardSource> {
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        println!("no python3 here: this program is not tested");
        return None;
    }
    let header = "import sys, json, time, os\n";
    let argv = ["python3", "-c", &format!("{header}{code}")].map(str::to_owned);
    let config = RewardConfig {
        program: Some(argv.into()),
        timeout: Some(timeout),
        ..RewardConfig::default()
    };
    Some(RewardSource::new(&config, &Device::Cpu).unwrap())
}

/// Long enough for Python to start on a machine that is busy; no test waits for it to pass.
const PATIENT: u64 = 60;

/// Answers of ids 0, 10, 20, … whose texts are `texts`.
fn ask<'a>(texts: &'a [String], row: &'a Map<String, Value>) -> Vec<Answer<'a>> {
    let answer = |(i, text): (usize, &'a String)| Answer {
        id: 10 * i as u64,
        prompt: "p\n",
        answer: text,
        tokens: 1,
        row,
    };
    texts.iter().enumerate().map(answer).collect()
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|i| "x".repeat(i)).collect()
}

/// The error of scoring five answers.
fn failure(code: &str, timeout: u64) -> Option<Error> {
    let mut source = python(code, timeout)?;
    let (texts, row) = (texts(5), Map::new());
    let error = source.score(&ask(&texts, &row), &GO).unwrap_err();
    // What has failed stays failed.
    says(&source.score(&ask(&texts, &row), &GO).unwrap_err(), &["python3", "has failed before"]);
    Some(error)
}

/// A failure whose message holds all of `parts`, and the name.
#[track_caller]
fn fails(code: &str, parts: &[&str]) {
    let started = Instant::now();
    if let Some(error) = failure(code, PATIENT) {
        says(&error, &["reward program python3"]);
        says(&error, parts);
        assert!(started.elapsed() < Duration::from_secs(PATIENT), "it waited for the timeout");
    }
}

/// Scores an answer by its length, with what it was asked as parts.
const HONEST: &str = "
for line in sys.stdin:
    asked = json.loads(line)
    assert set(asked) == {'id', 'prompt', 'answer', 'row'} and asked['prompt'] == 'p\\n'
    parts = {'row': asked['row']['n'], 'pid': os.getpid()}
    print(json.dumps({'id': asked['id'], 'score': len(asked['answer']) / 2, 'parts': parts, 'x': 1}), flush=True)
";

#[test]
fn a_program_scores_and_is_kept_for_the_next_round() {
    let Some(mut source) = python(HONEST, PATIENT) else { return };
    let (texts, row) = (texts(30), row(json!({ "n": 3 })));
    let first = source.score(&ask(&texts, &row), &GO).unwrap();
    for (i, scored) in first.iter().enumerate() {
        assert_eq!(scored.total, i as f64 / 2.0);
        assert_eq!(scored.parts[0], ("row".to_owned(), 3.0));
        assert_eq!(scored.parts[1].0, "pid");
    }
    // The same process, and the same ids once more.
    assert_eq!(source.score(&ask(&texts, &row), &GO).unwrap(), first);
    assert_eq!(source.score(&[], &GO).unwrap(), []);
    source.check_row(0, &row).unwrap();
}

/// Megabytes both ways at once: more than any pipe holds.
#[test]
fn full_pipes_stop_nobody() {
    // It reads everything before it answers, each answer is long, and standard error floods.
    let code = "
asked = []
for line in sys.stdin:
    asked.append(json.loads(line))
    sys.stderr.write('y' * 3000 + '\\n')
    if len(asked) == 400:
        for a in reversed(asked):
            print(json.dumps({'id': a['id'], 'score': a['id'], 'why': a['answer']}), flush=True)
        asked = []
";
    let Some(mut source) = python(code, PATIENT) else { return };
    let texts = vec!["long ".repeat(2000); 400];
    let row = Map::new();
    for _ in 0..2 {
        let scored = source.score(&ask(&texts, &row), &GO).unwrap();
        let totals: Vec<f64> = scored.iter().map(|s| s.total).collect();
        assert_eq!(totals, (0..400).map(|i| f64::from(10 * i)).collect::<Vec<_>>());
    }
}

#[test]
fn what_cannot_be_started_is_said() {
    let config = |argv: &[&str]| RewardConfig {
        program: Some(argv.iter().map(|&a| a.to_owned()).collect()),
        ..RewardConfig::default()
    };
    for argv in [&["no-such-program-here", "x"][..], &["a\0b"]] {
        let error = RewardSource::new(&config(argv), &Device::Cpu).err().unwrap();
        says(&error, &["reward program", argv[0], "cannot be started"]);
    }
}

#[test]
fn a_program_that_dies_is_told_with_its_last_words() {
    fails(
        "sys.stderr.write('no weights\\n\\x1b[31mgiving up\\n'); sys.exit(3)",
        &["ended (exit status: 3)", "0 of 5", "standard error", "no weights", "[31mgiving up"],
    );
    fails(
        "
for i, line in enumerate(sys.stdin):
    if i == 2: raise ValueError('boom')
    print(json.dumps({'id': json.loads(line)['id'], 'score': 1}), flush=True)
",
        &["ended (exit status: 1)", "2 of 5 answers scored", "ValueError: boom"],
    );
    // The last 20 lines are kept, each cut.
    let error = failure("[print(i, 'z' * 5000, file=sys.stderr) for i in range(99)]", PATIENT);
    if let Some(Error::Program { stderr, .. }) = error {
        assert_eq!(stderr.len(), 20);
        assert!(stderr.iter().all(|line| line.len() <= 1000), "{stderr:?}");
    }
}

#[test]
fn a_program_that_closes_its_pipes_is_not_waited_for() {
    fails("os.close(1); time.sleep(600)", &["closed its output and went on running", "0 of 5"]);
    // More than the pipe holds, so that the end of reading is noticed.
    let Some(mut source) = python("os.close(0); time.sleep(600)", PATIENT) else { return };
    let (texts, row) = (vec!["x".repeat(1 << 20)], Map::new());
    let error = source.score(&ask(&texts, &row), &GO).unwrap_err();
    says(&error, &["python3", "closed its input and went on running", "0 of 1"]);
}

#[test]
fn a_program_that_hangs_is_ended() {
    let read_all = "for line in sys.stdin: pass";
    for (code, size) in [("time.sleep(600)", 1), ("time.sleep(600)", 1 << 20), (read_all, 1)] {
        let Some(mut source) = python(code, 2) else { return };
        let (texts, row) = (vec!["x".repeat(size); 5], Map::new());
        let started = Instant::now();
        let error = source.score(&ask(&texts, &row), &GO).unwrap_err();
        says(&error, &["python3", "did nothing for 2 seconds", "0 of 5", "reward.timeout"]);
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

/// Slow is not hanging: seven answers, 0.5 s each, with a timeout of 2 s.
#[test]
fn progress_puts_the_timeout_off() {
    let code = "
for line in sys.stdin:
    time.sleep(0.5)
    print(json.dumps({'id': json.loads(line)['id'], 'score': 1}), flush=True)
";
    let Some(mut source) = python(code, 2) else { return };
    let (texts, row) = (texts(7), Map::new());
    assert_eq!(source.score(&ask(&texts, &row), &GO).unwrap().len(), 7);
}

/// `answer` is written for each line, with `ID` for its id.
fn replies(answer: &str) -> String {
    format!(
        "
for line in sys.stdin:
    print('''{answer}'''.replace('ID', str(json.loads(line)['id'])), flush=True)
"
    )
}

#[test]
fn garbage_is_shown_and_explained() {
    for (answer, parts) in [
        ("loading model...", &["wrote \"loading model...\"", "not a line of JSON"][..]),
        ("loading", &["messages belong on standard error"]),
        ("", &["not a line of JSON"]),
        ("{\"id\": ID, \"score\": NaN}", &["NaN", "finite numbers"]),
        ("{\"id\": ID, \"score\": -Infinity}", &["-Infinity", "finite numbers"]),
        ("{\"id\": ID, \"score\": 1e999}", &["1e999", "out of range"]),
        ("{\"id\": ID, \"score\": null}", &["no \"score\" that is a finite number"]),
        ("{\"id\": ID, \"score\": \"1\"}", &["no \"score\" that is a finite number"]),
        ("{\"id\": ID}", &["no \"score\" that is a finite number"]),
        ("{\"score\": 1}", &["no \"id\" that is a whole number"]),
        ("{\"id\": \"ID\", \"score\": 1}", &["no \"id\" that is a whole number"]),
        ("{\"id\": -1, \"score\": 1}", &["no \"id\" that is a whole number"]),
        ("[0, 1]", &["no \"id\""]),
        ("{\"id\": ID, \"score\": 1, \"parts\": [1]}", &["\"parts\" is not an object"]),
        ("{\"id\": ID, \"score\": 1, \"parts\": {\"a\": null}}", &["\"parts\" is not an object"]),
        ("{\"id\": 5, \"score\": 1}", &["id 5", "not asked for"]),
        ("{\"id\": 0, \"score\": 1}", &["id 0 twice"]),
        ("{\"id\": ID, \"score\": 1} {\"id\": ID, \"score\": 1}", &["not a line of JSON"]),
    ] {
        fails(&replies(answer), parts);
    }
    fails("os.write(1, b'\\xff\\xfe\\x00\\n'); time.sleep(600)", &["not a line of JSON"]);
    fails("print('x' * 5000, flush=True); time.sleep(600)", &["xxx…\""]);
    fails(
        "print('x' * (1 << 21), flush=True); time.sleep(600)",
        &["a line of more than 1048576 bytes"],
    );
    // Long texts, so that the end of reading is noticed; what comes after it is shown all the same.
    let code = "os.close(0); time.sleep(0.2); print('usage: score.py MODEL')";
    let Some(mut source) = python(code, PATIENT) else { return };
    let (texts, row) = (vec!["x".repeat(1 << 20); 5], Map::new());
    let error = source.score(&ask(&texts, &row), &GO).unwrap_err();
    says(&error, &["wrote \"usage: score.py MODEL\""]);
    // The last id is known, but cannot have been read.
    let code = "print('{\"id\": 40, \"score\": 1}', flush=True); time.sleep(600)";
    let Some(mut source) = python(code, PATIENT) else { return };
    let error = source.score(&ask(&texts, &row), &GO).unwrap_err();
    says(&error, &["id 40", "not asked for"]);
    // A flood without an end of line is not stored for ever either.
    fails("while True: sys.stdout.write('x' * 65536)", &["a line of more than 1048576 bytes"]);
}

/// Late words of one round are no answers of the next.
#[test]
fn a_second_score_after_the_round_is_an_error_too() {
    let code = "
for line in sys.stdin:
    reply = json.dumps({'id': json.loads(line)['id'], 'score': 1})
    print(reply + '\\n' + reply, flush=True)
";
    let Some(mut source) = python(code, PATIENT) else { return };
    let (texts, row) = (texts(1), Map::new());
    let answers = ask(&texts, &row);
    assert_eq!(source.score(&answers, &GO).unwrap().len(), 1);
    let other = [Answer { id: 99, ..answers[0] }];
    says(&source.score(&other, &GO).unwrap_err(), &["id 0", "not asked for"]);
}

#[test]
fn ids_name_answers() {
    let Some(mut source) = python(HONEST, PATIENT) else { return };
    let (texts, row) = (texts(1), Map::new());
    let answers = ask(&texts, &row);
    let error = source.score(&[answers[0], answers[0]], &GO).unwrap_err();
    says(&error, &["answer 0", "id of another answer"]);
}

#[test]
fn a_raised_flag_ends_the_wait_soon() {
    let Some(mut source) = python("time.sleep(600)", PATIENT) else { return };
    let (texts, row, stop) = (texts(3), Map::new(), AtomicBool::new(false));
    let started = Instant::now();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            stop.store(true, Ordering::Relaxed);
        });
        source.score(&ask(&texts, &row), &stop).unwrap_err()
    });
    assert!(matches!(error, Error::Interrupted));
    assert!(started.elapsed() < Duration::from_secs(20));
}

/// Dropped in the middle of its work, the program is gone (Linux tells by /proc), though it
/// ignores the end of its input and the signal to terminate.
#[test]
fn the_program_is_killed_on_drop() {
    let code = "
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
a = json.loads(sys.stdin.readline())
print(json.dumps({'id': a['id'], 'score': os.getpid()}), flush=True)
time.sleep(600)
";
    let Some(mut source) = python(code, PATIENT) else { return };
    let (texts, row) = (texts(1), Map::new());
    let pid = source.score(&ask(&texts, &row), &GO).unwrap()[0].total as u64;
    let process = std::path::PathBuf::from(format!("/proc/{pid}"));
    if !process.exists() {
        println!("no /proc here: whether the program is gone is not tested");
        return;
    }
    drop(source);
    assert!(!process.exists());
}

/// A child of the program's own that holds the pipes open makes nobody wait.
#[test]
#[cfg(unix)]
fn a_grandchild_makes_nobody_wait() {
    let argv = ["sh", "-c", "sleep 5 & exit 4"].map(str::to_owned);
    let config =
        RewardConfig { program: Some(argv.into()), timeout: Some(2), ..Default::default() };
    let mut source = RewardSource::new(&config, &Device::Cpu).unwrap();
    let (texts, row) = (texts(1), Map::new());
    let started = Instant::now();
    let error = source.score(&ask(&texts, &row), &GO).unwrap_err();
    drop(source);
    assert!(started.elapsed() < Duration::from_millis(4500), "{:?}", started.elapsed());
    says(&error, &["reward program sh", "0 of 1"]);
}

/// Answers in whatever order, the scores are in that of the questions; one process for all cases.
#[test]
fn the_order_of_replies_does_not_matter() {
    // The row says how many lines to read and in which order to answer them.
    let code = "
while True:
    line = sys.stdin.readline()
    if not line: break
    asked = [json.loads(line)]
    order = asked[0]['row']['order']
    while len(asked) < len(order): asked.append(json.loads(sys.stdin.readline()))
    for i in order:
        print(json.dumps({'id': asked[i]['id'], 'score': float(asked[i]['answer'])}), flush=True)
";
    let Some(source) = python(code, PATIENT) else { return };
    let source = std::sync::Mutex::new(source);
    let order = (1..20usize).prop_flat_map(|n| Just((0..n).collect::<Vec<_>>()).prop_shuffle());
    proptest!(ProptestConfig::with_cases(64), |(order in order, from: i32)| {
        let values: Vec<f64> = (0..order.len()).map(|i| f64::from(from) + i as f64).collect();
        let texts: Vec<String> = values.iter().map(f64::to_string).collect();
        let row = row(json!({ "order": order }));
        let scored: Vec<Scored> = source.lock().unwrap().score(&ask(&texts, &row), &GO).unwrap();
        prop_assert_eq!(scored.iter().map(|s| s.total).collect::<Vec<_>>(), values);
    });
}
