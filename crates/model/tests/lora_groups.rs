//! Each person's gradient from one walk back over a packed batch: what that person alone gives.

#![allow(clippy::single_range_in_vec_init)] // one group is a range, not its numbers

mod common;

use std::ops::Range;

use common::{config, golden, ids, model, nsa, train_by_chance};
use serde_json::json;
use tercet_model::{Adapter, Batch, ForwardOptions, IGNORE, LoraConfig, Model, ModelConfig};
use tercet_tensor::{Grads, Tape, Tensor};

/// A choice of blocks jumps, so that rounding could change it: all blocks are selected.
fn everything_selected(mut config: ModelConfig) -> ModelConfig {
    if let Some(spec) = &mut config.nsa {
        spec.select_count = 16;
    }
    config
}

fn bases() -> Vec<(String, Model)> {
    let own = [("mean", nsa("mean")), ("mlp", nsa("mlp")), ("dense", config(json!({})))];
    let own = own.map(|(name, config)| (name.to_owned(), model(everything_selected(config))));
    let shared = ["llama", "qwen2", "gpt2"].into_iter().filter_map(|name| {
        let dir = golden(name)?;
        Some((name.to_owned(), Model::load(&dir).unwrap()))
    });
    own.into_iter().chain(shared).collect()
}

/// The lengths of each person's sequences.
const PERSONS: [&[usize]; 6] = [&[25], &[12, 9], &[40], &[3], &[2, 2, 30], &[35, 40]];

fn persons(vocab: usize) -> Vec<Vec<Vec<i32>>> {
    let all = ids(PERSONS.iter().flat_map(|lengths| lengths.iter()).sum(), vocab);
    let mut rest = &all[..];
    let mut take = |count: &usize| {
        let (first, after) = rest.split_at(*count);
        rest = after;
        first.to_vec()
    };
    PERSONS.iter().map(|lengths| lengths.iter().map(&mut take).collect()).collect()
}

/// Rows of a filled batch: more than one chunk of logits.
const ROWS: usize = 1152;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// One gradient.
    Summed,
    /// One for each person.
    Grouped,
    /// One for each person and one for rows that are nobody's.
    Filled,
}

/// The gradients of Σ over persons of the mean loss of that person's tokens.
fn walk(model: &Model, persons: &[Vec<Vec<i32>>], recompute: bool, way: Way) -> Grads {
    let sequences: Vec<&[i32]> = persons.iter().flatten().map(Vec::as_slice).collect();
    let mut batch = Batch::next_token(&sequences);
    let mut rows: Vec<Range<usize>> = Vec::new();
    let mut slopes = Vec::new();
    for person in persons {
        let start = rows.last().map_or(0, |last| last.end);
        let tokens: usize = person.iter().map(Vec::len).sum();
        rows.push(start..start + tokens);
        slopes.extend(vec![-1.0 / (tokens - person.len()) as f32; tokens]);
    }
    if way == Way::Filled {
        let own = batch.fill_up(ROWS, 40).unwrap();
        assert_eq!(batch.input_ids.len(), ROWS);
        rows.push(own..ROWS);
        slopes.resize(ROWS, 0.0);
    }
    let slots = model.trained().len();
    let mut grads = match way {
        Way::Summed => Grads::new(slots),
        _ => Grads::by_group(slots, rows).unwrap(),
    };
    let mut tape = Tape::recording();
    let options = ForwardOptions { recompute, ..ForwardOptions::default() };
    let found = model.token_log_probs(&mut tape, &batch, &options).unwrap();
    let len = slopes.len();
    let seed = Tensor::from_f32(slopes, &[len]).unwrap();
    tape.backward_from(&[(&found.log_probs, seed)], &mut grads).unwrap();
    grads
}

fn adapted(base: &Model, targets: &[&str]) -> Model {
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    let config = LoraConfig { r: 4, alpha: 6.0, targets, ..LoraConfig::default() };
    train_by_chance(Adapter::new(base, config, 3).unwrap(), base, "a")
}

/// The same f32 sums over other neighbours: a few hundred terms, 2⁻²⁴ each, and as they fall in
/// either direction about their root: 1e-5 of the largest is five such sums in a row. The largest
/// is that of all persons, since of one it may cancel to nothing: a key that stands alone in a
/// softmax has no gradient but rounding.
const CLOSE: f32 = 1e-5;

#[test]
fn a_persons_gradient_is_that_of_the_person_alone() {
    for (what, base) in bases() {
        let some: &[&str] = if what == "gpt2" { &["c_attn"] } else { &["q_proj", "v_proj"] };
        // In NSA models each branch has its own values.
        let some: &[&str] = if base.config().nsa.is_some() { &["q_proj"] } else { some };
        for targets in [&["all-linear"], some] {
            let model = adapted(&base, targets);
            let persons = persons(base.config().vocab_size);
            for recompute in [false, true] {
                let all = walk(&model, &persons, recompute, Way::Grouped);
                for (at, person) in persons.iter().enumerate() {
                    let alone = walk(&model, std::slice::from_ref(person), recompute, Way::Summed);
                    for slot in 0..model.trained().len() {
                        let name = model.trained().name(slot);
                        let (all, alone) = (all.get(slot).unwrap(), alone.get(slot).unwrap());
                        assert_eq!(all.shape()[0], persons.len());
                        assert_eq!(&all.shape()[1..], alone.shape());
                        let (all, alone) = (all.as_f32().unwrap(), alone.as_f32().unwrap());
                        let size = all.iter().fold(0f32, |most, x| most.max(x.abs()));
                        let all = &all[at * alone.len()..][..alone.len()];
                        let off = all.iter().zip(alone).map(|(a, b)| (a - b).abs());
                        let off = off.fold(0f32, f32::max);
                        assert!(size > 0.0, "{what} {name}: nothing is learnt");
                        assert!(
                            off <= CLOSE * size,
                            "{what} {targets:?} {name}, person {at}: {off:e} of {size:e}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn bits_of_persons_gradients_do_not_depend_on_threads() {
    for (what, base) in bases() {
        let model = adapted(&base, &["all-linear"]);
        let persons = persons(base.config().vocab_size);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let grads = walk(&model, &persons, false, Way::Grouped);
                let bits = grads.iter().map(|g| g.unwrap().to_vec_f32().unwrap());
                bits.map(|g| g.into_iter().map(f32::to_bits).collect()).collect::<Vec<Vec<u32>>>()
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(3), "{what}");
    }
}

/// What the sensitivity of a private step rests on: nobody's gradient may depend on who else is in
/// the batch, not even in its last bits. Products choose their order of summing by the number of
/// rows; with that fixed, nothing is left to choose. The wide model's inner sums are longer than
/// one run of the products', and its logits come in chunks of 128, whose edge a person crosses.
#[test]
fn in_batches_of_equal_rows_others_change_no_bit() {
    let wide = config(json!({
        "vocab_size": 20000, "hidden_size": 640, "intermediate_size": 1100, "num_hidden_layers": 1, "head_dim": 160,
    }));
    let choosing = ("choosing".to_owned(), model(nsa("mlp")));
    for (what, base) in bases().into_iter().chain([("wide".to_owned(), model(wide)), choosing]) {
        let model = adapted(&base, &["all-linear"]);
        let persons = persons(base.config().vocab_size);
        let all = walk(&model, &persons, false, Way::Filled);
        for (at, person) in persons.iter().enumerate() {
            let alone = walk(&model, std::slice::from_ref(person), false, Way::Filled);
            for slot in 0..model.trained().len() {
                let [all, alone] = [&all, &alone].map(|g| g.get(slot).unwrap().as_f32().unwrap());
                let size = alone.len() / 2;
                let same = all[at * size..][..size] == alone[..size];
                assert!(same, "{what} {}, person {at}", model.trained().name(slot));
            }
        }
    }
}

#[test]
fn filling_up_adds_whole_sequences_without_targets() {
    let mut batch = Batch::next_token(&[&[1, 2, 3]]);
    assert_eq!(batch.fill_up(128, 100).unwrap(), 3);
    assert_eq!(batch.cu_seqlens, [0, 3, 103, 128]);
    assert!(batch.input_ids.len() == 128 && batch.targets[2..].iter().all(|&t| t == IGNORE));
    let full = batch.clone();
    assert_eq!(batch.fill_up(128, 100).unwrap(), 128);
    assert_eq!(batch, full);
    let mut empty = Batch::next_token(&[]);
    assert_eq!(empty.fill_up(256, 128).unwrap(), 0);
    assert_eq!(empty.cu_seqlens, [0, 128, 256]);
    for (rows, context) in [(0, 1), (100, 1), (128, 0), (usize::MAX / 128 * 128, 9)] {
        assert!(batch.fill_up(rows, context).is_err(), "{rows} {context}");
    }
}

#[test]
fn pairs_hold_every_parameter_of_an_adapter_once() {
    for (what, base) in bases() {
        let model = adapted(&base, &["all-linear"]);
        let adapter = model.adapter("a").unwrap();
        let mut seen: Vec<usize> = Vec::new();
        for (name, slots) in adapter.pairs() {
            for slot in &slots {
                assert!(adapter.params().name(*slot).starts_with(name), "{what}");
            }
            seen.extend(slots);
        }
        assert_eq!(seen, (0..adapter.params().len()).collect::<Vec<_>>(), "{what}");
    }
}

/// Without an adapter everything is trained, and norms cannot tell persons apart.
#[test]
fn full_training_by_person_is_refused_by_name() {
    for (what, base) in bases() {
        let persons = persons(base.config().vocab_size);
        let batch = Batch::next_token(&[&persons[0][0]]);
        let mut tape = Tape::recording();
        let parts = base.forward_loss(&mut tape, &batch, &ForwardOptions::default()).unwrap();
        let mut grads = Grads::by_group(base.params().len(), vec![0..25]).unwrap();
        let error = tape.backward(&parts.loss, &mut grads).unwrap_err().to_string();
        assert!(error.contains("tell groups of rows apart"), "{what}: {error}");
    }
}
