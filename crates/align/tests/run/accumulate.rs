//! What a step finds must not depend on how it is cut into portions, and its gradient must be that
//! of its loss.

use std::sync::atomic::AtomicBool;

use tercet_align::objective::{ObjectiveConfig, Objectives, TermConfig};
use tercet_align::pairs::Pair;
use tercet_align::reference::Reference;
use tercet_align::task::Align;
use tercet_model::{Adapter, LoraConfig, Model};
use tercet_tensor::Grads;
use tercet_train::config::TuneTrain;
use tercet_train::run::{Measured, Task};
use tercet_train::tune::Order;

use crate::room::{ROUNDING, disturb, id_pairs};
use crate::tiny_chat::{CONTEXT, model};

const PAIRS: usize = 7;

/// Every objective, with the parameters it must be given, and sums of them.
const TERMS: [&str; 27] = [
    "{objective='dpo'}",
    "{objective='mappo'}",
    "{objective='dpo_norm'}",
    "{objective='ipo_mean'}",
    "{objective='ipo_sum'}",
    "{objective='simpo'}",
    "{objective='cpo'}",
    "{objective='hinge'}",
    "{objective='robust', label_smoothing=0.1}",
    "{objective='cdpo', label_smoothing=0.1}",
    "{objective='exo'}",
    "{objective='discopop'}",
    "{objective='apo_zero'}",
    "{objective='apo_down'}",
    "{objective='bco'}",
    "{objective='nca'}",
    "{objective='sppo'}",
    "{objective='orpo'}",
    "{objective='kto'}",
    "{objective='sft'}",
    "{objective='sft', nll='seq_mean'}",
    "{objective='cpo', nll='seq_sum', mappo=true}",
    "{objective='simpo', mappo=true}",
    "{objective='ipo_sum', mappo=true}",
    "{objective='dpo', weight=0.5}, {objective='sft', weight=0.3}",
    "{objective='kto', desirable_weight=2.0}, {objective='mappo'}, {objective='sft'}",
    "{objective='orpo', beta=0.5}, {objective='dpo_norm', beta=2.0}",
];

fn objectives(terms: &str, ld_alpha: f64) -> Objectives {
    #[derive(serde::Deserialize)]
    struct Terms {
        terms: Vec<TermConfig>,
    }
    let Terms { terms } = toml::from_str(&format!("terms = [{terms}]")).unwrap();
    Objectives::new(&ObjectiveConfig { terms, ld_alpha }).unwrap()
}

/// A policy that has left its reference.
fn models(lora: bool) -> (Model, Model) {
    let reference = model(3);
    let mut policy = reference.clone();
    if lora {
        let config = LoraConfig { r: 2, alpha: 4.0, ..LoraConfig::default() };
        policy.attach("x", Adapter::new(&policy, config, 5).unwrap()).unwrap();
        policy.activate(Some("x")).unwrap();
    }
    disturb(&mut policy, 1);
    (policy, reference)
}

/// One step over all of `pairs`, and its gradient.
fn step(
    (policy, reference): &(Model, Model),
    objectives: &Objectives,
    pairs: &[Pair],
    micro_tokens: usize,
) -> (Measured, Vec<f32>) {
    let train =
        TuneTrain { steps: Some(1), batch: pairs.len(), micro_tokens, ..TuneTrain::default() };
    let mut task = Align {
        train: &train,
        objectives,
        reference: match objectives.needs_reference() {
            true => Reference::Model(Box::new(reference.clone())),
            false => Reference::None,
        },
        pairs,
        validation: &[],
        order: Order::new(pairs.len(), &train),
        context: CONTEXT,
    };
    let mut grads = Grads::new(policy.trained().len());
    let measured = task.step(policy, 0, &mut grads, &AtomicBool::new(false)).unwrap().unwrap();
    assert!(measured.place.is_none() && loss(&measured).is_finite());
    let of = |grad: Option<&tercet_tensor::Tensor>| grad.unwrap().to_vec_f32().unwrap();
    (measured, grads.iter().flat_map(of).collect())
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |m, x| m.max(f64::from(x.abs())))
}

fn loss(measured: &Measured) -> f64 {
    measured.loss.unwrap()
}

fn assert_alike(what: &str, a: &(Measured, Vec<f32>), b: &(Measured, Vec<f32>)) {
    let [a_loss, b_loss] = [loss(&a.0), loss(&b.0)];
    let scale = a_loss.abs().max(1.0);
    assert!((a_loss - b_loss).abs() < ROUNDING * scale, "{what}: {a_loss} {b_loss}");
    let apart: Vec<f32> = a.1.iter().zip(&b.1).map(|(a, b)| a - b).collect();
    let (off, of) = (largest(&apart), largest(&a.1));
    assert!(of > 0.0 && off < ROUNDING * of, "{what}: gradients differ by {off:e} of {of:e}");
    assert_eq!((a.0.tokens, a.0.measures.len()), (b.0.tokens, b.0.measures.len()), "{what}");
    for ((name, a), (other, b)) in a.0.measures.iter().zip(&b.0.measures) {
        assert_eq!(name, other);
        assert!((a - b).abs() < ROUNDING * a.abs().max(1.0), "{what}: {name} is {a} and {b}");
    }
}

#[test]
fn every_objective_in_portions_is_that_of_one_batch() {
    let pairs = id_pairs(PAIRS);
    let mut named: Vec<&str> = TERMS.iter().filter_map(|t| t.split('\'').nth(1)).collect();
    named.sort_unstable();
    named.dedup();
    assert_eq!(named.len(), 20, "an objective is missing");
    for lora in [false, true] {
        let models = models(lora);
        for terms in TERMS {
            let objectives = objectives(terms, 1.0);
            let whole = step(&models, &objectives, &pairs, 1 << 20);
            for micro in [1, 60] {
                let parts = step(&models, &objectives, &pairs, micro);
                assert_alike(&format!("{terms} in {micro}, adapter: {lora}"), &whole, &parts);
            }
        }
    }
}

#[test]
fn the_order_inside_a_batch_changes_rounding_alone() {
    let pairs = id_pairs(PAIRS);
    let mut turned = pairs.clone();
    turned.reverse();
    let models = models(false);
    // KTO compares each prompt with its neighbour's answer, so there order matters.
    for terms in TERMS.into_iter().filter(|terms| !terms.contains("kto")) {
        let objectives = objectives(terms, 1.0);
        let a = step(&models, &objectives, &pairs, 60);
        let b = step(&models, &objectives, &turned, 60);
        assert_alike(terms, &a, &b);
    }
}

#[test]
fn the_gradient_is_that_of_the_loss() {
    let pairs = id_pairs(PAIRS);
    let (policy, reference) = models(false);
    for (terms, ld_alpha) in TERMS
        .into_iter()
        // Z of KTO is a constant to the gradient, but moves with the loss.
        .filter(|terms| !terms.contains("kto"))
        .map(|terms| (terms, 1.0))
        .chain([("{objective='dpo'}", 0.3), ("{objective='mappo'}", 0.0)])
    {
        let objectives = objectives(terms, ld_alpha);
        let both = (policy.clone(), reference.clone());
        let (_, gradient) = step(&both, &objectives, &pairs, 60);
        let length = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        // Along the gradient the loss changes by its length. The step is short enough for the
        // third derivative (its share is of the order of h²) and long enough for the rounding of
        // the loss, which is about 1e-6.
        let h = 4e-3;
        let moved = |sign: f64| {
            let mut moved = policy.clone();
            let mut at = 0;
            for tensor in moved.trained_mut().tensors_mut() {
                for value in tensor.as_f32_mut().unwrap() {
                    *value += (sign * h * f64::from(gradient[at]) / length) as f32;
                    at += 1;
                }
            }
            loss(&step(&(moved, reference.clone()), &objectives, &pairs, 60).0)
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * h);
        let off = (slope - length).abs();
        assert!(
            off < 0.02 * length + 2e-6 / h,
            "{terms} with ld_alpha {ld_alpha}: slope {slope}, gradient {length}"
        );
    }
}

#[test]
fn with_delta_0_the_rejected_answer_is_not_pushed_and_with_1_mappo_is_dpo() {
    let models = models(false);
    let (mappo, dpo) =
        (objectives("{objective='mappo'}", 1.0), objectives("{objective='dpo'}", 1.0));
    let with = |delta: f64| -> Vec<Pair> {
        id_pairs(PAIRS).into_iter().map(|pair| Pair { delta: Some(delta), ..pair }).collect()
    };
    let spared = with(0.0);
    let mut others = spared.clone();
    for pair in &mut others {
        let open = pair.rejected.learnt.iter().position(|learnt| *learnt).unwrap();
        pair.rejected.ids[open..].iter_mut().for_each(|id| *id = (*id + 50) % 256);
    }
    let (a, b) = (step(&models, &mappo, &spared, 60), step(&models, &mappo, &others, 60));
    assert!(a.1 == b.1 && a.0.loss == b.0.loss, "the rejected answer's words reach the gradient");
    let (a, b) = (step(&models, &dpo, &spared, 60), step(&models, &dpo, &others, 60));
    assert!(a.1 != b.1, "this test could not fail");

    let ones = with(1.0);
    let (a, b) = (step(&models, &mappo, &ones, 60), step(&models, &dpo, &ones, 60));
    assert!(a.1 == b.1 && a.0.loss == b.0.loss);
    let (a, b) = (step(&models, &mappo, &with(0.5), 60), step(&models, &dpo, &ones, 60));
    assert!(a.1 != b.1, "this test could not fail");
}

#[test]
fn a_policy_gone_wild_is_left_to_the_guard_and_a_stop_leaves_nothing() {
    let (mut policy, reference) = models(false);
    let slot = policy.params().slot("model.norm.weight").unwrap();
    policy.params_mut().tensors_mut()[slot].as_f32_mut().unwrap()[0] = f32::NAN;
    let pairs = id_pairs(3);
    let train = TuneTrain { steps: Some(1), batch: 3, ..TuneTrain::default() };
    for terms in ["{objective='dpo'}", "{objective='kto'}", "{objective='orpo'}"] {
        let objectives = objectives(terms, 1.0);
        let mut task = Align {
            train: &train,
            objectives: &objectives,
            reference: Reference::Model(Box::new(reference.clone())),
            pairs: &pairs,
            validation: &pairs,
            order: Order::new(3, &train),
            context: CONTEXT,
        };
        let mut grads = Grads::new(policy.trained().len());
        let stop = AtomicBool::new(false);
        let measured = task.step(&policy, 0, &mut grads, &stop).unwrap().unwrap();
        assert!(loss(&measured).is_nan() && measured.place.unwrap().contains("NaN"), "{terms}");
        assert!(loss(&task.evaluate(&policy).unwrap().unwrap()).is_nan());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(task.step(&policy, 0, &mut grads, &stop).unwrap().is_none());
    }
}
