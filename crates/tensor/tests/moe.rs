//! The pieces of a mixture of experts against their formulas.

mod common;

use common::{Check, ROUNDING, numbers, refusal, tensor, wide};
use proptest::prelude::*;
use tercet_tensor::{Grads, Tape, Tensor, Var, ops};

/// Softmax of every row and the `k` largest of each, lower index on ties.
fn route(logits: &[f64], experts: usize, k: usize) -> (Vec<f64>, Vec<usize>) {
    let (mut p, mut chosen) = (vec![], vec![]);
    for row in logits.chunks(experts) {
        let top = row.iter().fold(f64::NEG_INFINITY, |m, z| m.max(*z));
        let total: f64 = row.iter().map(|z| (z - top).exp()).sum();
        p.extend(row.iter().map(|z| (z - top).exp() / total));
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        chosen.extend(&order[..k]);
    }
    (p, chosen)
}

/// Logits whose order no rounding and no difference step can change: distinct multiples of 1/16.
fn logits(tokens: usize, experts: usize, seed: u64) -> Tensor {
    let mut x = vec![];
    for t in 0..tokens {
        let keys = numbers(experts, seed + t as u64);
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
        x.extend(order.into_iter().map(|i| i as f32 / 16.0));
    }
    Tensor::from_f32(x, &[tokens, experts]).unwrap()
}

/// Sums of a few dozen terms below 1.
const BOUND: f64 = 64.0 * 8.0 * ROUNDING;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_weights_are_the_top_probabilities(
        tokens in 0usize..6,
        experts in 1usize..9,
        k in 1usize..9,
        normalise: bool,
        seed in 0u64..1000,
    ) {
        let k = k.min(experts);
        Check {
            op: &|tape, x| Ok(ops::moe_route(tape, &x[0], k, normalise)?.weights),
            exact: &|x| {
                let (p, chosen) = route(&x[0], experts, k);
                let rows = chosen.chunks(k).zip(p.chunks(experts));
                rows.flat_map(|(chosen, p)| {
                    let total: f64 = chosen.iter().map(|&e| p[e]).sum();
                    let total = if normalise { total } else { 1.0 };
                    chosen.iter().map(|&e| p[e] / total).collect::<Vec<_>>()
                })
                .collect()
            },
            inputs: &[logits(tokens, experts, seed)],
            value_bound: BOUND,
            grad_bound: BOUND,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn the_balance_loss_is_load_times_probability(
        tokens in 1usize..6,
        experts in 1usize..9,
        k in 1usize..9,
        seed in 0u64..1000,
    ) {
        let k = k.min(experts);
        let logits = logits(tokens, experts, seed);
        let (_, chosen) = route(&wide(&logits), experts, k);
        let share = experts as f64 / (k * tokens) as f64;
        let load = |e: usize| share * chosen.iter().filter(|&&c| c == e).count() as f64;
        Check {
            op: &|tape, x| Ok(ops::moe_route(tape, &x[0], k, false)?.balance),
            exact: &|x| {
                let (p, _) = route(&x[0], experts, k);
                let mean = |e: usize| p.iter().skip(e).step_by(experts).sum::<f64>() / tokens as f64;
                vec![(0..experts).map(|e| load(e) * mean(e)).sum()]
            },
            inputs: &[logits],
            value_bound: BOUND * experts as f64,
            grad_bound: BOUND * experts as f64,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn a_whole_layer_is_the_weighted_sum_of_its_experts(
        tokens in 0usize..6,
        experts in 1usize..6,
        k in 1usize..6,
        seed in 0u64..1000,
    ) {
        let k = k.min(experts);
        let (inner, outer) = (5, 3);
        let router = logits(tokens, experts, seed);
        let mut inputs = vec![tensor(&[tokens, inner], seed), tensor(&[tokens, k], seed + 1)];
        inputs.extend((0..experts).map(|e| tensor(&[outer, inner], seed + 2 + e as u64)));
        let (_, chosen) = route(&wide(&router), experts, k);
        let op = |tape: &mut Tape, x: &[Var]| {
            let logits = tape.leaf(router.clone());
            let plan = ops::moe_route(tape, &logits, k, true)?.plan;
            let rows = ops::gather_rows(tape, &x[0], &plan)?;
            let rows = ops::expert_linear(tape, &rows, &x[2..], &plan)?;
            ops::scatter_rows(tape, &rows, &x[1], &plan)
        };
        let exact = |x: &[Vec<f64>]| {
            let mut y = vec![0.0; tokens * outer];
            for (pair, &e) in chosen.iter().enumerate() {
                let t = pair / k;
                for o in 0..outer {
                    let row = &x[2 + e][o * inner..][..inner];
                    let dot: f64 = row.iter().zip(&x[0][t * inner..]).map(|(w, x)| w * x).sum();
                    y[t * outer + o] += x[1][pair] * dot;
                }
            }
            y
        };
        let (value_bound, grad_bound) = (BOUND, BOUND * 8.0);
        // k rows whose elements are sums of five products, each times its weight.
        let stored = (k * inner) as f64;
        Check { op: &op, exact: &exact, inputs: &inputs, value_bound, grad_bound, stored }.run();
    }
}

#[test]
fn ties_go_to_the_lower_expert_and_nan_still_picks_different_ones() {
    let rows = vec![1.0, 1.0, 1.0, 1.0, f32::NAN, f32::NAN, f32::NAN, f32::NAN];
    let tape = &mut Tape::inference();
    let logits = tape.leaf(Tensor::from_f32(rows, &[2, 4]).unwrap());
    let plan = ops::moe_route(tape, &logits, 2, false).unwrap().plan;
    assert_eq!(plan.experts().unwrap(), [0, 1, 0, 1]);
    assert_eq!(plan.offsets(), [0, 2, 4, 4, 4]);
}

#[test]
fn an_expert_without_tokens_gets_a_gradient_of_zeros() {
    let tape = &mut Tape::recording();
    let logits = tape.leaf(Tensor::from_f32(vec![0.0, 1.0, 0.0, 1.0], &[2, 2]).unwrap());
    let plan = ops::moe_route(tape, &logits, 1, false).unwrap().plan;
    let x = tape.leaf(tensor(&[2, 3], 1));
    let rows = ops::gather_rows(tape, &x, &plan).unwrap();
    let weights = [tape.param(tensor(&[4, 3], 2), 0), tape.param(tensor(&[4, 3], 3), 1)];
    let y = ops::expert_linear(tape, &rows, &weights, &plan).unwrap();
    let (loss, _) = common::weigh(tape, &y).unwrap();
    let mut grads = Grads::new(2);
    // Twice, so that left-overs of the first walk would show.
    grads.set(0, tensor(&[4, 3], 9)).unwrap();
    grads.zero();
    tape.backward(&loss, &mut grads).unwrap();
    assert_eq!(grads.get(0).unwrap().as_f32().unwrap(), [0.0; 12]);
    assert!(grads.get(1).unwrap().as_f32().unwrap().iter().any(|&g| g != 0.0));
}

#[test]
fn what_does_not_fit_the_plan_is_refused() {
    let tape = &mut Tape::recording();
    let logits = tape.leaf(tensor(&[3, 4], 1));
    let text = refusal(ops::moe_route(tape, &logits, 5, false));
    assert_eq!(text, "moe_route: top_k 5 is outside 1..=4, the experts");
    assert!(refusal(ops::moe_route(tape, &logits, 0, false)).contains("top_k 0"));
    let plan = ops::moe_route(tape, &logits, 2, false).unwrap().plan;
    let x = tape.leaf(tensor(&[2, 5], 1));
    assert!(refusal(ops::gather_rows(tape, &x, &plan)).contains("[3, C], the tokens of the plan"));
    let rows = tape.leaf(tensor(&[6, 5], 1));
    let weights = [tape.leaf(tensor(&[2, 5], 1))];
    let text = refusal(ops::expert_linear(tape, &rows, &weights, &plan));
    assert_eq!(text, "expert_linear: 1 weights were given for 4 experts");
    let text = refusal(ops::scatter_rows(tape, &rows, &x, &plan));
    assert_eq!(text, "scatter_rows: the weights has shape [2, 5], expected [3, 2]");
}
