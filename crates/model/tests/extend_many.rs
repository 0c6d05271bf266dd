//! Many sequences a token at a time: the logits of each are those it would have alone.

mod common;

use common::{config, golden, ids, model, nsa, spec, train_by_chance};
use serde_json::json;
use tercet_model::{Adapter, Cache, LoraConfig, Model, ModelConfig};
use tercet_tensor::{DType, FEW_ROWS};

const VOCAB: usize = 96;

fn kinds() -> Vec<(&'static str, ModelConfig)> {
    vec![
        ("mean", nsa("mean")),
        ("linear", nsa("linear")),
        ("mlp", nsa("mlp")),
        ("dense", config(json!({}))),
        ("window", config(json!({ "sliding_window": 9 }))),
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

/// Caches that hold the first `held` tokens of sequences of their own.
fn begun(model: &Model, held: &[usize]) -> (Vec<Cache>, Vec<Vec<i32>>) {
    let texts: Vec<Vec<i32>> = (0..held.len())
        .map(|i| ids(200, model.config().vocab_size)[i..].iter().map(|id| id / 2).collect())
        .collect();
    let caches = texts.iter().zip(held).map(|(text, &held)| {
        let mut cache = model.cache().unwrap();
        if held > 0 {
            model.extend(&mut cache, &text[..held]).unwrap();
        }
        cache
    });
    (caches.collect(), texts)
}

fn step(model: &Model, caches: &mut [Cache], texts: &[Vec<i32>]) -> Vec<Vec<f32>> {
    let tokens: Vec<i32> = caches.iter().zip(texts).map(|(c, text)| text[c.len()]).collect();
    let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
    let logits = model.extend_many(&mut caches, &tokens).unwrap();
    logits.chunks(model.config().vocab_size).map(<[f32]>::to_vec).collect()
}

/// Lengths below and above a window, a compressed block and a page, and none at all.
const HELD: [usize; 9] = [0, 1, 3, 7, 8, 40, 63, 64, 101];

fn the_logits_are_those_of_one_alone(what: &str, model: &Model) {
    let (mut many, texts) = begun(model, &HELD);
    let (mut alone, _) = begun(model, &HELD);
    for _ in 0..9 {
        let together = step(model, &mut many, &texts);
        for (i, together) in together.iter().enumerate() {
            let token = texts[i][alone[i].len()];
            let single = model.extend(&mut alone[i], &[token]).unwrap();
            assert!(single == *together, "{what}: sequence {i} has other bits in company");
        }
    }
    assert!(many.iter().zip(HELD).all(|(cache, held)| cache.len() == held + 9));
}

#[test]
fn a_sequence_has_the_same_bits_whatever_stands_beside_it() {
    for (what, config) in kinds() {
        for dtype in [DType::F32, DType::BF16] {
            let model = Model::new(config.clone(), 7, dtype).unwrap();
            the_logits_are_those_of_one_alone(what, &model);
        }
    }
}

#[test]
fn an_adapter_is_in_every_row() {
    let base = model(config(json!({})));
    let lora = LoraConfig { r: 4, ..LoraConfig::default() };
    let tuned = train_by_chance(Adapter::new(&base, lora, 3).unwrap(), &base, "a");
    the_logits_are_those_of_one_alone("adapter", &tuned);
    let [(mut with, texts), (mut without, _)] = [&tuned, &base].map(|m| begun(m, &HELD));
    assert_ne!(step(&tuned, &mut with, &texts), step(&base, &mut without, &texts));
}

/// Groups of a batch of more than [`FEW_ROWS`] are cut without a trace.
#[test]
fn more_sequences_than_one_product_takes_keep_their_bits() {
    let model = model(nsa("mean"));
    for count in [FEW_ROWS, FEW_ROWS + 1, 2 * FEW_ROWS + 1] {
        let held: Vec<usize> = (0..count).map(|i| 1 + i % 20).collect();
        let (mut many, texts) = begun(&model, &held);
        let (mut alone, _) = begun(&model, &held);
        let together = step(&model, &mut many, &texts);
        for (i, together) in together.iter().enumerate() {
            let single = model.extend(&mut alone[i], &[texts[i][held[i]]]).unwrap();
            assert!(single == *together, "{i} of {count}");
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    for (what, config) in kinds() {
        let model = model(config);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut caches, texts) = begun(&model, &HELD);
                step(&model, &mut caches, &texts)
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5), "{what}");
    }
}

/// Two ways of summing the same f32 numbers; the tolerance of `tests/decoder.rs`, and for the
/// same reason.
fn decode_is_prefill(what: &str, model: &Model, held: &[usize], steps: usize) {
    let vocab = model.config().vocab_size;
    let (mut caches, texts) = begun(model, held);
    for _ in 0..steps {
        let lengths: Vec<usize> = caches.iter().map(Cache::len).collect();
        let together = step(model, &mut caches, &texts);
        for ((got, text), length) in together.iter().zip(&texts).zip(lengths) {
            let whole = model.logits(&text[..length + 1], &[0, length as i32 + 1]).unwrap();
            let whole = whole.to_vec_f32().unwrap();
            let want = &whole[length * vocab..];
            let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let worst = got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst <= 1e-4 * scale, "{what}, token {length}: {worst:e} beside {scale}");
        }
    }
}

#[test]
fn decoding_many_is_prefilling_each() {
    for (what, config) in kinds() {
        decode_is_prefill(what, &model(config), &HELD, 5);
    }
}

#[test]
fn decoding_many_is_prefilling_each_for_models_of_transformers() {
    for name in ["gpt2", "qwen3", "llama"] {
        let Some(dir) = golden(name) else { continue };
        let model = Model::load(&dir).unwrap();
        let longest = model.config().max_position_embeddings - 4;
        let held = [0, 1, 5, 17.min(longest), 30.min(longest)];
        decode_is_prefill(name, &model, &held, 4);
        the_logits_are_those_of_one_alone_at(name, &model, &held);
    }
}

fn the_logits_are_those_of_one_alone_at(what: &str, model: &Model, held: &[usize]) {
    let (mut many, texts) = begun(model, held);
    let (mut alone, _) = begun(model, held);
    let together = step(model, &mut many, &texts);
    for (i, together) in together.iter().enumerate() {
        let single = model.extend(&mut alone[i], &[texts[i][held[i]]]).unwrap();
        assert!(single == *together, "{what}: sequence {i}");
    }
}

#[test]
fn a_fork_goes_on_by_itself() {
    for (what, config) in kinds() {
        let model = model(config);
        let text = ids(80, VOCAB);
        let mut cache = model.cache().unwrap();
        model.extend(&mut cache, &text[..50]).unwrap();
        let mut fork = cache.fork().unwrap();
        assert_eq!((fork.len(), fork.bytes()), (50, cache.bytes()));
        // The original goes another way; the copy must not notice.
        model.extend(&mut cache, &text[..30]).unwrap();
        let got = model.extend(&mut fork, &text[50..]).unwrap();
        let mut fresh = model.cache().unwrap();
        model.extend(&mut fresh, &text[..50]).unwrap();
        assert!(got == model.extend(&mut fresh, &text[50..]).unwrap(), "{what}");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_changes() {
    let model = model(config(json!({ "max_position_embeddings": 10 })));
    let refuse = |caches: &mut [Cache], tokens: &[i32], word: &str| {
        let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
        let text = model.extend_many(&mut caches, tokens).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    let (mut caches, _) = begun(&model, &[3, 10, 0]);
    refuse(&mut caches, &[1, 1], "2 tokens for 3 sequences");
    refuse(&mut caches, &[], "0 tokens for 3 sequences");
    refuse(&mut [], &[1], "1 tokens for 0 sequences");
    refuse(&mut caches, &[1, 1, 1], "sequence 1 holds 10 tokens");
    refuse(&mut caches, &[1, 1, 96], "token id 96");
    refuse(&mut caches, &[1, -1, 1], "token id -1");
    // An adapter came since: the caches are of other weights.
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    let tuned = train_by_chance(Adapter::new(&model, lora, 3).unwrap(), &model, "a");
    let mut other = tuned.cache().unwrap();
    {
        let [first, _, last] = &mut caches[..] else { panic!("there are three") };
        let text = model.extend_many(&mut [first, &mut other, last], &[1, 1, 1]).unwrap_err();
        assert!(text.to_string().contains("sequence 1: the cache was filled under other weights"));
    }
    assert_eq!(model.extend_many(&mut [], &[]).unwrap(), Vec::<f32>::new());
    // None of these refusals has touched a cache.
    let [first, _, last] = &mut caches[..] else { panic!("there are three") };
    let got = model.extend_many(&mut [first, last], &[5, 6]).unwrap();
    let (mut fresh, texts) = begun(&model, &[3]);
    assert!(texts[0].len() > 3);
    assert!(got[..VOCAB] == model.extend(&mut fresh[0], &[5]).unwrap());
}
