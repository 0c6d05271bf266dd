//! Tasks on a tiny model: numbers by hand, against the model's own logits, and what is refused.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tercet_eval::{Answer, Error, Metric, Options, Outcome, Ready, Task, evaluate};
use tercet_model::{Batch, ForwardOptions, Model, ModelConfig, Tokenizer};
use tercet_tensor::{DType, Tape, Tensor, log_sum_exp};

/// One token a word, split at spaces: `a` is 0, `b` 1, … `h` 7, `<s>` 8.
fn tokenizer() -> Tokenizer {
    let words = ["a", "b", "c", "d", "e", "f", "g", "h", "<s>"];
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<s>" }
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

fn config(more: Value) -> ModelConfig {
    let mut fields = json!({
        "model_type": "tercet", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.4, "bos_token_id": 8
    });
    for (key, value) in more.as_object().unwrap() {
        fields[key] = value.clone();
    }
    serde_json::from_value(fields).unwrap()
}

fn model() -> Model {
    Model::new(config(json!({})), 3, DType::F32).unwrap()
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A task over rows.
    fn task(&self, rows: &[Value], rest: &str) -> Task {
        let data: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(self.0.path().join("rows.jsonl"), data).unwrap();
        Task::load(&self.file(rest)).unwrap()
    }

    fn file(&self, rest: &str) -> PathBuf {
        let path = self.0.path().join("task.yaml");
        let rows = self.0.path().join("rows.jsonl");
        let head = format!(
            "task: t\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\n\
             test_split: test\n",
            rows.display()
        );
        std::fs::write(&path, head + rest).unwrap();
        path
    }
}

const CHOICE: &str = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\n\
                      doc_to_target: g\nmetric_list: [{metric: acc}, {metric: acc_norm}, \
                      {metric: exact_match}]\n";

fn run(model: &Model, task: &Task, options: &Options) -> tercet_eval::Result<Outcome> {
    let tokenizer = tokenizer();
    let ready = [Ready::new(task, model, &tokenizer, options)?];
    let mut last = None;
    let done = evaluate(model, &tokenizer, &ready, options, &mut |progress| last = Some(progress))?;
    let last = last.unwrap();
    assert_eq!((last.done, last.total), (ready[0].requests(), ready[0].requests()));
    Ok(done.into_iter().next().unwrap())
}

/// `Σ ln p` of the words of `rest` after those of `context`, one forward pass each, with logits
/// in full; and whether each is the highest.
fn by_hand(model: &Model, context: &[i32], rest: &[i32]) -> (f64, bool) {
    let ids: Vec<i32> = context.iter().chain(rest).copied().collect();
    let logits = model.logits(&ids, &[0, ids.len() as i32]).unwrap().to_vec_f32().unwrap();
    let rows: Vec<&[f32]> = logits.chunks_exact(9).collect();
    let mut sum = (0.0, true);
    for (i, &target) in rest.iter().enumerate() {
        let row = rows[context.len() - 1 + i];
        sum.0 += f64::from(row[target as usize]) - log_sum_exp(row);
        sum.1 &= row.iter().all(|&z| z <= row[target as usize]);
    }
    sum
}

fn likelihoods(outcome: &Outcome, row: usize) -> Vec<(f64, bool)> {
    let Answer::Likelihoods(all) = &outcome.samples[row].answer else { panic!("not scored") };
    all.iter().map(|own| (own.log_prob, own.greedy)).collect()
}

/// f32 sums of 16 products over two layers, on numbers of order 1: 1e-5 is a hundred roundings.
fn near(found: &[(f64, bool)], wanted: &[(f64, bool)]) {
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(wanted) {
        assert!((found.0 - wanted.0).abs() < 1e-5, "{found:?} is not {wanted:?}");
        assert_eq!(found.1, wanted.1, "{found:?} {wanted:?}");
    }
}

fn fill(model: &mut Model, slot: usize, value: f32) {
    let shape = model.params().tensor(slot).shape().to_vec();
    let all = Tensor::from_f32(vec![value; shape.iter().product()], &shape).unwrap();
    model.params_mut().set(slot, all).unwrap();
}

/// With all weights 0 each of the 9 tokens has probability 1/9.
#[test]
fn a_uniform_model_scores_what_paper_and_pencil_say() {
    let mut model = model();
    for slot in 0..model.params().len() {
        fill(&mut model, slot, 0.0);
    }
    let files = Files::new();
    let rows = [
        json!({ "q": "a b", "c": ["c d", "e"], "g": 0 }),
        json!({ "q": "a", "c": ["c ddd", "e f g"], "g": 0 }),
        json!({ "q": "c", "c": ["a", "a"], "g": 1 }),
    ];
    let outcome = run(&model, &files.task(&rows, CHOICE), &Options::default()).unwrap();
    let nat = -(9f64.ln());
    let wanted = [[2.0, 1.0], [2.0, 3.0], [1.0, 1.0]];
    for (row, wanted) in wanted.iter().enumerate() {
        let found: Vec<f64> = likelihoods(&outcome, row).iter().map(|own| own.0).collect();
        for (found, tokens) in found.iter().zip(wanted) {
            assert!((found - tokens * nat).abs() < 1e-5, "row {row}: {found}");
        }
    }
    // acc: 0 (the shorter wins), 1 (2 tokens beat 3), 0 (the first of equals): mean 1/3, sample
    // deviation √(2/3 / 2) = √(1/3), error √(1/3)/√3 = 1/3.
    let acc = outcome.scores[0];
    assert_eq!((acc.metric, acc.value), (Metric::Acc, 1.0 / 3.0));
    assert!((acc.stderr.unwrap() - 1.0 / 3.0).abs() < 1e-15);
    // Per character: 2/3 against 1 → right; 2/5 against 3/5 → right; equals → wrong.
    assert_eq!(outcome.scores[1].value, 2.0 / 3.0);
    // Greedy is the first of nine equals, `a`: only the last row's right choice.
    assert_eq!(outcome.scores[2].value, 1.0 / 3.0);
}

#[test]
fn packed_and_shared_contexts_give_what_whole_logits_give() {
    let model = model();
    let files = Files::new();
    let long: Vec<String> = (0..60).map(|i| ["a", "b", "c", "d", "e"][i * i % 5].into()).collect();
    let rows = [
        json!({ "q": "a b c", "c": ["d e", "f"], "g": 0 }),
        json!({ "q": long.join(" "), "c": ["d e f", "f", "a a"], "g": 2 }),
        json!({ "q": "h", "c": ["h", "<s> a"], "g": 1 }),
    ];
    let outcome = run(&model, &files.task(&rows, CHOICE), &Options::default()).unwrap();
    let ids = |text: &str| -> Vec<i32> {
        tokenizer().encode(text, false).unwrap().into_iter().map(|id| id as i32).collect()
    };
    for (at, row) in rows.iter().enumerate() {
        let context = ids(row["q"].as_str().unwrap());
        let choices = row["c"].as_array().unwrap();
        let wanted: Vec<(f64, bool)> =
            choices.iter().map(|c| by_hand(&model, &context, &ids(c.as_str().unwrap()))).collect();
        near(&likelihoods(&outcome, at), &wanted);
    }
    assert_eq!(outcome.samples[1].continuations[1], " f");
}

#[test]
fn an_empty_context_begins_with_the_first_token() {
    let model = model();
    let files = Files::new();
    let rest = "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: t\n";
    let rows = [json!({ "q": "", "t": "a b" }), json!({ "q": "", "t": "<s> c" })];
    let outcome = run(&model, &files.task(&rows, rest), &Options::default()).unwrap();
    near(&likelihoods(&outcome, 0), &[by_hand(&model, &[8], &[0, 1])]);
    // A continuation that begins with that token is its own context.
    near(&likelihoods(&outcome, 1), &[by_hand(&model, &[8], &[2])]);
    let sum: f64 = (0..2).map(|row| likelihoods(&outcome, row)[0].0).sum();
    assert_eq!(outcome.scores[0].metric, Metric::Perplexity);
    assert!((outcome.scores[0].value - (-sum / 2.0).exp()).abs() < 1e-12);
    let mut config = config(json!({}));
    config.bos_token_id = None;
    let none = Model::new(config, 3, DType::F32).unwrap();
    let error = run(&none, &files.task(&rows, rest), &Options::default()).unwrap_err();
    assert!(error.to_string().contains("the context is empty"), "{error}");
}

#[test]
fn what_is_too_long_loses_its_beginning() {
    let model = model();
    let files = Files::new();
    let rows = [json!({ "q": "a b c d e", "c": ["f g", "h"], "g": 0 })];
    let task = files.task(&rows, CHOICE);
    let short = Options { max_length: Some(3), ..Options::default() };
    let outcome = run(&model, &task, &short).unwrap();
    // Three tokens are read, and the one after them is judged.
    let wanted = [by_hand(&model, &[3, 4], &[5, 6]), by_hand(&model, &[2, 3, 4], &[7])];
    near(&likelihoods(&outcome, 0), &wanted);
    for (max_length, part) in [(1, "has 2 tokens, and the model reads 1"), (0, "outside 1 to 128")]
    {
        let options = Options { max_length: Some(max_length), ..Options::default() };
        let error = run(&model, &task, &options).unwrap_err();
        assert!(error.to_string().contains(part) && error.is_users(), "{error}");
    }
}

#[test]
fn a_continuation_longer_than_its_context_is_scored_in_full() {
    let model = model();
    let files = Files::new();
    let rows = [json!({ "q": "a", "c": ["b c d e f g", "h"], "g": 0 })];
    let outcome = run(&model, &files.task(&rows, CHOICE), &Options::default()).unwrap();
    let wanted = [by_hand(&model, &[0], &[1, 2, 3, 4, 5, 6]), by_hand(&model, &[0], &[7])];
    near(&likelihoods(&outcome, 0), &wanted);
}

#[test]
fn a_text_is_the_most_probable_one_and_ends_where_it_should() {
    let model = model();
    let files = Files::new();
    let rest = "doc_to_text: q\ndoc_to_target: t\ngeneration_kwargs: {max_gen_toks: 3}\n";
    let written = |row: Value, rest: &str| {
        let outcome = run(&model, &files.task(&[row], rest), &Options::default()).unwrap();
        let Answer::Text(text) = outcome.samples[0].answer.clone() else { panic!("no text") };
        (text, outcome.scores[0].value)
    };
    let (text, _) = written(json!({ "q": "a b", "t": "-" }), rest);
    let mut ids = vec![0, 1];
    for word in text.split(' ') {
        let own = tokenizer().token_id(word).unwrap() as i32;
        assert!(by_hand(&model, &ids, &[own]).1, "{text}: {word} is not the most probable");
        ids.push(own);
    }
    assert_eq!(ids.len(), 5);
    assert_eq!(written(json!({ "q": "a b", "t": text.clone() }), rest).1, 1.0);
    assert_eq!(written(json!({ "q": "a b", "t": ["-", text.clone()] }), rest).1, 1.0);
    let last = text.split(' ').next_back().unwrap();
    let stop = format!(
        "doc_to_text: q\ndoc_to_target: t\n\
         generation_kwargs: {{max_gen_toks: 3, until: '{last}'}}\n"
    );
    let (cut, _) = written(json!({ "q": "a b", "t": "-" }), &stop);
    assert!(text.starts_with(&cut) && !cut.contains(last), "{cut} of {text}");
}

#[test]
fn empty_data_a_limit_and_broken_files_are_told() {
    let model = model();
    let files = Files::new();
    let error = run(&model, &files.task(&[], CHOICE), &Options::default()).unwrap_err();
    assert!(error.to_string().contains("no row to ask") && error.is_users(), "{error}");
    let fine = json!({ "q": "a", "c": ["b", "c"], "g": 0 });
    let rows = [fine.clone(), fine, json!({ "q": "a", "c": [], "g": 0 })];
    let task = files.task(&rows, CHOICE);
    let limited = Options { limit: Some(2), ..Options::default() };
    let outcome = run(&model, &task, &limited).unwrap();
    assert_eq!((outcome.rows, outcome.samples.len()), (3, 2));
    let error = run(&model, &task, &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Row { row: 2, .. }), "{error}");
    std::fs::remove_file(Path::new(files.0.path()).join("rows.jsonl")).unwrap();
    let error = run(&model, &task, &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.is_users(), "{error}");
}

#[test]
fn spaces_alone_and_continuations_without_tokens_are_refused() {
    let model = model();
    let files = Files::new();
    for (row, part) in [
        (json!({ "q": "  ", "c": ["a"], "g": 0 }), "nothing but spaces"),
        (json!({ "q": "a", "c": [" "], "g": 0 }), "adds no token"),
    ] {
        let error = run(&model, &files.task(&[row], CHOICE), &Options::default()).unwrap_err();
        assert!(error.to_string().contains(part) && error.is_users(), "{error}");
    }
}

#[test]
fn damaged_weights_are_an_error_and_no_score() {
    let mut model = model();
    fill(&mut model, 0, f32::NAN);
    let files = Files::new();
    let rows = [json!({ "q": "a b", "c": ["c", "d"], "g": 0, "t": "x" })];
    let text = "doc_to_text: q\ndoc_to_target: t\ngeneration_kwargs: {max_gen_toks: 3}\n";
    for rest in [CHOICE, text] {
        let found = run(&model, &files.task(&rows, rest), &Options::default());
        assert!(found.is_err_and(|error| error.is_users()), "{rest}");
    }
}

/// Rows of random lengths and shared contexts: what is grouped and packed changes no number beyond
/// the roundings of one pass.
#[test]
fn a_row_is_worth_the_same_beside_any_others() {
    let model = model();
    let files = Files::new();
    let words = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let text = |seed: usize, n: usize| -> String {
        (0..n).map(|i| words[(seed * 7 + i * i + i / 3) % 8]).collect::<Vec<_>>().join(" ")
    };
    let rows: Vec<Value> = (0..40)
        .map(|i| {
            let choices: Vec<String> = (0..1 + i % 4).map(|c| text(i + c, 1 + c)).collect();
            json!({ "q": text(i / 2, 1 + 3 * (i / 2)), "c": choices, "g": 0 })
        })
        .collect();
    let whole = run(&model, &files.task(&rows, CHOICE), &Options::default()).unwrap();
    for (at, row) in rows.iter().enumerate() {
        let alone = files.task(std::slice::from_ref(row), CHOICE);
        let alone = run(&model, &alone, &Options::default()).unwrap();
        near(&likelihoods(&whole, at), &likelihoods(&alone, 0));
    }
    let again = run(&model, &files.task(&rows, CHOICE), &Options::default()).unwrap();
    for at in 0..rows.len() {
        assert_eq!(likelihoods(&whole, at), likelihoods(&again, at));
    }
}

/// The model's own function agrees with what is asked of it here.
#[test]
fn by_hand_is_what_token_log_probs_says() {
    let model = model();
    let batch = Batch::next_token(&[&[0, 1, 2]]);
    let tape = &mut Tape::inference();
    let found = model.token_log_probs(tape, &batch, &ForwardOptions::default()).unwrap();
    let sum: f32 = found.log_probs.value().to_vec_f32().unwrap().iter().sum();
    assert!((f64::from(sum) - by_hand(&model, &[0], &[1, 2]).0).abs() < 1e-5);
}
