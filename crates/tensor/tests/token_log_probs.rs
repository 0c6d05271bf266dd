//! Log-probabilities of given tokens against their formula in f64, and the walk back from
//! gradients that a caller brings.

mod common;

use common::{ROUNDING, ROUNDING_BF16, close, ints, refusal, slopes, tensor, threads, wide};
use proptest::prelude::*;
use tercet_tensor::{DType, Grads, Tape, Tensor, ops};

/// One token's numbers in f64.
struct Exact {
    log_prob: f64,
    best: f64,
    entropy: f64,
    hit: f64,
}

fn exact(x: &[f64], w: &[f64], target: i32) -> Exact {
    if target < 0 {
        return Exact { log_prob: 0.0, best: 0.0, entropy: 0.0, hit: 0.0 };
    }
    let z: Vec<f64> =
        w.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
    let p: Vec<f64> = z.iter().map(|z| z - top - log_sum).collect();
    let first = z.iter().position(|&z| z == top).unwrap();
    Exact {
        log_prob: p[target as usize],
        best: -log_sum,
        entropy: -p.iter().map(|p| p.exp() * p).sum::<f64>(),
        hit: if first == target as usize { 1.0 } else { 0.0 },
    }
}

fn all(x: &[f64], w: &[f64], width: usize, targets: &[i32]) -> Vec<Exact> {
    x.chunks(width).zip(targets).map(|(x, &t)| exact(x, w, t)).collect()
}

/// `[ln p, best, entropy, hits, dx, dW]` for given gradients of ln p.
fn run(x: &Tensor, w: &Tensor, targets: &Tensor, gradient: &[f32]) -> [Vec<f32>; 6] {
    let tape = &mut Tape::recording();
    let (px, pw) = (tape.param(x.clone(), 0), tape.param(w.clone(), 1));
    let found = ops::token_log_probs(tape, &px, &pw, targets).unwrap();
    let gradient = Tensor::from_f32(gradient.to_vec(), &[gradient.len()]).unwrap();
    let mut grads = Grads::new(2);
    tape.backward_from(&[(&found.log_probs, gradient)], &mut grads).unwrap();
    assert_eq!(found.log_probs.dtype(), DType::F32);
    let numbers = |x: &Tensor| x.to_vec_f32().unwrap();
    let [d_x, d_w] = [0, 1].map(|slot| numbers(grads.get(slot).unwrap()));
    [
        numbers(found.log_probs.value()),
        numbers(&found.best),
        numbers(&found.entropy),
        numbers(&found.hits),
        d_x,
        d_w,
    ]
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Values and gradients of one random case in one storage type.
fn check(targets: &[i32], width: usize, vocab: usize, dtype: DType, seed: u64) {
    let x = tensor(&[targets.len(), width], seed).to_dtype(dtype).unwrap();
    let w = tensor(&[vocab, width], seed + 1).to_dtype(dtype).unwrap();
    let gradient = common::numbers(targets.len(), seed + 2);
    let found = run(&x, &w, &ints(targets), &gradient).map(|x| f64s(&x));
    let inputs = [wide(&x), wide(&w)];
    let want = all(&inputs[0], &inputs[1], width, targets);
    // Logits of `width` products below 1, each rounded relative to at most `width`, twice (target
    // and highest); then a few roundings of what is at most 2·width + ln vocab.
    let n = (width + 12) as f64;
    let bound = n * n * ROUNDING;
    let column = |f: fn(&Exact) -> f64| want.iter().map(f).collect::<Vec<f64>>();
    close("ln p", &found[0], &column(|e| e.log_prob), bound, 0.0);
    close("best", &found[1], &column(|e| e.best), bound, 0.0);
    // Entropy moves by at most the spread of ln p where a logit moves.
    close("entropy", &found[2], &column(|e| e.entropy), n * bound, 0.0);
    assert_eq!(found[3], column(|e| e.hit));

    let total = |x: &[Vec<f64>]| -> f64 {
        let rows = all(&x[0], &x[1], width, targets);
        rows.iter().zip(&gradient).map(|(e, &g)| e.log_prob * f64::from(g)).sum()
    };
    // dx is rounded to the storage type once; dW lands in f32.
    let relative = if dtype == DType::BF16 { ROUNDING_BF16 } else { 0.0 };
    for slot in [0, 1] {
        let want = slopes(&inputs, slot, &total);
        close(["dx", "dW"][slot], &found[4 + slot], &want, bound, relative);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn each_token_has_its_log_probability_and_gradient(
        targets in prop::collection::vec(prop_oneof![Just(-100i32), 0i32..9], 0..14),
        width in 1usize..20,
        seed in 0u64..1000,
    ) {
        for dtype in [DType::F32, DType::BF16] {
            check(&targets, width, 9, dtype, seed);
        }
    }
}

#[test]
fn a_vocabulary_of_one_is_certain() {
    let [log_probs, best, entropy, hits, d_x, d_w] =
        run(&tensor(&[3, 4], 1), &tensor(&[1, 4], 2), &ints(&[0, -100, 0]), &[1.0, 2.0, -3.0]);
    assert_eq!((log_probs, best, entropy), (vec![0.0; 3], vec![0.0; 3], vec![0.0; 3]));
    assert_eq!(hits, [1.0, 0.0, 1.0]);
    assert!(d_x.iter().chain(&d_w).all(|&g| g == 0.0));
}

#[test]
fn no_tokens_and_no_targets_give_zeros() {
    for (tokens, targets) in [(0, vec![]), (3, vec![-100; 3])] {
        let found = run(
            &tensor(&[tokens, 4], 1),
            &tensor(&[5, 4], 2),
            &ints(&targets),
            &targets.iter().map(|_| 1.0).collect::<Vec<_>>(),
        );
        assert!(found.iter().flatten().all(|&x| x == 0.0));
        assert_eq!((found[0].len(), found[4].len(), found[5].len()), (tokens, tokens * 4, 20));
    }
}

#[test]
fn log_probabilities_survive_huge_logits() {
    let x = Tensor::from_f32(vec![1e4, -1e4], &[2, 1]).unwrap();
    let w = Tensor::from_f32(vec![1.0, -1.0], &[2, 1]).unwrap();
    let [log_probs, best, entropy, hits, d_x, d_w] = run(&x, &w, &ints(&[0, 0]), &[1.0, 1.0]);
    // The first token is certain and right, the second certain and wrong by 2·10⁴.
    assert_eq!(log_probs, [0.0, -2e4]);
    assert_eq!((best, entropy, hits), (vec![0.0; 2], vec![0.0; 2], vec![1.0, 0.0]));
    assert_eq!(d_x, [0.0, 2.0]);
    assert_eq!(d_w, [-1e4, 1e4]);
}

#[test]
fn the_first_of_equal_tokens_is_the_hit() {
    let x = tensor(&[2, 3], 1);
    let w = Tensor::zeros(DType::F32, &[4, 3]);
    let [log_probs, _, entropy, hits, ..] = run(&x, &w, &ints(&[0, 3]), &[0.0, 0.0]);
    assert_eq!(hits, [1.0, 0.0]);
    for (p, h) in log_probs.iter().zip(&entropy) {
        assert!((f64::from(*p) + 4f64.ln()).abs() < ROUNDING * 4.0, "{p}");
        assert!((f64::from(*h) - 4f64.ln()).abs() < ROUNDING * 4.0, "{h}");
    }
}

/// Tokens, width and vocabulary whose logits are cut into several chunks: 2²²/5000 = 838 rows.
const LARGE: [usize; 3] = [1700, 6, 5000];

fn large() -> (Tensor, Tensor, Vec<i32>) {
    let [tokens, width, vocab] = LARGE;
    let target = |t| if t % 5 == 0 { -100 } else { (t * 31 % vocab) as i32 };
    (tensor(&[tokens, width], 1), tensor(&[vocab, width], 2), (0..tokens).map(target).collect())
}

#[test]
fn the_mean_of_log_probabilities_has_the_fused_losss_gradient() {
    let [tokens, ..] = LARGE;
    let (x, w, targets) = large();
    let counted = targets.iter().filter(|&&t| t >= 0).count() as f64;
    let gradient = vec![(-1.0 / counted) as f32; tokens];
    let [log_probs, _, _, _, d_x, d_w] = run(&x, &w, &ints(&targets), &gradient);

    let tape = &mut Tape::recording();
    let (px, pw) = (tape.param(x, 0), tape.param(w, 1));
    let loss = ops::linear_cross_entropy(tape, &px, &pw, &ints(&targets)).unwrap();
    let mut grads = Grads::new(2);
    tape.backward(&loss, &mut grads).unwrap();
    let mean = -f64s(&log_probs).iter().sum::<f64>() / counted;
    let value = f64::from(loss.value().item().unwrap());
    // Losses are about ln 5000; each rounds a few times.
    assert!((mean - value).abs() < 16.0 * 10.0 * ROUNDING, "{mean} {value}");
    // Slopes are at most 1/M, each off by a few roundings, in sums of 5000 terms that add up to
    // at most 2/M (dx) and of 1700 terms of x below 1 (dW), of which 1360 count.
    let (m, relative) = (1.0 / counted, 1e-6);
    close("dx", &f64s(&d_x), &wide(grads.get(0).unwrap()), 64.0 * ROUNDING * m, relative);
    close("dW", &f64s(&d_w), &wide(grads.get(1).unwrap()), 64.0 * ROUNDING * m, relative);
}

#[test]
fn every_piece_of_every_chunk_reads_its_own_tokens() {
    let [tokens, width, _] = LARGE;
    let (x, w, targets) = large();
    let gradient = common::numbers(tokens, 9);
    let found = run(&x, &w, &ints(&targets), &gradient);
    let (x, w) = (wide(&x), wide(&w));
    let want = all(&x, &w, width, &targets);
    // Logits of 6 products below 1, as above, and sums of 5000 terms in 32 parts of 157.
    let bound = (18.0 * 18.0 + 160.0) * ROUNDING;
    let column = |f: fn(&Exact) -> f64| want.iter().map(f).collect::<Vec<f64>>();
    close("ln p", &f64s(&found[0]), &column(|e| e.log_prob), bound, 0.0);
    close("best", &f64s(&found[1]), &column(|e| e.best), bound, 0.0);
    close("entropy", &f64s(&found[2]), &column(|e| e.entropy), 10.0 * bound, 0.0);
    assert_eq!(f64s(&found[3]), column(|e| e.hit));
    // dx_t = g_t·(W_target − Σ_v p_v·W_v).
    for t in 0..tokens {
        let mut slope = vec![0.0; width];
        if targets[t] >= 0 {
            let z: Vec<f64> = w
                .chunks(width)
                .map(|w| w.iter().zip(&x[t * width..]).map(|(w, x)| w * x).sum::<f64>().exp())
                .collect();
            let total: f64 = z.iter().sum();
            for (i, slope) in slope.iter_mut().enumerate() {
                let mean: f64 = z.iter().zip(w.chunks(width)).map(|(z, w)| z / total * w[i]).sum();
                *slope = f64::from(gradient[t]) * (w[targets[t] as usize * width + i] - mean);
            }
        }
        let got = &found[4][t * width..][..width];
        close(&format!("dx of {t}"), &f64s(got), &slope, bound, 0.0);
    }
}

#[test]
fn chunks_of_which_nothing_is_asked_get_zeros_and_change_nothing() {
    let [tokens, width, _] = LARGE;
    let (x, w, targets) = large();
    // Only the first chunk's tokens are asked for: the second's must be as if they were not there.
    let mut gradient = common::numbers(tokens, 7);
    gradient[838..].fill(0.0);
    let all = run(&x, &w, &ints(&targets), &gradient);
    let cut = Tensor::from_f32(x.to_vec_f32().unwrap()[..838 * width].to_vec(), &[838, width]);
    let first = run(&cut.unwrap(), &w, &ints(&targets[..838]), &gradient[..838]);
    assert!(all[4][..838 * width] == first[4] && all[5] == first[5]);
    assert!(all[4][838 * width..].iter().all(|&g| g == 0.0));
    assert!(all[0][838..].iter().any(|&p| p != 0.0));
}

#[test]
fn repeats_and_any_number_of_threads_give_the_same_bits() {
    let (x, w, targets) = large();
    let gradient = common::numbers(targets.len(), 3);
    for dtype in [DType::F32, DType::BF16] {
        let (x, w) = (x.to_dtype(dtype).unwrap(), w.to_dtype(dtype).unwrap());
        let bits = |count| {
            let found = threads(count, || run(&x, &w, &ints(&targets), &gradient));
            found.map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<u32>>())
        };
        let one = bits(1);
        for count in [1, 2, 3, 8] {
            assert!(one == bits(count), "{dtype} {count} threads");
        }
    }
}

#[test]
fn a_frozen_head_gets_no_gradient_and_x_the_same() {
    let (x, w, targets) = (tensor(&[5, 4], 1), tensor(&[7, 4], 2), ints(&[1, -100, 6, 0, 3]));
    let gradient = common::numbers(5, 3);
    let both = run(&x, &w, &targets, &gradient);
    let tape = &mut Tape::recording();
    let (px, pw) = (tape.param(x, 0), tape.leaf(w));
    let found = ops::token_log_probs(tape, &px, &pw, &targets).unwrap();
    let mut grads = Grads::new(2);
    let gradient = Tensor::from_f32(gradient, &[5]).unwrap();
    tape.backward_from(&[(&found.log_probs, gradient)], &mut grads).unwrap();
    assert!(grads.get(0).unwrap().as_f32().unwrap() == both[4] && grads.get(1).is_none());
}

#[test]
fn a_tied_head_adds_to_what_the_embedding_gave() {
    let (w, ids) = (tensor(&[7, 4], 2), ints(&[3, 1, 6]));
    let gradient = Tensor::from_f32(common::numbers(3, 3), &[3]).unwrap();
    let walk = |tied: bool| {
        let tape = &mut Tape::recording();
        let (head, table) = (tape.param(w.clone(), 0), tape.param(w.clone(), usize::from(!tied)));
        let x = ops::embedding(tape, &table, &ids).unwrap();
        let found = ops::token_log_probs(tape, &x, &head, &ids).unwrap();
        let mut grads = Grads::new(2);
        tape.backward_from(&[(&found.log_probs, gradient.clone())], &mut grads).unwrap();
        grads
    };
    let (one, two) = (walk(true), walk(false));
    let parts = [0, 1].map(|slot| wide(two.get(slot).unwrap()));
    let want: Vec<f64> = parts[0].iter().zip(&parts[1]).map(|(a, b)| a + b).collect();
    close("dW", &wide(one.get(0).unwrap()), &want, 2.0 * ROUNDING, 0.0);
}

#[test]
fn hostile_inputs_are_refused_by_name_and_nan_shows() {
    let tape = &mut Tape::recording();
    let (x, w) = (tape.leaf(tensor(&[2, 3], 1)), tape.leaf(tensor(&[4, 3], 2)));
    let text = refusal(ops::token_log_probs(tape, &x, &w, &ints(&[1, 4])));
    assert_eq!(text, "token_log_probs: target 4 of token 1 is neither -100 nor in 0..4");
    assert!(refusal(ops::token_log_probs(tape, &x, &w, &ints(&[1]))).contains("targets"));
    assert!(refusal(ops::token_log_probs(tape, &x, &w, &ints(&[1, -1]))).contains("target -1"));
    let narrow = tape.leaf(tensor(&[4, 2], 2));
    let text = refusal(ops::token_log_probs(tape, &x, &narrow, &ints(&[1, 1])));
    assert!(text.contains("expected [vocab, 3]"), "{text}");
    let half = tape.leaf(tensor(&[4, 3], 2).to_dtype(DType::BF16).unwrap());
    assert!(refusal(ops::token_log_probs(tape, &x, &half, &ints(&[1, 1]))).contains("bf16"));

    let bad = Tensor::from_f32(vec![f32::NAN, 0.0, 0.0, 1.0, 1.0, 1.0], &[2, 3]).unwrap();
    let [log_probs, ..] = run(&bad, &tensor(&[4, 3], 2), &ints(&[1, 1]), &[0.0, 0.0]);
    assert!(log_probs[0].is_nan() && log_probs[1].is_finite());
}

#[test]
fn the_walk_from_given_gradients_is_the_walk_from_their_weighted_sum() {
    let gradient = tensor(&[2, 4], 4242);
    let w = tensor(&[4, 3], 1);
    let walk = |given: bool| {
        let tape = &mut Tape::recording();
        let (x, w) = (tape.leaf(tensor(&[2, 3], 2)), tape.param(w.clone(), 0));
        let y = ops::linear(tape, &x, &w, None).unwrap();
        let mut grads = Grads::new(1);
        if given {
            // In two parts, which add up; one of them exactly nothing.
            let zero = Tensor::zeros(DType::F32, &[2, 4]);
            tape.backward_from(&[(&y, gradient.clone()), (&y, zero)], &mut grads).unwrap();
        } else {
            let c = tape.leaf(gradient.reshape(&[1, 8]).unwrap());
            let loss = ops::linear(tape, &y.reshape(&[1, 8]).unwrap(), &c, None).unwrap();
            tape.backward(&loss, &mut grads).unwrap();
        }
        grads.get(0).unwrap().to_vec_f32().unwrap()
    };
    assert_eq!(walk(true), walk(false));
}

#[test]
fn the_walk_from_given_gradients_refuses_what_does_not_fit() {
    let mut grads = Grads::new(1);
    let mut tape = Tape::recording();
    let x = tape.param(tensor(&[2, 3], 1), 0);
    let y = ops::scale(&mut tape, &x, 2.0).unwrap();
    let g = || Tensor::zeros(DType::F32, &[2, 3]);
    let text = refusal(tape.backward_from(&[(&y, tensor(&[6], 1))], &mut grads));
    assert_eq!(text, "backward: a gradient has shape [6], expected [2, 3] like the output");
    let whole = Tensor::zeros(DType::I32, &[2, 3]);
    assert!(refusal(tape.backward_from(&[(&y, whole)], &mut grads)).contains("i32"));
    let mut other = Tape::recording();
    assert!(refusal(other.backward_from(&[(&y, g())], &mut grads)).contains("another tape"));
    assert!(refusal(Tape::inference().backward_from(&[], &mut grads)).contains("does not record"));
    tape.backward_from(&[(&y, g())], &mut grads).unwrap();
    assert!(refusal(tape.backward_from(&[(&y, g())], &mut grads)).contains("already run"));
    // Constants have nowhere to send a gradient.
    let constant = tape.leaf(g());
    tape.backward_from(&[(&constant, g())], &mut grads).unwrap();
}
