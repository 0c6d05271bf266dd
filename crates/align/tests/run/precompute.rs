//! The reference's sums in a file: the same as asked at every step, used again, and never for
//! anything else than what they are of.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use tercet_align::objective::ReferenceLogProbs;
use tercet_align::pairs::Pair;
use tercet_align::reference::{Precompute, precomputed};
use tercet_model::{Adapter, LoraConfig, Model};
use tercet_train::{Error, Event};

use crate::room::{ROUNDING, Room, disturb, id_pairs, records, rows, run, run_with};
use crate::tiny_chat::model;

/// The sums, and whether they came from the file.
fn ask(folder: &Path, model: &Model, pairs: &[Pair], alpha: f64) -> (Vec<ReferenceLogProbs>, bool) {
    let stop = AtomicBool::new(false);
    let rule = Precompute { folder, pairs_key: "pairs", alpha, micro_tokens: 60, stop: &stop };
    let pairs: Vec<&Pair> = pairs.iter().collect();
    let mut known = false;
    let sums = precomputed(&rule, model, &pairs, &mut |event| {
        if let Event::Note(text) = event {
            known |= text.contains("earlier run");
        }
    });
    (sums.unwrap(), known)
}

fn bits(sums: &[ReferenceLogProbs]) -> Vec<[u64; 2]> {
    sums.iter().map(|sum| [sum.chosen.to_bits(), sum.rejected.to_bits()]).collect()
}

#[test]
fn sums_from_the_file_have_the_bits_of_those_that_were_computed() {
    let folder = tempfile::tempdir().unwrap();
    let (model, pairs) = (model(3), id_pairs(200));
    // LD-DPO's weights make sums that need all 53 bits.
    let (computed, known) = ask(folder.path(), &model, &pairs, 0.37);
    assert!(!known && computed.len() == 200);
    let (read, known) = ask(folder.path(), &model, &pairs, 0.37);
    assert!(known);
    assert!(bits(&read) == bits(&computed));
}

#[test]
fn the_file_is_made_again_when_anything_it_is_of_has_changed_or_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = id_pairs(5);
    let base = model(3);
    let fresh = |what: &str, model: &Model, pairs: &[Pair], alpha: f64| {
        let (sums, known) = ask(folder.path(), model, pairs, alpha);
        assert!(!known, "{what}: the file was used again");
        let elsewhere = tempfile::tempdir().unwrap();
        assert_eq!(bits(&sums), bits(&ask(elsewhere.path(), model, pairs, alpha).0), "{what}");
        assert!(ask(folder.path(), model, pairs, alpha).1, "{what}: not used again");
    };
    fresh("first", &base, &pairs, 1.0);
    fresh("alpha", &base, &pairs, 0.5);
    let mut other = base.clone();
    let slot = other.params().slot("model.norm.weight").unwrap();
    other.params_mut().tensors_mut()[slot].as_f32_mut().unwrap()[0] += f32::EPSILON;
    fresh("one bit of a weight", &other, &pairs, 0.5);
    let mut words = pairs.clone();
    words[3].rejected.ids[1] += 1;
    fresh("a word", &other, &words, 0.5);
    words[2].chosen.learnt[0] = true;
    fresh("what is learnt", &other, &words, 0.5);
    words.swap(0, 1);
    fresh("the order", &other, &words, 0.5);
    words.pop();
    fresh("a pair less", &other, &words, 0.5);

    let adapted = |alpha: f64, rslora: bool| {
        let config = LoraConfig { r: 2, alpha, rslora, ..LoraConfig::default() };
        let mut model = base.clone();
        model.attach("x", Adapter::new(&model, config, 5).unwrap()).unwrap();
        model.activate(Some("x")).unwrap();
        disturb(&mut model, 1);
        model
    };
    fresh("an adapter", &adapted(4.0, false), &pairs, 1.0);
    fresh("the scale of its update", &adapted(8.0, false), &pairs, 1.0);
    fresh("how it is scaled", &adapted(8.0, true), &pairs, 1.0);
    let config = tercet_model::ModelConfig { rope_theta: 500.0, ..base.config().clone() };
    let turned = tercet_model::Model::new(config, 3, tercet_tensor::DType::F32).unwrap();
    fresh("base", &base, &pairs, 1.0);
    fresh("the model's shape of positions", &turned, &pairs, 1.0);

    let path = folder.path().join("reference.json");
    let text = std::fs::read_to_string(&path).unwrap();
    // A digit in the middle of the first number.
    let at = text.find('[').unwrap() + 9;
    let digit = if &text[at..=at] == "7" { "8" } else { "7" };
    for (what, damaged) in [
        ("cut short", text[..text.len() / 2].to_owned()),
        ("empty", String::new()),
        ("other text", "[]".to_owned()),
        ("another number", format!("{}{digit}{}", &text[..at], &text[at + 1..])),
    ] {
        std::fs::write(&path, damaged).unwrap();
        fresh(what, &turned, &pairs, 1.0);
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_stop_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (model, pairs) = (model(3), id_pairs(5));
    let stop = AtomicBool::new(true);
    let rule = Precompute {
        folder: folder.path(),
        pairs_key: "",
        alpha: 1.0,
        micro_tokens: 9,
        stop: &stop,
    };
    let pairs: Vec<&Pair> = pairs.iter().collect();
    let stopped = precomputed(&rule, &model, &pairs, &mut |_| {});
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_run_with_a_precomputed_reference_is_one_that_asks_to_rounding() {
    let room = Room::new(&rows(12));
    let terms = "align.terms=[{objective='mappo'}, {objective='sft', weight=0.5}]";
    let all = [terms, "data.validation=0.4", "train.eval_every=2", "train.micro_tokens=90"];
    let online = room.config("online", &all);
    run(&online, false).unwrap();
    let known = room.config("known", &[&all[..], &["align.precompute=true"]].concat());
    run(&known, false).unwrap();
    for (a, b) in records(&online).iter().zip(&records(&known)) {
        assert_eq!(a.validation_loss.is_some(), a.step % 2 == 0);
        assert_eq!(a.measures.len(), b.measures.len());
        for (name, value) in &a.measures {
            let off = (value - b.measures[name]).abs();
            // Weights walk apart a little with every step: ten times the rounding of one.
            assert!(
                off < 10.0 * ROUNDING * value.abs().max(1.0),
                "step {}: {name} by {off:e}",
                a.step
            );
        }
    }
    // A run that begins again in the folder uses the file.
    std::fs::remove_dir_all(known.output.join("checkpoints")).unwrap();
    let (before, mut notes) = (records(&known), Vec::new());
    run_with(&known, false, u64::MAX, &mut notes).unwrap();
    assert!(notes.iter().any(|note| note.contains("earlier run")), "{notes:?}");
    let losses = |records: &[tercet_train::metrics::StepRecord]| -> Vec<_> {
        records.iter().map(|record| (record.loss, record.grad_norm)).collect()
    };
    assert_eq!(losses(&before), losses(&records(&known)));
}
