//! Linear maps, embeddings and the fused loss against their formulas.

mod common;

use common::{Check, ROUNDING, close, ints, refusal, slopes, tensor, wide};
use proptest::prelude::*;
use tercet_tensor::{DType, Grads, Tape, Tensor, ops};

/// `x·Wᵀ`, weight `[outer, inner]`.
fn project(x: &[f64], w: &[f64], inner: usize, outer: usize) -> Vec<f64> {
    let rows = x.len().checked_div(inner).unwrap_or(0);
    (0..rows)
        .flat_map(|t| {
            (0..outer).map(move |o| (0..inner).map(|i| x[t * inner + i] * w[o * inner + i]).sum())
        })
        .collect()
}

/// Mean cross-entropy over the counted targets.
fn cross_entropy(x: &[f64], w: &[f64], width: usize, vocab: usize, targets: &[i32]) -> f64 {
    let logits = project(x, w, width, vocab);
    let counted = targets.iter().filter(|&&t| t >= 0).count().max(1);
    let losses = logits.chunks(vocab).zip(targets).filter(|(_, t)| **t >= 0).map(|(z, &t)| {
        let top = z.iter().fold(f64::NEG_INFINITY, |m, z| m.max(*z));
        top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln() - z[t as usize]
    });
    losses.sum::<f64>() / counted as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn linear_is_the_matrix_product(
        rows in 0usize..12,
        inner in 1usize..40,
        outer in 1usize..20,
        seed in 0u64..1000,
    ) {
        // Sums of products below 1: n terms, n roundings each relative to at most n.
        let bound = |n: usize| ((n + 2) * (n + 2)) as f64 * ROUNDING;
        Check {
            op: &|tape, x| ops::linear(tape, &x[0], &x[1], Some(&x[2])),
            exact: &|x| {
                let y = project(&x[0], &x[1], inner, outer);
                y.iter().enumerate().map(|(i, y)| y + x[2][i % outer]).collect()
            },
            inputs: &[tensor(&[rows, inner], seed), tensor(&[outer, inner], 5), tensor(&[outer], 6)],
            value_bound: bound(inner),
            grad_bound: bound(rows.max(outer)),
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn embedding_picks_rows_and_adds_their_gradients(
        ids in prop::collection::vec(0i32..7, 0..40),
        width in 1usize..20,
    ) {
        let list = ints(&ids);
        Check {
            op: &|tape, x| ops::embedding(tape, &x[0], &list),
            exact: &|x| {
                ids.iter().flat_map(|&id| x[0][id as usize * width..][..width].to_vec()).collect()
            },
            inputs: &[tensor(&[7, width], 3)],
            value_bound: 0.0,
            grad_bound: (ids.len() * ids.len()) as f64 * ROUNDING,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn the_fused_loss_is_the_mean_cross_entropy(
        targets in prop::collection::vec(prop_oneof![Just(-100i32), 0i32..9], 0..14),
        width in 1usize..20,
        seed in 0u64..1000,
    ) {
        let list = ints(&targets);
        let n = (width + 12) as f64;
        let bound = n * n * ROUNDING;
        Check {
            op: &|tape, x| ops::linear_cross_entropy(tape, &x[0], &x[1], &list),
            exact: &|x| vec![cross_entropy(&x[0], &x[1], width, 9, &targets)],
            inputs: &[tensor(&[targets.len(), width], seed), tensor(&[9, width], seed + 1)],
            value_bound: bound,
            grad_bound: bound,
            stored: 0.0,
        }
        .run();
    }
}

#[test]
fn embedding_of_a_large_table_splits_by_rows() {
    // Several pieces of the table, tokens in all of them, some rows untouched.
    let (vocab, width) = (5000, 9);
    let ids: Vec<i32> = (0..3000).map(|i| (i * 37) % 4801).collect();
    let tape = &mut Tape::recording();
    let table = tape.param(tensor(&[vocab, width], 1), 0);
    let y = ops::embedding(tape, &table, &ints(&ids)).unwrap();
    let (loss, c) = common::weigh(tape, &y).unwrap();
    let mut grads = Grads::new(1);
    tape.backward(&loss, &mut grads).unwrap();
    let mut want = vec![0.0; vocab * width];
    for (t, &id) in ids.iter().enumerate() {
        for i in 0..width {
            want[id as usize * width + i] += c[t * width + i];
        }
    }
    close("gradient", &wide(grads.get(0).unwrap()), &want, 4.0 * ROUNDING, 0.0);
}

/// The sum is the mean's numerator, and of each token's loss and gradient the bits are its own,
/// whichever others count.
#[test]
fn a_sum_of_losses_divides_nothing_and_mixes_no_tokens() {
    let (tokens, width, vocab) = (1024, 6, 5000);
    let run = |counts: &dyn Fn(usize) -> bool| {
        let target = |t: usize| if counts(t) { (t * 31 % vocab) as i32 } else { -100 };
        let targets: Vec<i32> = (0..tokens).map(target).collect();
        let tape = &mut Tape::recording();
        let x = tape.param(tensor(&[tokens, width], 1), 0);
        let w = tape.leaf(tensor(&[vocab, width], 2));
        let (sum, each) = ops::linear_cross_entropy_sum(tape, &x, &w, &ints(&targets)).unwrap();
        let mean = ops::linear_cross_entropy(tape, &x, &w, &ints(&targets)).unwrap();
        let mut grads = Grads::new(1);
        tape.backward(&sum, &mut grads).unwrap();
        let values = [sum.value().item().unwrap(), mean.value().item().unwrap()];
        (values, each.to_vec_f32().unwrap(), grads.get(0).unwrap().to_vec_f32().unwrap())
    };
    let (values, all, d_all) = run(&|t| t % 5 != 0);
    let total: f64 = all.iter().map(|&loss| f64::from(loss)).sum();
    let counted = (0..tokens).filter(|t| t % 5 != 0).count() as f64;
    assert!((total / f64::from(values[0]) - 1.0).abs() < ROUNDING * 2.0);
    assert!((total / counted / f64::from(values[1]) - 1.0).abs() < ROUNDING * 2.0);
    let (_, few, d_few) = run(&|t| t % 5 != 0 && t < 300);
    for t in 0..tokens {
        let [row_all, row_few] = [&d_all, &d_few].map(|d| &d[t * width..][..width]);
        match t < 300 {
            true => assert!(all[t].to_bits() == few[t].to_bits() && row_all == row_few, "{t}"),
            false => assert!(few[t] == 0.0 && row_few.iter().all(|&x| x == 0.0), "{t}"),
        }
    }
}

#[test]
fn the_fused_loss_agrees_across_chunks() {
    // A vocabulary whose logits are cut into several chunks of tokens: 2²²/5000 = 838 rows.
    let (tokens, width, vocab) = (1700, 6, 5000);
    let targets: Vec<i32> =
        (0..tokens).map(|t| if t % 5 == 0 { -100 } else { (t * 31 % vocab) as i32 }).collect();
    let (x, w) = (tensor(&[tokens, width], 1), tensor(&[vocab, width], 2));
    let tape = &mut Tape::recording();
    let (px, pw) = (tape.param(x.clone(), 0), tape.param(w.clone(), 1));
    let loss = ops::linear_cross_entropy(tape, &px, &pw, &ints(&targets)).unwrap();
    let exact = [wide(&x), wide(&w)];
    let f = |x: &[Vec<f64>]| cross_entropy(&x[0], &x[1], width, vocab, &targets);
    let value = f64::from(loss.value().item().unwrap());
    assert!((value - f(&exact)).abs() < 20.0 * 10.0 * ROUNDING, "{value}");

    let mut grads = Grads::new(2);
    tape.backward_scaled(&loss, 2.0, &mut grads).unwrap();
    // A few rows on both sides of the seam, moved one element at a time.
    for t in [0, 837, 838, 839, 1699] {
        let row = exact[0][t * width..][..width].to_vec();
        let near = |x: &[Vec<f64>]| {
            let one = &targets[t..t + 1];
            cross_entropy(&x[0], &exact[1], width, vocab, one) / (tokens as f64 * 0.8)
        };
        let want: Vec<f64> = slopes(&[row], 0, &near).iter().map(|s| 2.0 * s).collect();
        let got = &wide(grads.get(0).unwrap())[t * width..][..width];
        close("row", got, &want, 40.0 * ROUNDING / (tokens as f64 * 0.8), 1e-6);
    }
    // dW = Σ_t (softmax(z_t) − onehot)·x_t / M: every chunk must be in it.
    let logits = project(&exact[0], &exact[1], width, vocab);
    let mut want = vec![0.0; vocab * width];
    for (t, &target) in targets.iter().enumerate().filter(|(_, target)| **target >= 0) {
        let z = &logits[t * vocab..][..vocab];
        let total: f64 = z.iter().map(|z| z.exp()).sum();
        for (v, z) in z.iter().enumerate() {
            let hit = if v == target as usize { 1.0 } else { 0.0 };
            let dz = 2.0 * (z.exp() / total - hit) / (tokens as f64 * 0.8);
            for i in 0..width {
                want[v * width + i] += dz * exact[0][t * width + i];
            }
        }
    }
    // Each row sums at most one target's 2/M and 1700 small terms.
    let bound = 1700.0 * ROUNDING * 2.0 / (tokens as f64 * 0.8);
    close("dW", &wide(grads.get(1).unwrap()), &want, bound, 1e-6);
}

#[test]
fn a_loss_without_targets_is_zero_with_zero_gradients() {
    let tape = &mut Tape::recording();
    let (x, w) = (tape.param(tensor(&[3, 4], 1), 0), tape.param(tensor(&[5, 4], 2), 1));
    let loss = ops::linear_cross_entropy(tape, &x, &w, &ints(&[-100; 3])).unwrap();
    assert_eq!(loss.value().item().unwrap(), 0.0);
    let mut grads = Grads::new(2);
    tape.backward(&loss, &mut grads).unwrap();
    assert_eq!(grads.get(0).unwrap().as_f32().unwrap(), [0.0; 12]);
    assert_eq!(grads.get(1).unwrap().as_f32().unwrap(), [0.0; 20]);
}

#[test]
fn the_loss_survives_huge_logits() {
    let tape = &mut Tape::inference();
    let x = tape.leaf(Tensor::from_f32(vec![1e4, -1e4], &[2, 1]).unwrap());
    let w = tape.leaf(Tensor::from_f32(vec![1.0, -1.0], &[2, 1]).unwrap());
    let loss = ops::linear_cross_entropy(tape, &x, &w, &ints(&[0, 0])).unwrap();
    // The first token is certain and right, the second certain and wrong by 2·10⁴.
    assert_eq!(loss.value().item().unwrap(), 1e4);
}

#[test]
fn wrong_shapes_and_indices_are_refused_by_name() {
    let tape = &mut Tape::recording();
    let x = tape.leaf(tensor(&[2, 3], 1));
    let w = tape.leaf(tensor(&[4, 5], 1));
    assert_eq!(
        refusal(ops::linear(tape, &x, &w, None)),
        "linear: the weight has shape [4, 5], expected [O, 3] to fit x of shape [2, 3]"
    );
    assert_eq!(
        refusal(ops::embedding(tape, &w, &ints(&[0, 4]))),
        "embedding: id 4 at position 1 is outside 0..4"
    );
    assert!(refusal(ops::embedding(tape, &w, &ints(&[-1]))).contains("id -1 at position 0"));
    let w = tape.leaf(tensor(&[4, 3], 1));
    assert_eq!(
        refusal(ops::linear_cross_entropy(tape, &x, &w, &ints(&[1, 4]))),
        "linear_cross_entropy: target 4 of token 1 is neither -100 nor in 0..4"
    );
    assert!(refusal(ops::linear_cross_entropy(tape, &x, &w, &ints(&[1]))).contains("targets"));
    let ids = Tensor::zeros(DType::F32, &[2]);
    assert_eq!(refusal(ops::embedding(tape, &w, &ids)), "embedding: ids is f32, expected i32");
}

#[test]
fn a_constant_head_gives_the_same_gradient_of_x_and_none_of_its_own() {
    let x = tensor(&[7, 5], 3);
    let w = tensor(&[11, 5], 4);
    let targets = ints(&[3, -100, 0, 10, 5, 5, 1]);
    let slopes = |constant: bool| {
        let mut tape = Tape::recording();
        let (x, w) = (tape.param(x.clone(), 0), w.clone());
        let w = if constant { tape.leaf(w) } else { tape.param(w, 1) };
        let loss = ops::linear_cross_entropy(&mut tape, &x, &w, &targets).unwrap();
        let mut grads = Grads::new(2);
        tape.backward(&loss, &mut grads).unwrap();
        (grads.get(0).unwrap().to_vec_f32().unwrap(), grads.get(1).is_some())
    };
    let ((constant, none), (trained, some)) = (slopes(true), slopes(false));
    assert_eq!(constant, trained);
    assert!(!none && some);
}
