//! Elementwise ops against their formulas.

mod common;

use common::{Check, ROUNDING, refusal, tensor};
use proptest::prelude::*;
use tercet_tensor::{DType, Tape, Tensor, ops};

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Values in −8..8, where the activations bend.
fn bent(shape: &[usize], seed: u64) -> Tensor {
    let x = common::numbers(shape.iter().product(), seed);
    Tensor::from_f32(x.into_iter().map(|x| 8.0 * x).collect(), shape).unwrap()
}

/// Bounds for functions of a few operations on values up to 8 times a slope up to about 1.13 and
/// a weight up to 1: each of at most 12 roundings is relative to at most 8·8 = 64.
const FEW: f64 = 12.0 * 64.0 * ROUNDING;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn add_is_the_sum(rows in 0usize..4, width in 1usize..70, seed in 0u64..1000) {
        let shape = [rows, width];
        Check {
            op: &|tape, x| ops::add(tape, &x[0], &x[1]),
            exact: &|x| x[0].iter().zip(&x[1]).map(|(a, b)| a + b).collect(),
            inputs: &[tensor(&shape, seed), tensor(&shape, seed + 1)],
            value_bound: 2.0 * ROUNDING,
            grad_bound: 2.0 * ROUNDING,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn scale_multiplies(rows in 0usize..4, width in 1usize..70, factor in -3f32..3.0) {
        Check {
            op: &|tape, x| ops::scale(tape, &x[0], factor),
            exact: &|x| x[0].iter().map(|a| a * f64::from(factor)).collect(),
            inputs: &[tensor(&[rows, width], 7)],
            value_bound: 3.0 * ROUNDING,
            grad_bound: 6.0 * ROUNDING,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn sigmoid_is_the_logistic_function(count in 0usize..200, seed in 0u64..1000) {
        Check {
            op: &|tape, x| ops::sigmoid(tape, &x[0]),
            exact: &|x| x[0].iter().map(|&x| sigmoid(x)).collect(),
            inputs: &[bent(&[count], seed)],
            value_bound: 4.0 * ROUNDING,
            grad_bound: 8.0 * ROUNDING,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn gelu_exact_is_x_times_phi(count in 0usize..200, seed in 0u64..1000) {
        let phi = |x: f64| 0.5 * libm::erfc(-x / 2f64.sqrt());
        Check {
            op: &|tape, x| ops::gelu(tape, &x[0], ops::Gelu::Exact),
            exact: &|x| x[0].iter().map(|&x| x * phi(x)).collect(),
            inputs: &[bent(&[count], seed)],
            value_bound: FEW,
            grad_bound: FEW,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn gelu_tanh_is_gpt2s(count in 0usize..200, seed in 0u64..1000) {
        let root = (2.0 / std::f64::consts::PI).sqrt();
        let gelu = |x: f64| 0.5 * x * (1.0 + (root * (x + 0.044715 * x * x * x)).tanh());
        Check {
            op: &|tape, x| ops::gelu(tape, &x[0], ops::Gelu::Tanh),
            exact: &|x| x[0].iter().map(|&x| gelu(x)).collect(),
            inputs: &[bent(&[count], seed)],
            value_bound: FEW,
            grad_bound: FEW,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn swiglu_is_silu_times_up(rows in 0usize..4, width in 1usize..50, seed in 0u64..1000) {
        let shape = [rows, width];
        Check {
            op: &|tape, x| ops::swiglu(tape, &x[0], &x[1]),
            exact: &|x| x[0].iter().zip(&x[1]).map(|(&g, u)| g * sigmoid(g) * u).collect(),
            inputs: &[bent(&shape, seed), bent(&shape, seed + 1)],
            value_bound: FEW,
            grad_bound: FEW,
            stored: 0.0,
        }
        .run();
    }
}

#[test]
fn long_inputs_are_cut_into_pieces_without_a_seam() {
    // More than one piece of the parallel loop, and a ragged last one.
    let count = 3 * (1 << 14) + 5;
    let (a, b) = (bent(&[count], 1), bent(&[count], 2));
    let whole = {
        let tape = &mut Tape::inference();
        let (a, b) = (tape.leaf(a.clone()), tape.leaf(b.clone()));
        ops::swiglu(tape, &a, &b).unwrap()
    };
    for start in [0, (1 << 14) - 3, 3 * (1 << 14) - 1] {
        let tape = &mut Tape::inference();
        let cut = |x: &Tensor| {
            Tensor::from_f32(x.as_f32().unwrap()[start..start + 6].to_vec(), &[6]).unwrap()
        };
        let (a, b) = (tape.leaf(cut(&a)), tape.leaf(cut(&b)));
        let part = ops::swiglu(tape, &a, &b).unwrap();
        let whole = &whole.value().as_f32().unwrap()[start..start + 6];
        assert_eq!(part.value().as_f32().unwrap(), whole);
    }
}

#[test]
fn nan_and_infinity_stay_where_they_are() {
    let x = Tensor::from_f32(vec![f32::NAN, 1.0, f32::INFINITY, f32::NEG_INFINITY], &[4]).unwrap();
    let tape = &mut Tape::inference();
    let x = tape.leaf(x);
    let y = ops::sigmoid(tape, &x).unwrap();
    let y = y.value().as_f32().unwrap();
    assert!(y[0].is_nan() && y[1].is_finite());
    assert_eq!(y[2..], [1.0, 0.0]);
    let y = ops::swiglu(tape, &x, &x).unwrap();
    let y = y.value().as_f32().unwrap();
    assert!(y[0].is_nan() && y[1].is_finite());
}

#[test]
fn unlike_inputs_are_refused_by_name() {
    let tape = &mut Tape::recording();
    let a = tape.leaf(tensor(&[2, 3], 1));
    let b = tape.leaf(tensor(&[3, 2], 1));
    let half = tape.leaf(tensor(&[2, 3], 1).to_dtype(DType::BF16).unwrap());
    let whole = tape.leaf(Tensor::zeros(DType::I32, &[2, 3]));
    assert_eq!(refusal(ops::add(tape, &a, &b)), "add: b has shape [3, 2], expected [2, 3]");
    assert_eq!(
        refusal(ops::swiglu(tape, &a, &half)),
        "swiglu: up is bf16, expected f32 like the first input"
    );
    assert_eq!(
        refusal(ops::sigmoid(tape, &whole)),
        "sigmoid: the input is i32, expected f32 or bf16"
    );
}

/// Which elements of ones are kept.
fn kept(count: usize, rate: f64, seed: u64) -> Vec<bool> {
    let tape = &mut Tape::inference();
    let ones = tape.leaf(Tensor::from_f32(vec![1.0; count], &[count]).unwrap());
    let y = ops::dropout(tape, &ones, rate, seed).unwrap();
    y.value().as_f32().unwrap().iter().map(|&y| y != 0.0).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn dropout_multiplies_by_its_mask(rows in 0usize..4, width in 1usize..70, rate in 0.01..0.95) {
        let mask = kept(rows * width, rate, 9);
        Check {
            op: &|tape, x| ops::dropout(tape, &x[0], rate, 9),
            exact: &|x| {
                let each = x[0].iter().zip(&mask);
                each.map(|(x, &kept)| if kept { x / (1.0 - rate) } else { 0.0 }).collect()
            },
            inputs: &[tensor(&[rows, width], 7)],
            // The factor and the product round, relative to at most 1/(1 − 0.95).
            value_bound: 20.0 * 2.0 * ROUNDING,
            grad_bound: 20.0 * 4.0 * ROUNDING,
            stored: 0.0,
        }
        .run();
    }
}

/// Shares and products of independent choices, within five standard errors.
#[test]
fn dropout_drops_its_rate_and_every_place_and_seed_alone() {
    let n = 200_000;
    for rate in [0.05, 0.5, 0.9] {
        let error = 5.0 * (rate * (1.0 - rate) / n as f64).sqrt();
        for seed in [0, 1, u64::MAX] {
            let mask = kept(n, rate, seed);
            let share = mask.iter().filter(|&&kept| !kept).count() as f64 / n as f64;
            assert!((share - rate).abs() < error, "{share} of {rate} are dropped");
        }
    }
    let (one, two) = (kept(n, 0.5, 1), kept(n, 0.5, 2));
    let error = 5.0 * 0.5 / (n as f64).sqrt();
    for (what, pairs) in [
        ("two seeds", one.iter().zip(&two).filter(|(a, b)| a == b).count()),
        ("neighbours", one.windows(2).filter(|w| w[0] == w[1]).count()),
        ("columns", one.windows(65).filter(|w| w[0] == w[64]).count()),
    ] {
        let share = pairs as f64 / n as f64;
        assert!((share - 0.5).abs() < error, "{what} agree in {share}");
    }
}

/// Pinned, from the paper's formula in Python: the mask is part of "same seed, same run"; and a part of a tensor from its first element
/// is dropped as in the whole, whatever thread it falls to.
#[test]
fn dropout_is_a_function_of_seed_and_place() {
    let whole = kept(40_000, 0.5, 3);
    assert_eq!(whole[..100], kept(100, 0.5, 3));
    let bits = whole[..64].iter().fold(0u64, |bits, &kept| bits << 1 | u64::from(kept));
    assert_eq!(bits, 0x9f76_59cd_1001_2497);
}

#[test]
fn dropout_refuses_rates_that_leave_nothing_and_0_is_no_op() {
    let tape = &mut Tape::recording();
    let x = tape.param(tensor(&[3], 1), 0);
    for rate in [1.0, -0.1, 1.5, f64::NAN, f64::INFINITY] {
        let text = refusal(ops::dropout(tape, &x, rate, 1));
        assert!(text.starts_with(&format!("dropout: the rate is {rate}, expected")), "{text}");
    }
    let y = ops::dropout(tape, &x, 0.0, 1).unwrap();
    assert_eq!(y.value().as_f32().unwrap(), x.value().as_f32().unwrap());
}
