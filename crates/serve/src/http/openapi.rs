//! `/openapi.json`: what the routes take and give. The bounds are those of [`limits`], and a test
//! compares the fields with those that the routes read.

use serde_json::{Map, Value, json};

use super::limits;

/// The document of a server that asks for a key or does not.
pub fn document(keys: bool) -> Value {
    let mut document = whole_document();
    if !keys {
        // Without keys nothing is closed, and nothing answers 401.
        let all = document.as_object_mut();
        all.map(|all| all.shift_remove("security"));
        for path in document["paths"].as_object_mut().into_iter().flat_map(Map::values_mut) {
            for method in ["get", "post"] {
                let responses = path.get_mut(method).and_then(|m| m["responses"].as_object_mut());
                responses.map(|responses| responses.shift_remove("401"));
            }
        }
    }
    document
}

fn whole_document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "tercet",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI's API and what evaluation harnesses add to it. Fields that \
                            OpenAI documents and that have no use here are accepted without \
                            effect; others are refused.",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "security": [{ "key": [] }],
        "paths": paths(),
        "components": {
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
            "schemas": {
                "Error": object(&["error"], json!({ "error": object(&["message", "type"], json!({
                    "message": { "type": "string" },
                    "type": { "type": "string" },
                    "param": nullable("string"),
                    "code": { "type": ["string", "integer", "null"] },
                })) })),
                "Model": object(&["id", "object", "created", "owned_by"], json!({
                    "id": { "type": "string" },
                    "object": { "const": "model" },
                    "created": { "type": "integer" },
                    "owned_by": { "type": "string" },
                    "root": { "type": "string" },
                    "parent": nullable("string"),
                    "max_model_len": { "type": "integer" },
                    "sparse": { "type": "boolean" },
                })),
                "Usage": object(&["prompt_tokens", "completion_tokens", "total_tokens"], json!({
                    "prompt_tokens": { "type": "integer" },
                    "completion_tokens": { "type": "integer" },
                    "total_tokens": { "type": "integer" },
                    "prompt_tokens_details": { "type": "object" },
                })),
                "CompletionRequest": streams(closed(&["prompt"], completion_fields())),
                "ChatRequest": streams(closed(&["messages"], chat_fields())),
                "TokenizeRequest": tokenize_schema(),
                "DetokenizeRequest": closed(&["tokens"], json!({
                    "model": name(),
                    "tokens": { "type": "array", "items": token() },
                })),
                "Completion": answer("text_completion", json!({ "text": { "type": "string" } })),
                "Chat": answer("chat.completion", json!({ "message": { "type": "object" } })),
            },
        },
    })
}

fn paths() -> Value {
    let ok = |schema: Value| {
        json!({
            "description": "fine", "content": { "application/json": { "schema": schema } },
        })
    };
    let reference = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let status = || closed(&["status"], json!({ "status": { "type": "string" } }));
    let get = |fine: Value, more: &[&str]| json!({ "get": { "responses": responses(fine, more) } });
    let post = |schema: &str, fine: Value| {
        json!({ "post": {
        "requestBody": {
            "required": true,
            "content": { "application/json": { "schema": reference(schema) } },
        },
        "responses": responses(fine, &["400", "401", "403", "404", "408", "413", "415", "429", "500", "503"]),
    } })
    };
    let streamed = |schema: &str| {
        let mut fine = ok(reference(schema));
        fine["content"]["text/event-stream"] = json!({ "schema": {} });
        fine
    };
    let closed_get = ["401", "403", "503"];
    let mut live = get(ok(status()), &["403"]);
    live["get"]["security"] = json!([]);
    let mut ready = get(ok(status()), &["403", "503"]);
    ready["get"]["security"] = json!([]);
    let text = json!({ "description": "fine", "content": { "text/plain": { "schema": { "type": "string" } } } });
    let html = json!({ "description": "fine", "content": { "text/html": { "schema": { "type": "string" } } } });
    let mut page = get(html, &["403"]);
    page["get"]["security"] = json!([]);
    let mut one = get(ok(reference("Model")), &["401", "403", "404", "503"]);
    one["parameters"] = json!([
        { "name": "model", "in": "path", "required": true, "schema": { "type": "string" } },
    ]);
    let list = object(
        &["object", "data"],
        json!({
            "object": { "const": "list" },
            "data": { "type": "array", "items": reference("Model") },
        }),
    );
    json!({
        "/": page,
        "/livez": live,
        "/readyz": ready,
        "/health": get(ok(status()), &closed_get),
        "/metrics": get(text, &closed_get),
        "/openapi.json": get(ok(json!({ "type": "object" })), &["401", "403"]),
        "/v1/models": get(ok(list), &closed_get),
        "/v1/models/{model}": one,
        "/v1/completions": post("CompletionRequest", streamed("Completion")),
        "/v1/chat/completions": post("ChatRequest", streamed("Chat")),
        "/tokenizer_info": get(ok(json!({ "type": "object" })), &closed_get),
        "/tokenize": post("TokenizeRequest", ok(object(&["count", "max_model_len", "tokens"], json!({
            "count": { "type": "integer" },
            "max_model_len": { "type": "integer" },
            "tokens": { "type": "array", "items": { "type": "integer" } },
            "token_strs": { "type": ["array", "null"], "items": { "type": "string" } },
        })))),
        "/detokenize": post("DetokenizeRequest", ok(object(&["prompt"], json!({
            "prompt": { "type": "string" },
        })))),
    })
}

fn responses(fine: Value, errors: &[&str]) -> Value {
    let mut all = Map::new();
    all.insert("200".into(), fine);
    for status in errors {
        let schema = json!({ "$ref": "#/components/schemas/Error" });
        all.insert(
            (*status).into(),
            json!({
                "description": "an error",
                "content": { "application/json": { "schema": schema } },
            }),
        );
    }
    Value::Object(all)
}

/// An answer of one of the two forms.
fn answer(object_name: &str, own: Value) -> Value {
    let mut choice = json!({
        "index": { "type": "integer" },
        "finish_reason": { "enum": ["stop", "length", "tool_calls"] },
        "stop_reason": { "type": ["string", "integer", "null"] },
        "logprobs": nullable("object"),
        "token_ids": { "type": "array" },
        "prompt_token_ids": { "type": "array" },
        "prompt_tokens": { "type": "array" },
        "reads": { "type": "array" },
    });
    merge(&mut choice, own);
    object(
        &["id", "object", "created", "model", "choices", "usage"],
        json!({
            "id": { "type": "string" },
            "object": { "const": object_name },
            "created": { "type": "integer" },
            "model": { "type": "string" },
            "choices": { "type": "array", "items": object(&["index", "finish_reason"], choice) },
            "usage": { "$ref": "#/components/schemas/Usage" },
        }),
    )
}

/// `stream_options` are for streams.
fn streams(mut schema: Value) -> Value {
    schema["anyOf"] = json!([
        { "properties": { "stream": { "const": true } }, "required": ["stream"] },
        { "properties": { "stream_options": { "type": "null" } } },
    ]);
    schema
}

/// Fields of [`super::ask::Ask`].
fn common_fields() -> Value {
    let tokens = || whole(0, i32::MAX.into());
    let guide = json!({ "type": ["object", "boolean", "string", "null"] });
    let texts = |most: usize| {
        json!({
            "type": ["array", "null"], "minItems": 1, "maxItems": most,
            "items": { "type": "string", "minLength": 1, "maxLength": limits::NAME_CHARS },
        })
    };
    json!({
        "model": name(),
        "temperature": number(0.0, 2.0),
        "top_p": number(0.0, 1.0),
        "top_k": whole(-1, i32::MAX.into()),
        "min_p": number(0.0, 1.0),
        "repetition_penalty": number(0.01, 100.0),
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "logit_bias": {
            "type": ["object", "null"],
            "maxProperties": limits::LOGIT_BIASES,
            "propertyNames": { "pattern": "^[0-9]+$" },
            "additionalProperties": { "type": "number", "minimum": -100, "maximum": 100 },
        },
        "seed": whole(i64::MIN, i64::MAX),
        "max_tokens": tokens(),
        "min_tokens": tokens(),
        "stop": {
            "type": ["string", "array", "null"],
            "minLength": 1, "maxLength": limits::STOP_CHARS, "maxItems": limits::STOPS,
            "items": { "type": "string", "minLength": 1, "maxLength": limits::STOP_CHARS },
        },
        "stop_token_ids": {
            "type": ["array", "null"], "maxItems": limits::STOP_TOKENS, "items": token(),
        },
        "ignore_eos": nullable("boolean"),
        "n": whole(1, limits::N),
        "stream": nullable("boolean"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": nullable("boolean"), "include_obfuscation": nullable("boolean"),
            },
            "additionalProperties": false,
        },
        "skip_special_tokens": nullable("boolean"),
        "include_stop_str_in_output": nullable("boolean"),
        "return_token_ids": nullable("boolean"),
        "return_tokens_as_token_ids": nullable("boolean"),
        "return_reads": nullable("boolean"),
        "cache_salt": { "type": ["string", "null"], "maxLength": limits::NAME_CHARS },
        "response_format": nullable("object"),
        "guided_json": guide,
        "guided_regex": { "type": ["string", "null"], "maxLength": limits::REGEX_BYTES },
        "guided_choice": texts(limits::GUIDED_CHOICES),
        "structured_outputs": nullable("object"),
    })
}

fn completion_fields() -> Value {
    let ids = || json!({ "type": "array", "items": token(), "minItems": 1 });
    let mut fields = common_fields();
    merge(
        &mut fields,
        json!({
            "prompt": { "anyOf": [
                { "type": "string", "minLength": 1 },
                ids(),
                { "type": "array", "items": { "type": "string" }, "minItems": 1, "maxItems": limits::PROMPTS },
                { "type": "array", "items": ids(), "minItems": 1, "maxItems": limits::PROMPTS },
            ] },
            "echo": described(nullable("boolean"), format!(
                "With `logprobs`, the tokens of all prompts times `logprobs` + 1 times `n` are at \
                 most {}.", limits::ECHO_SCORES
            )),
            "best_of": whole(1, limits::N),
            "logprobs": whole(0, limits::TOP_LOGPROBS),
            "add_special_tokens": nullable("boolean"),
            "suffix": { "type": "null" },
        }),
    );
    fields
}

fn conversation_fields() -> Value {
    let part = object(
        &["type", "text"],
        json!({
            "type": { "const": "text" }, "text": { "type": "string" },
        }),
    );
    let call = object(
        &["function"],
        json!({ "function": object(&["name"], json!({
            "name": { "type": "string" }, "arguments": { "type": ["string", "object", "null"] },
        })) }),
    );
    // Told apart, so that whoever makes requests of this need not reason about it.
    let message = |roles: &[&str], required: &[&str], content: &[&str]| {
        closed(
            required,
            json!({
                "role": { "enum": roles },
                "content": { "type": content, "items": part },
                "name": name(),
                "tool_call_id": name(),
                "tool_calls": {
                    "type": ["array", "null"], "maxItems": limits::TOOLS, "items": call,
                },
                "annotations": {}, "refusal": {}, "reasoning_content": {}, "function_call": {},
                "audio": {},
            }),
        )
    };
    let others = ["system", "developer", "user", "tool"];
    let message = json!({ "anyOf": [
        message(&["assistant"], &["role"], &["string", "array", "null"]),
        message(&others, &["role", "content"], &["string", "array"]),
    ] });
    let function = object(
        &["name"],
        json!({
            "name": { "type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$" },
            "description": nullable("string"),
            "parameters": nullable("object"),
        }),
    );
    json!({
        "messages": { "type": "array", "minItems": 1, "maxItems": limits::MESSAGES, "items": message },
        "tools": {
            "type": ["array", "null"], "maxItems": limits::TOOLS,
            "items": object(&["type", "function"], json!({
                "type": { "const": "function" }, "function": function,
            })),
        },
        "tool_choice": { "type": ["string", "object", "null"] },
        "add_generation_prompt": nullable("boolean"),
        "chat_template": { "type": "null" },
        "functions": { "type": "null" },
        "function_call": { "type": "null" },
    })
}

fn chat_fields() -> Value {
    let mut fields = common_fields();
    merge(&mut fields, conversation_fields());
    merge(
        &mut fields,
        json!({
            "max_tokens": whole(1, i32::MAX.into()),
            "max_completion_tokens": whole(1, i32::MAX.into()),
            "logprobs": nullable("boolean"),
            "top_logprobs": whole(0, limits::TOP_LOGPROBS),
            "modalities": { "type": ["array", "null"], "items": { "const": "text" }, "minItems": 1, "maxItems": 1 },
            "audio": { "type": "null" },
            "web_search_options": { "type": "null" },
        }),
    );
    fields
}

fn tokenize_schema() -> Value {
    let mut fields = conversation_fields();
    merge(
        &mut fields,
        json!({
            "model": name(),
            "prompt": nullable("string"),
            "add_special_tokens": nullable("boolean"),
            "return_token_strs": nullable("boolean"),
        }),
    );
    let mut schema = closed(&[], fields);
    schema["anyOf"] = json!([{ "required": ["prompt"] }, { "required": ["messages"] }]);
    schema
}

fn name() -> Value {
    json!({ "type": ["string", "null"], "maxLength": limits::NAME_CHARS })
}

fn token() -> Value {
    json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX })
}

fn nullable(kind: &str) -> Value {
    json!({ "type": [kind, "null"] })
}

fn described(mut schema: Value, text: String) -> Value {
    schema["description"] = text.into();
    schema
}

fn number(least: f64, most: f64) -> Value {
    json!({ "type": ["number", "null"], "minimum": least, "maximum": most })
}

fn whole(least: i64, most: i64) -> Value {
    json!({ "type": ["integer", "null"], "minimum": least, "maximum": most })
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({ "type": "object", "required": required, "properties": properties })
}

fn closed(required: &[&str], properties: Value) -> Value {
    let mut schema = object(required, properties);
    schema["additionalProperties"] = false.into();
    schema
}

fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}
