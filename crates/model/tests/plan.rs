//! The recipes in `configs/` are what their names say.

use std::path::Path;

use tercet_model::{Family, Model, ModelConfig, Workload};
use tercet_tensor::DType;

/// The `[model]` table of a recipe, with the vocabulary of its tokenizer.
fn recipe(name: &str) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../configs/{name}.toml"));
    let text = std::fs::read_to_string(&path).unwrap();
    let mut run: toml::Table = text.parse().unwrap();
    let mut model = run["model"].as_table_mut().unwrap().clone();
    model.insert("vocab_size".into(), run["data"]["vocab_size"].clone());
    model.try_into().unwrap()
}

/// The issue's bar: 27B and 3B within 5 %. The paper's 3B is its feed-forward part; attention of
/// the paper's shape adds 2.1B, which no choice of expert width can take away.
#[test]
fn the_papers_moe_adds_up_to_27b_and_3b_active() {
    let config = recipe("nsa-27b-moe");
    let counts = config.parameter_counts();
    let near = |count: u64, billions: f64| (count as f64 / 1e9 / billions - 1.0).abs() <= 0.05;
    assert!(near(counts.total, 27.0), "{counts:?}");
    assert!(near(counts.active_feed_forward, 3.0), "{counts:?}");
    assert_eq!((config.num_hidden_layers, config.hidden_size), (30, 2560));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads), (64, 4));
    assert_eq!((config.head_dim, config.v_head_dim), (192, 128));
    let moe = config.moe.unwrap();
    assert_eq!((moe.routed_experts, moe.shared_experts, moe.top_k), (72, 2, 6));
    assert_eq!(moe.first_dense_layers, 1);
    println!("{counts:?}");
}

#[test]
fn twins_differ_in_attention_only_and_have_the_size_of_their_name() {
    for (size, millions) in [("125m", 125.0), ("1b", 1000.0)] {
        let [nsa, dense] = ["nsa", "dense"].map(|kind| recipe(&format!("{kind}-{size}")));
        for config in [&nsa, &dense] {
            let total = config.parameter_counts().total as f64 / 1e6;
            assert!((total / millions - 1.0).abs() < 0.1, "{size}: {total}M");
        }
        assert!(nsa.nsa.is_some() && dense.nsa.is_none());
        let twin = ModelConfig { nsa: None, model_type: Family::Llama, ..nsa };
        assert_eq!(twin, dense, "{size}");
    }
}

#[test]
fn counts_are_those_of_a_built_model() {
    let text = r#"{"model_type": "tercet", "vocab_size": 60, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 4,
        "nsa": {"compress_block": 4, "compress_stride": 2, "select_block": 4, "select_count": 3,
            "window": 5, "compressor": "mlp"},
        "moe": {"routed_experts": 6, "shared_experts": 1, "top_k": 2, "expert_size": 12,
            "first_dense_layers": 1}}"#;
    let config = tercet_model::hf_config::from_json(text).unwrap();
    let counts = config.parameter_counts();
    let model = Model::new(config, 0, DType::F32).unwrap();
    assert_eq!(counts.total, model.params().elements() as u64);
    // Two layers keep 2 of 6 experts of 3 matrices 24 × 12.
    assert_eq!(counts.total - counts.active, 2 * 4 * 3 * 24 * 12);
}

/// Dense twin at 64k against the ratio of keys read, (T/2) / (T/32 + T/32·½ + 1024 + 512).
#[test]
fn nsa_saves_what_it_leaves_unread() {
    let flops = recipe("nsa-27b-moe").flops(65536);
    assert!(flops.attention < flops.attention_dense / 6.0, "{flops:?}");
    assert!(flops.forward() < flops.forward_dense());
    assert_eq!(flops.training(), 3.0 * flops.forward());
    let dense = recipe("dense-1b").flops(65536);
    assert_eq!(dense.attention, dense.attention_dense);
}

#[test]
fn memory_parts_follow_the_choices_that_change_them() {
    let config = recipe("nsa-125m");
    let load = |dtype, recompute| Workload {
        context: 8192,
        tokens_at_once: 8192,
        dtype,
        recompute,
        cuda: false,
    };
    let full = config.training_memory(&load(DType::F32, false));
    let less = config.training_memory(&load(DType::F32, true));
    let half = config.training_memory(&load(DType::BF16, false));
    assert!(less.activations < full.activations / 4);
    assert_eq!(less.weights, full.weights);
    assert_eq!((half.weights * 2, half.gradients), (full.weights, full.gradients));
    assert_eq!(half.optimizer, full.optimizer / 2 * 3);
    assert_eq!(
        full.total(),
        full.weights + full.gradients + full.optimizer + full.activations + full.workspace
    );
}

/// Peaks of the tensors on an H200, as `tercet bench step --lengths 8k` measured them.
#[test]
fn the_plan_for_a_gpu_is_within_a_tenth_of_what_was_measured() {
    for (name, tokens, recompute, measured) in [
        ("nsa-125m", 8192, true, 3.2),
        ("dense-125m", 8192, true, 3.1),
        ("nsa-125m", 8192, false, 6.1),
        ("dense-125m", 8192, false, 5.4),
        ("nsa-1b", 16384, true, 20.2),
        ("dense-1b", 16384, true, 19.6),
    ] {
        let load = Workload {
            context: 8192,
            tokens_at_once: tokens,
            dtype: DType::BF16,
            recompute,
            cuda: true,
        };
        let planned = recipe(name).training_memory(&load).total() as f64 / f64::from(1 << 30);
        let off = (planned / measured - 1.0).abs();
        assert!(off < 0.1, "{name}, recompute {recompute}: {planned:.1} GiB, not {measured}");
    }
}

/// By hand, for a GPU: rings and tails of every slot, pages of tokens, and pages of blocks: one for
/// every `compress_stride` pages of tokens, two for each slot and one for every 64 slots.
#[test]
fn slots_on_a_gpu_cost_their_rings_and_the_pages_that_they_share() {
    let config = recipe("nsa-1b");
    let spec = config.nsa.clone().unwrap();
    assert_eq!((spec.compress_block, spec.compress_stride, spec.window), (32, 16, 512));
    let dims = config.dims();
    let row = dims.kv_heads * (dims.key_dim + dims.value_dim) * 2 * config.num_hidden_layers;
    let slots = |count, pages| config.slots_bytes([count, 8192], pages, DType::BF16) as usize;
    // 128 pages of tokens a slot, and 511 blocks: 8 pages. A ring has 512 tokens more than the
    // window, the tail 64.
    let (ring, tables) = (1024 + 64, 4 * (128 + 8));
    assert_eq!(slots(1, 128), row * (ring + 64 * (128 + 8)) + tables);
    assert_eq!(slots(64, 1600), row * (64 * ring + 64 * (1600 + 100 + 128 + 1)) + 64 * tables);
    assert_eq!(slots(2, 10_000), slots(2, 256), "no more than they can hold");
    // What one more page costs is what the plan says of 64 tokens.
    let page = (slots(64, 3200) - slots(64, 1600)) as f64 / 1600.0;
    let token = |n| config.cache_bytes(n, DType::BF16) as f64;
    assert_eq!(page, 64.0 * (token(8192) - token(4096)) / 4096.0);

    let dense = recipe("dense-1b");
    let row = 2 * dense.num_hidden_layers * dense.dims().kv_heads * 2 * dense.head_dim;
    let bytes = dense.slots_bytes([3, 100], 5, DType::BF16) as usize;
    assert_eq!(bytes, row * 5 * 64 + 3 * 4 * (2 + 1));
    let window = ModelConfig { sliding_window: Some(100), ..dense };
    let bytes = window.slots_bytes([3, 100], 5, DType::BF16) as usize;
    assert_eq!(bytes, row * 3 * (100usize + 100).next_multiple_of(64));
}
