//! Model folders: what is written comes back, and hostile or damaged files are refused by name.

mod common;

use std::fs;
use std::path::Path;

use common::{config, model, nsa};
use serde_json::{Value, json};
use tempfile::tempdir;
use tercet_model::{Model, parameters};
use tercet_tensor::DType;

fn refused(dir: &Path) -> String {
    match Model::load(dir) {
        Ok(_) => panic!("the folder should be refused"),
        Err(e) => {
            assert!(e.is_users(), "{e} counts as our own fault");
            e.to_string()
        }
    }
}

/// A saved model, and a way to write `model.safetensors` again from header and data.
fn saved() -> (tempfile::TempDir, Value, Vec<u8>) {
    let dir = tempdir().unwrap();
    model(config(json!({}))).save(dir.path()).unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    (dir, header, bytes[8 + n..].to_vec())
}

fn write(dir: &Path, header: &[u8], data: &[u8]) {
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, data].concat();
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn every_kind_of_model_comes_back_bit_for_bit() {
    for config in [
        nsa("mean"),
        nsa("linear"),
        nsa("mlp"),
        config(json!({ "tie_word_embeddings": true, "moe": { "routed_experts": 3, "top_k": 1,
                       "shared_experts": 1, "expert_size": 8 } })),
        config(
            json!({ "model_type": "gpt2", "num_key_value_heads": 4, "tie_word_embeddings": true }),
        ),
        config(json!({ "model_type": "llama", "attention_bias": true, "mlp_bias": true })),
        config(json!({ "model_type": "qwen2" })),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let [one, two] = [tempdir().unwrap(), tempdir().unwrap()];
            let model = Model::new(config.clone(), 3, dtype).unwrap();
            let text = || fs::read_to_string(one.path().join("config.json")).unwrap();
            model.save(one.path()).unwrap();
            let again = Model::load(one.path()).unwrap_or_else(|e| panic!("{e}\n{}", text()));
            assert_eq!(again.config(), &config, "{}", text());
            assert_eq!(again.params().dtype(), dtype);
            for slot in 0..model.params().len() {
                let [a, b] =
                    [&model, &again].map(|m| m.params().tensor(slot).to_vec_f32().unwrap());
                assert_eq!(a, b, "{}", model.params().name(slot));
            }
            again.save(two.path()).unwrap();
            for file in ["config.json", "model.safetensors"] {
                let [a, b] = [&one, &two].map(|d| fs::read(d.path().join(file)).unwrap());
                assert!(a == b, "{file} changed");
            }
        }
    }
}

#[test]
fn shards_come_back_as_one_model_and_save_to_the_same_shards() {
    let [one, two] = [tempdir().unwrap(), tempdir().unwrap()];
    let model = model(nsa("linear"));
    model.save_sharded(one.path(), 20_000).unwrap();
    let again = Model::load(one.path()).unwrap();
    for slot in 0..model.params().len() {
        let [a, b] = [&model, &again].map(|m| m.params().tensor(slot).to_vec_f32().unwrap());
        assert_eq!(a, b, "{}", model.params().name(slot));
    }
    again.save_sharded(two.path(), 20_000).unwrap();
    let names = |dir: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert!(names(one.path()).len() > 4, "{:?}", names(one.path()));
    assert_eq!(names(one.path()), names(two.path()));
    for name in names(one.path()) {
        assert!(
            fs::read(one.path().join(&name)).unwrap() == fs::read(two.path().join(&name)).unwrap()
        );
    }
}

#[test]
fn half_precision_sources_are_read_exactly() {
    let (dir, mut header, data) = saved();
    // Every second byte pair of small f32 numbers, declared as F16: any bit pattern is a value.
    let numbers: Vec<u8> = (0..data.len() / 2).map(|i| (i % 97) as u8).collect();
    for (_, info) in header.as_object_mut().unwrap() {
        if let Some(offsets) = info.get_mut("data_offsets").and_then(Value::as_array_mut) {
            offsets.iter_mut().for_each(|o| *o = json!(o.as_u64().unwrap() / 2));
            info["dtype"] = json!("F16");
        }
    }
    write(dir.path(), header.to_string().as_bytes(), &numbers);
    let model = Model::load(dir.path()).unwrap();
    assert_eq!(model.params().dtype(), DType::F32);
    let head = model.params().tensor(model.params().slot("lm_head.weight").unwrap());
    let first = half::f16::from_le_bytes([numbers[0], numbers[1]]).to_f32();
    assert_eq!(head.to_vec_f32().unwrap()[0], first);
}

#[test]
fn gpt2_files_without_the_prefix_and_with_mask_buffers_are_read() {
    let dir = tempdir().unwrap();
    let shape =
        json!({ "model_type": "gpt2", "num_key_value_heads": 4, "tie_word_embeddings": true });
    let original = model(config(shape));
    original.save(dir.path()).unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = std::str::from_utf8(&bytes[8..8 + n]).unwrap().replace("transformer.", "");
    let mut header: Value = serde_json::from_str(&text).unwrap();
    let mut data = bytes[8 + n..].to_vec();
    let end = data.len();
    data.extend([0u8; 16]);
    header["h.0.attn.bias"] =
        json!({ "dtype": "F32", "shape": [1, 1, 2, 2], "data_offsets": [end, end + 16] });
    write(dir.path(), header.to_string().as_bytes(), &data);
    let again = Model::load(dir.path()).unwrap();
    let [a, b] = [&original, &again].map(|m| m.params().tensor(3).to_vec_f32().unwrap());
    assert_eq!(a, b);
}

#[test]
fn attack_truncated_file() {
    let (dir, _, _) = saved();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for keep in [0, 7, 8, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        let text = refused(dir.path());
        assert!(text.contains("model.safetensors"), "{text}");
    }
    assert!(refused(dir.path()).contains("may be incomplete"));
}

#[test]
fn attack_header_longer_than_the_file_or_huge() {
    let (dir, _, _) = saved();
    for length in [u64::MAX, 1 << 40, 100_000_001, 1000] {
        let bytes = [&length.to_le_bytes()[..], b"{}"].concat();
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        assert!(refused(dir.path()).contains("promises a header"));
    }
}

#[test]
fn attack_header_that_is_not_json_or_not_utf8() {
    let (dir, _, data) = saved();
    for header in [&b"{\"a\": [}"[..], b"\xff\xfe{}", b"[]", b"{\"__metadata__\": 3}"] {
        write(dir.path(), header, &data);
        assert!(refused(dir.path()).contains("header that is not valid"));
    }
    // Nesting that would overflow a recursive parser's stack.
    write(dir.path(), &[b'['; 100_000], &data);
    assert!(refused(dir.path()).contains("not valid"));
}

#[test]
fn attack_offsets_that_overlap_leave_holes_or_overflow() {
    let (dir, header, data) = saved();
    let name = "model.norm.weight";
    for offsets in
        [json!([0, 128]), json!([u64::MAX - 1, u64::MAX]), json!([128, 0]), json!([-1, 4])]
    {
        let mut header = header.clone();
        header[name]["data_offsets"] = offsets;
        write(dir.path(), header.to_string().as_bytes(), &data);
        refused(dir.path());
    }
    let mut header = header.clone();
    header[name]["shape"] = json!([1u64 << 62, 1u64 << 62]);
    write(dir.path(), header.to_string().as_bytes(), &data);
    refused(dir.path());
}

#[test]
fn a_missing_extra_misshapen_or_integer_tensor_is_named() {
    let (dir, header, data) = saved();
    let name = "model.layers.1.mlp.up_proj.weight";

    let mut changed = header.clone();
    let info = changed.as_object_mut().unwrap().remove(name).unwrap();
    changed["model.layers.1.mlp.up.weight"] = info;
    write(dir.path(), changed.to_string().as_bytes(), &data);
    assert!(refused(dir.path()).contains(&format!("tensor {name} is missing")));

    let mut changed = header.clone();
    let end = data.len();
    changed["surplus"] = json!({ "dtype": "F32", "shape": [1], "data_offsets": [end, end + 4] });
    write(dir.path(), changed.to_string().as_bytes(), &[&data[..], &[0; 4]].concat());
    assert!(refused(dir.path()).contains("tensor surplus does not belong"));

    let mut changed = header.clone();
    changed[name]["shape"] = json!([32, 48]);
    write(dir.path(), changed.to_string().as_bytes(), &data);
    let text = refused(dir.path());
    assert!(text.contains(&format!("tensor {name} has shape [32, 48]")), "{text}");
    assert!(text.contains("[48, 32]"), "{text}");

    let mut changed = header.clone();
    changed[name]["dtype"] = json!("I32");
    write(dir.path(), changed.to_string().as_bytes(), &data);
    assert!(refused(dir.path()).contains("stored as I32; only F32, BF16 and F16"));
}

#[test]
fn a_tied_models_second_output_matrix_must_be_the_first() {
    let dir = tempdir().unwrap();
    model(config(json!({ "tie_word_embeddings": true }))).save(dir.path()).unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let mut data = bytes[8 + n..].to_vec();
    let at = header["model.embed_tokens.weight"]["data_offsets"].clone();
    let range = at[0].as_u64().unwrap() as usize..at[1].as_u64().unwrap() as usize;
    let (start, copy) = (data.len(), data[range].to_vec());
    data.extend(&copy);
    header["lm_head.weight"] =
        json!({ "dtype": "F32", "shape": [96, 32], "data_offsets": [start, data.len()] });
    write(dir.path(), header.to_string().as_bytes(), &data);
    Model::load(dir.path()).unwrap();
    data[start + 2] ^= 1;
    write(dir.path(), header.to_string().as_bytes(), &data);
    assert!(refused(dir.path()).contains("lm_head.weight differs"));
}

#[test]
fn attack_shard_index_pointing_outside_the_folder() {
    let dir = tempdir().unwrap();
    model(config(json!({}))).save_sharded(dir.path(), 20_000).unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for shard in [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "C:\\x",
        "a\0b",
    ] {
        let mut index = index.clone();
        index["weight_map"]["model.norm.weight"] = json!(shard);
        fs::write(&path, index.to_string()).unwrap();
        let text = refused(dir.path());
        assert!(text.contains("outside the model's folder"), "{text}");
    }
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let dir = tempdir().unwrap();
    model(config(json!({}))).save_sharded(dir.path(), 20_000).unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let name = "model.norm.weight";
    let other = map.values().find(|v| **v != map[name]).unwrap();

    let mut changed = index.clone();
    changed["weight_map"][name] = other.clone();
    fs::write(&path, changed.to_string()).unwrap();
    assert!(refused(dir.path()).contains("where the index says it is"));

    let mut changed = index.clone();
    changed["weight_map"].as_object_mut().unwrap().remove(name);
    fs::write(&path, changed.to_string()).unwrap();
    assert!(refused(dir.path()).contains("in a shard but not in the index"));

    fs::remove_file(dir.path().join(other.as_str().unwrap())).unwrap();
    fs::write(&path, index.to_string()).unwrap();
    assert!(refused(dir.path()).contains(other.as_str().unwrap()));

    fs::write(&path, "{\"weight_map\": 3}").unwrap();
    assert!(refused(dir.path()).contains("is not a shard index"));
    fs::remove_file(&path).unwrap();
    assert!(refused(dir.path()).contains("holds neither"));
}

#[test]
fn a_folder_without_a_config_or_with_a_broken_one_is_refused() {
    let (dir, _, _) = saved();
    let path = dir.path().join("config.json");
    for text in ["", "{", "[]", "{}", "\u{feff}{}", "{\"model_type\": \"bert\"}"] {
        fs::write(&path, text).unwrap();
        assert!(refused(dir.path()).contains("config.json"));
    }
    fs::write(&path, b"\xff\xfe").unwrap();
    assert!(refused(dir.path()).contains("config.json"));
    fs::remove_file(&path).unwrap();
    assert!(refused(dir.path()).contains("config.json"));
}

/// A config of another size is refused before memory is taken for it.
#[test]
fn attack_config_far_larger_than_the_weights() {
    let (dir, _, _) = saved();
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["hidden_size"] = json!(100_000);
    config["vocab_size"] = json!(10_000_000);
    fs::write(&path, config.to_string()).unwrap();
    let text = refused(dir.path());
    assert!(text.contains("config.json asks for [10000000, 100000]"), "{text}");
}

#[test]
fn writing_into_a_missing_or_read_only_folder_says_so() {
    let model = model(config(json!({})));
    let dir = tempdir().unwrap();
    let text = model.save(&dir.path().join("absent")).unwrap_err().to_string();
    assert!(text.contains("absent"), "{text}");
}

#[test]
fn a_created_folder_is_whole_or_absent() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out");
    let broken: tercet_model::Result<()> = tercet_model::folder::create(&out, |temp| {
        fs::write(temp.join("half"), "…").unwrap();
        Err(tercet_model::Error::Config("stopped".into()))
    });
    assert!(broken.is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something is left behind");
    tercet_model::folder::create(&out, |temp| {
        fs::write(temp.join("all"), "…").unwrap();
        Ok(())
    })
    .unwrap();
    assert!(out.join("all").exists());
    let text = tercet_model::folder::create(&out, |_| Ok(())).unwrap_err().to_string();
    assert!(text.contains("is not empty"), "{text}");
}

#[test]
fn slots_have_unique_names_and_decay_is_for_matrices() {
    for config in [nsa("mlp"), config(json!({ "model_type": "qwen3" }))] {
        let specs = parameters(&config);
        let names: std::collections::HashSet<_> = specs.iter().map(|s| &s.name).collect();
        assert_eq!(names.len(), specs.len());
        for spec in &specs {
            let vector = spec.name.contains("norm")
                || spec.name.contains("bias")
                || spec.name.ends_with("_pe");
            assert_eq!(spec.decays(), !vector, "{}", spec.name);
        }
    }
}
