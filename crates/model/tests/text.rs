//! Tokenizers and chat templates from strangers.

mod common;

use std::fs;

use common::{tokenizer, tokenizer_json};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::tempdir;
use tercet_model::{ChatTemplate, GenerationConfig, Message, Sampling, Tokenizer, copy_companions};

fn refused(json: &Value) -> String {
    match Tokenizer::from_bytes(json.to_string().as_bytes()) {
        Ok(_) => panic!("the tokenizer should be refused"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn text_comes_back_and_special_tokens_are_left_out() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), 258);
    for text in ["", "plain", "日本語 🦀\r\n\tx", "a\u{0}b", "<|end|"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap()).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("a<|end|>", true).unwrap()[1], 257);
    assert_eq!(tokenizer.decode(&[257, 9999]).unwrap(), "");
    assert_eq!(tokenizer.token_id("<|end|>"), Some(257));
    assert_eq!(tokenizer.token(257).as_deref(), Some("<|end|>"));
}

#[test]
fn attack_two_tokens_with_one_id() {
    let mut json = tokenizer_json();
    json["model"]["vocab"]["xæ"] = json!(5);
    let text = refused(&json);
    assert!(text.contains("gives id 5 to both"), "{text}");
}

#[test]
fn attack_tokenizer_files_that_are_not() {
    for bytes in [&b""[..], b"{", b"[]", b"{}", b"\xff\xfe", b"{\"version\": \"1.0\"}", b"null"] {
        assert!(Tokenizer::from_bytes(bytes).is_err());
    }
    assert!(Tokenizer::from_bytes(&[b'['; 200_000]).is_err(), "deep nesting");
    let mut json = tokenizer_json();
    json["model"]["merges"] = json!(["x nothere"]);
    refused(&json);
    let mut json = tokenizer_json();
    json["model"]["vocab"] = json!({});
    json["model"]["merges"] = json!([]);
    json["added_tokens"] = json!([]);
    assert!(refused(&json).contains("no tokens"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever happens to a byte of tokenizer.json, loading it answers and does not panic.
    #[test]
    fn attack_damaged_tokenizer_json(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = tokenizer_json().to_string().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes) {
            let ids = tokenizer.encode("x日<|end|>", true).unwrap_or_default();
            let _ = tokenizer.decode(&ids);
        }
    }
}

/// Replaces the n-th value of a JSON tree, counted depth first.
fn replace(tree: &mut Value, n: &mut usize, by: &Value) {
    if *n == 0 {
        *tree = by.clone();
    }
    *n = n.wrapping_sub(1);
    match tree {
        Value::Array(items) => items.iter_mut().for_each(|v| replace(v, n, by)),
        Value::Object(map) => map.values_mut().for_each(|v| replace(v, n, by)),
        _ => {}
    }
}

/// Every value of a small tokenizer.json replaced by every kind of value.
#[test]
fn attack_tokenizer_json_with_values_of_the_wrong_kind() {
    let mut base = tokenizer_json();
    base["model"]["vocab"] = json!({ "x": 0, "y": 1, "xy": 2, "<|end|>": 3 });
    base["model"]["merges"] = json!([["x", "y"]]);
    base["added_tokens"][0]["id"] = json!(3);
    let kinds = [
        json!(null),
        json!(true),
        json!(-1),
        json!(7),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!("x"),
        json!("ByteLevel"),
        json!("日"),
        json!([]),
        json!({}),
        json!(["x"]),
        json!({ "type": "Sequence", "pretokenizers": [], "decoders": [], "normalizers": [] }),
        json!({ "type": "Split", "pattern": { "Regex": "(" }, "behavior": "Isolated", "invert": false }),
        json!({ "type": "Split", "pattern": { "Regex": "(x+x+)+y" }, "behavior": "Removed", "invert": true }),
        json!({ "type": "Strip", "content": "x", "start": 9, "stop": 9 }),
        json!({ "type": "BPEDecoder", "suffix": "" }),
        json!({ "type": "Replace", "pattern": { "String": "" }, "content": "y" }),
        json!({ "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "Q", "type_id": 0 } }], "pair": [], "special_tokens": {} }),
    ];
    let mut loaded = 0;
    for n in 0..80 {
        for by in &kinds {
            let mut tree = base.clone();
            replace(&mut tree, &mut n.clone(), by);
            if let Ok(tokenizer) = Tokenizer::from_bytes(tree.to_string().as_bytes()) {
                loaded += 1;
                let ids = tokenizer.encode("xyxx日<|end|> ", true).unwrap_or_default();
                let _ = tokenizer.decode(&ids);
                let _ = tokenizer.decode(&[0, 1, 2, 3, 4, u32::MAX]);
            }
        }
    }
    assert!(loaded > 100, "{loaded}");
}

fn template(source: &str) -> tercet_model::Result<ChatTemplate> {
    ChatTemplate::new(source.into(), vec![("bos_token".into(), "<s>".into())])
}

fn render(source: &str) -> Result<String, String> {
    let messages = [Message::new("user", " Hi <b>\"you\"</b> ")];
    let render = |t: ChatTemplate| t.render(&messages, true);
    template(source).and_then(render).map_err(|e| e.to_string())
}

/// SmolLM2's template, and what transformers makes of it.
#[test]
fn a_published_template_renders_as_in_transformers() {
    let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' \
        + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\n' }}{% endif %}";
    let messages = [
        Message::new("user", "Hi"),
        Message::new("assistant", "Yes?"),
        Message::new("user", "Bye"),
    ];
    let template = template(source).unwrap();
    assert_eq!(
        template.render(&messages, true).unwrap(),
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    );
    assert!(template.render(&messages, false).unwrap().ends_with("Bye<|im_end|>\n"));
}

#[test]
fn what_published_templates_use_is_there() {
    for (source, expected) in [
        ("{{ bos_token }}{{ messages[0].content | trim }}", "<s>Hi <b>\"you\"</b>"),
        ("{{ messages[0]['content'].strip().split(' ')[0] }}", "Hi"),
        ("{{ messages[0].content.strip().startswith('Hi') }}", "True"),
        ("{% if tools is not none %}x{% else %}y{% endif %}{% if not tools %}z{% endif %}", "yz"),
        ("{%- for m in messages -%}\n  {{ m.role }}\n{%- endfor -%}", "user"),
        ("  {% if true %}\nline\n  {% endif %}\n", "line\n"),
        (
            "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{{ messages[::-1][0].role }}{{ 'abc'[1:] }}", "userbc"),
        (
            "{{ {'b': [1, 2.5, none, true], 'a': '<é>'} | tojson }}",
            "{\"b\": [1, 2.5, null, true], \"a\": \"<é>\"}",
        ),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ [] | tojson }}{{ {} | tojson(indent=4, ensure_ascii=False) }}", "[]{}"),
        ("{%- generation -%} x {%- endgeneration -%}", "x"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}", "[a]"),
        ("{{ strftime_now('%%') }}", "%"),
    ] {
        assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
    }
    let year: u32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2024);
}

#[test]
fn a_template_refuses_in_its_own_words() {
    let text = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert!(text.contains("roles must alternate"), "{text}");
    assert!(render("{% for %}").unwrap_err().contains("cannot be parsed"));
    assert!(render("{{ strftime_now('%Q') }}").unwrap_err().contains("%Q"));
}

/// A template that makes `ns.x` a list in a list in a list …
fn nested(levels: usize, then: &str) -> String {
    let build = "{% set ns = namespace(x=[]) %}{% for a in range(AA) %}{% for b in range(1000) %}\
        {% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    build.replace("AA", &(levels / 1000).to_string()) + then
}

/// The 116-byte template that costs an engine without fuel a minute, and its relatives: each
/// would take minutes or gigabytes if a step or a method were free.
#[test]
fn attack_template_that_never_ends_or_fills_memory() {
    let start = std::time::Instant::now();
    let mut sources: Vec<String> = [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{{ 'a' * 100000000000 }}",
        "{{ ('a' * 1000000) * 1000000 }}",
        "{{ [1] * 100000000000 }}",
        "{{ ([1] * 1000000) | tojson }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format('x') }}",
        "{{ range(1000000000) | list | length }}",
        "{{ (1000 ** 1000) ** 1000 }}",
        "{{ 'a' | batch(1000000000, 'x') | list }}",
        "{{ 'x' | indent(1000000000) }}",
        "{{ ('\n' * 3000000) | indent(1000000) }}",
        "{{ ('a' * 3000000) | replace('a', 'b' * 3000000) }}",
        "{{ ('a' * 3000000).replace('a', 'b' * 3000000) }}",
        "{{ ('b' * 3000000).join(('a,' * 1000000).split(',')) }}",
        "{{ ('a,' * 1000000).split(',') | map('upper') | join('b' * 3000000) }}",
        "{{ ('a,' * 10000000).split(',') | length }}",
    ]
    .map(String::from)
    .into();
    sources.push(nested(200_000, "{{ ns.x }}"));
    for then in ["{{ ns.x | tojson }}", "{{ ns.x | pprint }}", "{{ debug(ns.x) }}"] {
        sources.push(nested(40_000, then));
    }
    for source in &sources {
        let text = render(source).expect_err(source);
        assert!(text.contains("chat template"), "{text}");
    }
    // As deep as fuel allows: printing, comparing and dropping must not overflow the stack.
    for then in ["{{ ns.x }}", "{{ ns.x == [ns.x] }}", "{{ {ns.x: 1} }}", "{{ ns.x | string }}"] {
        let _ = render(&nested(50_000, then));
    }
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    assert!(ChatTemplate::new("a".repeat(2 << 20), vec![]).is_err());
}

#[test]
fn templates_see_no_files() {
    for source in
        ["{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}"]
    {
        assert!(render(source).is_err(), "{source}");
    }
}

#[test]
fn templates_are_found_where_models_keep_them() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    let load = || Tokenizer::load(dir.path()).unwrap();
    let says = |t: &Tokenizer| t.chat().map(|c| c.render(&[], false).unwrap());
    assert_eq!(says(&load()), None);
    let config = |value: Value| {
        fs::write(dir.path().join("tokenizer_config.json"), value.to_string()).unwrap();
    };
    config(json!({ "chat_template": "A{{ eos_token }}", "eos_token": { "content": "</s>" } }));
    assert_eq!(says(&load()).as_deref(), Some("A</s>"));
    config(json!({ "chat_template": [{ "name": "rag", "template": "B" },
                                     { "name": "default", "template": "C" }] }));
    assert_eq!(says(&load()).as_deref(), Some("C"));
    fs::write(dir.path().join("chat_template.jinja"), "D").unwrap();
    assert_eq!(says(&load()).as_deref(), Some("D"));

    let to = tempdir().unwrap();
    copy_companions(dir.path(), to.path()).unwrap();
    assert_eq!(says(&Tokenizer::load(to.path()).unwrap()).as_deref(), Some("D"));
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 3);

    fs::write(dir.path().join("tokenizer_config.json"), "[]").unwrap();
    let Err(error) = Tokenizer::load(dir.path()) else { panic!("a list is no object") };
    assert!(error.to_string().contains("tokenizer_config.json"), "{error}");
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(Tokenizer::load(dir.path()).is_err());
}

#[test]
fn a_models_own_settings_are_followed() {
    let dir = tempdir().unwrap();
    let load = || GenerationConfig::load(dir.path());
    assert_eq!(load().unwrap(), GenerationConfig::default());
    let write = |text: &str| fs::write(dir.path().join("generation_config.json"), text).unwrap();
    write(
        r#"{"eos_token_id": [3, 4], "temperature": 0.6, "top_k": 20, "top_p": 0.9,
              "do_sample": true, "transformers_version": "5"}"#,
    );
    let config = load().unwrap();
    assert_eq!(config.eos_token_ids, Some(vec![3, 4]));
    let sampling = config.apply(Sampling::default());
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.6, 20, 0.9));
    write(r#"{"do_sample": false, "eos_token_id": 7}"#);
    let config = load().unwrap();
    assert_eq!(config.eos_token_ids, Some(vec![7]));
    assert_eq!(config.apply(Sampling::default()).temperature, 0.0);
    write("{\"top_k\": \"many\"}");
    assert!(load().unwrap_err().to_string().contains("generation_config.json"));
}

/// Together, in order, the bytes of tokens are those of the text they were made of.
#[test]
fn the_bytes_of_tokens_are_those_of_their_text() {
    let tokenizer = tokenizer();
    let bytes = tokenizer.token_bytes();
    assert_eq!(bytes.len(), 258);
    let text = "x日本語 \n\0🦀";
    let ids = tokenizer.encode(text, false).unwrap();
    let joined: Vec<u8> = ids.iter().flat_map(|&id| bytes[id as usize].bytes.clone()).collect();
    assert_eq!(joined, text.as_bytes());
    assert!(bytes[257].special && !bytes[0].special);
    assert_eq!(bytes[257].bytes, b"<|end|>");
    assert_eq!(tokenizer.decode_all(&[257]).unwrap(), "<|end|>");

    let llama = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "added_tokens": [],
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ]},
        "model": { "type": "BPE", "byte_fallback": true, "unk_token": null, "merges": [],
            "vocab": { "<0xE6>": 0, "▁the": 1, "<0xZZ>": 2, "a": 5 } },
    });
    let bytes = Tokenizer::from_bytes(llama.to_string().as_bytes()).unwrap().token_bytes();
    let want: [&[u8]; 6] = [&[0xe6], b" the", b"<0xZZ>", b"", b"", b"a"];
    assert!(bytes.iter().map(|b| b.bytes.as_slice()).eq(want));
}

#[test]
fn tools_and_calls_reach_the_template() {
    let source = "{% for t in tools %}{{ t.function.name }}:{{ t | tojson }}{% endfor %}\
                  {% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}\
                  [{{ c.function.arguments.x }}]{% endfor %}{% endfor %}";
    let template = ChatTemplate::new(source.into(), Vec::new()).unwrap();
    assert!(template.knows_tools());
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let messages = json!([
        { "role": "user", "content": "" },
        { "role": "assistant", "tool_calls": [{ "function": { "arguments": { "x": 3 } } }] },
    ]);
    let text = template.render_with_tools(&messages, Some(&tools), true).unwrap();
    assert_eq!(
        text,
        format!("f:{}userassistant[3]", r#"{"type": "function", "function": {"name": "f"}}"#)
    );
    let none = template.render_with_tools(&messages, None, true).unwrap();
    assert_eq!(none, "userassistant[3]");
    let plain = ChatTemplate::new("{{ messages[0].content }}".into(), Vec::new()).unwrap();
    assert!(!plain.knows_tools());
}
