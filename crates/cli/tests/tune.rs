//! `tercet sft` and `tercet align` through the binary: shown, run, stopped, gone on with, refused.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

#[path = "../../train/tests/train/tiny_chat.rs"]
mod tiny_chat;

use tiny_chat::{write_model, write_rows};

const SFT: &str = "output = \"run\"\n[model]\npath = \"model\"\n[lora]\nr = 2\ndropout = 0.1\n\
    [data]\npaths = [\"rows.jsonl\"]\ncontext = 64\nvalidation = 0.3\n[train]\nsteps = 4\n\
    batch = 4\nlr = 1e-3\n[checkpoint]\nevery = 2\n";

const ALIGN: &str = "output = \"run\"\n[model]\npath = \"model\"\n[data]\npaths = [\"pairs.jsonl\"]\n\
    context = 64\n[align]\nprecompute = true\nterms = [{ objective = \"mappo\" }]\n[train]\n\
    steps = 4\nbatch = 4\nlr = 1e-4\n[checkpoint]\nevery = 2\n";

const PRIVATE: &str = "output = \"run\"\n[model]\npath = \"model\"\n[lora]\nr = 2\n[data]\n\
    paths = [\"people.jsonl\"]\ncontext = 64\n[private]\nunit = \"who\"\npeople = 20\nepsilon = 4.0\n\
    cap = 2\nmethod = \"random-action\"\n[train]\nsteps = 4\nbatch = 4\nlr = 1e-3\n[checkpoint]\n\
    every = 2\n";

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_model(&at("model"), 1);
    let talk = |i: usize| {
        json!({"messages": [{"role": "user", "content": format!("{i}?")},
               {"role": "assistant", "content": format!("it is {i}")}]})
    };
    write_rows(&at("rows.jsonl"), &(0..12).map(talk).collect::<Vec<_>>());
    let pair = |i: usize| {
        json!({"prompt": format!("{i}?"), "chosen": "yes", "rejected": format!("no, {i}"),
               "score_chosen": 1.0, "score_rejected": -0.25 * i as f64})
    };
    write_rows(&at("pairs.jsonl"), &(0..12).map(pair).collect::<Vec<_>>());
    let told = |i: usize| json!({"who": format!("p{}", i % 5), "text": format!("{i} is odd")});
    write_rows(&at("people.jsonl"), &(0..12).map(told).collect::<Vec<_>>());
    std::fs::write(at("private.toml"), PRIVATE).unwrap();
    std::fs::write(at("sft.toml"), SFT).unwrap();
    std::fs::write(at("align.toml"), ALIGN).unwrap();
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

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_private_run_is_planned_shown_run_and_gone_on_with() {
    let folder = folder();
    let before = names(folder.path());
    let plan = fine(folder.path(), &["plan", "private.toml"]);
    for part in
        ["epsilon at most 4,", "by the column \"who\"", "4 steps", "mode m1", "% more noise"]
    {
        assert!(plan.contains(part), "{part} is missing from {plan}");
    }
    let shown = fine(folder.path(), &["private", "tune", "private.toml", "--show", "1"]);
    assert!(shown.contains("person 1:") && !shown.contains("person 2:"), "{shown}");
    assert_eq!(names(folder.path()), before, "a plan or a look made something");

    let seeded = ["private", "tune", "private.toml", "--device", "cpu", "--insecure-seed", "3"];
    let text = fine(folder.path(), &seeded);
    let steps: Vec<&str> = text.lines().filter(|line| line.starts_with("step ")).collect();
    let told: Vec<&&str> = steps.iter().filter(|line| line.contains(" · lr ")).collect();
    assert_eq!(told.len(), 4, "{text}");
    for line in told {
        assert!(line.contains("epsilon ") && line.contains("INSECURE SEED"), "{line}");
        assert!(!line.contains("tok/s"), "{line}");
    }
    assert!(text.contains("privacy.json") && text.contains("at delta"), "{text}");
    let promise = std::fs::read_to_string(folder.path().join("run/privacy.json")).unwrap();
    assert!(promise.contains("\"private\": false"), "{promise}");
    let refused = tercet(folder.path(), &seeded[..5]);
    assert_eq!(refused.status.code(), Some(2));
    let again = fine(folder.path(), &[&seeded[..], &["--resume"]].concat());
    assert!(again.contains("4 steps"), "{again}");
    // An adapter's run is no model.
    let alone = tercet(folder.path(), &["generate", "run", "-p", "a"]);
    assert_eq!(alone.status.code(), Some(2));
    let text = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert!(text.contains("run trained an adapter") && text.contains("beside it"), "{text}");
    let missing = tercet(
        folder.path(),
        &["private", "tune", "private.toml", "private.unit=\"x\"", "output=\"other\""],
    );
    assert_eq!(missing.status.code(), Some(2));
    let text = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(text.contains("row 1 has no \"x\""), "{text}");
}

#[test]
fn what_will_be_learnt_is_shown_and_nothing_is_made() {
    let folder = folder();
    let before = names(folder.path());
    let text = fine(folder.path(), &["sft", "sft.toml", "--show", "1", "data.validation=0.0"]);
    assert!(text.starts_with("12 of 12 rows\n"), "{text}");
    assert!(text.contains("example 1:") && !text.contains("example 2:"), "{text}");
    let learnt = text.split('⟦').nth(1).and_then(|rest| rest.split('⟧').next()).unwrap();
    let plain: String = learnt.chars().filter(|c| *c != '│').collect();
    assert!(plain.starts_with("it is 0") && plain.contains("im_end"), "{text}");
    assert_eq!(text.matches('⟦').count(), 1, "only the answer is learnt: {text}");
    let all = fine(folder.path(), &["sft", "sft.toml", "--show", "999", "data.validation=0.0"]);
    assert!(all.contains("example 12:") && !all.contains("example 13:"));
    let cut = fine(folder.path(), &["sft", "sft.toml", "--show", "0", "data.context=30"]);
    assert!(cut.contains("dropped") || cut.contains("truncated"), "{cut}");
    assert_eq!(names(folder.path()), before);
}

#[test]
fn both_verbs_run_log_and_say_what_to_do_next() {
    let folder = folder();
    for (verb, config, part) in [("sft", "sft.toml", "adapter"), ("align", "align.toml", "model")] {
        let output = format!("output={verb}");
        let log = fine(folder.path(), &[verb, config, &output]);
        let steps = log.lines().filter(|line| line.starts_with("step ")).count();
        assert!(steps >= 4, "{log}");
        let checkpoint = format!("{verb}/checkpoints/step-00000004");
        assert!(log.contains(part) && log.contains(&checkpoint), "{log}");
        // The command it ends with works as it stands.
        let write = log.lines().find(|line| line.starts_with("write ")).unwrap();
        let mut words = write.split_whitespace().skip(2);
        assert_eq!(words.next(), Some("generate"));
        let mut args: Vec<&str> = vec!["generate"];
        args.extend(words.take_while(|word| *word != "-p"));
        args.extend(["-p", "1?", "-n", "3"]);
        fine(folder.path(), &args);
        let metrics = std::fs::read_to_string(folder.path().join(verb).join("metrics.jsonl"));
        let lines: Vec<Value> =
            metrics.unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 4);
        if verb == "align" {
            assert_eq!(lines[0]["rewards/margins"], json!(0.0));
            assert!(names(&folder.path().join("align")).contains(&"squeezing.svg".to_owned()));
        }
        let again = tercet(folder.path(), &[verb, config, &output]);
        assert_eq!(again.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&again.stderr).contains("--resume"));
    }
}

#[test]
#[cfg(unix)]
fn runs_that_are_told_to_stop_go_on_to_the_same_bits() {
    for (verb, config, file) in [
        ("sft", "sft.toml", "adapter_model.safetensors"),
        ("align", "align.toml", "model.safetensors"),
    ] {
        let whole = folder();
        let run = [verb, config, "train.steps=300", "checkpoint.every=0"];
        fine(whole.path(), &run);
        let parts = folder();
        let mut child = command(parts.path(), &run)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.by_ref().flatten().any(|line| line.starts_with("step 3/")));
        let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(kill.success());
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{rest:?}");
        let hint =
            rest.iter().any(|line| line.contains("--resume") && line.contains("stopped as asked"));
        assert!(hint, "{verb} was too fast to be stopped: {:?}", rest.last());
        let end = Path::new("run/checkpoints/step-00000300").join(file);
        assert!(!parts.path().join(&end).exists());
        fine(parts.path(), &[&run[..], &["--resume"]].concat());
        let read = |folder: &Path| std::fs::read(folder.join(&end)).unwrap();
        assert!(read(whole.path()) == read(parts.path()), "{verb} ended otherwise");
    }
}

#[test]
fn nonsense_is_refused_in_one_sentence_with_code_2_and_leaves_nothing() {
    let folder = folder();
    std::fs::write(folder.path().join("broken.toml"), "output = \n").unwrap();
    std::fs::write(folder.path().join("empty.toml"), "").unwrap();
    std::fs::write(folder.path().join("bare.toml"), "output = \"run\"\n").unwrap();
    std::fs::write(folder.path().join("bad.jsonl"), "{\"prompt\": \"a\"}\n").unwrap();
    let before = names(folder.path());
    let cases: [(&[&str], &str); 25] = [
        (&["sft", "absent.toml"], "absent.toml"),
        (&["sft", "broken.toml"], "broken.toml"),
        (&["sft", "empty.toml"], "`output` is missing"),
        (&["sft", "bare.toml"], "`model.path` is missing"),
        (&["align", "bare.toml"], "`model.path` is missing"),
        (&["sft", "sft.toml", "train.stpes=3"], "did you mean `train.steps`?"),
        (&["sft", "sft.toml", "lora.drop=0.1"], "`lora.drop`"),
        (&["sft", "sft.toml", "dta.paths=['x']"], "did you mean `data`?"),
        (&["sft", "sft.toml", "align.ld_alpha=1"], "`align` is not a known key"),
        (&["sft", "sft.toml", "train.steps=-3"], "`train.steps`"),
        (&["sft", "sft.toml", "train.lr=-0.1"], "`train.lr`"),
        (&["sft", "sft.toml", "train.lr=inf"], "`train.lr`"),
        (&["sft", "sft.toml", "data.context=1e9"], "`data.context`"),
        (&["sft", "sft.toml", "lora=3"], "`lora`"),
        (&["sft", "sft.toml", "lora.r=0"], "`lora`"),
        (&["sft", "sft.toml", "model.path=nowhere"], "nowhere"),
        (&["sft", "sft.toml", "data.paths=['nowhere.jsonl']"], "nowhere.jsonl"),
        (&["sft", "sft.toml", "data.paths=['bad.jsonl']"], "bad.jsonl, line 1"),
        (&["sft", "sft.toml", "--show", "1", "data.paths=['bad.jsonl']"], "bad.jsonl, line 1"),
        (&["sft", "sft.toml", "data.paths=['pairs.jsonl']"], "pairs.jsonl, line 1"),
        (&["align", "align.toml", "data.paths=['rows.jsonl']"], "rows.jsonl, line 1"),
        (&["align", "align.toml", "align.precomputed=true"], "did you mean `align.precompute`?"),
        (&["align", "align.toml", "align.terms=[]"], "`align.terms`"),
        (&["align", "align.toml", "lora={r=2, dropout=0.5}"], "`lora.dropout`"),
        (&["align", "align.toml", "align.delta.source='column'"], "pairs.jsonl, line 1"),
    ];
    for (args, said) in cases {
        let output = tercet(folder.path(), args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains(said) && error.contains("tercet: "), "{args:?}: {error}");
        assert!(!error.contains("panicked") && output.stdout.is_empty(), "{args:?}: {error}");
        let sentence = error.split("tercet: ").nth(1).unwrap().trim_end();
        // What is wrong with TOML is shown in its lines.
        let lines = sentence.lines().count();
        assert!(lines == 1 || args[1] == "broken.toml", "{args:?}: {error}");
        assert_eq!(names(folder.path()), before, "{args:?} left something behind");
    }
}
