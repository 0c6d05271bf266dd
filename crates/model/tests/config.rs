//! Configurations: every spelling that is published, and every rule.

mod common;

use serde_json::{Value, json};
use tercet_model::{Family, LayerType, ModelConfig, RopeScaling, hf_config};

fn llama(fields: Value) -> tercet_model::Result<ModelConfig> {
    let mut base = json!({
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    });
    for (key, value) in fields.as_object().unwrap() {
        base[key] = value.clone();
    }
    hf_config::from_json(&base.to_string())
}

fn ours(fields: Value) -> Result<ModelConfig, String> {
    let mut base = json!({
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    });
    for (key, value) in fields.as_object().unwrap() {
        base[key] = value.clone();
    }
    serde_json::from_value(base).map_err(|e| e.to_string())
}

#[test]
fn both_spellings_of_rope_give_the_same_config() {
    let yarn = json!({ "factor": 4.0, "original_max_position_embeddings": 1024 });
    let llama3 = json!({ "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 1024 });
    for (name, fields) in [("yarn", yarn), ("llama3", llama3), ("default", json!({}))] {
        let with = |extra: Value| {
            let mut all = fields.clone();
            all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            all
        };
        let new =
            json!({ "rope_parameters": with(json!({ "rope_type": name, "rope_theta": 5e5 })) });
        let old = json!({ "rope_theta": 5e5, "rope_scaling": with(json!({ "rope_type": name })) });
        let older = json!({ "rope_theta": 5e5, "rope_scaling": with(json!({ "type": name })) });
        let [new, old, older] = [new, old, older].map(|fields| llama(fields).unwrap());
        assert_eq!(new, old);
        assert_eq!(new, older);
        assert_eq!(new.rope_theta, 5e5);
        assert_eq!(new.rope_scaling.is_some(), name != "default");
    }
    let plain = llama(json!({ "rope_theta": 7.0, "rope_scaling": null })).unwrap();
    assert_eq!((plain.rope_theta, plain.rope_scaling), (7.0, None));
}

#[test]
fn yarn_falls_back_as_transformers_does() {
    let of = |fields: Value| match llama(json!({ "rope_scaling": fields })).unwrap().rope_scaling {
        Some(RopeScaling::Yarn { factor, attention_factor, truncate, beta_fast, .. }) => {
            (factor, attention_factor, truncate, beta_fast)
        }
        other => panic!("{other:?}"),
    };
    let original = json!({ "rope_type": "yarn", "original_max_position_embeddings": 1024 });
    assert_eq!(of(original).0, 4.0, "context over original when no factor is given");
    let scaled = of(json!({ "rope_type": "yarn", "factor": 40.0, "mscale": 1.0,
        "mscale_all_dim": 0.707, "original_max_position_embeddings": 1024, "truncate": false }));
    let m = |s: f64| 0.1 * s * 40f64.ln() + 1.0;
    assert!((scaled.1.unwrap() - m(1.0) / m(0.707)).abs() < 1e-12);
    assert!(!scaled.2);
    assert_eq!(scaled.3, 32.0);
}

#[test]
fn what_we_do_not_compute_is_refused_and_not_ignored() {
    for (fields, word) in [
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (json!({ "rope_scaling": { "rope_type": "dynamic", "factor": 2.0 } }), "dynamic"),
        (
            json!({ "rope_scaling": { "rope_type": "llama3", "factor": 2.0 } }),
            "low_freq_factor is missing",
        ),
        (json!({ "rope_scaling": [] }), "not an object"),
        (json!({ "hidden_size": "big" }), "hidden_size = \"big\" is not a whole number"),
        (json!({ "hidden_size": -3 }), "is not a whole number"),
        (json!({ "hidden_size": 1.5 }), "is not a whole number"),
        (json!({ "hidden_size": null }), "hidden_size is missing"),
        (json!({ "num_attention_heads": 5 }), "not divisible"),
        (json!({ "num_attention_heads": 0 }), "not divisible"),
        (json!({ "num_key_value_heads": 3 }), "cannot be shared"),
        (json!({ "eos_token_id": "x" }), "eos_token_id"),
        (json!({ "model_type": "mamba" }), "mamba"),
    ] {
        let text = llama(fields.clone()).unwrap_err().to_string();
        assert!(text.contains(word), "{fields}: {text}");
    }
    let gpt2 = |extra: &str| {
        let text = format!(
            r#"{{"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1{extra}}}"#
        );
        hf_config::from_json(&text)
    };
    assert_eq!(gpt2("").unwrap().intermediate_size, 32);
    for extra in [
        r#", "scale_attn_by_inverse_layer_idx": true"#,
        r#", "activation_function": "relu""#,
        r#", "add_cross_attention": true"#,
        r#", "scale_attn_weights": false"#,
    ] {
        assert!(gpt2(extra).is_err(), "{extra}");
    }
}

#[test]
fn sliding_windows_follow_each_family() {
    let of = |fields: Value| llama(fields).unwrap();
    let windows =
        |c: &ModelConfig| (0..c.num_hidden_layers).map(|i| c.window(i)).collect::<Vec<_>>();
    let mistral = of(json!({ "model_type": "mistral", "sliding_window": 24 }));
    assert_eq!(windows(&mistral), [Some(24), Some(24)]);
    assert_eq!(of(json!({ "model_type": "mistral", "sliding_window": null })).sliding_window, None);
    let off =
        of(json!({ "model_type": "qwen2", "sliding_window": 24, "use_sliding_window": false }));
    assert_eq!(windows(&off), [None, None]);
    let upper = of(json!({ "model_type": "qwen2", "sliding_window": 24,
        "use_sliding_window": true, "max_window_layers": 1 }));
    assert_eq!(windows(&upper), [None, Some(24)]);
    let listed =
        of(json!({ "model_type": "qwen3", "sliding_window": 24, "use_sliding_window": true,
        "layer_types": ["sliding_attention", "full_attention"] }));
    assert_eq!(windows(&listed), [Some(24), None]);
    assert_eq!(listed.layer_types.unwrap()[1], LayerType::FullAttention);
    let short = llama(json!({ "model_type": "qwen3", "sliding_window": 24,
        "use_sliding_window": true, "layer_types": ["sliding_attention"] }));
    assert!(short.unwrap_err().to_string().contains("layer_types has 1 entries"));
}

#[test]
fn what_is_written_is_read_back_for_every_family() {
    let scaled = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0,
                         "original_max_position_embeddings": 2048, "attention_factor": 1.5 } });
    for config in [
        llama(json!({})).unwrap(),
        llama(scaled).unwrap(),
        llama(json!({ "attention_bias": true, "mlp_bias": true, "eos_token_id": [1, 2] })).unwrap(),
        llama(json!({ "model_type": "mistral", "sliding_window": 9, "head_dim": 6 })).unwrap(),
        llama(json!({ "model_type": "qwen2", "sliding_window": 9, "use_sliding_window": true,
                      "max_window_layers": 1 }))
        .unwrap(),
        llama(json!({ "model_type": "qwen3", "bos_token_id": 3 })).unwrap(),
        common::config(
            json!({ "model_type": "gpt2", "num_key_value_heads": 4, "gelu_exact": true }),
        ),
        common::nsa("mlp"),
    ] {
        let text = hf_config::to_json(&config, "float32");
        assert_eq!(hf_config::from_json(&text).unwrap(), config, "{text}");
        let toml = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<ModelConfig>(&toml).unwrap(), config, "{toml}");
    }
}

#[test]
fn a_short_table_is_filled_with_defaults() {
    let config: ModelConfig = toml::from_str(
        "vocab_size = 50\nhidden_size = 64\nnum_hidden_layers = 1\nnum_attention_heads = 4\n[nsa]\nwindow = 99\n",
    )
    .unwrap();
    assert_eq!(config.model_type, Family::Tercet);
    assert_eq!((config.head_dim, config.v_head_dim, config.num_key_value_heads), (16, 16, 4));
    let spec = config.nsa.unwrap();
    assert_eq!((spec.window, spec.compress_block), (99, 32));
}

#[test]
fn every_rule_names_its_field() {
    for (fields, word) in [
        (json!({ "hiden_size": 3 }), "unknown field `hiden_size`"),
        (json!({ "nsa": { "windwo": 3 } }), "unknown field `windwo`"),
        (json!({ "moe": { "top_k": 1 } }), "missing field `routed_experts`"),
        (json!({ "vocab_size": 0 }), "vocab_size = 0"),
        (json!({ "vocab_size": 1u64 << 40 }), "vocab_size = 1099511627776"),
        (json!({ "hidden_size": 1u64 << 60, "head_dim": 8 }), "hidden_size"),
        (json!({ "num_hidden_layers": 100_000 }), "num_hidden_layers"),
        (json!({ "num_attention_heads": 3 }), "not divisible by num_attention_heads = 3"),
        (json!({ "num_key_value_heads": 3 }), "4 query heads"),
        (json!({ "head_dim": 7 }), "head_dim = 7 must be even"),
        (json!({ "head_dim": 300 }), "300"),
        (json!({ "rms_norm_eps": 0.0 }), "rms_norm_eps"),
        (json!({ "rope_theta": -1.0 }), "rope_theta"),
        (json!({ "sliding_window": 0 }), "sliding_window"),
        (json!({ "sliding_window": 3, "nsa": {} }), "exclude each other"),
        (json!({ "nsa": { "compress_stride": 7 } }), "compress_stride = 7"),
        (json!({ "model_type": "llama", "nsa": {} }), "nsa is not part of model_type = \"llama\""),
        (json!({ "model_type": "llama", "v_head_dim": 4 }), "v_head_dim = 4"),
        (json!({ "attention_bias": true }), "attention_bias"),
        (json!({ "model_type": "qwen2", "mlp_bias": true }), "mlp_bias"),
        (json!({ "moe": { "routed_experts": 4, "top_k": 5, "expert_size": 8 } }), "moe.top_k = 5"),
        (json!({ "moe": { "routed_experts": 0, "top_k": 1, "expert_size": 8 } }), "routed_experts"),
        (
            json!({ "num_hidden_layers": 4096,
                    "moe": { "routed_experts": 4096, "top_k": 1, "expert_size": 8 } }),
            "moe.routed_experts = 4096 in 4096 layers",
        ),
        (json!({ "moe": { "routed_experts": 4, "top_k": 1, "expert_size": 0 } }), "expert_size"),
        (
            json!({ "moe": { "routed_experts": 4, "top_k": 1, "expert_size": 8, "first_dense_layers": 3 } }),
            "first_dense_layers",
        ),
        (json!({ "eos_token_id": 100 }), "token id 100"),
        (
            json!({ "rope_scaling": { "rope_type": "yarn", "factor": 0.0,
                 "original_max_position_embeddings": 8 } }),
            "rope_scaling.factor",
        ),
    ] {
        let text = ours(fields.clone()).unwrap_err();
        assert!(text.contains(word), "{fields}: {text}");
    }
}
