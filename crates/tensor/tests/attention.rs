//! The attention ops are the operator's, wired to the right gradients.

mod common;

use common::{Check, ROUNDING, refusal, tensor};
use proptest::prelude::*;
use tercet_attention::{Dims, reference};
use tercet_tensor::ops::{NsaVars, Phi};
use tercet_tensor::{Compressor, Mask, NsaSpec, Tape, Tensor, ops};

/// Outputs are means of values below 1, gradients sums over up to 24 tokens, two per-token
/// products of at most 8 terms each, weights below 1.
const BOUND: f64 = 24.0 * 8.0 * 4.0 * ROUNDING;

fn small_spec(compressor: Compressor) -> NsaSpec {
    NsaSpec {
        compress_block: 4,
        compress_stride: 2,
        select_block: 4,
        select_count: 3,
        select_initial: 1,
        select_local: 1,
        window: 5,
        compressor,
    }
}

/// Offsets of sequences of these lengths.
fn offsets(lengths: &[usize]) -> Vec<i32> {
    let mut total = 0;
    let ends = lengths.iter().map(|l| {
        total += *l as i32;
        total
    });
    std::iter::once(0).chain(ends.collect::<Vec<_>>()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn dense_attention_is_the_reference(
        lengths in prop::collection::vec(0usize..8, 1..4),
        window in prop_oneof![Just(None), (1usize..6).prop_map(Some)],
        seed in 0u64..1000,
    ) {
        let (cu, mask) = (offsets(&lengths), window.map_or(Mask::Causal, Mask::Window));
        let tokens: usize = lengths.iter().sum();
        let dims = Dims { heads: 4, kv_heads: 2, key_dim: 6, value_dim: 5 };
        Check {
            op: &|tape, x| ops::attention_dense(tape, &x[0], &x[1], &x[2], &cu, mask),
            exact: &|x| {
                let input = reference::AttendInput {
                    dims,
                    cu_seqlens: &cu,
                    scale: 1.0 / 6f64.sqrt(),
                    q: &x[0],
                    k: &x[1],
                    v: &x[2],
                };
                reference::attend_forward(&input, mask).unwrap().out
            },
            inputs: &[
                tensor(&[tokens, 4, 6], seed),
                tensor(&[tokens, 2, 6], seed + 1),
                tensor(&[tokens, 2, 5], seed + 2),
            ],
            value_bound: BOUND,
            grad_bound: BOUND,
            stored: 0.0,
        }
        .run();
    }

    #[test]
    fn compression_is_the_reference(
        lengths in prop::collection::vec(0usize..11, 1..4),
        kind in 0usize..3,
        seed in 0u64..1000,
    ) {
        let cu = offsets(&lengths);
        let tokens: usize = lengths.iter().sum();
        let (k, c, l, m) = (2, 3, 4, 5);
        let compressor = [Compressor::Mean, Compressor::Linear, Compressor::Mlp][kind];
        let spec = small_spec(compressor);
        let shapes: Vec<Vec<usize>> = match kind {
            0 => vec![],
            1 => vec![vec![k, l * c, c], vec![k, l, c]],
            _ => {
                vec![vec![k, l * c, m], vec![k, m], vec![k, m, c], vec![k, c], vec![k, l, c]]
            }
        };
        let mut inputs = vec![tensor(&[tokens, k, c], seed)];
        inputs.extend(shapes.iter().enumerate().map(|(i, s)| tensor(s, seed + 1 + i as u64)));
        let phi = |x: &[tercet_tensor::Var]| match x {
            [weight, pe] => Phi::Linear { weight: weight.clone(), pe: pe.clone() },
            [weight1, bias1, weight2, bias2, pe] => Phi::Mlp {
                weight1: weight1.clone(),
                bias1: bias1.clone(),
                weight2: weight2.clone(),
                bias2: bias2.clone(),
                pe: pe.clone(),
            },
            _ => Phi::Mean,
        };
        Check {
            op: &|tape, x| ops::compress(tape, &x[0], &phi(&x[1..]), &spec, &cu),
            exact: &|x| {
                let phi = match &x[1..] {
                    [weight, pe] => reference::Phi::Linear { weight, pe },
                    [weight1, bias1, weight2, bias2, pe] => {
                        reference::Phi::Mlp { weight1, bias1, weight2, bias2, pe }
                    }
                    _ => reference::Phi::Mean,
                };
                let x = &x[0];
                let (spec, cu_seqlens) = (&spec, &cu[..]);
                let input =
                    reference::CompressInput { spec, cu_seqlens, kv_heads: k, dim: c, x, phi };
                reference::compress_forward(&input).unwrap()
            },
            inputs: &inputs,
            value_bound: 4.0 * BOUND,
            grad_bound: 16.0 * BOUND,
            stored: 0.0,
        }
        .run();
    }
}

/// Inputs of NSA in the order of the reference, for sequences of these lengths.
fn nsa_inputs(lengths: &[usize], spec: &NsaSpec, seed: u64) -> Vec<Tensor> {
    let tokens: usize = lengths.iter().sum();
    let blocks: usize = lengths.iter().map(|&l| spec.compressed_blocks(l)).sum();
    let shapes = [
        [tokens, 2, 4],
        [blocks, 1, 4],
        [blocks, 1, 3],
        [tokens, 1, 4],
        [tokens, 1, 3],
        [tokens, 1, 4],
        [tokens, 1, 3],
        [tokens, 2, 3],
    ];
    shapes.iter().enumerate().map(|(i, s)| tensor(s, seed + i as u64)).collect()
}

fn nsa_vars(x: &[tercet_tensor::Var]) -> NsaVars {
    NsaVars {
        q: x[0].clone(),
        k_cmp: x[1].clone(),
        v_cmp: x[2].clone(),
        k_slc: x[3].clone(),
        v_slc: x[4].clone(),
        k_win: x[5].clone(),
        v_win: x[6].clone(),
        gate: x[7].clone(),
    }
}

#[test]
fn sparse_attention_is_the_reference() {
    let spec = small_spec(Compressor::Mean);
    for (case, lengths) in [vec![21], vec![5, 0, 13], vec![1, 3], vec![0]].iter().enumerate() {
        let cu = offsets(lengths);
        let dims = Dims { heads: 2, kv_heads: 1, key_dim: 4, value_dim: 3 };
        Check {
            op: &|tape, x| ops::attention_nsa(tape, &nsa_vars(x), &spec, &cu),
            exact: &|x| {
                let input = reference::NsaInput {
                    spec: &spec,
                    dims,
                    cu_seqlens: &cu,
                    scale: 0.5,
                    q: &x[0],
                    k_cmp: &x[1],
                    v_cmp: &x[2],
                    k_slc: &x[3],
                    v_slc: &x[4],
                    k_win: &x[5],
                    v_win: &x[6],
                    gate: &x[7],
                };
                reference::nsa_forward(&input).unwrap().out
            },
            inputs: &nsa_inputs(lengths, &spec, 10 * case as u64),
            value_bound: 3.0 * BOUND,
            grad_bound: 3.0 * BOUND,
            stored: 0.0,
        }
        .run();
    }
}

#[test]
fn shared_keys_gather_the_gradients_of_both_branches() {
    let (spec, cu) = (small_spec(Compressor::Mean), [0, 17]);
    let inputs = nsa_inputs(&[17], &spec, 5);
    let run = |shared: bool| {
        let tape = &mut Tape::recording();
        let mut vars: Vec<_> =
            inputs.iter().enumerate().map(|(i, x)| tape.param(x.clone(), i)).collect();
        vars[5] = tape.param(inputs[3].clone(), if shared { 3 } else { 5 });
        let y = ops::attention_nsa(tape, &nsa_vars(&vars), &spec, &cu).unwrap();
        let (loss, _) = common::weigh(tape, &y).unwrap();
        let mut grads = tercet_tensor::Grads::new(8);
        tape.backward(&loss, &mut grads).unwrap();
        grads
    };
    let (apart, shared) = (run(false), run(true));
    let get = |grads: &tercet_tensor::Grads, slot| grads.get(slot).unwrap().to_vec_f32().unwrap();
    let sum: Vec<f32> =
        get(&apart, 3).iter().zip(get(&apart, 5)).map(|(slc, win)| slc + win).collect();
    assert_eq!(get(&shared, 3), sum);
}

#[test]
fn the_operators_refusals_carry_the_ops_name() {
    let tape = &mut Tape::recording();
    let q = tape.leaf(tensor(&[4, 2, 6], 1));
    let kv = tape.leaf(tensor(&[4, 1, 6], 1));
    let text = refusal(ops::attention_dense(tape, &q, &kv, &kv, &[0, 3], Mask::Causal));
    assert!(text.starts_with("attention_dense: cu_seqlens: ends at 3"), "{text}");
    let short = tape.leaf(tensor(&[3, 1, 6], 1));
    let text = refusal(ops::attention_dense(tape, &q, &short, &kv, &[0, 4], Mask::Causal));
    assert_eq!(text, "attention_dense: k has shape [3, 1, 6], expected [4, 1, 6]");
    let spec = small_spec(Compressor::Mean);
    let text = refusal(ops::compress(tape, &kv, &Phi::Mean, &spec, &[0, 5]));
    assert!(text.starts_with("compress: cu_seqlens: ends at 5"), "{text}");
    let pe = tape.leaf(tensor(&[1, 4, 6], 1));
    let phi = Phi::Linear { weight: pe.clone(), pe };
    let text = refusal(ops::compress(tape, &kv, &phi, &spec, &[0, 4]));
    assert_eq!(text, "compress: weight has shape [1, 4, 6], expected [1, 24, 6]");
}
