//! Tiny Hugging Face models against what transformers computes with them: logits, loss, gradient
//! norm, greedy tokens with and without a cache, and byte-equal saving.
//!
//! Two families stand in `tests/data`; the others are read from `$TERCET_GOLDEN/hf` (or
//! `../shared/golden/hf` beside the repository) when it is there.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use tercet_model::{Batch, ForwardOptions, Model};
use tercet_tensor::{DType, Grads, Tape, clip};

struct Expected {
    ids: Vec<Vec<i32>>,
    logits: Vec<f32>,
    log_probabilities: Vec<f32>,
    loss: f64,
    grad_norm: f64,
    greedy: Vec<i32>,
}

fn expected(dir: &Path) -> Expected {
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data();
        data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    };
    let integers = |name: &str| -> Vec<i32> {
        let data = file.tensor(name).unwrap().data();
        data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as i32).collect()
    };
    let width = file.tensor("input_ids").unwrap().shape()[1];
    Expected {
        ids: integers("input_ids").chunks(width).map(<[i32]>::to_vec).collect(),
        logits: floats("logits"),
        log_probabilities: floats("token_logprobs"),
        loss: f64::from(floats("loss")[0]),
        grad_norm: f64::from(floats("grad_norm")[0]),
        greedy: integers("greedy"),
    }
}

/// The folders to test; says so when the full set is not there.
fn families() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("TERCET_GOLDEN")
        .map(PathBuf::from)
        .unwrap_or_else(|| own.join("../../../shared/golden"))
        .join("hf");
    let mut found: Vec<PathBuf> = match std::fs::read_dir(&shared) {
        Ok(entries) => entries.map(|e| e.unwrap().path()).collect(),
        Err(_) => {
            println!("no {}: only the families in tests/data are tested", shared.display());
            std::fs::read_dir(own.join("tests/data"))
                .unwrap()
                .map(|e| e.unwrap().path())
                .filter(|p| p.join("expected.safetensors").exists())
                .collect()
        }
    };
    found.sort();
    assert!(found.len() >= 2, "{found:?}");
    found
}

fn batch(expected: &Expected) -> Batch {
    Batch::next_token(&expected.ids.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// The tolerances: logits 2e-4, loss 1e-5.
#[test]
fn logits_and_loss_are_those_of_transformers() {
    for dir in families() {
        let (model, expected) = (Model::load(&dir).unwrap(), expected(&dir));
        let batch = batch(&expected);
        let logits = model.logits(&batch.input_ids, &batch.cu_seqlens).unwrap();
        let logits = logits.to_vec_f32().unwrap();
        assert_eq!(logits.len(), expected.logits.len());
        let worst = logits.iter().zip(&expected.logits).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0, f32::max);
        assert!(worst <= 2e-4, "{}: logits differ by {worst:e}", dir.display());

        let tape = &mut Tape::inference();
        let loss = model.forward_loss(tape, &batch, &ForwardOptions::default()).unwrap();
        let loss = f64::from(loss.cross_entropy.value().item().unwrap());
        let error = (loss - expected.loss).abs();
        assert!(error <= 1e-5, "{}: loss {loss} is not {}", dir.display(), expected.loss);
        println!("{}: logits {worst:e}, loss {error:e}", dir.display());
    }
}

/// Log-probabilities of each next token, from the logits in f64.
#[test]
fn every_token_has_the_log_probability_of_transformers() {
    for dir in families() {
        let (model, expected) = (Model::load(&dir).unwrap(), expected(&dir));
        let batch = batch(&expected);
        let logits = model.logits(&batch.input_ids, &batch.cu_seqlens).unwrap();
        let logits = logits.to_vec_f32().unwrap();
        let vocab = model.config().vocab_size;
        let counted = batch.targets.iter().zip(logits.chunks(vocab)).filter(|(t, _)| **t >= 0);
        let mut tokens = 0;
        for ((&target, row), &want) in counted.zip(&expected.log_probabilities) {
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            let got = f64::from(row[target as usize]) - sum.ln();
            assert!((got - f64::from(want)).abs() <= 4e-4, "{}: {got} {want}", dir.display());
            tokens += 1;
        }
        assert_eq!(tokens, expected.log_probabilities.len());
    }
}

/// Relative 1e-4, with and without recomputation, whose gradients are bit-equal.
#[test]
fn the_gradient_norm_is_that_of_transformers() {
    for dir in families() {
        let (model, expected) = (Model::load(&dir).unwrap(), expected(&dir));
        let batch = batch(&expected);
        let gradients = |recompute: bool| {
            let mut grads = Grads::new(model.params().len());
            let mut tape = Tape::recording();
            let options = ForwardOptions { recompute, dropout: None };
            let loss = model.forward_loss(&mut tape, &batch, &options).unwrap();
            tape.backward(&loss.loss, &mut grads).unwrap();
            grads
        };
        let (kept, again) = (gradients(false), gradients(true));
        let norm = clip::global_norm(&kept).unwrap();
        let error = (norm / expected.grad_norm - 1.0).abs();
        assert!(error <= 1e-4, "{}: {norm} is not {}", dir.display(), expected.grad_norm);
        for slot in 0..model.params().len() {
            let name = model.params().name(slot);
            let [a, b] = [&kept, &again].map(|g| g.get(slot).map(|t| t.to_vec_f32().unwrap()));
            assert!(a.is_some(), "{name} has no gradient");
            assert_eq!(a, b, "{}: {name} changes with recomputation", dir.display());
        }
        println!("{}: gradient norm {error:e}", dir.display());
    }
}

fn argmax(row: &[f32]) -> i32 {
    let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&v| v == best).unwrap() as i32
}

/// Tokens that transformers was given before it continued.
const PROMPT: usize = 20;

/// A file whose continuation does not begin with the most probable token of its own logits was
/// not made greedily; there, only cached = uncached is left to test. Told, and never silent.
#[test]
fn greedy_tokens_are_identical_with_and_without_the_cache() {
    let mut compared = 0;
    for dir in families() {
        let (model, expected) = (Model::load(&dir).unwrap(), expected(&dir));
        let vocab = model.config().vocab_size;
        assert_eq!(expected.greedy[..PROMPT], expected.ids[0][..PROMPT]);

        let mut cache = model.cache().unwrap();
        let mut cached = expected.greedy[..PROMPT].to_vec();
        let mut logits = model.extend(&mut cache, &cached).unwrap();
        let mut plain = cached.clone();
        while cached.len() < expected.greedy.len() {
            cached.push(argmax(&logits));
            logits = model.extend(&mut cache, &cached[cached.len() - 1..]).unwrap();

            let all = model.logits(&plain, &[0, plain.len() as i32]).unwrap().to_vec_f32().unwrap();
            plain.push(argmax(&all[all.len() - vocab..]));
        }
        assert_eq!(cached, plain, "{}: the cache changes the text", dir.display());

        let first = argmax(&expected.logits[(PROMPT - 1) * vocab..PROMPT * vocab]);
        if first != expected.greedy[PROMPT] {
            println!(
                "{}: continues with {} where its own logits say {first}: not compared",
                dir.display(),
                expected.greedy[PROMPT]
            );
            continue;
        }
        assert_eq!(cached, expected.greedy, "{}", dir.display());
        compared += 1;
    }
    assert!(compared >= 2, "only {compared} files were compared");
}

#[test]
fn saving_what_was_loaded_gives_the_same_bytes() {
    for dir in families() {
        let out = tempfile::tempdir().unwrap();
        Model::load(&dir).unwrap().save(out.path()).unwrap();
        for file in ["model.safetensors", "config.json"] {
            let (before, after) = (
                std::fs::read(dir.join(file)).unwrap(),
                std::fs::read(out.path().join(file)).unwrap(),
            );
            assert!(before == after, "{}: {file} changed", dir.display());
        }
    }
}

/// A conversion to bf16 changes the type in config.json and nothing else there, and comes back.
#[test]
fn bf16_folders_save_to_the_same_bytes_too() {
    for dir in families() {
        let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        Model::load_as(&dir, DType::BF16).unwrap().save(one.path()).unwrap();
        let model = Model::load(one.path()).unwrap();
        assert_eq!(model.params().dtype(), DType::BF16);
        model.save(two.path()).unwrap();
        for file in ["model.safetensors", "config.json"] {
            let [a, b] = [&one, &two].map(|d| std::fs::read(d.path().join(file)).unwrap());
            assert!(a == b, "{}: {file} changed", dir.display());
        }
        let config = std::fs::read_to_string(one.path().join("config.json")).unwrap();
        assert!(config.contains("\"dtype\": \"bfloat16\""), "{config}");
    }
}
