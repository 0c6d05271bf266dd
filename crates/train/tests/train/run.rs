//! The loop as a whole: what it writes, what it says, and what it refuses.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{run, tiny, write_corpus};
use tercet_tensor::Device;
use tercet_train::{Control, Error, Event, RunConfig, dry_run, pretrain};

#[test]
fn a_short_run_learns_and_tells_what_happens() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(
        &corpus,
        &room.path().join("run"),
        &["train.steps=60", "train.lr=1e-2", "train.sample_every=30", "train.sample_tokens=8"],
    );
    let stop = AtomicBool::new(false);
    let control =
        Control { stop: &stop, resume: false, gemm_flops: Some(1e9), device: &Device::Cpu };
    let mut log = Vec::new();
    let mut unigram = 0.0;
    let report = pretrain(&config, &control, &mut |event| {
        log.push(match &event {
            Event::Step(progress) => {
                assert!(progress.tokens_per_second > 0.0 && progress.gemm_share.unwrap() > 0.0);
                format!("step {}", progress.record.step)
            }
            Event::Ready(summary) => {
                unigram = summary.unigram_entropy.unwrap();
                assert_eq!(summary.vocab_size, 300);
                assert_eq!(summary.train_documents + summary.validation_documents, 40);
                "ready".into()
            }
            Event::Sample { step, .. } => format!("sample {step}"),
            Event::Saved { step, .. } => format!("saved {step}"),
            Event::Evaluated { step, .. } => format!("evaluated {step}"),
            Event::Corpus(corpus) => format!("corpus {}", corpus.documents),
            _ => return,
        });
    })
    .unwrap();
    let at =
        |text: &str| log.iter().position(|line| line == text).unwrap_or_else(|| panic!("{text}"));
    assert!(at("corpus 40") < at("ready") && at("ready") < at("step 1"));
    assert!(at("evaluated 4") < at("step 4") && at("step 4") < at("saved 4"));
    assert!(at("saved 60") < at("sample 60") && at("sample 30") < at("saved 60"));
    assert_eq!(log.iter().filter(|line| line.starts_with("step")).count(), 60);
    // The text is nearly predictable; a model that learns anything beats its unigrams.
    let loss = report.validation_loss.unwrap();
    assert!(loss < unigram, "{loss} against {unigram}");

    let folder = report.checkpoint.unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    let model = tercet_model::Model::load(&folder).unwrap();
    assert_eq!(model.config().max_position_embeddings, 64);
    let kept: Vec<_> = fs::read_dir(config.output.join("checkpoints")).unwrap().collect();
    assert_eq!(kept.len(), 2, "keep = 2");
    assert!(fs::read_to_string(report.curve).unwrap().contains("</svg>"));
}

#[test]
fn two_runs_in_one_folder_are_refused_and_the_first_goes_on() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &["train.steps=2"]);
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume: false, gemm_flops: None, device: &Device::Cpu };
    let mut second = None;
    let report = pretrain(&config, &control, &mut |event| {
        if let Event::Ready(_) = event {
            let text = run(&config, true).unwrap_err().to_string();
            let dry = dry_run(&config, true, &Device::Cpu, &stop).unwrap_err().to_string();
            assert_eq!(text, dry);
            second = Some(text);
        }
    });
    assert!(report.unwrap().finished);
    let text = second.unwrap();
    assert!(text.contains("in use by another run (process "), "{text}");
}

#[test]
fn a_folder_that_holds_a_run_is_not_begun_again() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &["train.steps=2"]);
    let first = run(&config, false).unwrap();
    let error = run(&config, false).unwrap_err();
    assert!(error.to_string().contains("already holds a run; --resume goes on"), "{error}");
    assert!(error.is_users());
    // Resuming a finished run only looks again, and finds the same.
    let again = run(&config, true).unwrap();
    assert!(again.finished);
    assert_eq!(again.validation_loss, first.validation_loss);
    assert_eq!(again.checkpoint, first.checkpoint);
}

#[test]
fn a_dry_run_checks_everything_and_writes_nothing() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let stop = AtomicBool::new(false);
    let config = tiny(&corpus, &room.path().join("run"), &[]);
    let plan = dry_run(&config, false, &Device::Cpu, &stop).unwrap();
    assert_eq!((plan.files, plan.documents, plan.steps, plan.tokens), (40, 40, 12, 12 * 256));
    assert_eq!((plan.vocab_size, plan.model.vocab_size), (300, 300));
    assert!(!config.output.exists());
    let missing = tiny(&room.path().join("nothing"), &config.output, &[]);
    assert!(
        dry_run(&missing, false, &Device::Cpu, &stop).unwrap_err().to_string().contains("nothing")
    );
    let into_file = tiny(&corpus, &corpus.join("part-00.rs/run"), &[]);
    let text = dry_run(&into_file, false, &Device::Cpu, &stop).unwrap_err().to_string();
    assert!(text.contains("part-00.rs"), "{text}");
}

#[test]
fn weights_that_are_not_finite_stop_the_run_and_say_where() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let first = tiny(&corpus, &room.path().join("first"), &["train.steps=1"]);
    let folder = run(&first, false).unwrap().checkpoint.unwrap();
    let mut model = tercet_model::Model::load(&folder).unwrap();
    let slot = model.params().slot("model.norm.weight").unwrap();
    model.params_mut().tensors_mut()[slot].as_f32_mut().unwrap()[3] = f32::NAN;
    let broken = room.path().join("broken");
    fs::create_dir(&broken).unwrap();
    model.save(&broken).unwrap();
    tercet_model::copy_companions(&folder, &broken).unwrap();

    let second = RunConfig::parse(
        "[data]\ncontext = 64\n[train]\nsteps = 50\nbatch_tokens = 128\nnan_patience = 3",
        &[
            format!("output='{}'", room.path().join("second").display()),
            format!("data.paths=['{}']", corpus.display()),
            format!("model.path='{}'", broken.display()),
        ],
    )
    .unwrap();
    let text = run(&second, false).unwrap_err().to_string();
    assert!(text.contains("3 steps in a row") && text.contains("the last was step 3"), "{text}");
    assert!(text.contains("loss NaN in part 1"), "{text}");
    let records = tercet_train::metrics::read(&second.output.join("metrics.jsonl")).unwrap();
    assert!(records.len() == 3 && records.iter().all(|r| r.skipped && r.loss.is_none()));
}

#[test]
fn a_run_continues_from_a_model_folder_with_its_tokenizer() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let first = tiny(&corpus, &room.path().join("first"), &["train.steps=30", "train.lr=1e-2"]);
    let first = run(&first, false).unwrap();
    let folder = first.checkpoint.unwrap();
    let second = RunConfig::parse(
        "[data]\ncontext = 64\nvalidation = 0.1\n[train]\nsteps = 1\nbatch_tokens = 128\n\
         eval_batches = 2\nlr = 1e-9",
        &[
            format!("output='{}'", room.path().join("second").display()),
            format!("data.paths=['{}']", corpus.display()),
            format!("model.path='{}'", folder.display()),
        ],
    )
    .unwrap();
    let second = run(&second, false).unwrap();
    let (a, b) = (first.validation_loss.unwrap(), second.validation_loss.unwrap());
    assert!((a - b).abs() < 1e-3, "{a} then {b}: the weights were not taken over");
    let tokenizer = |folder: &std::path::Path| fs::read(folder.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&second.checkpoint.unwrap()), tokenizer(&folder));
}

#[test]
fn two_runs_may_share_their_tokens_even_at_the_same_time() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let cache = format!("data.cache='{}'", room.path().join("shared").display());
    let reports: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = ["a", "b", "c"]
            .map(|name| tiny(&corpus, &room.path().join(name), &["train.steps=2", &cache]))
            .into_iter()
            .map(|config| scope.spawn(move || run(&config, false).unwrap()))
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert_eq!(reports[0].validation_loss, reports[1].validation_loss);
    assert_eq!(reports[0].validation_loss, reports[2].validation_loss);
    let folders = fs::read_dir(room.path().join("shared")).unwrap();
    let folders = folders.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
    assert_eq!(folders, 1, "one corpus, one folder of tokens");
}

#[test]
fn a_stop_while_the_data_is_prepared_leaves_nothing_half_made() {
    let room = tempfile::tempdir().unwrap();
    let corpus = room.path().join("corpus");
    write_corpus(&corpus);
    let config = tiny(&corpus, &room.path().join("run"), &["train.steps=2"]);
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume: false, gemm_flops: None, device: &Device::Cpu };
    let error = pretrain(&config, &control, &mut |event| {
        if let Event::Corpus(_) = event {
            stop.store(true, Ordering::Relaxed);
        }
    });
    assert!(matches!(error, Err(Error::Interrupted)));
    let names: Vec<_> = fs::read_dir(config.cache()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(names.iter().all(|path| path.is_file()), "{names:?}");
    assert!(run(&config, false).unwrap().finished);
}
