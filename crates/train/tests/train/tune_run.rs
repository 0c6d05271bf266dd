//! Supervised tuning runs: what packing may change, exact resume, adapters, and what is refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tercet_model::{Adapter, Batch, ForwardOptions, IGNORE, LoraConfig, Model};
use tercet_tensor::{Device, Grads, Tape};
use tercet_train::config::TuneTrain;
use tercet_train::metrics::{self, StepRecord};
use tercet_train::tune::start::options;
use tercet_train::tune::{Example, SftConfig, pack, sft};
use tercet_train::{Control, Event, Report, Result};

use crate::tiny_chat::{CONTEXT, model_with, write_model, write_rows};

/// Largest difference of two sums of the same terms in another order, as a share of the largest
/// value: a few thousand terms of f32, each rounded by 2⁻²⁴ at most, which walk apart by the square
/// root of their number and stay within 2⁻¹⁷ with room to spare.
const ROUNDING: f32 = 1.0 / 131_072.0;

fn rows(count: usize) -> Vec<Value> {
    let row = |i: usize| match i % 3 {
        0 => json!({"prompt": format!("{i} times two is "), "completion": format!("{}", 2 * i)}),
        1 => json!({"text": format!("row {i} of many")}),
        _ => json!({"messages": [{"role": "user", "content": format!("{i}?")},
                    {"role": "assistant", "content": format!("it is {i}")}]}),
    };
    (0..count).map(row).collect()
}

/// A folder with `model` and `rows.jsonl`, and the runs below it.
struct Room(tempfile::TempDir);

impl Room {
    fn new(count: usize) -> Self {
        let room = Self(tempfile::tempdir().unwrap());
        write_model(&room.at("model"), 1);
        write_rows(&room.at("rows.jsonl"), &rows(count));
        room
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Six steps of four examples, with output in a folder and further overrides.
    fn config(&self, output: &str, overrides: &[&str]) -> SftConfig {
        self.try_config(output, overrides).unwrap()
    }

    fn try_config(&self, output: &str, overrides: &[&str]) -> Result<SftConfig> {
        let mut all = vec![
            format!("output='{}'", self.at(output).display()),
            format!("model.path='{}'", self.at("model").display()),
            format!("data.paths=['{}']", self.at("rows.jsonl").display()),
        ];
        all.extend(overrides.iter().map(|text| (*text).to_owned()));
        let text = "[data]\ncontext = 64\n[train]\nsteps = 6\nbatch = 4\nlr = 3e-3\nwarmup = 2\n\
                    eval_every = 0\n[checkpoint]\nevery = 0\n";
        SftConfig::parse(text, &all)
    }
}

fn run(config: &SftConfig, resume: bool) -> Result<Report> {
    run_until(config, resume, u64::MAX)
}

/// Runs until `steps` steps are done, then raises the stop flag.
fn run_until(config: &SftConfig, resume: bool, steps: u64) -> Result<Report> {
    let stop = AtomicBool::new(false);
    let control = Control { stop: &stop, resume, gemm_flops: None, device: &Device::Cpu };
    sft(config, &control, &mut |event| {
        if let Event::Step(progress) = event
            && progress.record.step >= steps
        {
            stop.store(true, Ordering::Relaxed);
        }
    })
}

fn records(config: &SftConfig) -> Vec<StepRecord> {
    metrics::read(&config.output.join("metrics.jsonl")).unwrap()
}

/// The history without the wall time, which no run repeats.
fn history(config: &SftConfig) -> Vec<String> {
    let timeless = |mut record: StepRecord| {
        record.seconds = 0.0;
        format!("{record:?}")
    };
    records(config).into_iter().map(timeless).collect()
}

/// Every file of a checkpoint but those that name the run's folder.
fn contents(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for folder in [checkpoint.to_owned(), checkpoint.join("state")] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_file() && name != "manifest.json" && name != "config.toml" {
                files.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    assert!(files.iter().any(|(name, _)| name == "optimizer.safetensors"));
    files
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A model whose adapter, when there is one, does something.
fn tuned(more: &Value, lora: bool) -> Model {
    let mut tuned = model_with(more, 3);
    if lora {
        let config = LoraConfig { r: 2, alpha: 4.0, ..LoraConfig::default() };
        tuned.attach("x", Adapter::new(&tuned, config, 5).unwrap()).unwrap();
        tuned.activate(Some("x")).unwrap();
        let params = tuned.trained_mut();
        for tensor in params.tensors_mut() {
            let values = tensor.as_f32_mut().unwrap().iter_mut().enumerate();
            values.for_each(|(i, value)| *value += ((i * 7) % 11) as f32 / 50.0 - 0.1);
        }
    }
    tuned
}

/// Sum of the losses of all targets and its gradient by parameter.
fn total(model: &Model, batch: &Batch) -> (f64, Vec<Vec<f32>>) {
    let counted = batch.targets.iter().filter(|target| **target != IGNORE).count();
    let mut grads = Grads::new(model.trained().len());
    let mut tape = Tape::recording();
    let parts = model.forward_loss(&mut tape, batch, &ForwardOptions::default()).unwrap();
    tape.backward_scaled(&parts.loss, counted as f32, &mut grads).unwrap();
    let loss = f64::from(parts.cross_entropy.value().item().unwrap()) * counted as f64;
    let of = |grad: Option<&tercet_tensor::Tensor>| grad.unwrap().to_vec_f32().unwrap();
    (loss, grads.iter().map(of).collect())
}

/// The largest difference of two lists of tensors, as a share of the largest value.
fn apart(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let (a, b) = (a.concat(), b.concat());
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert!(largest > 0.0);
    a.iter().zip(&b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / largest
}

#[test]
fn packed_examples_learn_what_each_would_alone() {
    let example = |seed: usize, len: usize, prompt: usize| {
        let ids: Vec<i32> = (0..len).map(|i| ((seed * 31 + i * i * 7) % 256) as i32).collect();
        Example::completion(&ids[..prompt], &ids[prompt..])
    };
    let examples = [example(1, 17, 5), example(2, 1 + 1, 1), example(3, 40, 39), example(4, 23, 0)];
    let sparse = json!({"model_type": "tercet", "nsa": {"compress_block": 8, "compress_stride": 4, "select_block": 8,
                                "select_count": 4, "window": 8}});
    for (more, lora) in [(&json!({}), false), (&json!({}), true), (&sparse, false), (&sparse, true)]
    {
        let model = tuned(more, lora);
        let (loss, grads) = total(&model, &pack(&examples));
        let mut sum = 0.0;
        let mut sums: Vec<Vec<f32>> = grads.iter().map(|g| vec![0.0; g.len()]).collect();
        for example in &examples {
            let (loss, grads) = total(&model, &pack([example]));
            sum += loss;
            for (sum, grad) in sums.iter_mut().zip(grads) {
                sum.iter_mut().zip(grad).for_each(|(sum, g)| *sum += g);
            }
        }
        let off = (sum - loss).abs() / loss;
        assert!(off < f64::from(ROUNDING), "loss {loss} packed, {sum} apart");
        let off = apart(&grads, &sums);
        assert!(off < ROUNDING, "gradients differ by {off:e}: {more}, adapter {lora}");
    }
}

/// Weights after one step with rate 1 and AdamW's ε = 1: each moves by g/(|g| + 1), so that a
/// difference of weights is one of gradients.
fn one_step(room: &Room, output: &str, overrides: &[&str]) -> (StepRecord, Vec<Vec<f32>>) {
    let mut all = vec![
        "train.steps=1",
        "train.warmup=0",
        "train.schedule=wsd",
        "train.decay=0.0",
        "train.lr=1.0",
        "train.eps=1.0",
        "train.clip=0.0",
        "train.batch=12",
        "data.validation=0.0",
    ];
    all.extend(overrides);
    let config = room.config(output, &all);
    let report = run(&config, false).unwrap();
    let folder = report.checkpoint.unwrap();
    let model = match config.lora {
        None => Model::load(&folder).unwrap(),
        Some(_) => {
            let mut base = Model::load(&room.at("model")).unwrap();
            base.attach("x", Adapter::load(&folder, &base).unwrap()).unwrap();
            base.activate(Some("x")).unwrap();
            base
        }
    };
    let weights = model.trained().tensors().iter().map(|t| t.to_vec_f32().unwrap()).collect();
    (records(&config).remove(0), weights)
}

#[test]
fn how_many_tokens_go_at_once_and_the_order_inside_a_batch_change_rounding_alone() {
    let room = Room::new(12);
    for lora in ["", "lora.r=2"] {
        let name = |text: &str| format!("{text}{lora}");
        let with = |output: &str, more: &[&str]| {
            let mut all = more.to_vec();
            all.extend((!lora.is_empty()).then_some(lora));
            one_step(&room, &name(output), &all)
        };
        write_rows(&room.at("rows.jsonl"), &rows(12));
        let (whole, weights) = with("whole", &[]);
        assert!(whole.grad_norm.unwrap() > 0.1);
        let near = |what: &str, (record, found): (StepRecord, Vec<Vec<f32>>)| {
            let pairs = [(record.loss, whole.loss), (record.grad_norm, whole.grad_norm)];
            for (a, b) in pairs.map(|(a, b)| (a.unwrap(), b.unwrap())) {
                assert!((a - b).abs() / b < f64::from(ROUNDING), "{what}: {a} and {b}");
            }
            let off = apart(&weights, &found);
            assert!(off < ROUNDING, "{what}: weights differ by {off:e}");
            assert_eq!(record.tokens, whole.tokens, "{what}");
        };
        near("each alone", with("alone", &["train.micro_tokens=1"]));
        near("some", with("some", &["train.micro_tokens=70"]));
        near("recomputed", with("recomputed", &["train.recompute=true"]));
        let mut turned = rows(12);
        turned.reverse();
        write_rows(&room.at("rows.jsonl"), &turned);
        near("another order", with("turned", &[]));
        near("another seed", with("seeded", &["train.seed=0", "train.micro_tokens=33"]));
    }
}

fn interrupted_runs_end_alike(overrides: &[&str]) {
    let room = Room::new(14);
    let mut all = vec!["data.validation=0.4", "train.eval_every=2", "checkpoint.every=2"];
    all.extend(overrides);
    let whole = room.config("whole", &all);
    let report = run(&whole, false).unwrap();
    assert!(report.finished && report.validation_loss.is_some());
    let expected = contents(&report.checkpoint.unwrap());

    let parts = room.config("parts", &all);
    // Stops between checkpoints, then on one, then goes to the end.
    for (resume, until) in [(false, 1), (true, 4)] {
        let report = run_until(&parts, resume, until).unwrap();
        assert_eq!((report.finished, report.steps), (false, until));
    }
    let report = run(&parts, true).unwrap();
    assert!(report.finished);
    let found = contents(&report.checkpoint.unwrap());
    for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
        assert_eq!(name, expected_name);
        assert!(found == expected, "{name} differs: {overrides:?}");
    }
    assert_eq!(found.len(), expected.len());
    assert_eq!(history(&parts), history(&whole));
    assert_eq!(history(&whole).len(), 6);
    // Resuming what is finished changes nothing.
    let again = run(&parts, true).unwrap();
    assert!(again.finished && contents(&again.checkpoint.unwrap()) == expected);
}

#[test]
fn a_run_in_three_parts_ends_with_the_bits_of_one() {
    interrupted_runs_end_alike(&[]);
    interrupted_runs_end_alike(&["train.dtype=bf16", "train.micro_tokens=40"]);
}

#[test]
fn a_run_of_an_adapter_in_three_parts_ends_with_the_bits_of_one() {
    interrupted_runs_end_alike(&["lora.r=3", "train.recompute=true"]);
    interrupted_runs_end_alike(&["lora.r=3", "lora.dropout=0.3", "train.micro_tokens=40"]);
    interrupted_runs_end_alike(&[
        "lora={r=2, alpha=3.7, dropout=0.1, rslora=true, targets=['q_proj', 'mlp.*_proj']}"
            .replace("'mlp.*_proj'", "'*.mlp.*_proj'")
            .as_str(),
        "train.dtype=bf16",
    ]);
}

#[test]
fn dropout_changes_a_run_and_recomputation_does_not_change_its_dropout() {
    let room = Room::new(8);
    let end = |output: &str, overrides: &[&str]| {
        let config = room.config(output, overrides);
        contents(&run(&config, false).unwrap().checkpoint.unwrap())
    };
    let with = ["lora.r=3", "lora.dropout=0.3"];
    let kept = end("kept", &with);
    assert!(kept != end("none", &["lora.r=3", "lora.dropout=0.0"]));
    let weights = |files: &[(String, Vec<u8>)]| {
        files.iter().find(|(name, _)| name == "adapter_model.safetensors").unwrap().1.clone()
    };
    let again = end("again", &["lora.r=3", "lora.dropout=0.3", "train.recompute=true"]);
    assert!(weights(&kept) == weights(&again));
}

#[test]
fn every_step_and_every_portion_drops_other_numbers() {
    let mut seeds: Vec<Option<u64>> = Vec::new();
    for seed in [0, 1] {
        let train = TuneTrain { seed, ..TuneTrain::default() };
        let grid = (0..200).flat_map(|step| (0..20).map(move |portion| (step, portion)));
        seeds.extend(grid.map(|(step, portion)| options(&train, step, portion).dropout));
    }
    let all = seeds.len();
    seeds.sort_unstable();
    seeds.dedup();
    assert!(seeds.len() == all && seeds[0].is_some());

    // One row again and again, at a rate that moves nothing: only dropout can change its loss.
    let room = Room::new(1);
    let first = room.config("first", &["lora={r=2, alpha=64.0, dropout=0.5}", "train.lr=1e-2"]);
    let folder = run(&first, false).unwrap().checkpoint.unwrap();
    let on = format!("model.adapter='{}'", folder.display());
    let losses = |output: &str, batch: &str| -> Vec<f64> {
        let all = [on.as_str(), "train.lr=1e-30", "train.micro_tokens=1", batch];
        let config = room.config(output, &all);
        run(&config, false).unwrap();
        records(&config).iter().map(|record| record.loss.unwrap()).collect()
    };
    let one = losses("one", "train.batch=1");
    assert!(one.iter().enumerate().all(|(i, loss)| !one[..i].contains(loss)), "{one:?}");
    assert!(losses("two", "train.batch=2")[0] != one[0], "both portions drop the same");
}

#[test]
fn a_resume_with_other_rows_or_another_configuration_is_refused_and_harms_nothing() {
    let room = Room::new(8);
    let config = room.config("run", &[]);
    let checkpoint = run_until(&config, false, 3).unwrap().checkpoint.unwrap();
    let before = contents(&checkpoint);
    let refused = |config: &SftConfig, said: &str| {
        let text = run(config, true).err().unwrap_or_else(|| panic!("{said}: taken")).to_string();
        assert!(text.contains(said), "{text}");
        assert!(contents(&checkpoint) == before);
    };
    let mut other = rows(8);
    other[3] = json!({"text": "another row"});
    write_rows(&room.at("rows.jsonl"), &other);
    refused(&config, "not what step 3 was trained on");
    // The same words with something else learnt are other rows, too.
    let text = json!({"text": "0 times two is 0"});
    write_rows(&room.at("rows.jsonl"), &[&[text][..], &rows(8)[1..]].concat());
    refused(&config, "not what step 3 was trained on");
    write_rows(&room.at("rows.jsonl"), &rows(8));
    refused(&room.config("run", &["train.lr=1e-3"]), "train.lr");
    refused(&room.config("run", &["lora.r=2"]), "lora.");
    refused(&room.config("run", &["train.micro_tokens=9"]), "train.micro_tokens");
    let again = run(&config, false).err().unwrap().to_string();
    assert!(again.contains("--resume"), "{again}");
    assert!(run(&config, true).unwrap().finished);
}

#[test]
fn an_adapter_does_not_go_on_beside_other_weights() {
    let room = Room::new(8);
    let config = room.config("run", &["lora.r=2"]);
    run_until(&config, false, 3).unwrap();
    crate::tiny_chat::model(99).save(&room.at("model")).unwrap();
    let text = run(&config, true).err().unwrap().to_string();
    assert!(text.contains("not what step 3 was trained on"), "{text}");
}

#[test]
fn an_adapter_leaves_its_base_alone_is_a_peft_folder_and_goes_on() {
    let room = Room::new(12);
    let base: Vec<_> =
        names(&room.at("model")).iter().map(|n| std::fs::read(room.at("model").join(n))).collect();
    let held_out = format!("data.validation_paths=['{}']", room.at("rows.jsonl").display());
    let all = ["lora={r=2, alpha=8.0}", "train.batch=12", held_out.as_str()];
    let config = room.config("first", &all);
    let report = run(&config, false).unwrap();
    let folder = report.checkpoint.unwrap();
    for (name, before) in names(&room.at("model")).iter().zip(&base) {
        let now = std::fs::read(room.at("model").join(name)).unwrap();
        assert!(now == *before.as_ref().unwrap(), "{name} of the base has changed");
    }
    let there = names(&folder);
    for name in ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"] {
        assert!(there.iter().any(|n| n == name), "{name} is missing: {there:?}");
    }
    assert!(!there.iter().any(|n| n == "model.safetensors" || n == "config.json"), "{there:?}");
    let model = Model::load(&room.at("model")).unwrap();
    let adapter = Adapter::load(&folder, &model).unwrap();
    assert_eq!((adapter.config().r, adapter.config().alpha), (2, 8.0));
    assert!(
        adapter
            .params()
            .tensors()
            .iter()
            .all(|t| { t.to_vec_f32().unwrap().iter().any(|x| *x != 0.0) })
    );

    // What goes on begins where the first run ended: the batch is all rows, which were held out too.
    let on = format!("model.adapter='{}'", folder.display());
    let going = room.config("second", &[on.as_str(), "train.batch=12", held_out.as_str()]);
    run(&going, false).unwrap();
    let (end, begin) = (report.validation_loss.unwrap(), records(&going)[0].loss.unwrap());
    assert!((end - begin).abs() / end < f64::from(ROUNDING), "{end} went on as {begin}");
    assert!(begin < records(&config)[0].loss.unwrap() - 0.01);

    let both = room.config("third", &[on.as_str(), "lora.r=2"]);
    let text = run(&both, false).err().unwrap().to_string();
    assert!(text.contains("keep one of the two"), "{text}");
}

#[test]
fn an_adapter_that_goes_on_resumes_with_the_bits_of_one_run() {
    let room = Room::new(8);
    let first = room.config("first", &["lora={r=2, dropout=0.2}", "train.steps=2"]);
    let folder = run(&first, false).unwrap().checkpoint.unwrap();
    let on = format!("model.adapter='{}'", folder.display());
    let whole = room.config("whole", &[on.as_str()]);
    let expected = contents(&run(&whole, false).unwrap().checkpoint.unwrap());
    let parts = room.config("parts", &[on.as_str()]);
    run_until(&parts, false, 2).unwrap();
    let found = contents(&run(&parts, true).unwrap().checkpoint.unwrap());
    assert!(found == expected);
}

#[test]
fn an_adapters_checkpoint_is_its_own_whatever_stands_beside_the_base() {
    let room = Room::new(4);
    // Some published folders hold an adapter beside the weights.
    let stale = "{\"peft_type\": \"LORA\", \"r\": 64, \"target_modules\": [\"q_proj\"]}";
    std::fs::write(room.at("model").join("adapter_config.json"), stale).unwrap();
    let config = room.config("run", &["lora.r=2", "train.steps=2"]);
    let folder = run_until(&config, false, 1).unwrap().checkpoint.unwrap();
    let model = Model::load(&room.at("model")).unwrap();
    assert_eq!(Adapter::load(&folder, &model).unwrap().config().r, 2);
    assert!(run(&config, true).unwrap().finished);
}

/// A run's own `rows.jsonl` once took the place of the rows it was to learn.
#[test]
fn a_folder_with_somebodys_own_files_is_refused_and_they_stay_as_they_are() {
    let room = Room::new(12);
    let before = std::fs::read(room.at("rows.jsonl")).unwrap();
    let here = room.config(".", &["data.context=8"]);
    for resume in [false, true] {
        let said = run(&here, resume).unwrap_err().to_string();
        assert!(said.contains("`output`") && said.contains("rows.jsonl"), "{said}");
        assert!(std::fs::read(room.at("rows.jsonl")).unwrap() == before);
        assert!(!room.at(".lock").exists() && !room.at("config.toml").exists());
    }
    // Other files of a folder are nobody's business, and a run's own come back.
    std::fs::create_dir(room.at("run")).unwrap();
    std::fs::write(room.at("run/notes.txt"), "mine").unwrap();
    run_until(&room.config("run", &[]), false, 1).unwrap();
    std::fs::remove_file(room.at("run/.lock")).unwrap();
    assert!(run(&room.config("run", &[]), true).unwrap().finished);
}

/// Beside merged weights `tercet merge` writes what was promised of an adapter's privacy. Weights that
/// were trained on rows since have no such promise.
#[test]
fn a_promise_of_privacy_beside_the_start_is_not_passed_on_to_what_was_trained_since() {
    let room = Room::new(12);
    for name in ["privacy.json", "privacy-1.json"] {
        std::fs::write(room.at("model").join(name), "{\"private\": true}").unwrap();
    }
    for (output, more) in [("weights", &[][..]), ("adapter", &["lora.r=2"])] {
        let report = run(&room.config(output, more), false).unwrap();
        let names = names(&report.checkpoint.unwrap());
        let found: Vec<_> = names.iter().filter(|name| name.contains("privacy")).collect();
        assert!(found.is_empty(), "{output}: {found:?}");
    }
}

#[test]
fn what_cannot_begin_says_why_in_the_name_of_its_key() {
    let room = Room::new(4);
    let context = format!("data.context={}", CONTEXT + 1);
    for (overrides, said) in [
        (&["model.path='absent'"][..], "absent"),
        (&["model.adapter='absent'"], "absent"),
        (&[context.as_str()], "more than the model's context of 96"),
        (&["lora.r=0"], "r is 0"),
        (&["lora.r=-1"], "lora.r"),
        (&["lora.r=1000"], "1000"),
        (&["lora.alpha=nan"], "alpha is NaN"),
        (&["lora.dropout=1.0"], "dropout is 1"),
        (&["lora.targets=['nothing']"], "nothing"),
        (&["lora.targets=[]"], "no target"),
        (&["lora.rank=3"], "lora.rank"),
        (&["data.validation=1.0"], "data.validation"),
        (&["data.paths=[]"], "data.paths"),
        (&["data.paths='rows.jsonl'"], "data.paths"),
        (&["data.paths=['absent.jsonl']"], "absent.jsonl"),
        (&["data.context=1"], "data.context"),
        (&["data.bad_rows='skip'"], "data.bad_rows"),
        (&["train.epochs=1"], "train.epochs"),
        (&["train.batch=0"], "train.batch"),
        (&["train.batch=-4"], "train.batch"),
        (&["train.lr=-1e-3"], "train.lr"),
        (&["train.lr='fast'"], "train.lr"),
        (&["train.micro_tokens=0"], "train.micro_tokens"),
        (&["train.dtype='f16'"], "train.dtype"),
        (&["train.betas=[0.9]"], "train.betas"),
        (&["checkpoint.keep=0"], "checkpoint.keep"),
        (&["modle.path='x'"], "modle"),
    ] {
        let refused = room.try_config("run", overrides).and_then(|config| run(&config, false));
        let error = refused.err().unwrap_or_else(|| panic!("{overrides:?} was taken"));
        let text = error.to_string();
        assert!(text.contains(said) && error.is_users(), "{overrides:?}: {text}");
        assert!(!text.contains('\n'), "{text}");
        assert!(!room.at("run").exists(), "{overrides:?} left a folder behind");
    }
    let missing = SftConfig::parse("output='x'", &[]).unwrap_err().to_string();
    assert!(missing.contains("model.path"), "{missing}");
}

#[test]
fn the_last_step_takes_what_an_epoch_leaves_and_threads_do_not_change_the_bits() {
    let room = Room::new(10);
    let text = "[data]\ncontext = 64\n[train]\nepochs = 1\nbatch = 4\n";
    let ends: Vec<_> = [1, 3]
        .into_iter()
        .map(|threads| {
            let output = format!("t{threads}");
            let paths = [
                format!("output='{}'", room.at(&output).display()),
                format!("model.path='{}'", room.at("model").display()),
                format!("data.paths=['{}']", room.at("rows.jsonl").display()),
            ];
            let config = SftConfig::parse(text, &paths).unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let report = pool.install(|| run(&config, false)).unwrap();
            assert_eq!(report.steps, 3);
            contents(&report.checkpoint.unwrap())
        })
        .collect();
    assert!(ends[0] == ends[1]);
}
