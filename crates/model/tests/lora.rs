//! LoRA adapters: the same numbers merged and unmerged, gradients by the chain rule, dropout,
//! targets, and what happens when several come and go.

mod common;

use common::{config, golden, ids, model, nsa, spec, train_by_chance};
use serde_json::json;
use tercet_model::{Adapter, Batch, ForwardOptions, LoraConfig, Model, ModelConfig};
use tercet_tensor::{DType, Grads, Tape};

fn logits(model: &Model, ids: &[i32]) -> Vec<f32> {
    model.logits(ids, &[0, ids.len() as i32]).unwrap().to_vec_f32().unwrap()
}

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0f32, |most, value| most.max(value.abs()))
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    largest(a.iter().zip(b).map(|(a, b)| a - b))
}

/// Two ways of summing the same f32 numbers: errors grow with the number of terms (here at most a
/// few hundred a sum) times 2⁻²⁴, through two layers; 1e-4 of the largest leaves room for ten such
/// steps.
const CLOSE: f32 = 1e-4;

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let (off, size) = (distance(got, want), largest(want.iter().copied()));
    assert!(off <= CLOSE * size, "{what}: {off:e} beside {size}");
}

fn lora(fields: serde_json::Value) -> LoraConfig {
    serde_json::from_value(fields).unwrap()
}

/// A choice of blocks or experts jumps, so that rounding could change it: all blocks are selected.
fn everything_selected(mut config: ModelConfig) -> ModelConfig {
    if let Some(spec) = &mut config.nsa {
        spec.select_count = 16;
    }
    config
}

fn bases() -> Vec<(String, Model)> {
    let experts = config(json!({
        "nsa": spec("mean"),
        "moe": { "routed_experts": 5, "shared_experts": 1, "top_k": 2, "expert_size": 16,
                 "first_dense_layers": 1 },
    }));
    let own = [
        ("mean", nsa("mean")),
        ("linear", nsa("linear")),
        ("mlp", nsa("mlp")),
        ("dense", config(json!({}))),
        ("experts", experts),
    ];
    let own = own.map(|(name, config)| (name.to_owned(), model(everything_selected(config))));
    let shared = ["llama", "qwen2", "gpt2"].into_iter().filter_map(|name| {
        let dir = golden(name)?;
        Some((name.to_owned(), Model::load(&dir).unwrap()))
    });
    own.into_iter().chain(shared).collect()
}

/// Every linear adapted, B not zero, active as "a".
fn adapted(base: &Model) -> Model {
    let config = lora(json!({ "r": 4, "alpha": 6.0, "rslora": true, "dropout": 0.25 }));
    train_by_chance(Adapter::new(base, config, 3).unwrap(), base, "a")
}

#[test]
fn a_fresh_adapter_changes_nothing_and_is_all_that_is_trained() {
    for (what, base) in bases() {
        let ids = ids(60, base.config().vocab_size);
        let mut model = base.clone();
        let adapter = Adapter::new(&base, LoraConfig { r: 2, ..LoraConfig::default() }, 1).unwrap();
        model.attach("fresh", adapter).unwrap();
        assert_eq!(model.trained().len(), base.params().len(), "{what}: not active yet");
        model.activate(Some("fresh")).unwrap();
        assert_eq!(logits(&model, &ids), logits(&base, &ids), "{what}");
        assert!(model.trained().specs().iter().all(|s| s.name.contains(".lora_")), "{what}");
        let gated = model.trained().specs().iter().any(|s| s.name.contains("gate_proj.lora_A"));
        assert_eq!(gated, what != "gpt2", "{what}");
        assert!(!model.trained().specs().iter().any(|s| s.name.contains(".experts.")));
    }
}

/// PEFT's start: A within ±1/√in with the variance of a uniform number, a third of the bound
/// squared; the standard error of the variance of n such numbers is below its value over √n.
#[test]
fn a_starts_uniform_and_b_zero() {
    let base = model(config(json!({ "hidden_size": 64, "intermediate_size": 256 })));
    let adapter = Adapter::new(&base, lora(json!({ "r": 32 })), 1).unwrap();
    for (spec, tensor) in adapter.params().specs().iter().zip(adapter.params().tensors()) {
        let x = tensor.to_vec_f32().unwrap();
        if spec.name.contains("lora_B") {
            assert!(x.iter().all(|&x| x == 0.0), "{}", spec.name);
            continue;
        }
        let square = 1.0 / spec.shape[1] as f32;
        let variance = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        assert!(largest(x.iter().copied()) <= square.sqrt(), "{}", spec.name);
        let error = 5.0 / (x.len() as f32).sqrt();
        assert!((variance * 3.0 / square - 1.0).abs() < error, "{}: {variance}", spec.name);
    }
    let again = Adapter::new(&base, lora(json!({ "r": 32 })), 2).unwrap();
    let [a, b] = [&adapter, &again].map(|x| x.params().tensor(0).to_vec_f32().unwrap());
    assert_ne!(a, b, "the seed does nothing");
}

#[test]
fn merged_and_unmerged_models_compute_the_same_at_once_and_token_by_token() {
    for (what, base) in bases() {
        let model = adapted(&base);
        let ids = ids(90, base.config().vocab_size);
        let unmerged = logits(&model, &ids);
        let mut merged = model.clone();
        merged.merge("a").unwrap();
        assert_eq!(merged.adapters().count(), 0);
        assert_eq!(merged.trained().len(), base.params().len());
        assert_close(&logits(&merged, &ids), &unmerged, &what);
        let effect = distance(&unmerged, &logits(&base, &ids));
        let size = largest(unmerged.iter().copied());
        assert!(effect > 100.0 * CLOSE * size, "{what}: the adapter does nothing: {effect:e}");

        for chunk in [1, 41] {
            let mut cache = model.cache().unwrap();
            let mut got = Vec::new();
            for tokens in ids.chunks(chunk) {
                got.extend(model.extend_all(&mut cache, tokens).unwrap().to_vec_f32().unwrap());
            }
            assert_close(&got, &unmerged, &format!("{what} in chunks of {chunk}"));
        }
        let mut cache = model.cache().unwrap();
        let last = model.extend(&mut cache, &ids).unwrap();
        assert_close(&last, &unmerged[unmerged.len() - last.len()..], &what);
    }
}

struct Gradients {
    loss: f32,
    slots: Vec<Option<Vec<f32>>>,
}

fn gradients(model: &Model, options: &ForwardOptions) -> Gradients {
    let ids = ids(60, model.config().vocab_size);
    let batch = Batch::next_token(&[&ids[..25], &ids[25..]]);
    let mut tape = Tape::recording();
    let parts = model.forward_loss(&mut tape, &batch, options).unwrap();
    let mut grads = Grads::new(model.trained().len());
    tape.backward(&parts.loss, &mut grads).unwrap();
    let loss = parts.loss.value().item().unwrap();
    Gradients { loss, slots: grads.iter().map(|g| g.map(|g| g.to_vec_f32().unwrap())).collect() }
}

/// `Σ_k a[i][k]·b[k][j]` in f64, added to `out`.
fn add_product(
    out: &mut [f64],
    a: &dyn Fn(usize, usize) -> f32,
    b: &dyn Fn(usize, usize) -> f32,
    [rows, inner, columns]: [usize; 3],
) {
    for (at, out) in out.iter_mut().enumerate() {
        let (i, j) = (at / columns, at % columns);
        assert!(i < rows);
        *out += (0..inner).map(|k| f64::from(a(i, k)) * f64::from(b(k, j))).sum::<f64>();
    }
}

/// With `W′ = W + s·B·A`: `dB = s·dW′·Aᵀ` and `dA = s·Bᵀ·dW′`, where dW′ is what the merged model
/// gets in full training.
#[test]
fn gradients_are_those_of_the_merged_weights_by_the_chain_rule() {
    for (what, base) in bases() {
        let model = adapted(&base);
        let scale = model.adapter("a").unwrap().config().scale();
        let mut merged = model.clone();
        merged.merge("a").unwrap();
        let full = gradients(&merged, &ForwardOptions::default());
        let thin = gradients(&model, &ForwardOptions::default());
        let params = model.trained();
        assert_eq!(thin.slots.len(), params.len());
        let tensor = |name: &str| {
            let slot = params.slot(name)?;
            let (shape, values) = (params.tensor(slot).shape(), params.tensor(slot).to_vec_f32());
            Some((shape.to_vec(), values.unwrap(), thin.slots[slot].clone()))
        };
        for module in model.adapter("a").unwrap().modules() {
            let (shape, a, da) = tensor(&format!("{module}.lora_A.weight")).unwrap();
            let (r, inputs) = (shape[0], shape[1]);
            // The base's weights by name, and the Bs; GPT-2 shares an A between three.
            let parts = if module.ends_with("c_attn") { 3 } else { 1 };
            let mut want_a = vec![0f64; r * inputs];
            for part in 0..parts {
                let weight = match parts {
                    3 => {
                        let layer = module.split('.').nth(2).unwrap();
                        let letter = ["q", "k", "v"][part];
                        format!("model.layers.{layer}.self_attn.{letter}_proj.weight")
                    }
                    _ => format!("{module}.weight")
                        .replace("transformer.h", "model.layers")
                        .replace("attn.c_proj", "self_attn.o_proj")
                        .replace(".c_fc", ".up_proj")
                        .replace(".c_proj", ".down_proj"),
                };
                let slot = base.params().slot(&weight).unwrap();
                let dw = full.slots[slot].as_ref().unwrap();
                let name = if parts == 3 {
                    format!("{module}.lora_B.{part}.weight")
                } else {
                    format!("{module}.lora_B.weight")
                };
                let (shape, b, db) = tensor(&name).unwrap();
                let outputs = shape[0];
                let mut want_b = vec![0f64; outputs * r];
                add_product(
                    &mut want_b,
                    &|i, k| dw[i * inputs + k],
                    &|k, j| a[j * inputs + k],
                    [outputs, inputs, r],
                );
                add_product(
                    &mut want_a,
                    &|i, k| b[k * r + i],
                    &|k, j| dw[k * inputs + j],
                    [r, outputs, inputs],
                );
                let want: Vec<f32> = want_b.iter().map(|x| (x * scale) as f32).collect();
                assert_close(&db.unwrap(), &want, &format!("{what}: {name}"));
            }
            let want: Vec<f32> = want_a.iter().map(|x| (x * scale) as f32).collect();
            assert_close(&da.unwrap(), &want, &format!("{what}: {module}.lora_A"));
        }
    }
}

#[test]
fn dropout_repeats_with_its_seed_through_recomputation_and_is_off_without() {
    for (what, base) in bases() {
        let model = adapted(&base);
        let run = |recompute, dropout| gradients(&model, &ForwardOptions { recompute, dropout });
        let (kept, again) = (run(false, Some(5)), run(true, Some(5)));
        assert_eq!(kept.loss.to_bits(), again.loss.to_bits(), "{what}");
        assert_eq!(kept.slots, again.slots, "{what}: recomputation changes gradients");
        assert_ne!(run(false, Some(6)).loss, kept.loss, "{what}: the seed does nothing");
        let (off, off_again) = (run(false, None), run(true, None));
        assert_ne!(off.loss, kept.loss, "{what}: nothing is dropped");
        assert_eq!(off.slots, off_again.slots, "{what}");

        // A rate of 0 drops nothing, whatever the seed.
        let config = LoraConfig { dropout: 0.0, ..model.adapter("a").unwrap().config().clone() };
        let plain = train_by_chance(Adapter::new(&base, config, 3).unwrap(), &base, "a");
        let plain = gradients(&plain, &ForwardOptions { recompute: false, dropout: Some(5) });
        assert_eq!(plain.slots, off.slots, "{what}");
    }
}

/// Along the gradient g of the adapter the loss falls by |g|² times the step; with dropout on, the
/// mask being the seed's. Central differences: see decoder.rs.
#[test]
fn the_slope_under_dropout_is_the_gradient_s() {
    let base = model(everything_selected(nsa("mean")));
    let mut model = adapted(&base);
    let options = ForwardOptions { recompute: false, dropout: Some(9) };
    let here = gradients(&model, &options);
    for slot in 0..model.trained().len() {
        let gradient = here.slots[slot].clone().unwrap();
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let (old, h) = (model.trained().tensor(slot).clone(), 1e-2);
        let mut loss = |step: f64| {
            let mut moved = old.clone();
            for (x, g) in moved.as_f32_mut().unwrap().iter_mut().zip(&gradient) {
                *x += (step * f64::from(*g) / norm) as f32;
            }
            model.trained_mut().set(slot, moved).unwrap();
            let loss = gradients(&model, &options).loss;
            model.trained_mut().set(slot, old.clone()).unwrap();
            f64::from(loss)
        };
        let slope = (loss(h) - loss(-h)) / (2.0 * h);
        let allowed = 1e-4 + 0.01 * norm;
        let name = model.trained().name(slot);
        assert!((slope - norm).abs() < allowed, "{name}: {slope} is not {norm}");
    }
}

#[test]
fn adapters_come_and_go_and_merge_in_any_number() {
    let base = model(nsa("mean"));
    let ids = ids(50, 96);
    let mut model = adapted(&base);
    let other = Adapter::new(&base, lora(json!({ "r": 1, "targets": ["o_proj"] })), 8).unwrap();
    let with_b = train_by_chance(other, &base, "b");
    let b = with_b.adapter("b").unwrap().clone();
    model.attach("b", b.clone()).unwrap();
    assert_eq!(model.adapters().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(model.active_adapter(), Some("a"));
    let text = model.attach("b", b).unwrap_err().to_string();
    assert!(text.contains("\"b\" is attached already"), "{text}");

    let a_alone = logits(&model, &ids);
    model.activate(Some("b")).unwrap();
    assert_eq!(logits(&model, &ids), logits(&with_b, &ids));
    model.activate(None).unwrap();
    assert_eq!(logits(&model, &ids), logits(&base, &ids));
    let text = model.activate(Some("c")).unwrap_err().to_string();
    assert!(text.contains("none called \"c\"; there are a, b"), "{text}");

    let mut both = model.clone();
    both.merge("b").unwrap();
    both.activate(Some("a")).unwrap();
    let mut merged = model.clone();
    merged.merge("a").unwrap();
    merged.merge("b").unwrap();
    assert_close(&logits(&merged, &ids), &logits(&both, &ids), "a and b");
    assert!(merged.merge("a").is_err());
    assert!(model.detach("c").is_none());

    // Taking out one before it does not change which is active.
    model.activate(Some("b")).unwrap();
    assert!(model.detach("a").is_some());
    assert_eq!(logits(&model, &ids), logits(&with_b, &ids));
    assert!(model.detach("b").is_some());
    assert_eq!(logits(&model, &ids), logits(&base, &ids));
    assert_ne!(a_alone, logits(&base, &ids));
}

#[test]
fn a_clone_keeps_its_numbers_when_the_original_is_trained() {
    let base = model(config(json!({})));
    let mut trained = base.clone();
    let ids = ids(20, 96);
    let before = logits(&base, &ids);
    trained.params_mut().tensors_mut()[0].as_f32_mut().unwrap().fill(0.5);
    assert_eq!(logits(&base, &ids), before);
    assert_ne!(logits(&trained, &ids), before);
}

#[test]
fn a_cache_filled_under_other_weights_is_refused() {
    let mut model = adapted(&model(config(json!({}))));
    let mut cache = model.cache().unwrap();
    model.extend(&mut cache, &[1, 2]).unwrap();
    model.activate(Some("a")).unwrap();
    model.extend(&mut cache, &[3]).unwrap();
    model.activate(None).unwrap();
    let text = model.extend(&mut cache, &[3]).unwrap_err().to_string();
    assert!(text.contains("filled under other weights"), "{text}");
    let mut cache = model.cache().unwrap();
    model.extend(&mut cache, &[1]).unwrap();
    model.merge("a").unwrap();
    assert!(model.extend(&mut cache, &[3]).is_err());
}

/// An adapter takes the storage type of the model it is attached to. In bf16 the merged weights are
/// rounded by up to 2⁻⁸ of their size, as is each sum of the unmerged model: a few such steps.
#[test]
fn an_adapter_fits_a_model_of_the_other_storage_type() {
    let config = config(json!({}));
    let wide = Model::new(config.clone(), 7, DType::BF16).unwrap();
    let mut narrow = wide.clone();
    let source = adapted(&model(config));
    narrow.attach("a", source.adapter("a").unwrap().clone()).unwrap();
    narrow.activate(Some("a")).unwrap();
    assert_eq!(narrow.trained().dtype(), DType::BF16);
    let ids = ids(40, 96);
    let unmerged = logits(&narrow, &ids);
    let frozen = narrow.clone();
    narrow.merge("a").unwrap();
    assert_eq!(narrow.params().dtype(), DType::BF16);
    // W + s·B·A is summed in f32 and rounded once, by 2⁻⁸ of its size at most.
    let read = |model: &Model, name: &str| {
        let params = if name.contains("lora_") { model.trained() } else { model.params() };
        params.tensor(params.slot(name).unwrap()).to_vec_f32().unwrap()
    };
    let name = "model.layers.0.mlp.down_proj";
    let [w, a, b] = ["weight", "lora_A.weight", "lora_B.weight"]
        .map(|end| read(&frozen, &format!("{name}.{end}")));
    let mut want: Vec<f64> = vec![0.0; w.len()];
    add_product(&mut want, &|i, k| b[i * 4 + k], &|k, j| a[k * 48 + j], [32, 4, 48]);
    for ((want, w), got) in want.iter().zip(w).zip(read(&narrow, &format!("{name}.weight"))) {
        let want = f64::from(w) + want * 3.0;
        assert!((f64::from(got) - want).abs() <= want.abs() / 256.0 + 1e-6, "{got} is not {want}");
    }
    let (off, size) = (distance(&logits(&narrow, &ids), &unmerged), largest(unmerged.into_iter()));
    assert!(off < 10.0 * size / 256.0, "{off} beside {size}");
}

#[test]
fn targets_are_matched_like_pefts_and_what_takes_no_adapter_is_refused_by_name() {
    let base = &bases()[4].1;
    let named = |targets: &[&str]| {
        let config = lora(json!({ "r": 1, "targets": targets }));
        let adapter = Adapter::new(base, config, 0)?;
        Ok::<_, tercet_model::Error>(adapter.modules().map(str::to_owned).collect::<Vec<_>>())
    };
    let found = named(&["q_proj", "self_attn.gate_proj", "*.1.*.o_proj"]).unwrap();
    let layer = |l: usize, m: &str| format!("model.layers.{l}.self_attn.{m}");
    let mut want = vec![layer(0, "q_proj"), layer(0, "gate_proj"), layer(1, "q_proj")];
    want.extend([layer(1, "gate_proj"), layer(1, "o_proj")]);
    assert_eq!(found, want);
    assert_eq!(named(&["shared_experts.up_proj"]).unwrap().len(), 1);
    let all = named(&["all-linear"]).unwrap();
    // Each layer: q, o, three pairs of k and v, the gate, and an MLP (one of them shared experts).
    assert_eq!(all.len(), 2 * (2 + 6 + 1 + 3), "{all:?}");
    for (target, texts) in [
        ("q_prj", ["\"q_prj\" means no module", "q_proj, k_cmp_proj, v_cmp_proj"]),
        ("", ["means no module", "o_proj"]),
        ("lm_head", ["lm_head", "the output head"]),
        ("embed_tokens", ["model.embed_tokens", "the embedding"]),
        ("mlp.gate", ["model.layers.1.mlp.gate", "a router"]),
        ("experts.3.up_proj", ["model.layers.1.mlp.experts.3.up_proj", "a routed expert"]),
        ("up_proj", ["model.layers.1.mlp.experts.0.up_proj", "a routed expert"]),
        ("*", ["the embedding", "takes no adapter"]),
        ("input_layernorm", ["means no module", "q_proj"]),
    ] {
        let text = named(&["q_proj", target]).unwrap_err().to_string();
        assert!(texts.iter().all(|part| text.contains(part)), "{target}: {text}");
    }
}

#[test]
fn configurations_without_sense_are_refused() {
    let base = model(config(json!({})));
    let default = LoraConfig::default;
    for (config, text) in [
        (LoraConfig { r: 0, ..default() }, "r is 0"),
        (
            LoraConfig { r: 49, ..default() },
            "r is 49, but no update of these modules has a rank above 32",
        ),
        (LoraConfig { r: usize::MAX, ..default() }, "a rank above 32"),
        (LoraConfig { alpha: f64::NAN, ..default() }, "alpha is NaN"),
        (LoraConfig { alpha: f64::INFINITY, ..default() }, "alpha is inf"),
        (LoraConfig { alpha: -1.0, ..default() }, "alpha is -1"),
        (LoraConfig { dropout: 1.0, ..default() }, "dropout is 1"),
        (LoraConfig { dropout: f64::NAN, ..default() }, "dropout is NaN"),
        (LoraConfig { targets: vec![], ..default() }, "there is no target"),
    ] {
        let error = Adapter::new(&base, config, 0).unwrap_err();
        assert!(error.to_string().contains(text) && error.is_users(), "{error}");
    }
    assert!(serde_json::from_value::<LoraConfig>(json!({ "rank": 3 })).is_err());
    assert_eq!(lora(json!({})), default());
}

#[test]
fn an_adapter_of_another_base_is_refused_with_the_tensors_that_do_not_fit() {
    let base = model(config(json!({})));
    let adapter = Adapter::new(&base, lora(json!({ "r": 2 })), 0).unwrap();
    let mut wider = model(config(json!({ "intermediate_size": 56 })));
    let text = wider.attach("a", adapter.clone()).unwrap_err().to_string();
    assert!(
        text.contains("model.layers.0.mlp.gate_proj.lora_B.weight is [48, 2], expected [56, 2]")
            && text.contains("; and 2 more do not fit"),
        "{text}"
    );
    assert_eq!(wider.adapters().count(), 0);
    let mut sparse = model(nsa("mean"));
    let text = sparse.attach("a", adapter).unwrap_err().to_string();
    assert!(text.contains("model.layers.0.self_attn.k_proj is no linear of this model"), "{text}");
}
