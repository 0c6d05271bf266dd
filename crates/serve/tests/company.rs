//! Many requests at once: what each gets is what it would get alone, to the last bit, whatever
//! stands beside it, is kept of others, runs out, or is cancelled.

mod common;

use std::time::{Duration, Instant};

use common::*;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tercet_model::{Model, ModelConfig, Sampling};
use tercet_serve::engine::{EngineError, Event, Finish, Handle, Limits, Reads, Request, Stats};
use tercet_tensor::{DType, Tensor};

/// What one caller does.
#[derive(Clone, Debug)]
struct Caller {
    prompt: Vec<u32>,
    answer: usize,
    adapter: Option<String>,
    seed: u64,
    /// Events after which the caller goes away.
    leaves: Option<usize>,
    namespace: String,
}

impl Caller {
    fn request(&self) -> Request {
        Request {
            adapter: self.adapter.clone(),
            namespace: self.namespace.clone(),
            sampling: Sampling { temperature: 1.0, seed: self.seed, ..Sampling::default() },
            ..request(&self.prompt, self.answer)
        }
    }
}

/// All callers at once; each that stays gets what the model alone would write.
fn all_get_their_own(model: &Model, limits: Limits, callers: &[Caller]) -> Handle {
    let chunk = limits.chunk;
    let (handle, thread) = start(model, limits);
    let receivers: Vec<_> =
        callers.iter().map(|caller| handle.submit(caller.request()).unwrap()).collect();
    // The last first, so that leaving does not go by age.
    for (i, (caller, mut receiver)) in callers.iter().zip(receivers).enumerate().rev() {
        if let Some(events) = caller.leaves {
            for _ in 0..events {
                receiver.blocking_recv();
            }
            continue;
        }
        let answer = wait(receiver);
        assert_eq!(answer.finish, Ok(Finish::Length), "caller {i}");
        let (tokens, log_probs) = alone(model, &caller.request(), chunk);
        assert_eq!(answer.tokens(), tokens, "caller {i}");
        assert_eq!(answer.log_probs(), log_probs, "caller {i}");
    }
    handle.drain();
    thread.join().unwrap();
    let stats = handle.stats();
    assert_eq!((stats.running, stats.waiting, stats.pages_used), (0, 0, 0));
    let ended = stats.finished_length + stats.cancelled;
    assert_eq!((ended, stats.failed), (callers.len() as u64, 0));
    handle
}

fn callers(count: usize, adapters: &[Option<&str>]) -> Vec<Caller> {
    let system = ids(140, 99);
    (0..count)
        .map(|i| {
            let own = ids(1 + (i * 53) % 190, i as u64);
            // A third begin alike, and some are equal but for the seed.
            let prompt = match i % 6 {
                0 | 1 => [&system[..], &own].concat(),
                2 => system.clone(),
                _ => own,
            };
            Caller {
                prompt,
                answer: 1 + (i * 29) % 90,
                adapter: adapters[i % adapters.len()].map(str::to_owned),
                seed: i as u64,
                leaves: (i % 7 == 3).then_some(i % 11),
                namespace: ["", "other"][i % 4 / 3].to_owned(),
            }
        })
        .collect()
}

#[test]
fn every_kind_of_model_keeps_its_bits_in_company() {
    for (what, config) in kinds() {
        for dtype in [DType::F32, DType::BF16] {
            println!("{what}, {dtype:?}");
            let model = Model::new(config.clone(), 7, dtype).unwrap();
            let handle = all_get_their_own(&model, limits(), &callers(24, &[None]));
            let stats = handle.stats();
            assert!(stats.prefix_hits > 0, "nothing was kept");
        }
    }
}

/// More rows than have bits of their own in one product.
#[test]
fn forty_sequences_in_a_step_keep_their_bits() {
    let limits = Limits { running: 40, prefill_tokens: 4096, ..limits() };
    let mut callers = callers(60, &[None]);
    callers.iter_mut().for_each(|caller| caller.answer += 60);
    all_get_their_own(&model(nsa()), limits, &callers);
}

#[test]
fn adapters_answer_side_by_side() {
    let model = with_adapter(with_adapter(model(nsa()), "a", 1), "b", 2);
    let adapters = [None, Some("a"), Some("b")];
    let asked = callers(30, &adapters);
    let handle = all_get_their_own(&model, limits(), &asked);
    assert_eq!(handle.adapters(), ["a", "b"]);
    let tokens = |adapter: Option<&str>| {
        let mut ask = request(&ids(50, 1), 20);
        ask.adapter = adapter.map(str::to_owned);
        alone(&model, &ask, 64).0
    };
    assert_ne!(tokens(Some("a")), tokens(None), "the adapters change something");
    assert_ne!(tokens(Some("a")), tokens(Some("b")));
}

#[test]
fn sequences_that_had_to_give_way_go_on_with_the_same_bits() {
    for (config, batch_invariant) in [(nsa(), false), (dense(), false), (nsa(), true)] {
        let model = model(config);
        let limits = Limits { batch_invariant, ..with_pages(&model, limits(), 12) };
        let mut callers = callers(24, &[None]);
        for caller in &mut callers {
            caller.prompt.truncate(200);
            caller.answer += 150;
        }
        let handle = all_get_their_own(&model, limits, &callers);
        let preempted = handle.stats().preempted;
        assert!(preempted > 5, "{preempted} preemptions");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]
    /// Random limits, memory, lengths, beginnings and cancels.
    #[test]
    fn random_traffic_changes_no_bit(
        sparse: bool,
        running in 1usize..10,
        chunk in 1usize..4,
        budget in 0usize..200,
        pages in 10usize..60,
        prefix_cache: bool,
        asks in prop::collection::vec((1usize..300, 0u64..3, 1usize..80, 0usize..20), 1..24),
    ) {
        let model = model(if sparse { nsa() } else { dense() });
        let chunk = 64 * chunk;
        let limits = Limits { running, chunk, prefill_tokens: chunk + budget, prefix_cache, ..limits() };
        let limits = with_pages(&model, limits, pages);
        let callers: Vec<Caller> = asks
            .into_iter()
            .enumerate()
            .map(|(i, (prompt, shared, answer, leaves))| Caller {
                prompt: ids(prompt, shared),
                answer,
                adapter: None,
                seed: i as u64,
                leaves: (leaves < 4).then_some(leaves * 3),
                namespace: String::new(),
            })
            .collect();
        all_get_their_own(&model, limits, &callers);
    }
}

#[test]
fn n_answers_to_a_prompt_read_it_once() {
    let model = model(nsa());
    let (handle, thread) = start(&model, limits());
    let ask = |seed| Request {
        sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
        ..request(&ids(150, 1), 10)
    };
    // The first gives the engine something to do while the others come.
    let first = handle.submit(request(&ids(900, 2), 1)).unwrap();
    let receivers: Vec<_> = (0..6).map(|seed| handle.submit(ask(seed)).unwrap()).collect();
    wait(first);
    let mut cached = Vec::new();
    for (seed, receiver) in receivers.into_iter().enumerate() {
        let answer = wait(receiver);
        assert_eq!(answer.tokens(), alone(&model, &ask(seed as u64), 64).0);
        cached.push(answer.usage.cached);
    }
    cached.sort_unstable();
    assert_eq!(cached, [0, 150, 150, 150, 150, 150]);
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn only_the_same_namespace_and_adapter_share_prefixes() {
    let model = with_adapter(model(nsa()), "a", 1);
    let (handle, _thread) = start(&model, limits());
    let cached = |namespace: &str, adapter: Option<&str>, prompt: &[u32]| {
        let mut ask = request(prompt, 2);
        (ask.namespace, ask.adapter) = (namespace.into(), adapter.map(str::to_owned));
        let answer = wait(handle.submit(ask).unwrap());
        let read = |event: &Event| matches!(event, Event::Prefill { .. });
        let first = answer.events.iter().find(|event| read(event)).cloned();
        let cached = answer.usage.cached;
        let is =
            |e: Option<Event>| matches!(e, Some(Event::Prefill { cached: c, .. }) if c == cached);
        assert!(is(first));
        cached
    };
    let prompt = ids(200, 1);
    assert_eq!(cached("me", None, &prompt), 0);
    assert_eq!(cached("me", None, &prompt), 192);
    assert_eq!(cached("me", None, &prompt[..193]), 192);
    assert_eq!(cached("me", None, &prompt[..192]), 0, "its last token's logits are wanted");
    assert_eq!(cached("you", None, &prompt), 0);
    assert_eq!(cached("me", Some("a"), &prompt), 0);
    assert_eq!(cached("me", Some("a"), &prompt), 192);
    let mut other = prompt.clone();
    other[190] ^= 1;
    assert_eq!(cached("me", None, &other), 128, "what the short prompt left");
    let stats = handle.stats();
    assert!(stats.pages_cached > 0 && stats.pages_used == 0);
    assert_eq!(stats.prefix_hits, 192 * 3 + 128);
}

/// The bar, through threads and channels: callers leave at any moment, before they are
/// read to in the middle of an answer.
#[test]
fn a_thousand_cancels_leave_nothing_behind() {
    let model = model(nsa());
    let limits = with_pages(&model, Limits { prefix_cache: false, ..limits() }, 40);
    let (handle, thread) = start(&model, limits);
    for i in 0..1000u64 {
        let mut receiver =
            handle.submit(request(&ids(1 + (i * 37 % 400) as usize, i), 600)).unwrap();
        for _ in 0..i % 9 {
            receiver.blocking_recv();
        }
        if i % 5 == 0 {
            std::thread::yield_now();
        }
    }
    let start = Instant::now();
    // On a busy machine an answer may be whole before its caller gets to leave.
    let ended = |stats: Stats| stats.cancelled + stats.finished_length;
    while ended(handle.stats()) < 1000 {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", handle.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(handle.stats().cancelled > 900, "{:?}", handle.stats());
    // The engine still answers, and holds nothing once it did.
    assert_eq!(wait(handle.submit(request(&ids(30, 1), 5)).unwrap()).tokens().len(), 5);
    handle.drain();
    thread.join().unwrap();
    let stats = handle.stats();
    assert_eq!((stats.pages_used, stats.pages_cached, stats.running, stats.waiting), (0, 0, 0, 0));
}

/// A token whose embedding is not a number, as damaged weights have it.
fn poisoned() -> Model {
    let mut model = model(ModelConfig { tie_word_embeddings: false, ..nsa() });
    let params = model.trained_mut();
    let slot = params.slot("model.embed_tokens.weight").unwrap();
    let shape = params.tensor(slot).shape().to_vec();
    let mut values = params.tensor(slot).to_vec_f32().unwrap();
    let last = values.len() - shape[1];
    values[last..].fill(f32::NAN);
    params.set(slot, Tensor::from_f32(values, &shape).unwrap()).unwrap();
    model
}

#[test]
fn a_poisoned_request_ends_itself_alone() {
    let model = poisoned();
    let poison = VOCAB as u32 - 1;
    let (handle, _thread) = start(&model, limits());
    let clean = |seed| {
        let mut ask = request(&ids(70, seed), 60);
        ask.prompt.iter_mut().for_each(|id| *id %= poison);
        ask.sampling.logit_bias = vec![(poison, -100.0)];
        ask
    };
    let mut early = clean(5);
    early.prompt[10] = poison;
    // Written in the middle of the answer.
    let mut late = clean(6);
    late.sampling.logit_bias = vec![(poison, 3.0)];
    let fine: Vec<_> = (0..4).map(|seed| handle.submit(clean(seed)).unwrap()).collect();
    for bad in [early, late] {
        let answer = wait(handle.submit(bad).unwrap());
        assert!(matches!(answer.finish, Err(EngineError::Model(_))), "{:?}", answer.finish);
    }
    for (seed, receiver) in fine.into_iter().enumerate() {
        let tokens = wait(receiver).tokens();
        assert_eq!(tokens, alone(&model, &clean(seed as u64), 64).0);
    }
    assert_eq!(handle.stats().failed, 2);
}

#[test]
fn reads_are_the_blocks_that_the_model_selected() {
    let model = model(nsa());
    let (handle, _thread) = start(&model, limits());
    let ask = |reads| Request { reads, ..request(&ids(100, 1), 30) };
    // Company, so that places differ.
    let other = handle.submit(request(&ids(50, 2), 100)).unwrap();
    let answer = wait(handle.submit(ask(true)).unwrap());
    let reads: Vec<Reads> = answer
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Token { reads, .. } => Some(reads.clone().unwrap()),
            _ => None,
        })
        .collect();
    assert_eq!(reads.len(), 30);
    let tokens = answer.tokens();
    for (i, reads) in reads.iter().enumerate() {
        assert_eq!((reads.position, reads.block), (99 + i, 8));
        // All at once instead of step by step: the same selection.
        let read: Vec<i32> = ids(100, 1).iter().chain(&tokens[..i]).map(|&id| id as i32).collect();
        let mut cache = model.cache().unwrap();
        model.extend(&mut cache, &read[..64]).unwrap();
        model.extend(&mut cache, &read[64..100]).unwrap();
        read[100..].iter().for_each(|&id| drop(model.extend(&mut cache, &[id]).unwrap()));
        let selected = cache.selected().unwrap();
        assert_eq!(reads.layers.len(), 2);
        for (layer, want) in reads.layers.iter().zip(selected) {
            assert_eq!(layer.len(), 2, "groups");
            for (group, want) in layer.iter().zip(want.chunks(4)) {
                let want: Vec<u32> = want.iter().map(|&b| b as u32).collect();
                assert_eq!(*group, want);
                assert!(group.is_sorted() && group.contains(&((99 + i) as u32 / 8)), "its own");
            }
        }
    }
    let without = wait(handle.submit(ask(false)).unwrap());
    assert_eq!(without.tokens(), tokens);
    let none = |event: &Event| !matches!(event, Event::Token { reads: Some(_), .. });
    assert!(without.events.iter().all(none));
    wait(other);
}
