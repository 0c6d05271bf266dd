//! Every route does what its clients count on.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tercet_model::Tokenizer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::client::Server;
use super::fake::{END, Fake, VOCAB, served};
use crate::engine::FAILING_STEPS;
use crate::http::chat::Chat;
use crate::http::completions::Completion;
use crate::http::fields::Fields;
use crate::http::tokenize::{Tokenize, take_ids};
use crate::http::{Backend, Keys, Served, Text, limits, openapi};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

async fn writing(text: &str) -> (Server, std::sync::Arc<Fake>) {
    let (served, fake) = served(Fake::new(text));
    (Server::start(Some(served), Keys::default()).await, fake)
}

fn user(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}

#[tokio::test]
async fn a_completion_has_the_shape_that_clients_read() {
    let (server, fake) = writing("hello world").await;
    let answer = server.post(COMPLETIONS, &json!({ "prompt": "ab", "max_tokens": 5 })).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "base");
    assert_eq!(body["choices"][0]["text"], "hello");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["prompt_tokens"], 2);
    assert_eq!(body["usage"]["completion_tokens"], 5);
    assert_eq!(body["usage"]["total_tokens"], 7);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    // OpenAI's defaults.
    let body = server.post(COMPLETIONS, &json!({ "prompt": "ab", "model": "poems" })).await.json();
    assert_eq!(
        (&body["model"], &body["choices"][0]["finish_reason"]),
        (&json!("poems"), &json!("stop"))
    );
    let last = fake.last().pop().unwrap();
    assert_eq!((last.max_tokens, last.sampling.temperature, last.sampling.top_p), (16, 1.0, 1.0));
    assert_eq!(last.adapter.as_deref(), Some("poems"));
    assert!(answer.head.contains("content-security-policy") && answer.head.contains("nosniff"));
}

#[tokio::test]
async fn a_stream_ends_once_and_its_pieces_are_the_whole() {
    let (server, _) = writing("日本語 🦀!").await;
    for (path, body) in [
        (COMPLETIONS, json!({ "prompt": "x", "max_tokens": 50 })),
        (CHAT, json!({ "messages": user("x") })),
    ] {
        let mut body = body;
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.head.contains("text/event-stream"));
        assert!(answer.body.contains(": prefill "), "{}", answer.body);
        let mut events = answer.events();
        let usage = events.pop().unwrap();
        assert_eq!(usage["choices"], json!([]));
        assert!(usage["usage"]["completion_tokens"].as_u64() > Some(5), "{usage}");
        assert!(events.iter().all(|e| e["usage"].is_null() && e["id"] == usage["id"]));
        let choice = |e: &Value| e["choices"][0].clone();
        let text = |e: &Value| {
            let choice = choice(e);
            let piece = choice["text"].as_str().or(choice["delta"]["content"].as_str());
            piece.unwrap_or_default().to_owned()
        };
        assert_eq!(events.iter().map(text).collect::<String>(), "日本語 🦀!");
        let ends = events.iter().map(choice).filter(|c| c["finish_reason"] == "stop").count();
        assert_eq!(ends, 1, "{answer:?}");
    }
}

#[tokio::test]
async fn stop_texts_end_answers_and_are_not_shown() {
    let (server, fake) = writing("one two three").await;
    for stream in [false, true] {
        let body = json!({
            "messages": user("x"), "stop": ["wo t", "never"], "stream": stream, "n": 2,
        });
        let answer = server.post(CHAT, &body).await;
        if stream {
            let events = answer.events();
            let of = |n: u64| events.iter().filter(move |e| e["choices"][0]["index"] == n);
            for n in 0..2 {
                let text = of(n).filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
                assert_eq!(text.collect::<String>(), "one t");
                assert_eq!(of(n).next_back().unwrap()["choices"][0]["stop_reason"], "wo t");
            }
        } else {
            for choice in answer.json()["choices"].as_array().unwrap() {
                assert_eq!(choice["message"]["content"], "one t");
                assert_eq!(choice["finish_reason"], "stop");
            }
        }
    }
    let seeds: Vec<u64> = fake.last().iter().map(|r| r.sampling.seed).collect();
    assert_eq!(seeds[1], seeds[0].wrapping_add(1), "answers to one prompt draw differently");
    let body = json!({ "prompt": "x", "stop": "two", "include_stop_str_in_output": true });
    assert_eq!(server.post(COMPLETIONS, &body).await.json()["choices"][0]["text"], "one two");
    let metrics = server.get("/metrics").await.body;
    let stopped = |line: &str| {
        line.starts_with("tercet_requests_finished_total") && line.contains("\"stop\"")
    };
    let line = metrics.lines().find(|line| stopped(line)).unwrap();
    assert!(!line.ends_with(" 0"), "what a stop text ended is finished, not left: {line}");
}

#[tokio::test]
async fn what_can_never_be_taken_is_refused_and_not_put_off() {
    let (server, _) = writing("z").await;
    let body = json!({ "prompt": vec!["x"; 64], "max_tokens": 1 });
    let answer = server.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, 400);
    assert!(answer.error().contains("can never be taken"), "{answer:?}");
}

/// A decoder that fails on texts of `x` alone, and on no text: what cannot be written is an error,
/// not a shorter answer.
#[tokio::test]
async fn text_that_cannot_be_decoded_is_not_left_out() {
    let mut json = super::fake::tokenizer_json();
    json["decoder"] = json!({ "type": "Sequence", "decoders": [
        json["decoder"], { "type": "Strip", "content": "x", "start": 0, "stop": 2 },
    ] });
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    let x = tokenizer.encode("x", false).unwrap();
    assert!(tokenizer.decode_all(&x).is_err() && tokenizer.decode_all(&[]).is_err());
    let fake = std::sync::Arc::new(Fake::new("ab"));
    let text = Text::new(tokenizer, vec![END], VOCAB);
    let served = Served::new(fake.clone(), "base".into(), text, true);
    let server = Server::start(Some(served), Keys::default()).await;
    for scores in [json!(null), json!(1)] {
        let body = |prompt: &[u32]| json!({ "prompt": prompt, "echo": true, "logprobs": scores });
        assert_eq!(server.post(COMPLETIONS, &body(&[65, 66])).await.status, 200);
        let answer = server.post(COMPLETIONS, &body(&x)).await;
        assert!(answer.error().contains("cannot decode"), "{answer:?}");
    }
    // The end of an answer in which nothing was written.
    fake.text.lock().unwrap().clear();
    let answer = server.post(COMPLETIONS, &json!({ "prompt": "ab" })).await;
    assert!(answer.error().contains("cannot decode"), "{answer:?}");
    let answer = server.post(COMPLETIONS, &json!({ "prompt": "ab", "stream": true })).await;
    assert!(answer.body.contains("cannot decode"), "{answer:?}");
}

/// What lm-eval's local-completions sends and reads, by its own source.
#[tokio::test]
async fn a_harness_scores_texts_through_the_tokenizer_routes() {
    let (server, fake) = writing("z").await;
    let info = server.get("/tokenizer_info").await.json();
    assert_eq!(info["eos_token"], "<|end|>");
    let asked = json!({ "prompt": "ab日", "add_special_tokens": false });
    let tokens = server.post("/tokenize", &asked).await.json()["tokens"].clone();
    assert_eq!(tokens.as_array().unwrap().len(), 5);
    let back = server.post("/detokenize", &json!({ "tokens": tokens })).await.json();
    assert_eq!(back["prompt"], "ab日");

    let body = json!({
        "model": "base", "prompt": [tokens, [5, 6]], "temperature": 0, "max_tokens": 1,
        "logprobs": 1, "seed": 1234, "echo": true,
    });
    let answer = server.post(COMPLETIONS, &body).await;
    let body = answer.json();
    let first = &body["choices"][0];
    let scores = &first["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(scores[list].as_array().unwrap().len(), 6, "{list}");
    }
    assert!(scores["token_logprobs"][0].is_null() && scores["top_logprobs"][0].is_null());
    for at in 1..6 {
        let token = scores["tokens"][at].as_str().unwrap();
        assert!(scores["top_logprobs"][at][token].is_number(), "{scores}");
    }
    assert_eq!(scores["tokens"][2], "bytes:\\xe6");
    // Into the text that is returned: the bytes of one character begin where it does.
    assert_eq!(scores["text_offset"], json!([0, 1, 2, 2, 2, 3]));
    assert_eq!(first["text"], "ab日z");
    assert_eq!(body["choices"][1]["logprobs"]["tokens"].as_array().unwrap().len(), 3);
    assert!(fake.last()[0].ignore_eos, "one token follows the text, whichever it is");
}

/// Scores of long prompts take a while to write: that is done where prompts are read, so that the
/// threads that answer go on. Here no place is free there until the answer is long complete.
#[tokio::test]
async fn scores_of_prompts_are_not_written_on_the_threads_that_answer() {
    let pace = Duration::from_millis(300);
    let (served, fake) = served(Fake { pace, ..Fake::new("z") });
    let server = Server::start(Some(served), Keys::default()).await;
    let body = json!({ "prompt": [1, 2, 3], "echo": true, "logprobs": 1, "max_tokens": 1 });
    let asked = server.post(COMPLETIONS, &body);
    tokio::pin!(asked);
    while fake.last().is_empty() {
        assert!(timeout(Duration::from_millis(5), &mut asked).await.is_err());
    }
    let places = server.front.compiling.acquire_many(limits::COMPILING as u32).await.unwrap();
    assert!(timeout(3 * pace, &mut asked).await.is_err(), "written without a place");
    drop(places);
    assert_eq!(asked.await.status, 200);
}

#[tokio::test]
async fn chats_report_log_probabilities_ids_and_reads() {
    let (server, fake) = writing("hi").await;
    let body = json!({
        "messages": user("x"), "logprobs": true, "top_logprobs": 3, "return_token_ids": true,
        "return_reads": true, "cache_salt": "pepper",
    });
    let body = server.post(CHAT, &body).await.json();
    let choice = &body["choices"][0];
    let scores = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(scores.len(), 2);
    assert_eq!((&scores[0]["token"], &scores[0]["bytes"]), (&json!("h"), &json!([104])));
    assert_eq!(scores[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 2);
    let prompt = choice["prompt_tokens"].as_array().unwrap();
    let prompt: String = prompt.iter().filter_map(Value::as_str).collect();
    assert_eq!(prompt, "<user>x<assistant>");
    assert_eq!(choice["reads"][1]["token"], "i");
    assert_eq!(choice["reads"][1]["layers"], json!([[[0], [0, 1]]]));
    assert!(fake.last()[0].namespace.contains("pepper"));
}

#[tokio::test]
async fn tools_are_shown_to_the_template_and_calls_are_found() {
    let text = "ok <tool_call>{\"name\": \"sum\", \"arguments\": {\"a\": 1}}</tool_call>";
    let (server, fake) = writing(text).await;
    let tools = json!([{ "type": "function", "function": { "name": "sum", "parameters": {
        "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"],
    } } }]);
    let mut body = json!({ "messages": user("x"), "tools": tools });
    let choice = server.post(CHAT, &body).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "ok ");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({ "name": "sum", "arguments": "{\"a\":1}" }));
    assert!(call["id"].is_string() && call.get("index").is_none());

    body["stream"] = true.into();
    let events = server.post(CHAT, &body).await.events();
    let delta = |e: &Value| e["choices"][0]["delta"].clone();
    let shown = events.iter().filter_map(|e| delta(e)["content"].as_str().map(str::to_owned));
    assert_eq!(shown.collect::<String>(), "ok ");
    let call = events.iter().find_map(|e| delta(e)["tool_calls"].get(0).cloned()).unwrap();
    assert_eq!((&call["index"], &call["function"]["name"]), (&json!(0), &json!("sum")));
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    // The answer, sent back with its result, reaches the template as values.
    let asked = json!({ "messages": [
        { "role": "user", "content": [{ "type": "text", "text": "x" }] },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "1", "content": "3" },
    ], "tools": tools });
    let tokens = server.post("/tokenize", &asked).await.json()["tokens"].clone();
    let text = server.post("/detokenize", &json!({ "tokens": tokens })).await.json();
    assert_eq!(text["prompt"], "[sum]<user>x<assistant>sum{\"a\": 1}<tool>3<assistant>");

    // A forced call is a grammar.
    for choice in [json!("required"), json!({ "type": "function", "function": { "name": "sum" } })]
    {
        let body = json!({ "messages": user("x"), "tools": tools, "tool_choice": choice });
        assert_eq!(server.post(CHAT, &body).await.status, 200);
        assert!(fake.last().pop().unwrap().constraint.is_some());
    }
    let body = json!({ "messages": user("x"), "tools": tools, "tool_choice": "none" });
    assert_eq!(server.post(CHAT, &body).await.json()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn grammars_allow_what_they_say_and_nothing_else() {
    let (server, fake) = writing("x").await;
    for (guide, fine, bad) in [
        (json!({ "guided_regex": "[0-9]{2}-a" }), "12-a", "1a"),
        (json!({ "guided_choice": ["yes", "no"] }), "yes", "ya"),
        (json!({ "response_format": { "type": "json_object" } }), "{\"a\":[1]}", "[1]"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": {
                "name": "n", "strict": true,
                "schema": { "type": "object", "properties": { "k": { "enum": [7] } },
                            "required": ["k"], "additionalProperties": false },
            } } }),
            "{\"k\":7}",
            "{\"j",
        ),
        (json!({ "structured_outputs": { "json": { "type": "integer" } } }), "42", "x"),
        (json!({ "guided_json": "true" }), "[1]", "x"),
    ] {
        let mut body = guide.clone();
        body["prompt"] = "x".into();
        assert_eq!(server.post(COMPLETIONS, &body).await.status, 200, "{guide}");
        for (text, wanted) in [(fine, true), (bad, false)] {
            // A new constraint for each: it remembers.
            assert_eq!(server.post(COMPLETIONS, &body).await.status, 200);
            let mut constraint = fake.last().pop().unwrap().constraint.unwrap();
            let ids = super::fake::tokenizer().encode(text, false).unwrap();
            let allowed = ids.iter().all(|&id| {
                let mask = constraint.mask().unwrap().unwrap();
                let allowed = mask[id as usize / 32] >> (id % 32) & 1 == 1;
                if allowed {
                    constraint.take(id).unwrap();
                }
                allowed
            });
            assert_eq!(allowed, wanted, "{guide}: {text}");
            if wanted && !constraint.is_done() {
                let mask = constraint.mask().unwrap().unwrap();
                assert_eq!(mask[257 / 32] >> (257 % 32) & 1, 1, "{guide}: the end is allowed");
            }
        }
    }
}

#[tokio::test]
async fn keys_close_every_route_but_life_readiness_and_the_page() {
    let keys = Keys::parse("first-secret\nother-secret").unwrap();
    let (made, fake) = served(Fake::new("x"));
    let server = Server::start(Some(made), keys).await;
    for path in ["/livez", "/readyz", "/", "/page.js", "/page.css", "/reads.js"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    for path in [
        "/health",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/models/base",
        COMPLETIONS,
        CHAT,
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
    ] {
        for headers in ["", "authorization: Bearer \r\n", "authorization: Bearer first-secreT\r\n"]
        {
            for method in ["GET", "POST"] {
                let answer = server.send(method, path, headers, b"{}").await;
                assert_eq!(answer.status, 401, "{method} {path}");
                assert!(answer.error().contains("Bearer"));
                assert!(answer.head.contains("www-authenticate"));
            }
        }
    }
    for key in ["first-secret", "other-secret"] {
        let headers = format!("authorization: Bearer {key}\r\n");
        let answer = server.send("POST", COMPLETIONS, &headers, b"{\"prompt\":\"x\"}").await;
        assert_eq!(answer.status, 200);
    }
    let requests = fake.last();
    assert_ne!(requests[0].namespace, requests[1].namespace, "keys do not share prefixes");
}

#[tokio::test]
async fn the_listener_answers_while_the_model_loads() {
    let server = Server::start(None, Keys::default()).await;
    assert_eq!(server.get("/livez").await.status, 200);
    assert_eq!(server.get("/").await.status, 200);
    for path in ["/readyz", "/health", "/v1/models", "/metrics"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 503, "{path}");
        assert!(answer.head.contains("retry-after"));
        assert_eq!(answer.json()["error"]["type"], "unavailable_error");
        assert_eq!(answer.json()["error"]["message"], "Loading model");
    }
    assert_eq!(server.post(CHAT, &json!({ "messages": user("x") })).await.status, 503);
    server.front.ready(served(Fake::new("x")).0);
    assert_eq!(server.get("/readyz").await.status, 200);
    let names = server.get("/v1/models").await.json();
    assert_eq!(
        (&names["data"][0]["id"], &names["data"][1]["id"]),
        (&json!("base"), &json!("poems"))
    );
    assert_eq!(server.get("/v1/models/poems").await.json()["parent"], "base");
    assert_eq!(server.get("/v1/models/other").await.status, 404);
}

/// It lives, so nobody kills it for this alone, and still tries what comes: a step that succeeds
/// makes it ready again.
#[tokio::test]
async fn an_engine_that_only_fails_is_not_ready() {
    let (server, fake) = writing("x").await;
    for (failed, status) in [(FAILING_STEPS - 1, 200), (FAILING_STEPS, 503), (0, 200)] {
        fake.failed_steps.store(failed, Ordering::SeqCst);
        for path in ["/readyz", "/health"] {
            let answer = server.get(path).await;
            assert_eq!(answer.status, status, "{failed} {path}");
            if status == 503 {
                assert!(answer.error().contains("engine failed"), "{answer:?}");
                assert!(answer.head.contains("retry-after"));
            }
        }
        assert_eq!(server.get("/livez").await.status, 200);
        assert_eq!(server.post(COMPLETIONS, &json!({ "prompt": "x" })).await.status, 200);
    }
}

#[tokio::test]
async fn a_full_engine_is_429_with_a_time() {
    let (served, fake) = served(Fake { room: 1, ..Fake::new("x") });
    fake.running.store(1, Ordering::SeqCst);
    let server = Server::start(Some(served), Keys::default()).await;
    for stream in [false, true] {
        let body = json!({ "prompt": "x", "stream": stream });
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, 429);
        assert!(answer.head.contains("retry-after: 7"), "{}", answer.head);
        assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
    }
}

/// A client that leaves is noticed within two seconds, whether it waits for a whole answer or
/// reads a stream.
#[tokio::test]
async fn leaving_cancels() {
    let (served, fake) =
        served(Fake { pace: Duration::from_millis(20), ..Fake::new(&"x".repeat(3000)) });
    let server = Server::start(Some(served), Keys::default()).await;
    for stream in [false, true] {
        let body = json!({ "messages": user("x"), "stream": stream, "n": 2 }).to_string();
        let text = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        socket.write_all(text.as_bytes()).await.unwrap();
        while fake.running.load(Ordering::SeqCst) < 2 {
            sleep(Duration::from_millis(5)).await;
        }
        drop(socket);
        let left = async {
            while fake.running.load(Ordering::SeqCst) > 0 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(timeout(Duration::from_secs(2), left).await.is_ok(), "stream: {stream}");
    }
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_refuses_what_comes() {
    let (served, fake) =
        served(Fake { pace: Duration::from_millis(5), ..Fake::new(&"x".repeat(100)) });
    let mut server = Server::start(Some(served), Keys::default()).await;
    let body = json!({ "prompt": "x", "max_tokens": 200, "stream": true }).to_string();
    let text = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(text.as_bytes()).await.unwrap();
    while fake.running.load(Ordering::SeqCst) == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    server.stop.take().unwrap().send(()).unwrap();
    while !fake.draining.load(Ordering::SeqCst) {
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(server.get("/livez").await.status, 200);
    assert_eq!(server.get("/readyz").await.status, 503);
    assert_eq!(server.post(COMPLETIONS, &json!({ "prompt": "x" })).await.status, 503);
    let mut all = Vec::new();
    socket.read_to_end(&mut all).await.unwrap();
    let all = String::from_utf8_lossy(&all).into_owned();
    assert!(all.contains("[DONE]") && all.matches("\"text\":\"x\"").count() == 100, "{all}");
    timeout(Duration::from_secs(5), &mut server.ended).await.unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

/// Own names and vLLM's, in a form that Prometheus' parser takes.
#[tokio::test]
async fn metrics_are_there_under_both_names() {
    let (server, _) = writing("x").await;
    server.post(COMPLETIONS, &json!({ "prompt": "x" })).await;
    server.post(COMPLETIONS, &json!({})).await;
    let text = server.get("/metrics").await.body;
    for name in [
        "tercet_requests_running",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_success_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
    ] {
        assert!(text.contains(&format!("{name}{{model_name=\"base\"")), "{name}\n{text}");
    }
    assert!(text.contains("tercet_http_responses_total{route=\"/v1/completions\",code=\"400\"} 1"));
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok() && name.ends_with('}'), "{line}");
    }
}

/// The document has the fields that the routes read, and no others.
#[tokio::test]
async fn the_openapi_document_tells_the_truth() {
    let (served, _) = served(Fake::new("x"));
    let document = openapi::document(false);
    let body =
        json!({ "prompt": "x", "messages": [{ "role": "user", "content": "x" }], "tokens": [1] });
    let read = |take: &dyn Fn(&mut Fields)| {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        take(&mut fields);
        let mut names: Vec<String> = fields.asked().iter().map(|n| (*n).to_owned()).collect();
        names.sort();
        names.dedup();
        names
    };
    let documented = |schema: &str| {
        let fields = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        let mut names: Vec<String> = fields.keys().cloned().collect();
        names.sort();
        names
    };
    let text = &served.text;
    let completion = read(&|f| {
        Completion::take(f, text).map_err(|e| e.message).unwrap();
    });
    assert_eq!(completion, documented("CompletionRequest"));
    let chat = read(&|f| {
        Chat::take(f, text).map_err(|e| e.message).unwrap();
    });
    assert_eq!(chat, documented("ChatRequest"));
    assert_eq!(
        read(&|f| {
            take_ids(f, &served).unwrap();
        }),
        documented("DetokenizeRequest")
    );
    let mut fields =
        Fields::parse(b"{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}").unwrap();
    Tokenize::take(&mut fields, &served).map_err(|e| e.message).unwrap();
    let mut names: Vec<&str> = fields.asked().to_vec();
    names.sort_unstable();
    assert_eq!(names, documented("TokenizeRequest"));

    let server = Server::start(Some(served), Keys::default()).await;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{model}", "base");
        let method = if methods.get("post").is_some() { "POST" } else { "GET" };
        let answer = server.send(method, &path, "", b"").await;
        assert!(![404, 405, 500].contains(&answer.status), "{method} {path}: {}", answer.status);
    }
    assert_eq!(server.get("/openapi.json").await.json(), document);
}

#[tokio::test]
async fn a_model_without_a_template_says_so() {
    let fake = std::sync::Arc::new(Fake::new("x"));
    let engine: std::sync::Arc<dyn Backend> = fake;
    let text = super::fake::text(None);
    let made = crate::http::Served::new(engine, "base".into(), text, false);
    let server = Server::start(Some(made), Keys::default()).await;
    let answer = server.post(CHAT, &json!({ "messages": user("x") })).await;
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("no_chat_template"))
    );
    assert_eq!(server.get("/tokenizer_info").await.json()["has_chat_template"], false);
}
