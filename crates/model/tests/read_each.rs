//! What serving asks of caches beside the logits after a prompt: those after each of its tokens,
//! and which blocks were selected.

mod common;

use common::{config, ids, model, nsa};
use serde_json::json;
use tercet_model::{Model, Sampler, Sampling};
use tercet_tensor::{DType, FEW_ROWS};

const VOCAB: usize = 96;

/// Logits `[c, vocab]` of a chunk after `held` tokens, by slots.
fn each(model: &Model, held: &[i32], chunk: &[i32]) -> Vec<f32> {
    let mut slots = model.slots(2, 512).unwrap();
    if !held.is_empty() {
        slots.read(model, 1, held).unwrap();
    }
    let mut all = Vec::new();
    let mut next = 0;
    slots
        .read_each(model, 1, chunk, &mut |at, logits| {
            assert_eq!(at, next, "in order");
            next += logits.len() / VOCAB;
            all.extend_from_slice(logits);
        })
        .unwrap();
    assert_eq!((next, slots.len(1)), (chunk.len(), held.len() + chunk.len()));
    all
}

#[test]
fn the_logits_after_every_token_are_those_of_reading_as_far() {
    for config in [nsa("mean"), nsa("mlp"), config(json!({}))] {
        for dtype in [DType::F32, DType::BF16] {
            let model = Model::new(config.clone(), 7, dtype).unwrap();
            let tokens = ids(150, VOCAB);
            for (held, end) in [(0, 1), (0, FEW_ROWS), (0, FEW_ROWS + 1), (70, 150)] {
                let found = each(&model, &tokens[..held], &tokens[held..end]);
                let mut cache = model.cache().unwrap();
                if held > 0 {
                    model.read(&mut cache, &tokens[..held]).unwrap();
                }
                let mut fork = cache.fork().unwrap();
                let last = model.read(&mut cache, &tokens[held..end]).unwrap();
                assert_eq!(found[found.len() - VOCAB..], last, "the bits of the last");
                // The products of more rows sum in another order.
                if end - held <= FEW_ROWS {
                    for (token, row) in tokens[held..end].iter().zip(found.chunks(VOCAB)) {
                        assert_eq!(model.read(&mut fork, &[*token]).unwrap(), row);
                    }
                } else {
                    let all = model.extend_all(&mut fork, &tokens[held..end]).unwrap();
                    let all = all.to_vec_f32().unwrap();
                    let far = |(a, b): (&f32, &f32)| (a - b).abs();
                    let worst = found.iter().zip(&all).map(far).fold(0.0, f32::max);
                    // The head's sums of 32 products of hidden rows that are the same, and in bf16
                    // one rounding of logits below 16.
                    let most = if dtype == DType::BF16 { 16.0 / 256.0 } else { 16.0 * 32.0 / 2e7 };
                    assert!(worst <= most, "{worst}");
                }
            }
        }
    }
}

#[test]
fn a_chunk_that_cannot_be_read_changes_nothing() {
    let model = model(nsa("mean"));
    let mut slots = model.slots(1, 100).unwrap();
    let tokens = ids(150, VOCAB);
    let never = &mut |_: usize, _: &[f32]| panic!("called");
    for wrong in [&tokens[..0], &tokens[..101], &[96], &[-1]] {
        assert!(slots.read_each(&model, 0, wrong, never).is_err());
        assert!(slots.read_each(&model, 1, &tokens[..3], never).is_err(), "no such slot");
        assert_eq!(slots.len(0), 0);
        assert!(slots.selected(0).unwrap().is_none() && slots.selected(1).unwrap().is_none());
    }
    assert_eq!(slots.read(&model, 0, &tokens[..100]).unwrap().len(), VOCAB);
}

/// By the definition: block 0, the query's own, and no more than there are, whole before a choice
/// has to be made; and the same however the tokens came.
#[test]
fn the_selected_blocks_are_those_of_the_last_token() {
    let model = model(nsa("mean"));
    let tokens = ids(150, VOCAB);
    let mut slots = model.slots(3, 512).unwrap();
    slots.read(&model, 0, &tokens[..1]).unwrap();
    for (position, &token) in tokens.iter().enumerate() {
        if position > 0 {
            slots.step(&model, &[(0, token)]).unwrap();
        }
        let (own, groups) = ((position / 8) as i32, 2);
        let selected = slots.selected(0).unwrap().unwrap();
        assert_eq!(selected.len(), 2, "layers");
        for group in selected.iter().flat_map(|layer| layer.chunks(4)) {
            let blocks: Vec<i32> = group.iter().copied().filter(|&block| block >= 0).collect();
            assert!(blocks.is_sorted() && blocks.contains(&own) && blocks.contains(&0));
            assert_eq!(blocks.len(), 4.min(own as usize + 1), "at {position}: {blocks:?}");
            assert!(blocks.iter().all(|&block| block <= own));
        }
        assert_eq!(selected[0].len(), groups * 4);
    }
    slots.read(&model, 1, &tokens[..FEW_ROWS]).unwrap();
    slots.read(&model, 1, &tokens[FEW_ROWS..2 * FEW_ROWS]).unwrap();
    slots.copy(1, 2).unwrap();
    slots.clear(0).unwrap();
    slots.read(&model, 0, &tokens[..1]).unwrap();
    for &token in &tokens[1..2 * FEW_ROWS] {
        slots.step(&model, &[(0, token)]).unwrap();
    }
    let [zero, one, two] = [0, 1, 2].map(|slot| slots.selected(slot).unwrap());
    assert_eq!(zero, one);
    assert_eq!(two, one);
}

/// As OpenAI defines them: μ[j] − c[j]·frequency − (c[j] > 0)·presence, over what was written.
#[test]
fn penalties_and_bias_move_logits_as_they_are_defined() {
    let logits = [0.0, 3.0, 2.5, 2.0];
    let sampler = |change: &dyn Fn(&mut Sampling)| {
        let mut settings = Sampling::greedy(1);
        change(&mut settings);
        let mut sampler = Sampler::new(&settings).unwrap();
        // Of the prompt, which those penalties do not count.
        sampler.see(1);
        (0..6).map(|_| sampler.next(&logits).unwrap()).collect::<Vec<u32>>()
    };
    assert_eq!(sampler(&|_| ()), [1; 6]);
    // 3 → 2.3 → then 2.5 → 1.8, then 2.3 → 1.6, then 2.0 → 1.3, 1.8 → 1.1, 1.6.
    assert_eq!(sampler(&|s| s.frequency_penalty = 0.7), [1, 2, 1, 3, 2, 1]);
    assert_eq!(sampler(&|s| s.presence_penalty = 0.7), [1, 2, 1, 1, 1, 1]);
    assert_eq!(sampler(&|s| s.presence_penalty = -1.0), [1; 6]);
    assert_eq!(sampler(&|s| s.logit_bias = vec![(3, 0.6), (3, 0.6), (9999, 1.0)]), [3; 6]);
    assert_eq!(sampler(&|s| s.logit_bias = vec![(1, -100.0)]), [2; 6]);
    let none = [f32::NEG_INFINITY; 4];
    let mut greedy = Sampler::new(&Sampling::greedy(1)).unwrap();
    assert!(greedy.next(&none).unwrap_err().to_string().contains("no token"));
}
