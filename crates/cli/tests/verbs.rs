//! The verbs together, through the binary: train, stop, go on, write, measure.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A run of a few seconds on this repository's own documents.
const CONFIG: &str = r#"
output = "run"
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
tie_word_embeddings = true
[model.nsa]
compress_block = 8
compress_stride = 4
select_block = 8
select_count = 4
window = 16
[data]
paths = ["text"]
vocab_size = 300
context = 64
validation = 0.2
[train]
steps = 8
batch_tokens = 128
warmup = 2
eval_batches = 2
[checkpoint]
every = 4
"#;

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("run.toml"), CONFIG).unwrap();
    std::fs::create_dir(folder.path().join("text")).unwrap();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "LICENSE-MIT"] {
        let text = std::fs::read(repository.join(name)).unwrap();
        // One document a paragraph, so that there is something to hold out.
        for (i, part) in String::from_utf8(text).unwrap().split("\n\n").enumerate() {
            std::fs::write(folder.path().join(format!("text/{name}-{i}.txt")), part).unwrap();
        }
    }
    folder
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tercet"));
    command.current_dir(folder).args(args).stdin(Stdio::null());
    command
}

fn tercet(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().unwrap()
}

/// Standard output of a run that must succeed.
fn fine(folder: &Path, args: &[&str]) -> String {
    let output = tercet(folder, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_run_logs_each_step_on_one_line_and_its_folder_writes_text() {
    let folder = folder();
    let dry = fine(folder.path(), &["pretrain", "run.toml", "--dry-run"]);
    assert!(dry.contains("8 steps") && !folder.path().join("run").exists(), "{dry}");
    let log = fine(folder.path(), &["pretrain", "run.toml"]);
    let steps: Vec<&str> =
        log.lines().filter(|l| l.starts_with("step ") && l.contains("tok/s")).collect();
    assert_eq!(steps.len(), 8, "{log}");
    for part in ["loss", "grad norm", "% of gemm", "eta"] {
        assert!(steps.iter().all(|line| line.contains(part)), "{part} is missing from\n{log}");
    }
    assert!(log.contains("validation loss") && log.contains("unigram entropy"), "{log}");

    let write = ["generate", "run", "-p", "The ", "-n", "12", "--seed", "3"];
    let (once, again) = (fine(folder.path(), &write), fine(folder.path(), &write));
    assert_eq!(once, again);
    assert!(once.starts_with("The "), "{once}");

    let second = tercet(folder.path(), &["pretrain", "run.toml"]);
    assert_eq!(second.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&second.stderr).contains("--resume"));
}

#[test]
#[cfg(unix)]
fn a_run_that_is_told_to_stop_saves_says_how_to_go_on_and_ends_with_the_same_bits() {
    let whole = folder();
    fine(whole.path(), &["pretrain", "run.toml", "train.steps=60"]);

    let parts = folder();
    let mut child = command(parts.path(), &["pretrain", "run.toml", "train.steps=60"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let third = lines.by_ref().flatten().find(|line| line.starts_with("step 3/"));
    assert!(third.is_some());
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{rest:?}");
    let hint =
        rest.iter().any(|line| line.contains("--resume") && line.contains("stopped as asked"));
    assert!(hint, "{rest:?}");

    fine(parts.path(), &["pretrain", "run.toml", "train.steps=60", "--resume"]);
    let weights = |folder: &Path| {
        let path = folder.join("run/checkpoints/step-00000060/model.safetensors");
        std::fs::read(path).unwrap()
    };
    assert!(weights(whole.path()) == weights(parts.path()), "the resumed run ended otherwise");
}

#[test]
fn the_benchmark_measures_every_row_and_repeats_one() {
    let folder = tempfile::tempdir().unwrap();
    let args = [
        "bench",
        "attention",
        "--lengths",
        "256",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--dim",
        "16",
        "--seconds",
        "0",
        "--json",
        "rows.json",
        "--svg",
        "rows.svg",
    ];
    let text = fine(folder.path(), &args);
    let json = std::fs::read(folder.path().join("rows.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 17);
    for row in rows {
        let command = row["command"].as_str().unwrap();
        assert!(text.contains(command), "{command} is not in\n{text}");
    }
    let slc = rows.iter().find(|row| row["row"] == "forward/slc").unwrap();
    let repeat: Vec<&str> = slc["command"].as_str().unwrap().split(' ').skip(1).collect();
    assert!(fine(folder.path(), &repeat).contains("forward/slc"));
    let svg = std::fs::read_to_string(folder.path().join("rows.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
}

#[test]
fn a_report_that_cannot_be_written_is_the_users_and_said_plainly() {
    let folder = tempfile::tempdir().unwrap();
    let args =
        ["bench", "attention", "--lengths", "64", "--rows", "forward/gate", "--seconds", "0"];
    let missing = [&args[..], &["--json", "no/such/folder/x.json"]].concat();
    let output = tercet(folder.path(), &missing);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("could not write no/such/folder/x.json")
    );
}

#[test]
fn the_doctor_says_what_will_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let text = fine(folder.path(), &["doctor", "--threads", "1"]);
    for part in ["threads   1 of", "GFLOP/s", "will use", "because"] {
        assert!(text.contains(part), "{part} is missing from\n{text}");
    }
}

#[test]
#[cfg(unix)]
fn a_reader_that_leaves_ends_a_verb_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = command(folder.path(), &["bench", "attention", "--lengths", "256,512"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// A golden case of the operator's crate, in a folder of its own.
fn golden(change: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attention/tests/data");
    for end in ["input", "expected"] {
        let file = format!("varlen.{end}.safetensors");
        std::fs::copy(data.join(&file), folder.path().join(&file)).unwrap();
    }
    let expected = folder.path().join("varlen.expected.safetensors");
    let mut bytes = std::fs::read(&expected).unwrap();
    change(&mut bytes);
    std::fs::write(expected, bytes).unwrap();
    folder
}

#[test]
fn the_selftest_is_one_table_and_its_json_has_every_row() {
    let folder = golden(|_| {});
    let args = ["selftest", "--device", "cpu", "--golden", ".", "--json", "rows.json"];
    let text = fine(folder.path(), &args);
    let json = std::fs::read(folder.path().join("rows.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(
        (json["cases"].as_u64(), json["passed"].as_u64()),
        (Some(rows.len() as u64), json["cases"].as_u64())
    );
    for suite in ["golden", "property", "bitwise", "hostile", "ops", "model"] {
        let of = rows.iter().filter(|row| row["suite"] == suite).count();
        assert!(of > 0 && text.contains(&format!("{suite} {of} of {of}")), "{suite}:\n{text}");
    }
    assert_eq!(text.matches("  pass\n").count(), rows.len());
    assert!(!text.contains('\x1b'), "colours are for terminals");
}

#[test]
fn a_selftest_that_fails_says_so_and_leaves_with_1() {
    // A number in the middle of the expected results is another.
    let folder = golden(|bytes| {
        let at = (bytes.len() / 2) & !3;
        bytes[at..at + 4].copy_from_slice(&1e9f32.to_le_bytes());
    });
    let args = ["selftest", "--device", "cpu", "--parts", "operator", "--golden", "."];
    let output = tercet(folder.path(), &args);
    let (text, error) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(text.contains("varlen · reference") && text.contains("FAIL"), "{text}");
    assert!(error.contains("1 of") && error.contains("do not trust"), "{error}");
}

#[test]
fn steps_are_timed_at_each_length_for_the_model_and_its_dense_twin() {
    let folder = folder();
    let args = [
        "bench",
        "step",
        "--config",
        "run.toml",
        "--lengths",
        "64,128",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--json",
        "-",
    ];
    let json: serde_json::Value = serde_json::from_str(&fine(folder.path(), &args)).unwrap();
    let rows = json["rows"].as_array().unwrap();
    let kinds: Vec<(&str, u64)> = rows
        .iter()
        .map(|row| {
            let step = &row["step"];
            (step["attention"].as_str().unwrap(), step["context"].as_u64().unwrap())
        })
        .collect();
    assert_eq!(kinds, [("nsa", 64), ("dense", 64), ("nsa", 128), ("dense", 128)]);
    assert!(rows.iter().all(|row| row["share_of_gemm"].as_f64().unwrap() > 0.0));
}
