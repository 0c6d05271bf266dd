//! Rows to pairs: prompts, answers, Δ, and what is dropped or refused.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tercet_align::delta::{DeltaConfig, DeltaSource, NegativeDelta};
use tercet_align::pairs::{Pair, PairRule, Pairs, read_pairs};
use tercet_model::{GenerationConfig, Tokenizer};
use tercet_train::Result;
use tercet_train::config::{BadRow, RowsConfig};
use tercet_train::tune::{Encoder, Example};

use crate::tiny_chat::{EOS, ids, model, tokenizer, write_model, write_rows};

const COLUMN: DeltaConfig = DeltaConfig {
    source: DeltaSource::Column,
    negative: NegativeDelta::Error,
    value: None,
    scale: None,
    offset: None,
};

/// What is asked of the rows besides their words.
struct Ask {
    delta: Option<DeltaConfig>,
    bad_rows: BadRow,
    context: usize,
    validation: f64,
    merges: &'static [&'static str],
}

impl Default for Ask {
    fn default() -> Self {
        Self { delta: None, bad_rows: BadRow::Error, context: 64, validation: 0.0, merges: &[] }
    }
}

fn read(rows: &[Value], ask: &Ask) -> Result<Pairs> {
    let room = tempfile::tempdir().unwrap();
    write_model(room.path(), 1);
    std::fs::write(room.path().join("tokenizer.json"), tokenizer(ask.merges, &Value::Null))
        .unwrap();
    let path = room.path().join("rows.jsonl");
    write_rows(&path, rows);
    let data = RowsConfig {
        paths: vec![path.to_str().unwrap().to_owned()],
        validation: ask.validation,
        context: ask.context,
        bad_rows: ask.bad_rows,
        ..RowsConfig::default()
    };
    let tokenizer = Tokenizer::load(room.path()).unwrap();
    let generation = GenerationConfig::load(room.path()).unwrap();
    let encoder = Encoder::new(&tokenizer, model(1).config(), &generation).unwrap();
    let delta = ask.delta.clone().unwrap_or_default();
    let rule = PairRule { data: &data, delta: &delta, needs_delta: ask.delta.is_some() };
    read_pairs(&rule, &encoder, &AtomicBool::new(false))
}

fn one(row: Value) -> Pair {
    let mut pairs = read(&[row], &Ask::default()).unwrap();
    assert_eq!(pairs.train.len(), 1);
    pairs.train.remove(0)
}

fn refusal(rows: &[Value], ask: &Ask) -> String {
    read(rows, ask).err().unwrap_or_else(|| panic!("{rows:?} was taken")).to_string()
}

fn answer(prompt: &str, words: &str) -> Example {
    Example::completion(&ids(prompt), &ids(words))
}

fn row(delta: Value) -> Value {
    json!({"prompt": "a", "chosen": "b", "rejected": "c", "delta": delta})
}

#[test]
fn prompts_given_or_implicit_of_strings_or_messages_make_the_same_pairs() {
    let expected = [answer("Is it?", " yes<|endoftext|>"), answer("Is it?", " no<|endoftext|>")];
    for row in [
        json!({"prompt": "Is it?", "chosen": " yes", "rejected": " no"}),
        json!({"chosen": "Is it? yes", "rejected": "Is it? no"}),
    ] {
        let pair = one(row);
        assert_eq!([pair.chosen, pair.rejected], expected);
        assert_eq!(pair.delta, None);
    }
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let ask = turn("user", "hi");
    let (yes, no) = (turn("assistant", "yes"), turn("assistant", "no"));
    let opening = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
    let expected = [answer(opening, "yes<|im_end|>\n"), answer(opening, "no<|im_end|>\n")];
    for row in [
        json!({"prompt": [ask], "chosen": [yes], "rejected": [no]}),
        json!({"prompt": [ask], "chosen": "yes", "rejected": "no"}),
        json!({"chosen": [ask, yes], "rejected": [ask, no]}),
        // As HuggingFaceH4/ultrafeedback_binarized has it.
        json!({"prompt": "hi", "chosen": [ask, yes], "rejected": [ask, no]}),
    ] {
        let pair = one(row);
        assert_eq!([pair.chosen, pair.rejected], expected);
    }
}

#[test]
fn where_answers_part_inside_a_token_the_whole_token_is_learnt() {
    // "xg" and "xb" are one token each, and "x" stands in the shared beginning.
    let ask = Ask { merges: &["xg", "xb"], ..Ask::default() };
    for row in [
        json!({"chosen": "ask xgood", "rejected": "ask xbad"}),
        json!({"prompt": "ask x", "chosen": "good", "rejected": "bad"}),
    ] {
        let pair = &read(&[row], &ask).unwrap().train[0];
        let prompt = ids("ask ");
        let with = |token: i32, rest: &str| {
            Example::completion(&prompt, &[&[token][..], &ids(rest), &[EOS]].concat())
        };
        assert_eq!(pair.chosen, with(259, "ood"), "the token that tells them apart");
        assert_eq!(pair.rejected, with(260, "ad"));
    }
}

#[test]
fn pairs_that_teach_nothing_are_refused_by_row_or_dropped_and_counted() {
    let good = json!({"prompt": "a", "chosen": "b", "rejected": "c"});
    let long = "x".repeat(100);
    let refused = [
        (json!({"prompt": "a", "chosen": "b", "rejected": "b"}), "equal to the rejected one"),
        (json!({"prompt": "a", "chosen": "b", "rejected": "b<|endoftext|>"}), "once tokenized"),
        (json!({"prompt": "a", "chosen": "", "rejected": "b"}), "chosen answer) has an empty"),
        (json!({"prompt": "a", "chosen": "b", "rejected": " "}), "rejected answer) has an empty"),
        (json!({"chosen": "a b", "rejected": "a b c"}), "chosen answer) has an empty"),
        (json!({"prompt": "a", "chosen": "b"}), "has no `rejected`"),
        (json!({"prompt": 3, "chosen": "b", "rejected": "c"}), "`prompt` that is neither"),
        (json!({"chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}), "a string"),
        (
            json!({"chosen": [{"role": "user", "content": "a"}],
                "rejected": [{"role": "user", "content": "b"}]}),
            "share no first turn",
        ),
        (json!({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"}), "message 1"),
        (
            json!({"prompt": "else", "chosen": [{"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "a"},
                    {"role": "assistant", "content": "c"}]}),
            "none of the turns",
        ),
        (json!({"prompt": "a", "chosen": "b", "rejected": "c", "delta": "NaN"}), "\"NaN\", not"),
        (
            json!({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": []}),
            "not a number",
        ),
    ];
    for (row, said) in &refused {
        let text = refusal(&[good.clone(), row.clone()], &Ask::default());
        for part in ["rows.jsonl, line 2", said, "data.bad_rows"] {
            assert!(text.contains(part), "{row}: {text}");
        }
    }
    let mut all: Vec<Value> = refused.iter().map(|(row, _)| row.clone()).collect();
    all.push(good);
    // Too long for the context is no fault of a row.
    all.push(json!({"prompt": long, "chosen": "b", "rejected": "c"}));
    all.push(json!({"prompt": "a", "chosen": format!("{long}b"), "rejected": format!("{long}c")}));
    all.push(json!({"prompt": "a", "chosen": format!("b{long}"), "rejected": "c"}));
    let found = read(&all, &Ask { bad_rows: BadRow::Drop, ..Ask::default() }).unwrap();
    let count = &found.count;
    assert_eq!((count.rows, count.kept, count.dropped(), count.truncated()), (17, 2, 15, 1));
    assert_eq!(found.train[1].chosen.ids.len(), 64);
    let text = count.to_string();
    assert!(text.starts_with("2 of 17 rows; dropped 15 ("), "{text}");
    for (row, said) in [(14, "fills data.context"), (15, "differ only beyond data.context")] {
        let text = refusal(&all[row..=row], &Ask::default());
        assert!(text.contains(said) && text.contains("0 of 1 rows"), "{text}");
    }
}

#[test]
fn delta_comes_from_its_column_from_rewards_or_from_scores() {
    let row = json!({"prompt": "a", "chosen": "b", "rejected": "c", "delta": 0.25,
                     "score_chosen": 0.75, "score_rejected": 0.25});
    let with = |source, scale, offset| {
        let delta = DeltaConfig { source, scale, offset, ..DeltaConfig::default() };
        let ask = Ask { delta: Some(delta), ..Ask::default() };
        let found = read(std::slice::from_ref(&row), &ask).unwrap();
        assert_eq!(
            (found.scored, &found.raw_deltas[..]),
            (1, &[found.train[0].delta.unwrap()][..])
        );
        found.raw_deltas[0]
    };
    assert_eq!(with(DeltaSource::Column, None, None), 0.25);
    assert_eq!(with(DeltaSource::Identity, None, None), 0.5);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let logistic = with(DeltaSource::Logistic, Some(2.0), Some(0.5));
    assert!((logistic - (sigmoid(0.5) - sigmoid(-0.5))).abs() < 1e-15, "{logistic}");
    // Without an objective that asks, Δ is counted and not kept.
    let found = read(std::slice::from_ref(&row), &Ask::default()).unwrap();
    assert_eq!((found.scored, found.train[0].delta), (1, None));
}

#[test]
fn a_pair_without_delta_or_with_nonsense_for_it_is_an_error_that_names_its_row() {
    let ask = |bad_rows| Ask { delta: Some(COLUMN), bad_rows, ..Ask::default() };
    let without = json!({"prompt": "a", "chosen": "b", "rejected": "c"});
    let scores = json!({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1,
                        "score_rejected": 0});
    let nonsense = [
        (without.clone(), "Δ is missing"),
        (scores, "Δ is missing"),
        (row(Value::Null), "Δ is missing"),
        (row(json!("NaN")), "not a number"),
        (row(json!("0.5")), "not a number"),
        (row(json!(true)), "not a number"),
        (row(json!(1.5)), "Δ is 1.5"),
        (row(json!(-1.5)), "Δ is -1.5"),
        (row(json!(-0.5)), "prefers the rejected answer"),
    ];
    for (bad, said) in &nonsense {
        let text = refusal(&[row(json!(0.5)), bad.clone()], &ask(BadRow::Error));
        assert!(text.contains(said) && text.contains("rows.jsonl, line 2"), "{bad}: {text}");
    }
    // Half the rows: never trained as if Δ were 1.
    let half: Vec<Value> =
        (0..8).map(|i| if i % 2 == 0 { row(json!(0.5)) } else { without.clone() }).collect();
    let text = refusal(&half, &ask(BadRow::Error));
    assert!(text.contains("line 2") && text.contains("never guessed"), "{text}");
    let found = read(&half, &ask(BadRow::Drop)).unwrap();
    assert_eq!((found.train.len(), found.count.dropped(), found.scored), (4, 4, 4));
    assert!(found.train.iter().all(|pair| pair.delta == Some(0.5)));
}

#[test]
fn negative_deltas_follow_the_policy_and_are_counted() {
    let list = [row(json!(0.5)), row(json!(-0.25)), row(json!(0.0)), row(json!(-0.01))];
    let with = |negative| {
        let delta = DeltaConfig { negative, ..COLUMN };
        read(&list, &Ask { delta: Some(delta), ..Ask::default() }).unwrap()
    };
    let deltas = |found: &Pairs| -> Vec<f64> {
        found.train.iter().map(|pair| pair.delta.unwrap()).collect()
    };
    let clip = with(NegativeDelta::Clip);
    assert_eq!((deltas(&clip), clip.deltas.clipped), (vec![0.5, 0.0, 0.0, 0.0], 2));
    assert_eq!(clip.train[1].chosen, clip.train[0].chosen);
    let dropped = with(NegativeDelta::Drop);
    assert_eq!((deltas(&dropped), dropped.deltas.dropped), (vec![0.5, 0.0], 2));
    assert_eq!((dropped.count.dropped(), dropped.count.kept), (2, 2));
    let swap = with(NegativeDelta::Swap);
    assert_eq!((deltas(&swap), swap.deltas.swapped), (vec![0.5, 0.25, 0.0, 0.01], 2));
    assert_eq!(swap.train[1].chosen, swap.train[0].rejected);
    assert_eq!(swap.train[1].rejected, swap.train[0].chosen);
    for found in [&clip, &dropped, &swap] {
        assert_eq!(found.raw_deltas, [0.5, -0.25, 0.0, -0.01]);
    }
    assert_ne!(clip.key, swap.key);
}

/// Values as rows may hold them, the keys that mean something among them.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2i64..3).prop_map(Value::from),
        "[a-c <|_>]{0,8}|NaN|\\PC{0,6}|<.im_end.>".prop_map(Value::from),
        Just(json!([{"role": "user", "content": "a"}])),
        Just(json!([{"role": "assistant", "content": [{"type": "text", "text": "b"}]}])),
    ];
    let key = prop_oneof![
        Just("prompt"),
        Just("chosen"),
        Just("rejected"),
        Just("delta"),
        Just("score_chosen"),
        Just("score_rejected"),
        Just("role"),
        Just("content"),
    ];
    leaf.prop_recursive(3, 24, 4, move |inner| {
        let object = prop::collection::vec((key.clone(), inner.clone()), 0..5).prop_map(|pairs| {
            Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
        });
        prop_oneof![prop::collection::vec(inner, 0..4).prop_map(Value::from), object]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_row_makes_a_sound_pair_or_is_refused(
        values in prop::collection::vec(anything(), 6), with in prop::collection::vec(any::<bool>(), 6),
    ) {
        let keys = ["prompt", "chosen", "rejected", "delta", "score_chosen", "score_rejected"];
        let columns = keys.iter().zip(values).zip(with).enumerate();
        let row: Map<String, Value> = columns
            .filter(|(i, ((_, _), with))| *with || (1..3).contains(i))
            .map(|(_, ((key, value), _))| ((*key).to_owned(), value))
            .collect();
        let delta = Some(DeltaConfig { negative: NegativeDelta::Clip, ..COLUMN });
        for delta in [None, delta] {
            let asks = delta.is_some();
            let ask = Ask { delta, context: 20, ..Ask::default() };
            match read(&[Value::Object(row.clone())], &ask) {
                Err(error) => prop_assert!(error.is_users() && !error.to_string().is_empty()),
                Ok(pairs) => for pair in pairs.train {
                    prop_assert!(pair.chosen.ids != pair.rejected.ids);
                    prop_assert_eq!(pair.delta.is_some(), asks);
                    prop_assert!(pair.delta.is_none_or(|delta| (0.0..=1.0).contains(&delta)));
                    for answer in [&pair.chosen, &pair.rejected] {
                        prop_assert!(answer.counted() > 0 && answer.ids.len() <= 20);
                        prop_assert_eq!(answer.ids.len(), answer.learnt.len());
                        prop_assert!(answer.ids.iter().all(|id| (0..259).contains(id)));
                    }
                },
            }
        }
    }
}

#[test]
fn no_prompt_is_on_both_sides_of_the_split() {
    let list: Vec<Value> = (0..60)
        .map(|i| {
            json!({"prompt": format!("ask {}", i % 20), "chosen": format!("y{i}"),
                        "rejected": format!("n{i}")})
        })
        .collect();
    let found = read(&list, &Ask { validation: 0.4, ..Ask::default() }).unwrap();
    let prompts = |pairs: &[Pair]| -> Vec<Vec<i32>> {
        let of = |pair: &Pair| {
            let open = pair.chosen.learnt.iter().position(|learnt| *learnt).unwrap();
            pair.chosen.ids[..open].to_vec()
        };
        pairs.iter().map(of).collect()
    };
    let (train, held) = (prompts(&found.train), prompts(&found.validation));
    assert!(!held.is_empty() && train.len() + held.len() == 60);
    assert!(held.iter().all(|prompt| !train.contains(prompt)));
}
