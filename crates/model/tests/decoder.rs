//! The decoder of our own family: caches, packing, gradients, storage types.

mod common;

use common::{config, ids, model, nsa, spec};
use serde_json::json;
use tercet_model::{Batch, ForwardOptions, Model, ModelConfig};
use tercet_tensor::{DType, Grads, Tape, clip};

fn logits(model: &Model, ids: &[i32]) -> Vec<f32> {
    model.logits(ids, &[0, ids.len() as i32]).unwrap().to_vec_f32().unwrap()
}

/// Two ways of summing the same f32 numbers: errors grow with the number of terms (here at most
/// a few hundred a sum) times 2⁻²⁴, through two layers; 1e-4 of the largest logit leaves room
/// for ten such steps and none for one wrong key.
fn assert_close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst <= 1e-4 * scale, "{what}: {worst:e} beside {scale}");
}

fn kinds() -> Vec<(&'static str, ModelConfig)> {
    vec![
        ("mean", nsa("mean")),
        ("linear", nsa("linear")),
        ("mlp", nsa("mlp")),
        ("dense", config(json!({}))),
        ("window", config(json!({ "sliding_window": 9 }))),
        ("one group", config(json!({ "nsa": spec("mean"), "num_key_value_heads": 1 }))),
        (
            "experts",
            config(json!({
                "nsa": spec("mean"),
                "moe": { "routed_experts": 5, "shared_experts": 1, "top_k": 2, "expert_size": 16,
                         "first_dense_layers": 1 },
            })),
        ),
    ]
}

#[test]
fn a_cache_extended_in_any_chunks_gives_the_logits_of_the_whole() {
    for (what, config) in kinds() {
        let model = model(config);
        let ids = ids(130, 96);
        let whole = logits(&model, &ids);
        for chunk in [1, 7, 64, 130] {
            let mut cache = model.cache().unwrap();
            let mut got = Vec::new();
            for tokens in ids.chunks(chunk) {
                let logits = model.extend_all(&mut cache, tokens).unwrap();
                got.extend(logits.to_vec_f32().unwrap());
            }
            assert_eq!(cache.len(), ids.len());
            assert!(cache.bytes() > 0);
            assert_close(&got, &whole, &format!("{what} in chunks of {chunk}"));
        }
    }
}

#[test]
fn the_last_logits_of_a_long_prompt_are_those_of_the_whole() {
    // Longer than one prefill chunk.
    let model = model(config(json!({ "nsa": spec("mean"), "max_position_embeddings": 2048 })));
    let ids = ids(1100, 96);
    let mut cache = model.cache().unwrap();
    let last = model.extend(&mut cache, &ids).unwrap();
    assert_close(&last, &logits(&model, &ids)[1099 * 96..], "1100 tokens");
}

#[test]
fn packed_sequences_never_see_each_other() {
    for (what, config) in kinds() {
        let model = model(config);
        let all = ids(100, 96);
        let packed = model.logits(&all, &[0, 37, 37, 100]).unwrap().to_vec_f32().unwrap();
        let alone = [logits(&model, &all[..37]), logits(&model, &all[37..])].concat();
        assert_close(&packed, &alone, what);
    }
}

/// The slope along a tensor's own gradient is the gradient's length. Central differences of an
/// f32 loss near 4 carry noise of about 4·2⁻²³/h: 5e-5 with h = 1e-2. The truncation error is of
/// order h² times the third derivative, below 1 % for these sizes. Experts get a smaller step,
/// and ten times the noise, so that no token changes its experts on the way.
#[test]
fn gradients_of_every_parameter_are_those_of_finite_differences() {
    for (what, mut config) in kinds() {
        // Everything selected: the choice of blocks jumps, and no gradient goes through it.
        if let Some(spec) = &mut config.nsa {
            spec.select_count = 16;
        }
        let mut model = model(config);
        let tokens = ids(60, 96);
        let batch = Batch::next_token(&[&tokens[..25], &tokens[25..]]);
        let loss = |model: &Model| {
            let tape = &mut Tape::inference();
            let parts = model.forward_loss(tape, &batch, &ForwardOptions::default()).unwrap();
            f64::from(parts.loss.value().item().unwrap())
        };
        let mut grads = Grads::new(model.params().len());
        let mut tape = Tape::recording();
        let parts = model.forward_loss(&mut tape, &batch, &ForwardOptions::default()).unwrap();
        tape.backward(&parts.loss, &mut grads).unwrap();
        drop((tape, parts));

        let h = if what == "experts" { 1e-3 } else { 1e-2 };
        for slot in 0..model.params().len() {
            let name = model.params().name(slot).to_owned();
            let gradient = match grads.get(slot) {
                Some(gradient) => gradient.to_vec_f32().unwrap(),
                None => panic!("{what}: {name} has no gradient"),
            };
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            if norm == 0.0 {
                // An expert that no token chose.
                assert!(name.contains(".experts."), "{what}: {name} has a zero gradient");
                continue;
            }
            let original = model.params().tensor(slot).clone();
            let mut moved = |step: f64| {
                let mut tensor = original.clone();
                let values = tensor.as_f32_mut().unwrap();
                for (v, g) in values.iter_mut().zip(&gradient) {
                    *v += (step * f64::from(*g) / norm) as f32;
                }
                model.params_mut().set(slot, tensor).unwrap();
                loss(&model)
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * h);
            model.params_mut().set(slot, original).unwrap();
            let error = (slope - norm).abs();
            assert!(error <= 0.01 * norm + 1e-6 / h, "{what}: {name} {slope} is not {norm}");
        }
    }
}

#[test]
fn recomputation_and_repetition_keep_every_bit_of_the_gradients() {
    for (what, config) in kinds() {
        let model = model(config);
        let tokens = ids(70, 96);
        let batch = Batch::next_token(&[&tokens]);
        let run = |recompute: bool| {
            let mut grads = Grads::new(model.params().len());
            let mut tape = Tape::recording();
            let options = ForwardOptions { recompute, dropout: None };
            let parts = model.forward_loss(&mut tape, &batch, &options).unwrap();
            tape.backward(&parts.loss, &mut grads).unwrap();
            let bits: Vec<_> = grads.iter().map(|g| g.map(|t| t.to_vec_f32().unwrap())).collect();
            (parts.loss.value().item().unwrap().to_bits(), bits)
        };
        let first = run(false);
        assert_eq!(first, run(false), "{what}: a repetition");
        assert_eq!(first, run(true), "{what}: recomputation");
    }
}

#[test]
fn the_balance_loss_is_in_the_loss_and_not_in_the_cross_entropy() {
    let moe = |weight: f64| {
        config(json!({ "moe": { "routed_experts": 4, "top_k": 1, "expert_size": 8,
                                "balance_loss": weight } }))
    };
    let tokens = ids(50, 96);
    let batch = Batch::next_token(&[&tokens]);
    let parts = |config: ModelConfig| {
        let model = model(config);
        let tape = &mut Tape::inference();
        let parts = model.forward_loss(tape, &batch, &ForwardOptions::default()).unwrap();
        [parts.loss, parts.cross_entropy].map(|v| v.value().item().unwrap())
    };
    let [plain, entropy] = parts(moe(0.0));
    assert_eq!(plain, entropy);
    let [weighted, same] = parts(moe(0.5));
    assert_eq!(same, entropy);
    // Two layers, each at least 1 where routing is even and at most 4 where one expert has all.
    assert!((1.0..=4.0).contains(&(weighted - entropy)), "{weighted} {entropy}");
}

/// A bf16 number has 8 bits; the loss, a mean over many roundings, stays within 1 % of f32's.
#[test]
fn a_bf16_model_has_the_loss_of_its_f32_self() {
    for (what, config) in kinds() {
        let config = ModelConfig { initializer_range: 0.05, ..config };
        let tokens = ids(100, 96);
        let batch = Batch::next_token(&[&tokens]);
        let loss = |dtype| {
            let model = Model::new(config.clone(), 7, dtype).unwrap();
            let mut tape = Tape::recording();
            let mut grads = Grads::new(model.params().len());
            let parts = model.forward_loss(&mut tape, &batch, &ForwardOptions::default()).unwrap();
            tape.backward(&parts.loss, &mut grads).unwrap();
            let mut cache = model.cache().unwrap();
            let last = model.extend(&mut cache, &tokens).unwrap();
            assert!(last.iter().all(|v| v.is_finite()));
            (f64::from(parts.loss.value().item().unwrap()), clip::global_norm(&grads).unwrap())
        };
        let ((a, norm_a), (b, norm_b)) = (loss(DType::F32), loss(DType::BF16));
        assert!((a / b - 1.0).abs() < 0.01, "{what}: {a} {b}");
        assert!((norm_a / norm_b - 1.0).abs() < 0.1, "{what}: gradient norms {norm_a} {norm_b}");
    }
}

#[test]
fn a_twin_shares_the_weights_it_has_in_common() {
    let [sparse, dense] = [nsa("mean"), config(json!({ "v_head_dim": 4 }))].map(model);
    for name in ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"] {
        let [a, b] = [&sparse, &dense]
            .map(|m| m.params().tensor(m.params().slot(name).unwrap()).to_vec_f32().unwrap());
        assert_eq!(a, b, "{name}");
    }
}

#[test]
fn batches_that_do_not_fit_are_refused_with_the_reason() {
    let model = model(config(json!({ "max_position_embeddings": 10 })));
    let refuse = |ids: &[i32], cu: &[i32], word: &str| {
        let text = model.logits(ids, cu).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    refuse(&[1, 2, 96], &[0, 3], "token id 96 at position 2 is outside the model's vocabulary");
    refuse(&[1, -1], &[0, 2], "token id -1");
    refuse(&[1, 2], &[0, 3], "ends at 3");
    refuse(&[1, 2, 3], &[0, 2, 1, 3], "decreases");
    refuse(&[1; 11], &[0, 11], "11 tokens is longer than the model's context of 10");
    let batch = Batch { input_ids: vec![1, 2], targets: vec![1], cu_seqlens: vec![0, 2] };
    let tape = &mut Tape::inference();
    assert!(model.forward_loss(tape, &batch, &ForwardOptions::default()).is_err());

    let mut cache = model.cache().unwrap();
    assert!(model.extend(&mut cache, &[]).is_err());
    model.extend(&mut cache, &[1; 8]).unwrap();
    let text = model.extend(&mut cache, &[1; 3]).unwrap_err().to_string();
    assert!(text.contains("8 tokens in the cache and 3 new ones"), "{text}");
    // The refusal came before anything changed.
    model.extend(&mut cache, &[1; 2]).unwrap();
}
