//! The engine as a caller sees it: what each request gets is what it would get alone.

mod common;

use common::*;
use tercet_model::{Model, Sampling};
use tercet_serve::engine::{Engine, Event, Finish, Limits, Models, Refused, Request, Usage};

/// An answer by the model alone: the prompt in the engine's chunks, then a token at a time.
fn alone(model: &Model, request: &Request, chunk: usize) -> Vec<u32> {
    let mut cache = model.cache().unwrap();
    let mut logits = Vec::new();
    let prompt: Vec<i32> = request.prompt.iter().map(|&id| id as i32).collect();
    for chunk in prompt.chunks(chunk) {
        logits = model.extend(&mut cache, chunk).unwrap();
    }
    let mut sampler = tercet_model::Sampler::new(&request.sampling).unwrap();
    request.prompt.iter().for_each(|&id| sampler.see(id));
    let mut tokens = Vec::new();
    loop {
        tokens.push(sampler.next(&logits).unwrap());
        if tokens.len() == request.max_tokens {
            return tokens;
        }
        logits = model.extend(&mut cache, &[*tokens.last().unwrap() as i32]).unwrap();
    }
}

#[test]
fn one_request_is_answered_as_by_the_model() {
    for (what, config) in kinds() {
        let model = model(config);
        let (handle, thread) =
            Engine::start(Models::new(model.clone()).unwrap(), limits()).unwrap();
        let ask = request(&ids(150, 3), 20);
        let want = alone(&model, &request(&ids(150, 3), 20), 64);
        let answer = wait(handle.submit(ask).unwrap());
        assert_eq!(answer.tokens(), want, "{what}");
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
