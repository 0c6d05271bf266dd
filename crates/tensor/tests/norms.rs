//! RMSNorm and LayerNorm against their formulas.

mod common;

use common::{Check, ROUNDING, refusal, tensor};
use proptest::prelude::*;
use tercet_tensor::{Tape, Tensor, ops};

fn rms(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / w.len() as f64;
            let r = 1.0 / (mean + eps).sqrt();
            row.iter().zip(w).map(move |(x, w)| x * r * w).collect::<Vec<_>>()
        })
        .collect()
}

fn layer(x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|row| {
            let mean = row.iter().sum::<f64>() / w.len() as f64;
            let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / w.len() as f64;
            let r = 1.0 / (var + eps).sqrt();
            (0..w.len()).map(move |i| (row[i] - mean) * r * w[i] + b[i]).collect::<Vec<_>>()
        })
        .collect()
}

/// With eps = 0.01 and inputs below 1, r ≤ 10. A value is a sum of at most `width` roundings
/// times r; a gradient has r² at most and sums over the rows.
fn bounds(rows: usize, width: usize) -> (f64, f64) {
    let n = (width + 8) as f64;
    (10.0 * n * ROUNDING, 100.0 * n * (rows + 1) as f64 * ROUNDING)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rms_norm_follows_its_formula(rows in 0usize..5, width in 1usize..70, seed in 0u64..1000) {
        let (value_bound, grad_bound) = bounds(rows, width);
        Check {
            op: &|tape, x| ops::rms_norm(tape, &x[0], &x[1], 0.01),
            exact: &|x| rms(&x[0], &x[1], f64::from(0.01f32)),
            inputs: &[tensor(&[rows, width], seed), tensor(&[width], seed + 1)],
            value_bound,
            grad_bound,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn layer_norm_follows_its_formula(rows in 0usize..5, width in 1usize..70, seed in 0u64..1000) {
        let (value_bound, grad_bound) = bounds(rows, width);
        Check {
            op: &|tape, x| ops::layer_norm(tape, &x[0], &x[1], &x[2], 0.01),
            exact: &|x| layer(&x[0], &x[1], &x[2], f64::from(0.01f32)),
            inputs: &[tensor(&[rows, width], seed), tensor(&[width], 8), tensor(&[width], 9)],
            value_bound: 2.0 * value_bound,
            grad_bound: 2.0 * grad_bound,
            stored: 0.0,
        }
        .run();
    }
}

#[test]
fn a_norm_of_heads_norms_each_head_by_itself() {
    let (x, w) = (tensor(&[5, 3, 8], 1), tensor(&[8], 2));
    let tape = &mut Tape::inference();
    let (x, w) = (tape.leaf(x), tape.leaf(w));
    let heads = ops::rms_norm(tape, &x, &w, 1e-6).unwrap();
    assert_eq!(heads.shape(), [5, 3, 8]);
    let flat = ops::rms_norm(tape, &x.reshape(&[15, 8]).unwrap(), &w, 1e-6).unwrap();
    assert_eq!(heads.value().as_f32().unwrap(), flat.value().as_f32().unwrap());
}

#[test]
fn many_rows_give_weight_gradients_of_all_of_them() {
    // More rows than one partial sum takes, so that the parts must be added up.
    let (rows, width) = (70, 3);
    let (value_bound, grad_bound) = bounds(rows, width);
    Check {
        op: &|tape, x| ops::rms_norm(tape, &x[0], &x[1], 0.01),
        exact: &|x| rms(&x[0], &x[1], f64::from(0.01f32)),
        inputs: &[tensor(&[rows, width], 3), tensor(&[width], 4)],
        value_bound,
        grad_bound,
        stored: 0.0,
    }
    .run();
}

#[test]
fn weights_of_the_wrong_width_are_refused() {
    let tape = &mut Tape::recording();
    let x = tape.leaf(tensor(&[2, 6], 1));
    let w = tape.leaf(tensor(&[4], 1));
    let text = refusal(ops::rms_norm(tape, &x, &w, 1e-6));
    assert_eq!(text, "rms_norm: the weight has shape [4], expected [6]");
    let scalar = tape.leaf(Tensor::scalar(1.0));
    let text = refusal(ops::layer_norm(tape, &scalar, &w, &w, 1e-6));
    assert_eq!(text, "layer_norm: x has shape [], expected at least one dimension");
}
