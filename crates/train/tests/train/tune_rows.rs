//! Rows to examples: what is learnt, what is cut, what is left out and what is refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tercet_model::{GenerationConfig, ModelConfig, Tokenizer};
use tercet_train::config::{BadRow, RowsConfig};
use tercet_train::tune::encode::messages;
use tercet_train::tune::sft::{SftRows, rows};
use tercet_train::tune::{Encoder, Example, Part};
use tercet_train::{Error, Result};

use crate::tiny_chat::{CHATML, EOS, ids, model, tokenizer, write_model, write_rows};

/// A model folder, and what encodes its rows.
struct Room {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
    model: ModelConfig,
    generation: GenerationConfig,
}

impl Room {
    fn new() -> Self {
        Self::with(CHATML, &tokenizer(&[], &Value::Null))
    }

    fn with(template: &str, tokenizer: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path(), 1);
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        Self {
            tokenizer: Tokenizer::load(folder.path()).unwrap(),
            model: model(1).config().clone(),
            generation: GenerationConfig::load(folder.path()).unwrap(),
            folder,
        }
    }

    fn encoder(&self) -> Encoder<'_> {
        Encoder::new(&self.tokenizer, &self.model, &self.generation).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Reads rows that are written to a file first.
    fn read(&self, list: &[Value], change: impl FnOnce(&mut RowsConfig)) -> Result<SftRows> {
        let path = self.path("rows.jsonl");
        write_rows(&path, list);
        self.read_file(&path, change)
    }

    fn read_file(&self, path: &Path, change: impl FnOnce(&mut RowsConfig)) -> Result<SftRows> {
        let mut config = RowsConfig {
            paths: vec![path.to_str().unwrap().to_owned()],
            context: 64,
            ..RowsConfig::default()
        };
        change(&mut config);
        rows(&config, &self.encoder(), &AtomicBool::new(false))
    }
}

/// Pieces of text and whether each is learnt, as one example.
fn of(pieces: &[(&str, bool)]) -> Example {
    let mut example = Example::default();
    for (text, learnt) in pieces {
        let piece = ids(text);
        example.learnt.extend(vec![*learnt; piece.len()]);
        example.ids.extend(piece);
    }
    example
}

fn talk(turns: &[(&str, &str)]) -> Vec<Value> {
    turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}

fn encode(room: &Room, turns: &[(&str, &str)]) -> Result<Example, String> {
    room.encoder().messages(&messages(&talk(turns), "messages").unwrap())
}

fn text(text: &str) -> Part {
    Part::Text(text.to_owned())
}

/// The text of an error that must come.
fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this should be refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn of_a_conversation_the_assistants_turns_with_their_end_are_learnt_and_nothing_else() {
    let room = Room::new();
    let found = encode(
        &room,
        &[
            ("system", "be"),
            ("user", "hi"),
            ("assistant", "yo"),
            ("user", "more"),
            ("assistant", "ok then"),
            ("user", "a last word nobody answers"),
        ],
    );
    let expected = of(&[
        ("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n", false),
        ("<|im_start|>assistant\n", false),
        ("yo<|im_end|>\n", true),
        ("<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n", false),
        ("ok then<|im_end|>\n", true),
    ]);
    assert_eq!(found, Ok(expected));
}

#[test]
fn an_assistant_that_speaks_first_or_twice_is_learnt_each_time() {
    let room = Room::new();
    let found = encode(&room, &[("assistant", "a"), ("assistant", "b"), ("user", "c")]);
    let opening = ("<|im_start|>assistant\n", false);
    let expected = of(&[opening, ("a<|im_end|>\n", true), opening, ("b<|im_end|>\n", true)]);
    assert_eq!(found, Ok(expected));
    let silent = encode(&room, &[("user", "a"), ("system", "b")]).unwrap_err();
    assert!(silent.contains("no turn of the assistant"), "{silent}");
    assert!(encode(&room, &[]).is_err());
}

#[test]
fn of_a_pair_the_completion_is_learnt_and_of_a_text_everything_with_one_end_token() {
    let room = Room::new();
    let encoder = room.encoder();
    let end = ("<|endoftext|>", true);
    let pair = |a: &str, b: &str| encoder.pair(&text(a), &text(b));
    assert_eq!(pair("2+2=", "4"), Ok(of(&[("2+2=", false), ("4", true), end])));
    assert_eq!(pair("", "4"), Ok(of(&[("4", true), end])));
    assert_eq!(encoder.text("all of it"), Ok(of(&[("all of it", true), end])));
    // Rows often bring the end token themselves.
    let ended = pair("2+2=", "4<|endoftext|>").unwrap();
    assert_eq!(ended, of(&[("2+2=", false), ("4", true), end]));
    assert_eq!(encoder.text("x<|endoftext|>"), encoder.text("x"));
    for blank in ["", " ", "\n\t "] {
        assert!(pair("a", blank).unwrap_err().contains("empty completion"), "{blank:?}");
        assert!(encoder.text(blank).is_err(), "{blank:?}");
    }
}

#[test]
fn marks_that_a_tokenizer_adds_are_not_learnt_but_the_end_is_and_stands_once() {
    let mark = json!({"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}});
    let body = json!({"Sequence": {"id": "A", "type_id": 0}});
    let added = |single: Vec<&Value>| {
        json!({"type": "TemplateProcessing", "single": single, "pair": single,
               "special_tokens": {"<|endoftext|>":
                   {"id": "<|endoftext|>", "ids": [EOS], "tokens": ["<|endoftext|>"]}}})
    };
    let expected =
        of(&[("<|endoftext|>", false), ("ask", false), ("say", true), ("<|endoftext|>", true)]);
    for single in [vec![&mark, &body], vec![&mark, &body, &mark]] {
        let room = Room::with(CHATML, &tokenizer(&[], &added(single)));
        let pair = room.encoder().pair(&text("ask"), &text("say"));
        assert_eq!(pair, Ok(expected.clone()));
        // A template writes all marks itself.
        let talk = encode(&room, &[("user", "hi"), ("assistant", "yo")]).unwrap();
        assert!(!talk.ids.contains(&EOS), "{:?}", talk.ids);
    }
}

#[test]
fn a_token_across_the_border_counts_where_it_begins() {
    // "ab" is one token, 259.
    let room = Room::with(CHATML, &tokenizer(&["ab"], &Value::Null));
    let pair = room.encoder().pair(&text("xa"), &text("bc")).unwrap();
    assert_eq!(pair.ids, [i32::from(b'x'), 259, i32::from(b'c'), EOS]);
    assert_eq!(pair.learnt, [false, false, true, true]);
}

#[test]
fn letters_of_many_bytes_do_not_move_the_border() {
    let room = Room::new();
    let (prompt, completion) = ("Größe 🦀 日本", "ναί é");
    let pair = room.encoder().pair(&text(prompt), &text(completion)).unwrap();
    assert_eq!(pair.ids.len(), prompt.len() + completion.len() + 1);
    let learnt = pair.learnt.iter().position(|learnt| *learnt);
    assert_eq!(learnt, Some(prompt.len()));
    assert_eq!(pair.counted(), completion.len() + 1);
}

#[test]
fn contents_in_parts_are_joined_and_other_messages_are_refused_by_number() {
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "h"},
        {"type": "text", "text": "i"}]}, {"role": "assistant", "content": "yo"}]);
    let room = Room::new();
    let found = room.read(&[json!({"messages": parts})], |_| {}).unwrap();
    let plain = encode(&room, &[("user", "hi"), ("assistant", "yo")]).unwrap();
    assert_eq!(found.train, [plain]);
    for (bad, said) in [
        (json!([{"role": "user", "content": [{"type": "image", "url": "x"}]}]), "only text"),
        (json!([{"role": "user", "content": "a"}, {"content": "b"}]), "message 2 without a `role`"),
        (json!([{"role": "user"}]), "message 1 without a `content`"),
        (json!([{"role": "user", "content": null}]), "message 1 without a `content`"),
        (json!([{"role": 1, "content": "a"}]), "without a `role`"),
        (json!(["hi"]), "without a `role`"),
        (json!("hi"), "not a list"),
        (json!({"role": "user"}), "not a list"),
    ] {
        let text = refusal(room.read(&[json!({"messages": bad})], |_| {}));
        assert!(text.contains(said) && text.contains("rows.jsonl, line 1"), "{text}");
    }
}

#[test]
fn a_bad_row_stops_with_its_file_and_line_or_is_dropped_counted_and_listed() {
    let good = json!({"prompt": "a", "completion": "b"});
    let bad = [
        (json!({"prompt": "a"}), "has no `completion`"),
        (json!({"completion": "a"}), "has no `prompt`"),
        (json!({"prompt": "a", "completion": 4}), "neither a string nor a list"),
        (json!({"prompt": "a", "completion": null}), "neither a string nor a list"),
        (json!({"prompt": "a", "completion": "  "}), "has an empty completion"),
        (
            json!({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}),
            "answers a string",
        ),
        (json!({"text": ["a"]}), "has neither"),
        (json!({}), "has neither"),
        (json!({"messages": []}), "no turn of the assistant"),
    ];
    let room = Room::new();
    for (row, said) in &bad {
        let text = refusal(room.read(&[good.clone(), row.clone()], |_| {}));
        for part in ["rows.jsonl, line 2", said, "data.bad_rows"] {
            assert!(text.contains(part), "{row}: {text}");
        }
    }
    let mut all = vec![good.clone()];
    all.extend(bad.iter().map(|(row, _)| row.clone()));
    all.push(json!({"prompt": "x".repeat(100), "completion": "never seen"}));
    all.push(json!({"prompt": "xy", "completion": "z".repeat(100)}));
    let found = room.read(&all, |config| config.bad_rows = BadRow::Drop).unwrap();
    let count = &found.count;
    assert_eq!((count.rows, count.kept, count.dropped(), count.truncated()), (12, 2, 10, 1));
    let cut = &found.train[1];
    assert_eq!((cut.ids.len(), cut.counted(), cut.ids.last()), (64, 62, Some(&i32::from(b'z'))));

    let list = room.path("list.jsonl");
    count.write(&list).unwrap();
    let lines: Vec<Value> = std::fs::read_to_string(&list)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 11);
    for (i, (line, (_, said))) in lines.iter().zip(&bad).enumerate() {
        assert_eq!((&line["line"], &line["was"]), (&json!(i + 2), &json!("dropped")));
        assert!(line["reason"].as_str().unwrap().contains(said), "{line}");
        assert!(line["file"].as_str().unwrap().ends_with("rows.jsonl"), "{line}");
    }
    assert_eq!((&lines[9]["line"], &lines[9]["was"]), (&json!(11), &json!("dropped")));
    assert!(lines[9]["reason"].as_str().unwrap().contains("fills data.context"));
    assert_eq!((&lines[10]["line"], &lines[10]["was"]), (&json!(12), &json!("truncated")));
    assert!(lines[10]["reason"].as_str().unwrap().contains("103 tokens"));

    let nothing = refusal(room.read(&[json!({})], |config| config.bad_rows = BadRow::Drop));
    assert!(nothing.contains("nothing is left to train on: 0 of 1 rows"), "{nothing}");
}

#[test]
fn lines_that_are_no_objects_and_files_without_rows_are_refused() {
    let room = Room::new();
    let path = room.path("odd.jsonl");
    for (content, said) in [
        (&b"{\"text\": \"a\"}\n\n[1]\n"[..], "odd.jsonl, line 3 is JSON but not an object"),
        (b"{\"text\": \"a\"}\n{\"text\": \"a", "line 2 is not a JSON object"),
        (b"{\"text\": NaN}\n", "line 1 is not a JSON object"),
        (b"{\"text\": \"\xFF\"}\n", "line 1 is not a JSON object"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
    ] {
        std::fs::write(&path, content).unwrap();
        let text = refusal(room.read_file(&path, |_| {}));
        assert!(text.contains(said), "{text}");
    }
    std::fs::write(room.path("rows.txt"), "{\"text\": \"a\"}").unwrap();
    let text = refusal(room.read_file(&room.path("rows.txt"), |_| {}));
    assert!(text.contains("is not a .jsonl file"), "{text}");
    assert!(refusal(room.read_file(&room.path("absent.jsonl"), |_| {})).contains("absent.jsonl"));
    // Cut to nothing, which a file packed of nothing is not.
    for name in ["none.jsonl.gz", "none.jsonl.zst"] {
        std::fs::write(room.path(name), b"").unwrap();
        let text = refusal(room.read_file(&room.path(name), |_| {}));
        assert!(text.contains(name) && text.contains("damaged or cut short"), "{text}");
    }
    // A byte order mark, Windows line ends and no line end at the end are no faults.
    std::fs::write(&path, "\u{FEFF}{\"text\": \"a\"}\r\n{\"text\": \"b\"}").unwrap();
    assert_eq!(room.read_file(&path, |_| {}).unwrap().train.len(), 2);
}

#[test]
fn packed_files_give_the_rows_of_plain_ones() {
    let room = Room::new();
    let list: Vec<Value> = (0..5).map(|i| json!({"text": format!("row {i}")})).collect();
    let plain = room.read(&list, |_| {}).unwrap();
    let text = std::fs::read(room.path("rows.jsonl")).unwrap();
    let file = std::fs::File::create(room.path("rows.jsonl.gz")).unwrap();
    let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::default());
    std::io::Write::write_all(&mut gz, &text).unwrap();
    gz.finish().unwrap();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let frame = ruzstd::encoding::compress_to_vec(&text[..], level);
    std::fs::write(room.path("rows.jsonl.zst"), &frame).unwrap();
    for name in ["rows.jsonl.gz", "rows.jsonl.zst"] {
        let packed = room.read_file(&room.path(name), |_| {}).unwrap();
        assert!(packed.train == plain.train && packed.key == plain.key, "{name}");
    }
    std::fs::write(room.path("rows.jsonl.zst"), &frame[..frame.len() - 3]).unwrap();
    let cut = refusal(room.read_file(&room.path("rows.jsonl.zst"), |_| {}));
    assert!(cut.contains("rows.jsonl.zst"), "{cut}");
}

#[test]
fn templates_that_rewrite_loop_or_raise_fail_at_the_row() {
    let two = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    // As templates that strip the thoughts of earlier turns do.
    let rewriting = "{% for m in messages %}<|im_start|>{{ m.role }} \
        {% if loop.last %}{{ m.content }}{% else %}…{% endif %}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant {% endif %}";
    // Opens thoughts before an answer that an answer of the past does not have.
    let thinking = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\
        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant <think>{% endif %}";
    let looping = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
    let raising = "{{ raise_exception('roles must alternate') }}";
    for (template, said) in [
        (rewriting, "are rendered differently once others follow"),
        (thinking, "does not begin with what"),
        (looping, "limit of steps"),
        (raising, "roles must alternate"),
        ("{{ messages[0].content.nothing() }}", "nothing"),
    ] {
        let room = Room::with(template, &tokenizer(&[], &Value::Null));
        let begun = std::time::Instant::now();
        let text = refusal(room.read(&[json!({"messages": talk(&two)})], |_| {}));
        assert!(text.contains(said) && text.contains("line 1"), "{text}");
        assert!(begun.elapsed().as_secs() < 20, "{said}: took {:?}", begun.elapsed());
    }
    // One turn is rendered the same way however it goes on.
    let room = Room::with(rewriting, &tokenizer(&[], &Value::Null));
    assert!(encode(&room, &two[..1]).is_err());

    let room = Room::new();
    std::fs::remove_file(room.path("chat_template.jinja")).unwrap();
    let tokenizer = Tokenizer::load(room.folder.path()).unwrap();
    let room = Room { tokenizer, ..room };
    let text = refusal(room.read(&[json!({"messages": talk(&two)})], |_| {}));
    assert!(text.contains("no chat template") && text.contains("line 1"), "{text}");
}

#[test]
fn a_template_that_does_not_open_the_turn_learns_what_it_adds() {
    // No generation prompt: the header of the turn is part of what is learnt.
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{% endfor %}";
    let room = Room::with(template, &tokenizer(&[], &Value::Null));
    let found = encode(&room, &[("user", "a"), ("assistant", "b")]);
    assert_eq!(found, Ok(of(&[("<|im_start|>user:a", false), ("<|im_start|>assistant:b", true)])));
}

#[test]
fn a_model_without_an_end_token_or_with_one_it_does_not_have_is_refused() {
    let mut room = Room::new();
    room.generation.eos_token_ids = None;
    let missing = Encoder::new(&room.tokenizer, &room.model, &room.generation).err().unwrap();
    assert!(missing.to_string().contains("eos_token_id"), "{missing}");
    for beyond in [264, u32::MAX] {
        room.generation.eos_token_ids = Some(vec![beyond]);
        let wrong = Encoder::new(&room.tokenizer, &room.model, &room.generation).err();
        let wrong = wrong.unwrap_or_else(|| panic!("{beyond} was taken")).to_string();
        assert!(wrong.contains("eos_token_id") && wrong.contains(&beyond.to_string()), "{wrong}");
    }
    room.model.eos_token_ids = vec![7];
    room.generation.eos_token_ids = None;
    assert_eq!(room.encoder().eos(), 7);
    let smaller = ModelConfig { vocab_size: 100, ..room.model.clone() };
    assert!(matches!(
        Encoder::new(&room.tokenizer, &smaller, &room.generation).err(),
        Some(Error::Model(_) | Error::Tokenizer(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// A byte is a token here, so what is learnt can be read back.
    #[test]
    fn of_any_conversation_what_is_learnt_is_what_the_assistant_says(
        turns in prop::collection::vec((0usize..3, "\\PC{0,12}"), 1..6),
    ) {
        prop_assume!(turns.iter().all(|(_, text)| !text.contains("<|")));
        let roles = ["system", "user", "assistant"];
        let turns: Vec<(&str, &str)> =
            turns.iter().map(|(role, text)| (roles[*role], text.as_str())).collect();
        let room = Room::new();
        let said: Vec<String> = turns
            .iter()
            .filter(|(role, _)| *role == "assistant")
            .map(|(_, text)| format!("{text}<|im_end|>\n"))
            .collect();
        match encode(&room, &turns) {
            Err(_) => prop_assert!(said.is_empty()),
            Ok(example) => {
                let learnt = example.ids.iter().zip(&example.learnt).filter(|(_, is)| **is);
                let mut bytes = Vec::new();
                for (id, _) in learnt {
                    match u8::try_from(*id) {
                        Ok(byte) => bytes.push(byte),
                        Err(_) => bytes.extend(b"<|im_end|>"),
                    }
                }
                prop_assert_eq!(String::from_utf8(bytes).unwrap(), said.concat());
            }
        }
    }

    #[test]
    fn any_row_makes_a_sound_example_or_is_refused(
        keys in prop::collection::vec(0usize..4, 0..4),
        texts in prop::collection::vec("[a-c<|>]{0,5}|\\PC{0,30}|<.endoftext.>", 4),
        shapes in prop::collection::vec(0usize..5, 4),
    ) {
        let names = ["messages", "prompt", "completion", "text"];
        let mut row = Map::new();
        for key in keys {
            let text = &texts[key];
            let value = match shapes[key] {
                0 => json!(text),
                1 => json!([{"role": "assistant", "content": text}]),
                2 => json!([{"role": "user", "content": [{"text": text}]},
                            {"role": "assistant", "content": text}]),
                3 => json!([text, null]),
                _ => json!({"role": "user", "content": 3}),
            };
            row.insert(names[key].to_owned(), value);
        }
        let room = Room::new();
        match room.read(&[Value::Object(row)], |config| config.context = 16) {
            Err(error) => prop_assert!(error.is_users() && !error.to_string().is_empty()),
            Ok(found) => for example in found.train {
                prop_assert!(example.counted() > 0 && example.ids.len() <= 16);
                prop_assert_eq!(example.ids.len(), example.learnt.len());
                prop_assert!(example.ids.iter().all(|id| (0..259).contains(id)));
            },
        }
    }
}

#[test]
fn held_out_rows_stay_held_out_whatever_stands_around_them() {
    let room = Room::new();
    let row = |i: usize| json!({"prompt": format!("what is {i}?"), "completion": format!("{i}")});
    let list: Vec<Value> = (0..40).chain(0..40).map(row).collect();
    let split = |list: &[Value], share| {
        let found = room.read(list, |config: &mut RowsConfig| config.validation = share).unwrap();
        (found.train, found.validation)
    };
    let (train, held) = split(&list, 0.3);
    assert!((4..=40).contains(&held.len()) && train.len() + held.len() == 80, "{}", held.len());
    assert!(held.iter().all(|example| !train.contains(example)), "equal rows fall on one side");
    let reversed: Vec<Value> = list[..40].iter().rev().cloned().collect();
    let (_, fewer) = split(&reversed, 0.3);
    assert!(fewer.len() * 2 == held.len() && fewer.iter().all(|e| held.contains(e)));
    // A larger share holds out the same rows and others.
    let (_, more) = split(&list, 0.6);
    assert!(more.len() > held.len() && held.iter().all(|example| more.contains(example)));
    assert!(split(&list, 0.0).1.is_empty());

    let apart = room.path("apart.jsonl");
    write_rows(&apart, &list[..3]);
    let found = room
        .read(&list[5..9], |config| {
            config.validation = 0.9;
            config.validation_paths = vec![apart.to_str().unwrap().to_owned()];
        })
        .unwrap();
    assert_eq!((found.train.len(), found.validation.len(), found.count.rows), (4, 3, 7));
}
