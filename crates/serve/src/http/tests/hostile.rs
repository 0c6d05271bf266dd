//! Nothing that a client can send is more than an error to itself.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::client::Server;
use super::fake::{Fake, VOCAB, served};
use crate::http::{Keys, limits, openapi};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

async fn server() -> Server {
    Server::start(Some(served(Fake::new("ok")).0), Keys::default()).await
}

fn body(path: &str) -> Value {
    match path {
        CHAT => json!({ "messages": [{ "role": "user", "content": "x" }], "logprobs": true }),
        _ => json!({ "prompt": "x" }),
    }
}

/// At its bounds a number is taken, beyond and far beyond refused by name; so is every other type.
#[tokio::test]
async fn attack_every_number_at_and_beyond_its_bounds() {
    let server = server().await;
    let document = openapi::document(false);
    let mut seen = 0;
    for (path, schema) in [(COMPLETIONS, "CompletionRequest"), (CHAT, "ChatRequest")] {
        let fields = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        for (name, field) in fields {
            let Some(least) = field.get("minimum") else { continue };
            let most = &field["maximum"];
            seen += 1;
            let whole = field["type"][0] == "integer";
            let beyond: Vec<Value> = if whole {
                let (least, most) = (least.as_i64().unwrap(), most.as_i64().unwrap());
                let beyond = [least.checked_sub(1), most.checked_add(1)];
                let near = beyond.into_iter().flatten().map(Value::from);
                near.chain([json!(u64::MAX), json!(1.5), json!(1e300)]).collect()
            } else {
                let (least, most) = (least.as_f64().unwrap(), most.as_f64().unwrap());
                vec![json!(least - 1e-6), json!(most + 1e-6), json!(1e300), json!(-1e300)]
            };
            let wrong = ["1", "", "NaN"].map(Value::from).into_iter();
            let wrong = wrong.chain([json!([1]), json!({}), json!(true)]);
            for value in beyond.into_iter().chain(wrong) {
                let mut body = body(path);
                body[name] = value.clone();
                let answer = server.post(path, &body).await;
                assert_eq!(answer.status, 400, "{path} {name} = {value}: {answer:?}");
                assert!(answer.error().contains(name.as_str()), "{answer:?}");
                assert_eq!(answer.json()["error"]["param"], *name);
            }
            for value in [least, most, &Value::Null] {
                let mut body = body(path);
                body[name] = value.clone();
                if name == "best_of" {
                    body["n"] = value.clone();
                }
                let answer = server.post(path, &body).await;
                // 0 tokens are for `echo` alone.
                let fine = if name == "max_tokens" && *value == 0 { 400 } else { 200 };
                assert_eq!(answer.status, fine, "{path} {name} = {value}: {answer:?}");
            }
        }
    }
    assert!(seen > 20, "{seen}");
}

#[tokio::test]
async fn attack_bodies_that_are_none() {
    let server = server().await;
    let deep = format!("{{\"prompt\":{}1{}}}", "[".repeat(50_000), "]".repeat(50_000));
    let wide = format!("{{\"prompt\":\"x\",\"a\":[{}1]}}", "1,".repeat(400_000));
    let bodies: Vec<&[u8]> = vec![
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b"\"x\"",
        b"{}",
        b"\xff\xfe{}",
        b"{\"prompt\":\"\xc3\x28\"}",
        b"{\"prompt\":\"\\ud800\"}",
        b"{\"prompt\":NaN}",
        b"{\"prompt\":1e999}",
        b"{\"prompt\":\"x\",}",
        b"{\"prompt\":\"x\",\"temperature\":Infinity}",
        b"{\"\":1}",
        b"\0\0\0\0",
        deep.as_bytes(),
        wide.as_bytes(),
    ];
    for bytes in bodies {
        for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
            let answer = server.send("POST", path, "", bytes).await;
            assert_eq!(answer.status, 400, "{path}: {answer:?}");
            answer.error();
        }
    }
    // A key given twice: the last counts, as in most parsers; nothing is guessed.
    let twice = server.send("POST", COMPLETIONS, "", b"{\"prompt\":\"x\",\"prompt\":\"y\"}").await;
    assert_eq!(twice.status, 200);
}

#[tokio::test]
async fn attack_prompts_models_and_lists_that_do_not_fit() {
    let server = server().await;
    let long = "x".repeat(5000);
    for (path, body, status, word) in [
        (COMPLETIONS, json!({ "prompt": "x", "model": "other" }), 404, "other"),
        (COMPLETIONS, json!({ "prompt": "x", "model": 3 }), 400, "model"),
        (COMPLETIONS, json!({ "prompt": "" }), 400, "no tokens"),
        (COMPLETIONS, json!({ "prompt": [] }), 400, "empty"),
        (COMPLETIONS, json!({ "prompt": [[]] }), 400, "no tokens"),
        (COMPLETIONS, json!({ "prompt": [VOCAB] }), 400, "prompt"),
        (COMPLETIONS, json!({ "prompt": [-1] }), 400, "prompt"),
        (COMPLETIONS, json!({ "prompt": [1.5] }), 400, "whole"),
        (COMPLETIONS, json!({ "prompt": [1, "x"] }), 400, "prompt"),
        (COMPLETIONS, json!({ "prompt": ["x", 1] }), 400, "prompt[1]"),
        (COMPLETIONS, json!({ "prompt": {} }), 400, "prompt"),
        (COMPLETIONS, json!({ "prompt": vec!["x"; limits::PROMPTS + 1] }), 400, "prompt"),
        (COMPLETIONS, json!({ "prompt": vec!["x"; 30], "n": 8 }), 400, "answers"),
        (COMPLETIONS, json!({ "prompt": long }), 400, "tokens"),
        (COMPLETIONS, json!({ "prompt": "x", "stop": "" }), 400, "empty"),
        (COMPLETIONS, json!({ "prompt": "x", "stop": ["a", 1] }), 400, "stop"),
        (COMPLETIONS, json!({ "prompt": "x", "stop": vec!["a"; 17] }), 400, "16"),
        (COMPLETIONS, json!({ "prompt": "x", "stop": "y".repeat(257) }), 400, "256"),
        (COMPLETIONS, json!({ "prompt": "x", "stop_token_ids": [-1] }), 400, "stop_token_ids"),
        (COMPLETIONS, json!({ "prompt": "x", "logit_bias": { "999999": 1 } }), 400, "999999"),
        (COMPLETIONS, json!({ "prompt": "x", "logit_bias": { "a": 1 } }), 400, "logit_bias"),
        (COMPLETIONS, json!({ "prompt": "x", "logit_bias": { "1": 101 } }), 400, "-100"),
        (COMPLETIONS, json!({ "prompt": "x", "logit_bias": [1] }), 400, "logit_bias"),
        (COMPLETIONS, json!({ "prompt": "x", "stream_options": {} }), 400, "stream"),
        (COMPLETIONS, json!({ "prompt": "x", "suffix": "y" }), 400, "suffix"),
        (COMPLETIONS, json!({ "prompt": "x", "max_tokens": 0 }), 400, "echo"),
        (
            COMPLETIONS,
            json!({ "prompt": "x", "max_tokens": 4097, "return_reads": true }),
            400,
            "4096",
        ),
        (COMPLETIONS, json!({ "prompt": "x", "temperatur": 1 }), 400, "temperature"),
        (CHAT, json!({ "messages": [] }), 400, "messages"),
        (CHAT, json!({ "messages": "x" }), 400, "messages"),
        (CHAT, json!({ "messages": [{}] }), 400, "role"),
        (CHAT, json!({ "messages": [{ "role": "robot", "content": "" }] }), 400, "role"),
        (CHAT, json!({ "messages": [{ "role": "user" }] }), 400, "content"),
        (CHAT, json!({ "messages": [{ "role": "user", "content": 1 }] }), 400, "content"),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": "file:///etc/passwd" } }] }] }),
            400,
            "image_url",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "x", "x": 1 }] }),
            400,
            "messages[0].x",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "x" }], "chat_template": "{{ 1 }}" }),
            400,
            "chat_template",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "x" }], "top_logprobs": 2 }),
            400,
            "logprobs",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [{}] }),
            400,
            "tools[0]",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "x" }], "tool_choice": "required" }),
            400,
            "tools",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "x" }], "tool_choice": {} ,
            "tools": [{ "type": "function", "function": { "name": "f" } }] }),
            400,
            "tool_choice",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "assistant", "tool_calls": [1] }] }),
            400,
            "tool_calls",
        ),
        ("/tokenize", json!({}), 400, "prompt"),
        ("/detokenize", json!({ "tokens": [VOCAB] }), 400, "tokens"),
        ("/detokenize", json!({ "tokens": [1e300] }), 400, "tokens"),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert!(answer.error().contains(word), "{body}: {answer:?}");
    }
}

/// A few kilobytes that ask for gigabytes of scores.
#[tokio::test]
async fn attack_prompts_whose_scores_are_too_many() {
    let (made, fake) = served(Fake::new("ok"));
    let server = Server::start(Some(made), Keys::default()).await;
    let mut body = json!({
        "prompt": vec!["x".repeat(4000); 32], "echo": true, "logprobs": 20, "max_tokens": 1,
    });
    for stream in [false, true] {
        body["stream"] = stream.into();
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("logprobs")));
        assert!(answer.error().contains(&limits::ECHO_SCORES.to_string()), "{answer:?}");
    }
    assert!(fake.last().is_empty(), "nothing of it reached the engine");
    body["logprobs"] = 0.into();
    body["stream"] = false.into();
    assert_eq!(server.post(COMPLETIONS, &body).await.status, 200);
}

#[tokio::test]
async fn attack_schemas_and_expressions_that_explode() {
    let server = server().await;
    let mut deep = json!({ "type": "integer" });
    for _ in 0..25 {
        deep = json!({ "type": "object", "properties": { "a": deep } });
    }
    let nested = json!({ "$defs": { "a": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" });
    let doubled: serde_json::Map<String, Value> = (0..40)
        .map(|i| {
            let next = json!({ "$ref": format!("#/$defs/d{}", i + 1) });
            (format!("d{i}"), json!({ "allOf": [next.clone(), next] }))
        })
        .chain([("d40".to_owned(), json!({ "type": "string" }))])
        .collect();
    let answer = server.post(COMPLETIONS, &json!({ "prompt": "x", "guided_regex": "(" })).await;
    assert!(answer.error().contains("unclosed group"), "{answer:?}");
    let start = Instant::now();
    for guide in [
        json!({ "guided_regex": "(" }),
        json!({ "guided_regex": "a{1000}{1000}{1000}" }),
        json!({ "guided_regex": "(a*)*b" }),
        json!({ "guided_regex": "(x+x+)+y" }),
        json!({ "guided_regex": "(?=a)b" }),
        json!({ "guided_regex": "(.{0,1000}){0,1000}" }),
        json!({ "guided_regex": "[\\u{0}-\\u{10ffff}]{0,65535}" }),
        json!({ "guided_regex": "x".repeat(5000) }),
        json!({ "guided_regex": "/\n\\/start: \"x\"" }),
        json!({ "guided_regex": "" }),
        json!({ "guided_choice": [] }),
        json!({ "guided_choice": ["a\" | /b/"] }),
        json!({ "guided_json": 3 }),
        json!({ "guided_json": "{" }),
        json!({ "guided_json": { "type": "nonsense" } }),
        json!({ "guided_json": { "type": 3 } }),
        json!({ "guided_json": { "pattern": "(", "type": "string" } }),
        json!({ "guided_json": { "$ref": "http://example.com/x" } }),
        json!({ "guided_json": { "$ref": "#/nowhere" } }),
        json!({ "guided_json": nested }),
        json!({ "guided_json": { "$defs": doubled, "$ref": "#/$defs/d0" } }),
        json!({ "guided_json": deep }),
        json!({ "guided_json": { "type": "array", "minItems": 1_000_000_000 } }),
        json!({ "guided_json": { "type": "array", "minItems": -1 } }),
        json!({ "guided_json": { "type": "string", "minLength": 1_000_000_000 } }),
        json!({ "guided_json": { "type": "integer", "minimum": 1e300 } }),
        json!({ "guided_json": { "type": "number", "multipleOf": 0 } }),
        json!({ "guided_json": { "enum": (0..5000).collect::<Vec<u32>>() } }),
        json!({ "guided_json": { "enum": [] } }),
        json!({ "guided_json": false }),
        json!({ "guided_json": { "a": "x".repeat(70_000) } }),
        json!({ "guided_json": { "x-guidance": { "whitespace_pattern": "(" } } }),
        json!({ "guided_json": { "x-guidance": 3 } }),
        json!({ "response_format": { "type": "xml" } }),
        json!({ "response_format": { "type": "json_schema" } }),
        json!({ "response_format": { "type": "json_schema", "json_schema": {} } }),
        json!({ "response_format": "json" }),
        json!({ "guided_regex": "a", "guided_choice": ["b"] }),
    ] {
        let mut body = guide.clone();
        body["prompt"] = "x".into();
        let begun = Instant::now();
        let answer = server.post(COMPLETIONS, &body).await;
        assert!(matches!(answer.status, 200 | 400), "{guide}: {answer:?}");
        if answer.status == 400 {
            assert!(!answer.error().contains("backtrace"), "{answer:?}");
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{guide}: {:?}", begun.elapsed());
    }
    println!("all shapes in {:?}", start.elapsed());
}

#[tokio::test]
async fn attack_http_that_is_none() {
    let server = server().await;
    for bytes in [
        &b"\0\x01\x02\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ] {
        let answer = server.raw(bytes).await;
        assert!(matches!(answer.status, 0 | 400 | 505), "{answer:?}");
    }
    // Headers: too many, too large.
    let many: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    let answer = server.send("GET", "/livez", &many, b"").await;
    assert_eq!(answer.status, 431, "{answer:?}");
    let large = format!("x: {}\r\n", "y".repeat(2 * limits::HEADER_BYTES));
    let answer = server.send("GET", "/livez", &large, b"").await;
    assert!(matches!(answer.status, 0 | 431), "{answer:?}");
    // A body that is too large, announced or not.
    let announced = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n\
                     content-length: 99999999999\r\n\r\n{";
    assert_eq!(server.raw(announced.as_bytes()).await.status, 413);
    let mut chunks =
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..40 {
        chunks.extend_from_slice(b"10000\r\n");
        chunks.extend(std::iter::repeat_n(b' ', 0x10000));
        chunks.extend_from_slice(b"\r\n");
    }
    assert!(matches!(server.raw(&chunks).await.status, 413 | 0));
    // Methods and paths.
    for (method, path, status) in [
        ("DELETE", "/v1/models", 405),
        ("GET", COMPLETIONS, 405),
        ("OPTIONS", CHAT, 405),
        ("POST", "/", 405),
        ("PATCH", "/livez", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/embeddings", 404),
        ("TRACE", "/metrics", 405),
    ] {
        let answer = server.send(method, path, "", b"").await;
        assert_eq!(answer.status, status, "{method} {path}");
        answer.error();
        assert!(!answer.head.contains("access-control"), "CORS stays closed");
        assert_eq!(answer.head.contains("\r\nallow:"), status == 405);
    }
    let compressed = server.send("POST", COMPLETIONS, "content-encoding: gzip\r\n", b"x").await;
    assert_eq!(compressed.status, 415);
}

#[tokio::test]
async fn attack_pages_of_strangers() {
    let server = server().await;
    let rebound = b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(server.raw(rebound).await.status, 403);
    let nameless = b"GET /v1/models HTTP/1.0\r\n\r\n";
    assert_eq!(server.raw(nameless).await.status, 403);
    let body = b"{\"prompt\":\"x\"}";
    let answer = server.send("POST", COMPLETIONS, "origin: https://evil.example\r\n", body).await;
    assert_eq!(answer.status, 403);
    answer.error();
    let own = server.send("POST", COMPLETIONS, "origin: http://localhost\r\n", body).await;
    assert_eq!(own.status, 200);
}

/// Idle and half-sent connections cost the others nothing.
#[tokio::test]
async fn attack_connections_that_say_nothing() {
    let server = server().await;
    let mut idle = Vec::new();
    for i in 0..300 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        if i % 2 == 0 {
            stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: lo").await.unwrap();
        }
        idle.push(stream);
    }
    let body = body(COMPLETIONS);
    let asked = server.post(COMPLETIONS, &body);
    assert_eq!(timeout(Duration::from_secs(10), asked).await.unwrap().status, 200);
    // Beyond the limit a connection is told so.
    for _ in 300..limits::CONNECTIONS + 1 {
        match TcpStream::connect(server.address).await {
            Ok(stream) => idle.push(stream),
            // The system allows no more files; the limit cannot be reached here.
            Err(_) => return,
        }
    }
    let mut last = idle.pop().unwrap();
    let mut text = Vec::new();
    let read = timeout(Duration::from_secs(5), last.read_to_end(&mut text)).await;
    if read.is_ok() {
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("too many"), "{text}");
    }
    drop(idle);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(server.get("/livez").await.status, 200);
}

/// A JSON value of any shape, small.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,4}", inner), 0..4)
                .prop_map(|pairs| pairs.into_iter().collect::<Value>()),
        ]
    })
}

/// Whatever stands in any field, the answer is 200 or a 4xx that says why.
#[test]
fn attack_any_value_in_any_field() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(server());
    let document = openapi::document(false);
    let names = |schema: &str| -> Vec<String> {
        let fields = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        fields.keys().cloned().collect()
    };
    let routes = [
        (COMPLETIONS, names("CompletionRequest")),
        (CHAT, names("ChatRequest")),
        ("/tokenize", names("TokenizeRequest")),
        ("/detokenize", names("DetokenizeRequest")),
    ];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(400)
    });
    let cases =
        (0..4usize, prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..3));
    let outcome = runner.run(&cases, |(route, fields)| {
        let (path, names) = &routes[route];
        let mut body = body(path);
        for (at, value) in fields {
            body[at.get(names)] = value;
        }
        let answer = runtime.block_on(server.post(path, &body));
        prop_assert!(matches!(answer.status, 200 | 400 | 404), "{} {}: {:?}", path, body, answer);
        if answer.status != 200 {
            answer.error();
        }
        Ok(())
    });
    outcome.unwrap();
}
