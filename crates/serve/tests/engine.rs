//! One request after the other: what is asked for is done, and what cannot be is refused.

mod common;

use common::*;
use tercet_model::Sampling;
use tercet_serve::engine::{
    Constraint, Engine, EngineError, Event, Finish, Limits, Models, Refused, Request, StartError,
    Usage,
};

#[test]
fn one_request_is_answered_as_by_the_model() {
    for (what, config) in kinds() {
        let model = model(config);
        let (handle, thread) = start(&model, limits());
        let answer = wait(handle.submit(request(&ids(150, 3), 20)).unwrap());
        let (tokens, log_probs) = alone(&model, &request(&ids(150, 3), 20), 64);
        assert_eq!((answer.tokens(), answer.log_probs()), (tokens, log_probs), "{what}");
        assert_eq!(answer.finish, Ok(Finish::Length));
        assert_eq!(answer.usage, Usage { prompt: 150, cached: 0, completion: 20 });
        assert_eq!(answer.events[0], Event::Queued { ahead: 0 });
        let read = |&done: &usize| Event::Prefill { done, total: 150, cached: 0 };
        let reads: Vec<Event> = [64, 128, 150].iter().map(read).collect();
        assert_eq!(answer.events[1..4], reads);
        handle.drain();
        thread.join().unwrap();
    }
}

#[test]
fn settings_of_the_sampler_are_kept_to() {
    let (handle, _thread) = start(&model(nsa()), limits());
    let greedy = || Request { sampling: Sampling::greedy(1), ..request(&ids(30, 1), 12) };
    let plain = wait(handle.submit(greedy()).unwrap()).tokens();
    let biased = |id: u32, bias: f32| {
        let mut ask = greedy();
        ask.sampling.logit_bias = vec![(id, bias)];
        wait(handle.submit(ask).unwrap()).tokens()
    };
    assert_eq!(biased(17, 100.0), [17; 12]);
    assert!(!biased(plain[0], -100.0).contains(&plain[0]));
    // A token is taken off so much that none comes back.
    let mut ask = greedy();
    ask.sampling.logit_bias = vec![(17, 1.0)];
    (ask.sampling.presence_penalty, ask.sampling.frequency_penalty) = (2.0, 2.0);
    ask.sampling.repetition_penalty = 100.0;
    let tokens = wait(handle.submit(ask).unwrap()).tokens();
    let mut once = tokens.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), tokens.len(), "{tokens:?}");
}

#[test]
fn answers_end_where_they_should() {
    let config = config(serde_json::json!({ "eos_token_id": [5] }));
    let (handle, _thread) = start(&model(config), limits());
    let ask = |tokens: &[u32], change: &dyn Fn(&mut Request)| {
        let mut ask = request(&ids(20, 1), 10);
        // One after the other, whatever the model says.
        ask.constraint = Some(Box::new(Script { tokens: tokens.to_vec(), at: 0, done: 99 }));
        (ask.ignore_eos, ask.stop_tokens) = (false, vec![7]);
        change(&mut ask);
        let answer = wait(handle.submit(ask).unwrap());
        let written = answer.finish.is_ok().then_some(answer.usage.completion);
        assert!(written.is_none_or(|written| written == answer.tokens().len()));
        (answer.tokens(), answer.finish)
    };
    let same = |_: &mut Request| ();
    assert_eq!(ask(&[1, 2, 5, 3], &same), (vec![1, 2], Ok(Finish::EndOfText)));
    assert_eq!(ask(&[1, 7, 5, 3], &same), (vec![1], Ok(Finish::StopToken(7))));
    let on = |ask: &mut Request| ask.ignore_eos = true;
    assert_eq!(ask(&[1, 5, 5, 7], &on), (vec![1, 5, 5], Ok(Finish::StopToken(7))));
    assert_eq!(ask(&[4; 10], &same), (vec![4; 10], Ok(Finish::Length)));
    let done = |ask: &mut Request| {
        ask.constraint = Some(Box::new(Script { tokens: vec![8; 9], at: 0, done: 3 }));
    };
    assert_eq!(ask(&[], &done), (vec![8; 3], Ok(Finish::Constraint)));
    let late = |ask: &mut Request| ask.min_tokens = 3;
    let (tokens, finish) = ask(&[1, 5], &late);
    assert_eq!(tokens, [1]);
    assert!(matches!(finish, Err(EngineError::Constraint(_))), "only the end was allowed");
    // Without a constraint something else is chosen in time.
    let mut early = request(&ids(20, 1), 10);
    early.sampling.logit_bias = vec![(5, 100.0)];
    (early.ignore_eos, early.min_tokens) = (false, 4);
    let answer = wait(handle.submit(early).unwrap());
    assert_eq!((answer.tokens().len(), answer.finish), (4, Ok(Finish::EndOfText)));
}

#[test]
fn given_ends_of_text_replace_the_models_own() {
    let model = model(config(serde_json::json!({ "eos_token_id": 5 })));
    let models = Models::new(model).unwrap().with_ends(vec![6]);
    let (handle, _thread) = Engine::start(models, limits()).unwrap();
    let mut ask = request(&ids(20, 1), 10);
    ask.constraint = Some(Box::new(Script { tokens: vec![5, 4, 6], at: 0, done: 99 }));
    ask.ignore_eos = false;
    let answer = wait(handle.submit(ask).unwrap());
    assert_eq!((answer.tokens(), answer.finish), (vec![5, 4], Ok(Finish::EndOfText)));
}

/// Allows one token after the other; is done after `done`.
struct Script {
    tokens: Vec<u32>,
    at: usize,
    done: usize,
}

impl Constraint for Script {
    fn mask(&mut self) -> Result<Option<Vec<u32>>, String> {
        let token = *self.tokens.get(self.at).ok_or("the script is over")? as usize;
        let mut mask = vec![0; token / 32 + 1];
        mask[token / 32] = 1 << (token % 32);
        Ok(Some(mask))
    }
    fn take(&mut self, token: u32) -> Result<(), String> {
        assert_eq!(token, self.tokens[self.at]);
        self.at += 1;
        Ok(())
    }
    fn is_done(&self) -> bool {
        self.at == self.done
    }
}

/// What a grammar of a client may do.
struct Evil(Mask);

type Mask = fn() -> Result<Option<Vec<u32>>, String>;

impl Constraint for Evil {
    fn mask(&mut self) -> Result<Option<Vec<u32>>, String> {
        (self.0)()
    }
    fn take(&mut self, _: u32) -> Result<(), String> {
        panic!("take")
    }
    fn is_done(&self) -> bool {
        false
    }
}

#[test]
fn a_constraint_that_fails_ends_its_own_sequence() {
    let (handle, _thread) = start(&model(nsa()), limits());
    let long = handle.submit(request(&ids(20, 1), 200)).unwrap();
    let evil: [Mask; 5] = [
        || Err("no".into()),
        || Ok(Some(Vec::new())),
        || Ok(Some(vec![0, 0, 0, u32::MAX])),
        || panic!("mask"),
        || Ok(None),
    ];
    for evil in evil {
        let ask = Request { constraint: Some(Box::new(Evil(evil))), ..request(&ids(9, 2), 5) };
        let answer = wait(handle.submit(ask).unwrap());
        assert!(matches!(answer.finish, Err(EngineError::Constraint(_))), "{:?}", answer.finish);
    }
    assert_eq!(wait(long).finish, Ok(Finish::Length));
    let stats = handle.stats();
    assert_eq!((stats.failed, stats.finished_length), (5, 1));
    assert_eq!(stats.pages_used, 0);
}

#[test]
fn the_context_is_filled_to_the_last_token_and_no_further() {
    let model = model(nsa());
    let (handle, _thread) = start(&model, Limits { context: Some(100), ..limits() });
    assert_eq!(handle.context(), 100);
    for (prompt, asked, written) in [(99, 50, 1), (90, 500, 10), (1, usize::MAX, 99), (100, 0, 0)] {
        let answer = wait(handle.submit(request(&ids(prompt, 1), asked)).unwrap());
        assert_eq!(answer.finish, Ok(Finish::Length));
        assert_eq!(
            answer.usage,
            Usage { prompt, cached: answer.usage.cached, completion: written }
        );
    }
    let refused = |prompt, asked| handle.submit(request(&ids(prompt, 1), asked)).err().unwrap();
    assert_eq!(refused(100, 1), Refused::TooLong { tokens: 100, most: 99 });
    assert_eq!(refused(101, 0), Refused::TooLong { tokens: 101, most: 100 });
}

#[test]
fn what_memory_cannot_hold_is_refused_at_the_door() {
    let model = model(nsa());
    let small = with_pages(&model, limits(), 5);
    let (handle, _thread) = start(&model, small.clone());
    let most = handle.context();
    assert!(most < 1024 && most.is_multiple_of(64), "{most}");
    let answer = wait(handle.submit(request(&ids(most - 30, 1), 500)).unwrap());
    assert_eq!(answer.usage.completion, 30, "alone it gets all pages");
    let ask = request(&ids(most, 1), 1);
    assert_eq!(handle.submit(ask).err(), Some(Refused::TooLong { tokens: most, most: most - 1 }));
    let none = Limits { cache_bytes: 100, ..small };
    let failed = Engine::start(Models::new(model).unwrap(), none).err().unwrap();
    assert!(failed.to_string().contains("cache_bytes = 100"), "{failed}");
}

type Change<'a> = &'a dyn Fn(&mut Request);

#[test]
fn requests_that_make_no_sense_are_refused_with_a_reason() {
    let (handle, thread) = start(&model(nsa()), limits());
    let refused = |change: &dyn Fn(&mut Request)| {
        let mut ask = request(&ids(20, 1), 10);
        change(&mut ask);
        handle.submit(ask).expect_err("a refusal")
    };
    let vocab = VOCAB;
    assert_eq!(refused(&|ask| ask.prompt[3] = 96), Refused::Token { id: 96, vocab });
    assert_eq!(
        refused(&|ask| ask.stop_tokens = vec![u32::MAX]),
        Refused::Token { id: u32::MAX, vocab }
    );
    let bias = |ask: &mut Request| ask.sampling.logit_bias = vec![(1, 2.0), (100, 1.0)];
    assert_eq!(refused(&bias), Refused::Token { id: 100, vocab });
    assert_eq!(refused(&|ask| ask.adapter = Some("x".into())), Refused::Adapter("x".into()));
    let invalid: [(&str, Change); 14] = [
        ("no tokens", &|ask| ask.prompt.clear()),
        ("min_tokens = 11", &|ask| ask.min_tokens = 11),
        ("log_probs = 21", &|ask| ask.log_probs = Some(21)),
        ("prompt_log_probs = ", &|ask| ask.prompt_log_probs = Some(usize::MAX)),
        ("temperature = NaN", &|ask| ask.sampling.temperature = f32::NAN),
        ("temperature = 999999", &|ask| ask.sampling.temperature = 999_999.0),
        ("top_p = -1", &|ask| ask.sampling.top_p = -1.0),
        ("min_p = 2", &|ask| ask.sampling.min_p = 2.0),
        ("repetition_penalty = 0", &|ask| ask.sampling.repetition_penalty = 0.0),
        ("frequency_penalty = 2.1", &|ask| ask.sampling.frequency_penalty = 2.1),
        ("presence_penalty = -inf", &|ask| ask.sampling.presence_penalty = f32::NEG_INFINITY),
        ("frequency_penalty = NaN", &|ask| ask.sampling.frequency_penalty = f32::NAN),
        ("logit_bias of token 2 = 101", &|ask| ask.sampling.logit_bias = vec![(2, 101.0)]),
        ("logit_bias of token 2 = NaN", &|ask| ask.sampling.logit_bias = vec![(2, f32::NAN)]),
    ];
    for (what, change) in invalid {
        match refused(change) {
            Refused::Invalid(text) => assert!(text.contains(what), "{text:?} for {what}"),
            other => panic!("{other:?} for {what}"),
        }
    }
    // Those two fields of the sampling are not the engine's.
    let mut ask = request(&ids(20, 1), 3);
    (ask.sampling.max_tokens, ask.sampling.stop) = (0, vec![String::new()]);
    assert_eq!(wait(handle.submit(ask).unwrap()).tokens().len(), 3);
    assert_eq!(handle.stats().accepted, 1);
    drop(handle);
    thread.join().unwrap();
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let model = model(nsa());
    for (what, limits) in [
        ("running = 0", Limits { running: 0, ..limits() }),
        ("running = 5000", Limits { running: 5000, ..limits() }),
        ("chunk = 100", Limits { chunk: 100, ..limits() }),
        ("chunk = 0", Limits { chunk: 0, ..limits() }),
        ("prefill_tokens = 63", Limits { prefill_tokens: 63, ..limits() }),
        ("context of 1", Limits { context: Some(1), ..limits() }),
        ("waiting", Limits { waiting: usize::MAX, ..limits() }),
    ] {
        match Engine::start(Models::new(model.clone()).unwrap(), limits) {
            Err(StartError::Limits(text)) => assert!(text.contains(what), "{text}"),
            _ => panic!("{what} was taken"),
        }
    }
}

#[test]
fn a_full_engine_says_when_to_come_back_and_a_draining_one_finishes() {
    let limits = Limits { running: 2, waiting: 3, ..limits() };
    let (handle, thread) = start(&model(nsa()), limits);
    let ask = |seed| request(&ids(100, seed), 300);
    let inside: Vec<_> = (0..5).map(|seed| handle.submit(ask(seed)).unwrap()).collect();
    match handle.submit(ask(6)) {
        Err(Refused::Full { retry_after_s }) => assert!((1..=60).contains(&retry_after_s)),
        other => panic!("{other:?}"),
    }
    let stats = handle.stats();
    assert_eq!((stats.refused_full, stats.accepted), (1, 5));
    assert_eq!(stats.running + stats.waiting, 5);
    handle.clone().drain();
    assert_eq!(handle.submit(ask(7)).err(), Some(Refused::Draining));
    for receiver in inside {
        assert_eq!(wait(receiver).usage.completion, 300);
    }
    thread.join().unwrap();
    assert_eq!(handle.submit(ask(8)).err(), Some(Refused::Draining));
    let stats = handle.stats();
    assert_eq!((stats.running, stats.waiting, stats.pages_used), (0, 0, 0));
    assert_eq!((stats.finished_length, stats.generated_tokens), (5, 1500));
    assert_eq!((stats.queue_time.count(), stats.first_token.count()), (5, 5));
    assert_eq!((stats.inter_token.count(), stats.whole.count()), (1495, 5));
}

/// Ten times as many callers as there is room for, and a drain in the middle: whoever is let in is
/// answered, nobody else is, and no one waits for ever.
#[test]
fn overload_is_refused_and_a_drain_loses_nobody() {
    let limits = Limits { running: 3, waiting: 5, ..limits() };
    let (handle, thread) = start(&model(nsa()), limits);
    let caller = |seed: u64| {
        let handle = handle.clone();
        move || {
            let (mut answered, mut full) = (0u64, 0u64);
            loop {
                match handle.submit(request(&ids(1 + (seed * 7 % 90) as usize, seed), 8)) {
                    Ok(receiver) => {
                        assert_eq!(wait(receiver).tokens().len(), 8);
                        answered += 1;
                    }
                    Err(Refused::Full { .. }) => {
                        full += 1;
                        std::thread::yield_now();
                    }
                    Err(Refused::Draining) => return (answered, full),
                    Err(other) => panic!("{other}"),
                }
            }
        }
    };
    let callers: Vec<_> = (0..80).map(|seed| std::thread::spawn(caller(seed))).collect();
    while handle.stats().finished_length < 200 {
        let stats = handle.stats();
        assert!(stats.running <= 3 && stats.running + stats.waiting <= 8);
        assert!(stats.pages_used + stats.pages_cached <= stats.pages_total);
        std::thread::yield_now();
    }
    handle.drain();
    let ends: Vec<(u64, u64)> = callers.into_iter().map(|c| c.join().unwrap()).collect();
    thread.join().unwrap();
    let stats = handle.stats();
    assert_eq!(stats.accepted, ends.iter().map(|(answered, _)| answered).sum::<u64>());
    assert_eq!(stats.refused_full, ends.iter().map(|(_, full)| full).sum::<u64>());
    assert_eq!(stats.finished_length, stats.accepted);
    assert!(stats.refused_full > 0);
}

#[test]
fn memory_of_a_token_is_what_the_plan_says() {
    for (what, config) in kinds() {
        let model = model(config);
        let (handle, _thread) = start(&model, limits());
        let stats = handle.stats();
        let bytes = |tokens| model.config().cache_bytes(tokens, tercet_tensor::DType::F32) as f64;
        assert_eq!(stats.bytes_per_token, (bytes(1024) - bytes(512)) / 512.0, "{what}");
        assert_eq!(stats.pages_total, (64 << 20) / stats.page_bytes);
    }
}
