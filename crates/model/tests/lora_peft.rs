//! Adapter folders of PEFT: its logits, its bytes, and what is refused. `tests/data/peft/make.py`
//! makes the folders and compares those we write.

mod common;

use std::path::{Path, PathBuf};

use common::{config, golden, model, nsa, train_by_chance};
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tercet_model::{Adapter, LoraConfig, Model};
use tercet_tensor::DType;

const CASES: [&str; 3] = ["gpt2-fused", "llama-rslora", "qwen2-dropout"];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft").join(case)
}

/// The cases whose base is there, which GPT-2's always is.
fn cases() -> Vec<(&'static str, Model)> {
    let base = |case: &'static str| {
        let dir = golden(case.split('-').next().unwrap())?;
        Some((case, Model::load(&dir).unwrap()))
    };
    let found: Vec<_> = CASES.into_iter().filter_map(base).collect();
    assert!(!found.is_empty());
    found
}

/// `[2, 24]` ids and the logits PEFT computed.
fn expected(case: &str) -> (Vec<i32>, Vec<f32>) {
    let bytes = std::fs::read(folder(case).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap().data().as_chunks().0.iter();
    let logits = file.tensor("logits").unwrap().data().as_chunks().0.iter();
    let ids = ids.map(|&b| i64::from_le_bytes(b) as i32).collect();
    (ids, logits.map(|&b| f32::from_le_bytes(b)).collect())
}

fn active(mut base: Model, adapter: Adapter) -> Model {
    base.attach("peft", adapter).unwrap();
    base.activate(Some("peft")).unwrap();
    base
}

fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The tolerance of `golden_hf.rs`: 2e-4.
#[test]
fn logits_are_those_of_peft_unmerged_merged_and_token_by_token() {
    for (case, base) in cases() {
        let (ids, want) = expected(case);
        let vocab = base.config().vocab_size;
        let logits =
            |model: &Model| model.logits(&ids, &[0, 24, 48]).unwrap().to_vec_f32().unwrap();
        let alone = worst(&logits(&base), &want);
        assert!(alone > 0.1, "{case}: the adapter makes no difference: {alone}");

        let adapter = Adapter::load(&folder(case), &base).unwrap();
        let mut model = active(base, adapter);
        let unmerged = worst(&logits(&model), &want);
        assert!(unmerged <= 2e-4, "{case}: logits differ by {unmerged:e}");
        let mut cache = model.cache().unwrap();
        for (at, token) in ids[..24].chunks(1).enumerate() {
            let got = model.extend(&mut cache, token).unwrap();
            let off = worst(&got, &want[at * vocab..(at + 1) * vocab]);
            assert!(off <= 2e-4, "{case}: decoding differs by {off:e} after {at}");
        }
        model.merge("peft").unwrap();
        let merged = worst(&logits(&model), &want);
        assert!(merged <= 2e-4, "{case}: merged logits differ by {merged:e}");
        println!("{case}: unmerged {unmerged:e}, merged {merged:e}, without {alone:e}");
    }
}

#[test]
fn what_was_read_is_written_with_the_same_bytes_and_meaning() {
    for (case, base) in cases() {
        let out = tempfile::tempdir().unwrap();
        let adapter = Adapter::load(&folder(case), &base).unwrap();
        adapter.save(out.path(), "some/base").unwrap();
        let bytes = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert!(bytes(&folder(case)) == bytes(out.path()), "{case}");
        let json = |dir: &Path| -> Value {
            let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        let (theirs, ours) = (json(&folder(case)), json(out.path()));
        for (name, value) in ours.as_object().unwrap() {
            match name.as_str() {
                "base_model_name_or_path" => assert_eq!(value, "some/base"),
                _ => assert_eq!(*value, theirs[name], "{case}: {name}"),
            }
        }
        let again = Adapter::load(out.path(), &base).unwrap();
        assert_eq!(again.config(), adapter.config(), "{case}");
    }
}

#[test]
fn adapters_of_our_own_family_come_back_with_every_kind_of_target() {
    let base = model(nsa("linear"));
    for targets in [json!(["all-linear"]), json!(["o_proj", "mlp.up_proj"]), json!(["*.1.*v_*"])] {
        let lora: LoraConfig = serde_json::from_value(json!({
            "r": 2, "alpha": 0.5, "dropout": 0.25, "targets": targets
        }))
        .unwrap();
        let fresh = Adapter::new(&base, lora, 4).unwrap();
        let trained = train_by_chance(fresh, &base, "a");
        let (out, adapter) = (tempfile::tempdir().unwrap(), trained.adapter("a").unwrap());
        adapter.save(out.path(), "x").unwrap();
        let read = Adapter::load(out.path(), &base).unwrap();
        assert!(read.modules().eq(adapter.modules()));
        assert_eq!(read.config().alpha, 0.5);
        let ids: Vec<i32> = (0..40).collect();
        let logits = |m: &Model| m.logits(&ids, &[0, 40]).unwrap().to_vec_f32().unwrap();
        assert_eq!(logits(&active(base.clone(), read)), logits(&trained));
    }
}

/// bf16 tensors stay what they are in a bf16 model, and a stored type comes back.
#[test]
fn a_bf16_adapter_is_written_and_read_exactly() {
    let base = Model::new(config(json!({})), 1, DType::BF16).unwrap();
    let adapter = Adapter::new(&base, LoraConfig { r: 3, ..LoraConfig::default() }, 2).unwrap();
    let out = tempfile::tempdir().unwrap();
    adapter.save(out.path(), "x").unwrap();
    let read = Adapter::load(out.path(), &base).unwrap();
    for (a, b) in adapter.params().tensors().iter().zip(read.params().tensors()) {
        assert_eq!(a.as_bf16().unwrap(), b.as_bf16().unwrap());
    }
}

/// A valid folder for [`base`], to be spoilt.
fn spoilt(change: impl FnOnce(&Path)) -> String {
    let base = base();
    let dir = tempfile::tempdir().unwrap();
    let lora = LoraConfig { r: 2, targets: vec!["q_proj".into()], ..LoraConfig::default() };
    Adapter::new(&base, lora, 1).unwrap().save(dir.path(), "x").unwrap();
    assert!(Adapter::load(dir.path(), &base).is_ok());
    change(dir.path());
    let error = Adapter::load(dir.path(), &base).unwrap_err();
    assert!(error.is_users(), "{error}");
    error.to_string()
}

fn base() -> Model {
    model(config(json!({})))
}

fn spoilt_config(name: &str, value: Value) -> String {
    spoilt(|dir| {
        let path = dir.join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[name] = value;
        std::fs::write(&path, config.to_string()).unwrap();
    })
}

#[test]
fn fields_that_would_change_the_numbers_are_refused_by_name_and_value() {
    for (name, value) in [
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("use_something_new", json!(true)),
        ("lora_bias", json!(true)),
        ("rank_pattern", json!({ "q_proj": 4 })),
        ("alpha_pattern", json!({ "q_proj": 4 })),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("layers_to_transform", json!([0])),
        ("layer_replication", json!([[0, 2]])),
        ("exclude_modules", json!(["k_proj"])),
        ("target_parameters", json!(["w"])),
        ("trainable_token_indices", json!([1])),
        ("corda_config", json!({ "x": 1 })),
        ("megatron_config", json!({ "x": 1 })),
        ("peft_type", json!("IA3")),
        ("init_lora_weights", json!("pissa_niter_4")),
    ] {
        let text = spoilt_config(name, value.clone());
        assert!(text.contains(&format!("{name} is {value}")), "{text}");
    }
}

#[test]
fn configurations_that_are_none_are_refused() {
    for (name, value, part) in [
        ("r", json!(0), "r is 0"),
        ("r", json!(-3), "r is -3, expected a whole number"),
        ("r", json!(2.5), "r is 2.5, expected a whole number"),
        ("r", json!(u64::MAX), "lora_A.weight is [2, 32], expected [18446744073709551615, 32]"),
        ("r", Value::Null, "r is null"),
        ("lora_alpha", json!("much"), "lora_alpha is \"much\", expected a number"),
        ("lora_alpha", json!(0), "alpha is 0"),
        ("lora_dropout", json!(1), "dropout is 1"),
        ("use_rslora", json!("yes"), "use_rslora is \"yes\", expected true or false"),
        ("target_modules", json!([]), "there is no target"),
        ("target_modules", json!([3]), "something else than names"),
        ("target_modules", Value::Null, "target_modules is missing"),
        ("target_modules", json!(["q_proj", "k_proj"]), "k_proj, which adapter_model.safetensors"),
        ("target_modules", json!(["k_proj"]), "q_proj, which target_modules does not mean"),
        ("target_modules", json!(["q_proj", "lm_head"]), "lm_head, the output head"),
        ("target_modules", json!(["*"]), "which is no name"),
        ("target_modules", json!("all-linear"), "k_proj, which adapter_model.safetensors"),
    ] {
        let text = spoilt_config(name, value.clone());
        assert!(text.contains(part), "{name} {value}: {text}");
    }
    for (content, part) in [
        ("", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ("{\"r\": NaN}", "is not a JSON object"),
        ("{}", "peft_type is missing"),
        ("{\"peft_type\": \"LORA\"}", "r is missing"),
        ("{\"peft_type\": \"LORA\", \"r\": 2, \"target_modules\": \"x\"}", "lora_alpha is missing"),
    ] {
        let text = spoilt(|dir| std::fs::write(dir.join("adapter_config.json"), content).unwrap());
        assert!(text.contains(part), "{content}: {text}");
    }
    // A regular expression means what the file holds.
    let base = base();
    let dir = tempfile::tempdir().unwrap();
    let lora = LoraConfig { r: 2, targets: vec!["q_proj".into()], ..LoraConfig::default() };
    Adapter::new(&base, lora, 1).unwrap().save(dir.path(), "x").unwrap();
    let path = dir.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["target_modules"] = json!(".*\\.q_proj");
    std::fs::write(&path, config.to_string()).unwrap();
    let read = Adapter::load(dir.path(), &base).unwrap();
    assert!(read.config().targets.iter().map(String::as_str).eq(read.modules()));
}

/// Tensors of an adapter for q_proj of both layers, in f32.
fn spoilt_tensors(change: impl FnOnce(&mut Vec<(String, Dtype, Vec<usize>)>)) -> String {
    let mut tensors = Vec::new();
    for layer in 0..2 {
        for (which, shape) in [("A", vec![2, 32]), ("B", vec![32, 2])] {
            let at = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
            tensors.push((format!("{at}.lora_{which}.weight"), Dtype::F32, shape));
        }
    }
    change(&mut tensors);
    let zeros = vec![0u8; 1 << 16];
    let view = |(name, dtype, shape): (String, Dtype, Vec<usize>)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, TensorView::new(dtype, shape, &zeros[..bytes]).unwrap())
    };
    let bytes = safetensors::serialize(tensors.into_iter().map(view), None).unwrap();
    spoilt(|dir| std::fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap())
}

#[test]
fn tensors_that_are_no_adapter_s_are_refused_by_name() {
    let at = "model.layers.1.self_attn.q_proj";
    let text = spoilt_tensors(|all| drop(all.pop()));
    assert!(text.contains(&format!("{at}.lora_A.weight is there, but no lora_B")), "{text}");
    let text = spoilt_tensors(|all| drop(all.remove(2)));
    assert!(text.contains(&format!("{at}.lora_B.weight is there, but no lora_A")), "{text}");
    let text = spoilt_tensors(|all| all.truncate(2));
    assert!(text.contains(&format!("target_modules means {at}, which")), "{text}");
    let text = spoilt_tensors(Vec::clear);
    assert!(text.contains("holds no tensor"), "{text}");
    let text = spoilt_tensors(|all| all[2].2 = vec![2, 48]);
    assert!(text.contains(&format!("{at}.lora_A.weight is [2, 48], expected [2, 32]")), "{text}");
    let text = spoilt_tensors(|all| all[2].2 = vec![64]);
    assert!(text.contains(&format!("{at}.lora_A.weight is [64], expected [2, 32]")), "{text}");
    let text = spoilt_tensors(|all| all[0].1 = Dtype::I32);
    assert!(text.contains("is stored as I32"), "{text}");
    for name in [
        "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
        "model.layers.1.self_attn.k_proj.lora_A.weight",
        "base_model.model.lm_head.weight",
    ] {
        let text = spoilt_tensors(|all| all[3].0 = name.into());
        assert!(text.contains(&format!("holds {name}; expected")), "{text}");
    }
    let text = spoilt_tensors(|all| {
        all.iter_mut().for_each(|(name, ..)| *name = name.replace("q_proj", "qkv"));
    });
    assert!(text.contains("model.layers.0.self_attn.qkv is no linear of this model"), "{text}");
}

#[test]
fn files_that_are_cut_off_repeated_or_pickled_are_refused() {
    const FILE: &str = "adapter_model.safetensors";
    for keep in [0, 7, 8, 100, 700] {
        let text = spoilt(|dir| {
            let bytes = std::fs::read(dir.join(FILE)).unwrap();
            std::fs::write(dir.join(FILE), &bytes[..keep]).unwrap();
        });
        assert!(text.contains(FILE), "{keep}: {text}");
    }
    // The same name twice in the header, over the numbers of another tensor.
    let text = spoilt(|dir| {
        let mut bytes = std::fs::read(dir.join(FILE)).unwrap();
        let other = b"layers.1.self_attn.q_proj.lora_A";
        let at = bytes.windows(other.len()).position(|w| w == other).unwrap();
        bytes[at + 7] = b'0';
        std::fs::write(dir.join(FILE), bytes).unwrap();
    });
    assert!(text.contains("header that is not valid"), "{text}");
    let text = spoilt(|dir| std::fs::remove_file(dir.join(FILE)).unwrap());
    assert!(text.contains(FILE), "{text}");
    let text = spoilt(|dir| {
        std::fs::rename(dir.join(FILE), dir.join("adapter_model.bin")).unwrap();
    });
    assert!(text.contains("pickle") && text.contains("safe_serialization=True"), "{text}");
    let text = spoilt(|dir| std::fs::remove_file(dir.join("adapter_config.json")).unwrap());
    assert!(text.contains("adapter_config.json"), "{text}");
}

proptest! {
    /// A changed or missing end makes an error or another adapter, never a panic.
    #[test]
    fn damaged_files_never_panic(config in any::<bool>(), at in 0usize..4000, to in any::<u8>(), cut in any::<bool>()) {
        let base = base();
        let dir = tempfile::tempdir().unwrap();
        let lora = LoraConfig { r: 2, targets: vec!["q_proj".into()], ..LoraConfig::default() };
        Adapter::new(&base, lora, 1).unwrap().save(dir.path(), "x").unwrap();
        let name = if config { "adapter_config.json" } else { "adapter_model.safetensors" };
        let mut bytes = std::fs::read(dir.path().join(name)).unwrap();
        // Mostly in the header, which is what is parsed.
        let at = at % bytes.len().min(900);
        if cut { bytes.truncate(at) } else { bytes[at] = to }
        std::fs::write(dir.path().join(name), bytes).unwrap();
        match Adapter::load(dir.path(), &base) {
            Ok(adapter) => prop_assert!(base.clone().attach("a", adapter).is_ok()),
            Err(error) => prop_assert!(error.is_users(), "{error}"),
        }
    }
}

#[test]
fn an_adapter_for_another_base_names_what_does_not_fit() {
    let wider = model(config(json!({ "hidden_size": 48 })));
    let dir = tempfile::tempdir().unwrap();
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    Adapter::new(&base(), lora, 1).unwrap().save(dir.path(), "x").unwrap();
    let text = Adapter::load(dir.path(), &wider).unwrap_err().to_string();
    assert!(text.contains("made for another base"), "{text}");
    assert!(text.contains("lora_A.weight is [2, 32], expected [2, 48]"), "{text}");
    assert!(text.contains("more do not fit") && text.len() < 700, "{text}");
}
