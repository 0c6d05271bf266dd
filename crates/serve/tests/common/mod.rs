//! Tiny models, requests, and answers that are complete.

#![allow(dead_code)] // every test file uses its own part

use serde_json::{Value, json};
use std::thread::JoinHandle;

use tercet_model::{Adapter, LoraConfig, Model, ModelConfig, Sampler, Sampling};
use tercet_serve::engine::{
    Engine, EngineError, Event, Finish, Handle, Limits, Models, Request, Usage,
};
use tercet_tensor::{DType, Tensor, log_sum_exp};
use tokio::sync::mpsc::UnboundedReceiver;

pub const VOCAB: usize = 96;

/// A config from JSON fields over small defaults of our own family.
pub fn config(fields: Value) -> ModelConfig {
    let mut base = json!({
        "model_type": "tercet",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
    });
    for (key, value) in fields.as_object().unwrap() {
        base[key] = value.clone();
    }
    serde_json::from_value(base).unwrap()
}

/// A spec whose every branch leaves something out within a hundred tokens.
pub fn spec(compressor: &str) -> Value {
    json!({
        "compress_block": 8,
        "compress_stride": 4,
        "select_block": 8,
        "select_count": 4,
        "window": 12,
        "compressor": compressor,
    })
}

pub fn nsa() -> ModelConfig {
    config(json!({ "nsa": spec("mean"), "v_head_dim": 4 }))
}

pub fn dense() -> ModelConfig {
    config(json!({}))
}

/// Every kind of attention, and experts.
pub fn kinds() -> Vec<(&'static str, ModelConfig)> {
    vec![
        ("mean", nsa()),
        ("mlp", config(json!({ "nsa": spec("mlp"), "v_head_dim": 4 }))),
        ("dense", dense()),
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

pub fn model(config: ModelConfig) -> Model {
    Model::new(config, 7, DType::F32).unwrap()
}

/// Token ids that look random and are not.
pub fn ids(count: usize, seed: u64) -> Vec<u32> {
    let mut state = 12345 + seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % VOCAB as u64) as u32
    };
    next();
    (0..count).map(|_| next()).collect()
}

pub fn limits() -> Limits {
    Limits {
        running: 8,
        waiting: 1000,
        prefill_tokens: 128,
        chunk: 64,
        cache_bytes: 64 << 20,
        ..Limits::default()
    }
}

/// A request that draws its tokens.
pub fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        adapter: None,
        sampling: Sampling { temperature: 1.0, top_p: 1.0, seed: 11, ..Sampling::default() },
        max_tokens,
        min_tokens: 0,
        stop_tokens: Vec::new(),
        ignore_eos: true,
        log_probs: Some(0),
        prompt_log_probs: None,
        namespace: String::new(),
        reads: false,
        constraint: None,
    }
}

/// All that a request got.
pub struct Answer {
    pub events: Vec<Event>,
    pub finish: Result<Finish, EngineError>,
    pub usage: Usage,
}

impl Answer {
    pub fn tokens(&self) -> Vec<u32> {
        let token = |event: &Event| match event {
            Event::Token { id, .. } => Some(*id),
            _ => None,
        };
        self.events.iter().filter_map(token).collect()
    }

    pub fn log_probs(&self) -> Vec<f32> {
        let token = |event: &Event| match event {
            Event::Token { log_prob, .. } => Some(*log_prob),
            _ => None,
        };
        self.events.iter().filter_map(token).collect()
    }
}

/// Waits for the end, which has to come once and last.
pub fn wait(mut receiver: UnboundedReceiver<Event>) -> Answer {
    let mut events = Vec::new();
    while let Some(event) = receiver.blocking_recv() {
        events.push(event);
    }
    let (finish, usage) = match events.pop() {
        Some(Event::Done { finish, usage }) => (Ok(finish), usage),
        Some(Event::Failed(error)) => (Err(error), Usage::default()),
        other => panic!("ended with {other:?}"),
    };
    let ends = |event: &Event| matches!(event, Event::Done { .. } | Event::Failed(_));
    assert!(!events.iter().any(ends), "ended twice");
    Answer { events, finish, usage }
}

pub fn start(model: &Model, limits: Limits) -> (Handle, JoinHandle<()>) {
    Engine::start(Models::new(model.clone()).unwrap(), limits).unwrap()
}

/// The limits with memory for this many pages.
pub fn with_pages(model: &Model, limits: Limits, pages: usize) -> Limits {
    let (handle, thread) = start(model, limits.clone());
    let cache_bytes = handle.stats().page_bytes * pages;
    handle.drain();
    thread.join().unwrap();
    Limits { cache_bytes, ..limits }
}

/// The model with an adapter of this name attached, every B holding numbers within ±0.1.
pub fn with_adapter(mut model: Model, name: &str, seed: u64) -> Model {
    let lora = LoraConfig { r: 4, ..LoraConfig::default() };
    model.attach(name, Adapter::new(&model, lora, seed).unwrap()).unwrap();
    model.activate(Some(name)).unwrap();
    let params = model.trained_mut();
    for slot in 0..params.len() {
        if params.name(slot).contains("lora_B") {
            let shape = params.tensor(slot).shape().to_vec();
            let len: usize = shape.iter().product();
            let add = slot * 11 + seed as usize;
            let at = |i: usize| (((i * 37 + add) % 101) as f32 / 50.0 - 1.0) * 0.1;
            params
                .set(slot, Tensor::from_f32((0..len).map(at).collect(), &shape).unwrap())
                .unwrap();
        }
    }
    model.activate(None).unwrap();
    model
}

/// Tokens and their log-probabilities by the model alone: the prompt in chunks, then a token at a
/// time, with the request's adapter.
pub fn alone(model: &Model, request: &Request, chunk: usize) -> (Vec<u32>, Vec<f32>) {
    let mut model = model.clone();
    model.activate(request.adapter.as_deref()).unwrap();
    let mut cache = model.cache().unwrap();
    let mut logits = Vec::new();
    let prompt: Vec<i32> = request.prompt.iter().map(|&id| id as i32).collect();
    for chunk in prompt.chunks(chunk) {
        logits = model.extend(&mut cache, chunk).unwrap();
    }
    let mut sampler = Sampler::new(&request.sampling).unwrap();
    request.prompt.iter().for_each(|&id| sampler.see(id));
    let (mut tokens, mut log_probs) = (Vec::new(), Vec::new());
    loop {
        let token = sampler.next(&logits).unwrap();
        tokens.push(token);
        log_probs.push(log_prob(&logits, token));
        if tokens.len() == request.max_tokens {
            return (tokens, log_probs);
        }
        logits = model.extend(&mut cache, &[token as i32]).unwrap();
    }
}

/// `ln p`, summed in f64.
pub fn log_prob(logits: &[f32], token: u32) -> f32 {
    (f64::from(logits[token as usize]) - log_sum_exp(logits)) as f32
}
