//! The front before the real engine, on a tiny random model.

use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::{Value, json};
use tercet_model::{Model, ModelConfig};
use tercet_tensor::DType;

use super::client::Server;
use super::fake::{TEMPLATE, VOCAB, text};
use crate::engine::{Engine, Handle, Limits, Models};
use crate::http::{Keys, Served};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn model() -> Model {
    let config: ModelConfig = serde_json::from_value(json!({
        "model_type": "tercet",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "v_head_dim": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "eos_token_id": super::fake::END,
        "nsa": {
            "compress_block": 8, "compress_stride": 4, "select_block": 8, "select_count": 4,
            "window": 12, "compressor": "mean",
        },
    }))
    .unwrap();
    Model::new(config, 7, DType::F32).unwrap()
}

async fn start() -> (Server, Handle, JoinHandle<()>) {
    let limits = Limits { cache_bytes: 64 << 20, ..Limits::default() };
    let (handle, thread) = Engine::start(Models::new(model()).unwrap(), limits).unwrap();
    let served = Served::new(Arc::new(handle.clone()), "tiny".into(), text(Some(TEMPLATE)), true);
    (Server::start(Some(served), Keys::default()).await, handle, thread)
}

#[tokio::test]
async fn the_same_seed_writes_the_same_text_streamed_or_whole() {
    let (server, ..) = start().await;
    let mut body = json!({ "prompt": "hello", "max_tokens": 40, "seed": 5, "ignore_eos": true });
    let whole = server.post(COMPLETIONS, &body).await.json();
    assert_eq!(whole["usage"]["completion_tokens"], 40);
    body["stream"] = true.into();
    let events = server.post(COMPLETIONS, &body).await.events();
    let text = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect::<String>();
    assert_eq!(whole["choices"][0]["text"], text.as_str());
}

/// Greedy scores of a text are those that the text was written with: the echo's log-probabilities
/// equal the writing's to rounding, one token by one token against a whole prompt at once.
#[tokio::test]
async fn echoed_scores_are_those_of_the_writing() {
    let (server, ..) = start().await;
    let body = json!({
        "prompt": [1, 2, 3, 4, 5], "max_tokens": 30, "temperature": 0, "logprobs": 2,
        "ignore_eos": true, "return_token_ids": true,
    });
    let written = server.post(COMPLETIONS, &body).await.json()["choices"][0].clone();
    let mut ids = vec![json!(1), json!(2), json!(3), json!(4), json!(5)];
    ids.extend(written["token_ids"].as_array().unwrap().clone());
    let body = json!({
        "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true, "seed": 1234,
    });
    let echoed = server.post(COMPLETIONS, &body).await.json()["choices"][0].clone();
    let numbers = |choice: &Value, from: usize| -> Vec<f64> {
        let all = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        all[from..from + 30].iter().map(|v| v.as_f64().unwrap()).collect()
    };
    assert_eq!(echoed["logprobs"]["tokens"].as_array().unwrap().len(), 36);
    let (own, again) = (numbers(&written, 0), numbers(&echoed, 5));
    for (a, b) in own.iter().zip(&again) {
        // f32 logits of about 1 and 260 addends: 260 · 2⁻²⁴ ≈ 1.6e-5, a few times over.
        assert!((a - b).abs() < 1e-4, "{own:?} {again:?}");
    }
    // Greedy: each is the most probable, so lm-eval would say so.
    for at in 5..35 {
        let top = echoed["logprobs"]["top_logprobs"][at].as_object().unwrap();
        assert_eq!(top.len(), 1, "the written token is the most probable one");
    }
}

#[tokio::test]
async fn a_random_model_keeps_to_a_grammar() {
    let (server, ..) = start().await;
    for seed in 0..5 {
        let body = json!({
            "messages": [{ "role": "user", "content": "x" }], "seed": seed, "max_tokens": 200,
            "response_format": { "type": "json_schema", "json_schema": { "name": "s", "schema": {
                "type": "object",
                "properties": { "a": { "type": "boolean" }, "b": { "enum": ["p", "q"] } },
                "required": ["a", "b"], "additionalProperties": false,
            } } },
        });
        let choice = server.post(CHAT, &body).await.json()["choices"][0].clone();
        if choice["finish_reason"] == "stop" {
            let text = choice["message"]["content"].as_str().unwrap();
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(value["a"].is_boolean() && value["b"].is_string(), "{text}");
        }
        let body = json!({ "prompt": "x", "seed": seed, "guided_regex": "[a-c]{3}-[0-9]{2}" });
        let choice = server.post(COMPLETIONS, &body).await.json()["choices"][0].clone();
        let text = choice["text"].as_str().unwrap();
        assert!(text.len() == 6 && text.as_bytes()[3] == b'-', "{choice}");
        let tool = json!([{ "type": "function", "function": { "name": "f", "parameters": {
            "type": "object", "properties": { "x": { "type": "boolean" } }, "required": ["x"],
            "additionalProperties": false,
        } } }]);
        let body = json!({
            "messages": [{ "role": "user", "content": "x" }], "tools": tool, "seed": seed,
            "tool_choice": "required", "max_tokens": 300,
        });
        let choice = server.post(CHAT, &body).await.json()["choices"][0].clone();
        if choice["finish_reason"] != "length" {
            assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        }
    }
}

#[tokio::test]
async fn what_was_read_comes_with_each_token() {
    let (server, ..) = start().await;
    let body = json!({
        "prompt": "a text of some length, so that there are blocks to be chosen from, and more",
        "max_tokens": 5, "return_reads": true, "ignore_eos": true,
    });
    let choice = server.post(COMPLETIONS, &body).await.json()["choices"][0].clone();
    let reads = choice["reads"].as_array().unwrap();
    assert_eq!(reads.len(), 5);
    for (at, read) in reads.iter().enumerate() {
        assert_eq!(read["block"], 8);
        assert_eq!(read["position"], 75 + at - 1);
        assert_eq!(read["layers"].as_array().unwrap().len(), 2);
    }
}

/// After answers that were read, left and refused, every page is free and the engine drains.
#[tokio::test]
async fn nothing_is_held_when_all_have_left() {
    let (mut server, handle, thread) = start().await;
    for round in 0..10 {
        let body = json!({
            "prompt": ["one", "two"], "n": 2, "max_tokens": 400, "stream": round % 2 == 0,
            "ignore_eos": true,
        });
        let asked = server.post(COMPLETIONS, &body);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(30), asked).await;
    }
    for _ in 0..500 {
        if handle.stats().pages_used == 0 && handle.stats().running == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let stats = handle.stats();
    assert_eq!((stats.pages_used, stats.running, stats.waiting), (0, 0, 0));
    server.stop.take().unwrap().send(()).unwrap();
    (&mut server.ended).await.unwrap();
    drop(handle);
    thread.join().unwrap();
}
