//! Gradients kept apart by groups of rows: each is what its rows alone would give, and an op that
//! cannot tell rows apart says so.

#![allow(clippy::single_range_in_vec_init)] // one group is a range, not its numbers

mod common;

use std::ops::Range;

use common::{refusal, tensor};
use tercet_tensor::{DType, Grads, Result, Tape, Tensor, Var, ops};

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    (0..count)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

const ROWS: usize = 23;
const INNER: usize = 11;
const OUTER: usize = 7;

fn groups() -> Vec<Range<usize>> {
    vec![0..1, 1..9, 9..11, 11..23]
}

/// Two layers with one weight in both (slot 0), a bias (1) and a second weight (2); the rows of
/// `range` alone.
fn gradients(range: Range<usize>, dtype: DType, recompute: bool, grads: &mut Grads) -> Result<()> {
    let rows = range.len();
    let make = |values: Vec<f32>, shape: &[usize]| Tensor::from_f32(values, shape)?.to_dtype(dtype);
    let x = numbers(ROWS * INNER, 1)[range.start * INNER..range.end * INNER].to_vec();
    let dy = numbers(ROWS * OUTER, 2)[range.start * OUTER..range.end * OUTER].to_vec();
    let [w, b, v] = [
        make(numbers(INNER * INNER, 3), &[INNER, INNER])?,
        make(numbers(INNER, 4), &[INNER])?,
        make(numbers(OUTER * INNER, 5), &[OUTER, INNER])?,
    ];
    let mut tape = Tape::recording();
    let x = tape.leaf(make(x, &[rows, INNER])?);
    let layers = move |tape: &mut Tape, x: &[Var]| {
        let (w, b) = (tape.param(w.clone(), 0), tape.param(b.clone(), 1));
        let h = ops::linear(tape, &x[0], &w, Some(&b))?;
        let h = ops::sigmoid(tape, &h)?;
        Ok(vec![ops::linear(tape, &h, &w, Some(&b))?])
    };
    let h = match recompute {
        true => tape.recompute(&[x], layers)?,
        false => layers(&mut tape, &[x])?,
    };
    let v = tape.param(v, 2);
    let y = ops::linear(&mut tape, &h[0], &v, None)?;
    tape.backward_from(&[(&y, make(dy, &[rows, OUTER])?)], grads)
}

/// Sums of at most 23·11 products of numbers below 1, in f32 from f32 inputs: 2⁻²⁴ a term leaves
/// 2e-5; where activations are stored as bf16 both ways store the same ones, unless a tie of theirs
/// falls apart by such an error, which moves it by 2⁻⁸.
#[test]
fn each_group_gets_the_gradient_of_its_rows_alone() {
    for (dtype, most) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
        for recompute in [false, true] {
            let mut all = Grads::by_group(3, groups()).unwrap();
            // Twice, so that adding on top is seen too.
            gradients(0..ROWS, dtype, recompute, &mut all).unwrap();
            gradients(0..ROWS, dtype, recompute, &mut all).unwrap();
            for (at, group) in groups().into_iter().enumerate() {
                let mut alone = Grads::new(3);
                gradients(group.clone(), dtype, recompute, &mut alone).unwrap();
                for slot in 0..3 {
                    let (all, alone) = (all.get(slot).unwrap(), alone.get(slot).unwrap());
                    assert_eq!(all.shape()[0], 4);
                    assert_eq!(&all.shape()[1..], alone.shape());
                    let (all, alone) = (all.to_vec_f32().unwrap(), alone.to_vec_f32().unwrap());
                    let size = alone.iter().fold(0f32, |most, x| most.max(x.abs()));
                    for (got, want) in all[at * alone.len()..].iter().zip(&alone) {
                        let off = (got - 2.0 * want).abs();
                        assert!(off <= most * size.max(1.0), "{slot} {group:?}: {got} {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut grads = Grads::by_group(3, groups()).unwrap();
            gradients(0..ROWS, DType::F32, false, &mut grads).unwrap();
            grads.iter().map(|g| g.unwrap().to_vec_f32().unwrap()).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}

#[test]
fn groups_that_do_not_cover_the_rows_are_refused() {
    for wrong in [vec![0..3, 4..23], vec![1..23], vec![0..0, 0..23], vec![0..9, 5..23]] {
        let text = refusal(Grads::by_group(3, wrong));
        assert!(text.contains("cover the batch"), "{text}");
    }
    let mut short = Grads::by_group(3, vec![0..4, 4..22]).unwrap();
    let text = refusal(gradients(0..ROWS, DType::F32, false, &mut short));
    assert!(text.contains("linear") && text.contains("22 rows") && text.contains("23"), "{text}");
    let mut none = Grads::by_group(3, vec![]).unwrap();
    assert!(gradients(0..ROWS, DType::F32, false, &mut none).is_err());
}

/// What one op says when its parameter, slot 0, would get a gradient by group.
fn said(op: impl Fn(&mut Tape, &Var) -> Result<Var>, parameter: Tensor) -> String {
    let mut tape = Tape::recording();
    let parameter = tape.param(parameter, 0);
    let y = op(&mut tape, &parameter).unwrap();
    let seed = tensor(y.shape(), 9);
    let mut grads = Grads::by_group(1, vec![0..2, 2..4]).unwrap();
    refusal(tape.backward_from(&[(&y, seed)], &mut grads))
}

#[test]
fn ops_that_mix_groups_are_refused_by_name() {
    let x = |tape: &Tape| tape.leaf(tensor(&[4, 3], 1));
    let ones = || tensor(&[3], 2);
    let table = || tensor(&[5, 3], 3);
    let ids = Tensor::from_i32(vec![0, 1, 2, 3], &[4]).unwrap();
    let norm = said(|t, w| ops::rms_norm(t, &x(t), w, 1e-5), ones());
    let layer = said(|t, w| ops::layer_norm(t, &x(t), w, w, 1e-5), ones());
    let embedding = said(|t, w| ops::embedding(t, w, &ids), table());
    let fused = said(|t, w| ops::linear_cross_entropy(t, &x(t), w, &ids), table());
    let head = said(|t, w| Ok(ops::token_log_probs(t, &x(t), w, &ids)?.log_probs), table());
    let sum = said(|t, w| ops::add(t, &x(t), w), tensor(&[4, 3], 4));
    for (text, name) in [
        (norm, "rms_norm"),
        (layer, "layer_norm"),
        (embedding, "embedding"),
        (fused, "linear_cross_entropy"),
        (head, "token_log_probs"),
        (sum, "an op on activations"),
    ] {
        assert!(text.starts_with(&format!("{name}: parameter 0")), "{name}: {text}");
    }
}
