//! The engine on a GPU: more places than whole contexts fit, the same bits in any company when they
//! are asked for, and what was read. Without a device there is nothing to see, and the tests say so.

mod common;

use common::*;
use serde_json::{Value, json};
use tercet_model::{Model, ModelConfig, Sampling};
use tercet_serve::engine::{Event, Finish, Limits, Reads, Request, Stats};
use tercet_tensor::{DType, Device, Gpu};

/// The device, or none and a line that says why.
fn device() -> Option<Device> {
    match Gpu::open(0) {
        Ok(gpu) => {
            gpu.use_cache(Some(std::env::temp_dir().join("tercet-test-kernels")));
            Some(Device::Cuda(gpu))
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

/// Heads and blocks that the fast kernels take.
fn wide(fields: Value) -> ModelConfig {
    let mut base = json!({ "head_dim": 64, "hidden_size": 64, "initializer_range": 0.15 });
    fields.as_object().unwrap().iter().for_each(|(key, value)| base[key] = value.clone());
    config(base)
}

fn sparse(compressor: &str) -> Value {
    json!({ "compress_block": 16, "compress_stride": 8, "select_block": 32, "select_count": 6,
            "window": 40, "compressor": compressor })
}

fn models() -> Vec<(&'static str, ModelConfig)> {
    let moe = kinds().pop().unwrap().1.moe;
    vec![
        ("mean", wide(json!({ "nsa": sparse("mean") }))),
        ("linear", wide(json!({ "nsa": sparse("linear") }))),
        ("dense", wide(json!({}))),
        ("window", wide(json!({ "sliding_window": 70 }))),
        ("experts", ModelConfig { moe, ..wide(json!({ "nsa": sparse("mean") })) }),
    ]
}

fn on(device: &Device, config: &ModelConfig, dtype: DType) -> Model {
    let mut model = Model::new(config.clone(), 7, dtype).unwrap();
    model.to_device(device).unwrap();
    model
}

fn asks() -> Vec<Request> {
    let system = ids(200, 99);
    let ask = |i: usize| {
        let own = ids(400 + (i * 97) % 200, i as u64);
        let prompt = if i.is_multiple_of(3) { [&system[..], &own].concat() } else { own };
        let sampling = Sampling { temperature: 1.0, seed: i as u64, ..Sampling::default() };
        Request { sampling, reads: i == 4, ..request(&prompt, 180 + (i * 61) % 40) }
    };
    (0..10).map(ask).collect()
}

type Written = (Vec<u32>, Vec<u32>, Vec<Option<Reads>>);

/// What each of some requests gets, all at once or one after another: tokens, the bits of their
/// log-probabilities, what was read.
fn answers(model: &Model, limits: Limits, together: bool) -> (Vec<Written>, Stats) {
    let (handle, thread) = start(model, limits);
    let mut receivers = Vec::new();
    let mut written = Vec::new();
    let mut take = |receiver| {
        let answer = wait(receiver);
        assert_eq!(answer.finish, Ok(Finish::Length));
        let reads = |event: &Event| match event {
            Event::Token { reads, .. } => Some(reads.clone()),
            _ => None,
        };
        let reads = answer.events.iter().filter_map(reads).collect();
        let bits = answer.log_probs().iter().map(|p| p.to_bits()).collect();
        written.push((answer.tokens(), bits, reads));
    };
    for ask in asks() {
        let receiver = handle.submit(ask).unwrap();
        if together {
            receivers.push(receiver);
        } else {
            take(receiver);
        }
    }
    receivers.into_iter().for_each(&mut take);
    handle.drain();
    thread.join().unwrap();
    let stats = handle.stats();
    assert_eq!((stats.pages_used, stats.failed), (0, 0));
    (written, stats)
}

#[test]
fn answers_keep_their_bits_in_company_on_a_gpu() {
    let Some(device) = device() else { return };
    let mut preempted = 0;
    for (what, config) in models() {
        for dtype in [DType::F32, DType::BF16] {
            println!("{what}, {dtype:?}");
            let model = on(&device, &config, dtype);
            let limits = Limits {
                running: 8,
                chunk: 128,
                prefill_tokens: 256,
                batch_invariant: true,
                cache_bytes: 512 << 20,
                ..limits()
            };
            let alone = Limits { prefix_cache: false, ..limits.clone() };
            let (alone, roomy) = answers(&model, alone, false);
            let (together, stats) = answers(&model, limits.clone(), true);
            assert!(stats.prefix_hits > 0 && stats.preempted == 0, "{stats:?}");
            assert!(together == alone, "{what} {dtype:?}: other bits in company");
            // So little memory that some have to give way: as much for pages as for rings.
            if config.sliding_window.is_none() {
                let cache_bytes = 2 * roomy.reserved_bytes.max(20 * roomy.page_bytes);
                let small = Limits { cache_bytes, prefix_cache: false, ..limits };
                let (small, stats) = answers(&model, small, true);
                println!("{what} in {} pages: {} preempted", stats.pages_total, stats.preempted);
                assert!(small == alone, "{what} {dtype:?}: other bits after giving way");
                preempted += stats.preempted;
            }
        }
    }
    assert!(preempted > 0, "nobody had to give way");
}

#[test]
fn places_do_not_reserve_whole_contexts_and_what_was_read_is_told() {
    let Some(device) = device() else { return };
    let config =
        ModelConfig { max_position_embeddings: 1 << 16, ..wide(json!({ "nsa": sparse("mean") })) };
    let model = on(&device, &config, DType::BF16);
    let whole = config.cache_bytes(1 << 16, DType::BF16) as usize;
    let limits = Limits { running: 32, chunk: 128, cache_bytes: 4 * whole, ..limits() };
    let (written, stats) = answers(&model, Limits { prefill_tokens: 256, ..limits }, true);
    assert_eq!(stats.accepted, 10);
    let bytes = stats.pages_total * stats.page_bytes + stats.reserved_bytes;
    assert!(bytes <= 4 * whole && bytes > 4 * whole - 2 * stats.page_bytes, "{stats:?}");
    // The first answer whose reads were asked for; the blocks are those of a choice.
    for (i, (_, _, reads)) in written.iter().enumerate() {
        assert_eq!(reads.iter().all(Option::is_some), i == 4);
        let asked = asks().swap_remove(i).prompt.len();
        for (at, reads) in reads.iter().flatten().enumerate() {
            assert_eq!((reads.position, reads.block, reads.layers.len()), (asked - 1 + at, 32, 2));
            let own = (reads.position / 32) as u32;
            for group in reads.layers.iter().flatten() {
                assert!(group.is_sorted() && group.contains(&0) && group.last() == Some(&own));
                assert_eq!(group.len(), 6.min(own as usize + 1));
            }
        }
    }
}
