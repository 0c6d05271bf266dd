//! Rotary embedding: the rotation, and the frequencies of its scalings.

mod common;

use common::{Check, ROUNDING, close, ints, refusal, tensor};
use proptest::prelude::*;
use tercet_tensor::{Llama3Scaling, RopeTable, Tape, YarnScaling, ops};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rope_rotates_the_halves(
        positions in prop::collection::vec(0i32..3000, 0..6),
        heads in 1usize..4,
        half in 1usize..12,
        seed in 0u64..1000,
    ) {
        let table = RopeTable::plain(2 * half, 10000.0).unwrap();
        let list = ints(&positions);
        let inv_freq = table.inv_freq().to_vec();
        let exact = |x: &[Vec<f64>]| {
            let mut y = x[0].clone();
            for (t, &p) in positions.iter().enumerate() {
                for h in 0..heads {
                    for (i, f) in inv_freq.iter().enumerate() {
                        // The angle is an f32 product by definition.
                        let angle = f64::from(p as f32 * f);
                        let at = (t * heads + h) * 2 * half + i;
                        let (a, b) = (x[0][at], x[0][at + half]);
                        y[at] = a * angle.cos() - b * angle.sin();
                        y[at + half] = b * angle.cos() + a * angle.sin();
                    }
                }
            }
            y
        };
        Check {
            op: &|tape, x| ops::rope(tape, &x[0], &list, &table),
            exact: &exact,
            inputs: &[tensor(&[positions.len(), heads, 2 * half], seed)],
            value_bound: 6.0 * ROUNDING,
            grad_bound: 6.0 * ROUNDING,
            stored: 0.0,
        }
        .run();
    }
}

#[test]
fn far_positions_rotate_like_near_ones() {
    // Beyond the kept angles every token has its own row; a shared token must not change.
    let table = RopeTable::plain(8, 10000.0).unwrap();
    let x = tensor(&[2, 2, 8], 1);
    let run = |positions: &[i32]| {
        let tape = &mut Tape::inference();
        let x = tape.leaf(x.clone());
        let y = ops::rope(tape, &x, &ints(positions), &table).unwrap();
        y.value().as_f32().unwrap().to_vec()
    };
    let (near, far) = (run(&[7, 9]), run(&[7, i32::MAX]));
    assert_eq!(near[..16], far[..16]);
    assert!(far.iter().all(|x| x.is_finite()));
}

#[test]
fn the_attention_factor_scales_the_rotation() {
    let scaling = YarnScaling { attention_factor: Some(1.5), ..YarnScaling::new(4.0, 64) };
    let table = RopeTable::yarn(8, 10000.0, &scaling).unwrap();
    assert_eq!(table.attention_factor(), 1.5);
    let x = tensor(&[1, 1, 8], 1);
    let tape = &mut Tape::inference();
    let x = tape.leaf(x);
    let y = ops::rope(tape, &x, &ints(&[0]), &table).unwrap();
    let scaled: Vec<f32> = x.value().as_f32().unwrap().iter().map(|x| 1.5 * x).collect();
    assert_eq!(y.value().as_f32().unwrap(), scaled);
}

/// Frequencies by the formulas of transformers' `modeling_rope_utils.py`, in f64.
fn plain(dim: usize, theta: f64) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-((2 * i) as f64) / dim as f64)).collect()
}

fn inv_freq(table: &RopeTable) -> Vec<f64> {
    table.inv_freq().iter().map(|&f| f64::from(f)).collect()
}

/// A frequency is a power and a reciprocal, each rounded to f32, of an exponent rounded to f32
/// and multiplied by ln θ < 14: at most 16 roundings; blends add a few.
const FREQUENCY: f64 = 24.0 * ROUNDING;

#[test]
fn plain_frequencies_are_powers_of_theta() {
    let table = RopeTable::plain(128, 500_000.0).unwrap();
    assert_eq!(table.dim(), 128);
    assert_eq!(table.attention_factor(), 1.0);
    close("frequency", &inv_freq(&table), &plain(128, 500_000.0), 0.0, FREQUENCY);
}

#[test]
fn llama3_slows_long_waves_and_keeps_short_ones() {
    let scaling = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let table = RopeTable::llama3(128, 500_000.0, &scaling).unwrap();
    let want: Vec<f64> = plain(128, 500_000.0)
        .into_iter()
        .map(|f| {
            let turns = 8192.0 * f / (2.0 * std::f64::consts::PI);
            let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 - smooth) * f / 8.0 + smooth * f
        })
        .collect();
    // Where smooth is near 0 its own rounding, relative to 4, counts.
    close("frequency", &inv_freq(&table), &want, 0.0, 4.0 * FREQUENCY);
    assert_eq!(
        table.inv_freq()[63],
        RopeTable::plain(128, 500_000.0).unwrap().inv_freq()[63] / 8.0
    );
}

#[test]
fn yarn_ramps_between_the_correction_dimensions() {
    let (dim, theta, context) = (128usize, 1_000_000.0f64, 32768.0f64);
    let table = RopeTable::yarn(dim, theta, &YarnScaling::new(4.0, 32768)).unwrap();
    let turning = |rotations: f64| {
        dim as f64 * (context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let (low, high) = (turning(32.0).floor(), turning(1.0).ceil());
    assert_eq!((low, high), (23.0, 40.0), "as in Qwen's published configs");
    let want: Vec<f64> = plain(dim, theta)
        .into_iter()
        .enumerate()
        .map(|(i, f)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / 4.0 * ramp + f * (1.0 - ramp)
        })
        .collect();
    close("frequency", &inv_freq(&table), &want, 0.0, FREQUENCY);
    assert_eq!(table.attention_factor(), (0.1 * 4f64.ln() + 1.0) as f32);
}

#[test]
fn yarn_knows_mscale_truncation_and_its_betas() {
    let base = YarnScaling::new(40.0, 4096);
    let both = YarnScaling { mscale: Some(1.0), mscale_all_dim: Some(0.707), ..base.clone() };
    let sharpen = |m: f64| 0.1 * m * 40f64.ln() + 1.0;
    let table = RopeTable::yarn(64, 10000.0, &both).unwrap();
    assert_eq!(table.attention_factor(), (sharpen(1.0) / sharpen(0.707)) as f32);
    // One of the two alone counts for nothing, as in transformers.
    let one = YarnScaling { mscale: Some(0.707), ..base.clone() };
    let table = RopeTable::yarn(64, 10000.0, &one).unwrap();
    assert_eq!(table.attention_factor(), sharpen(1.0) as f32);
    let given = YarnScaling { attention_factor: Some(0.5), ..both };
    assert_eq!(RopeTable::yarn(64, 10000.0, &given).unwrap().attention_factor(), 0.5);

    let cut = RopeTable::yarn(64, 10000.0, &base).unwrap();
    let smooth = YarnScaling { truncate: false, ..base.clone() };
    assert_ne!(cut.inv_freq(), RopeTable::yarn(64, 10000.0, &smooth).unwrap().inv_freq());
    let fast = YarnScaling { beta_fast: 16.0, ..base };
    assert_ne!(cut.inv_freq(), RopeTable::yarn(64, 10000.0, &fast).unwrap().inv_freq());
}

#[test]
fn what_cannot_be_rotated_is_refused() {
    assert!(refusal(RopeTable::plain(7, 1e4)).contains("must be even and positive, got 7"));
    assert!(refusal(RopeTable::plain(8, 0.0)).contains("theta must be positive"));
    let bad = YarnScaling::new(f64::NAN, 64);
    assert!(refusal(RopeTable::yarn(8, 1e4, &bad)).contains("factor must be positive"));
    let flat = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 4.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    assert!(refusal(RopeTable::llama3(8, 1e4, &flat)).contains("must be above"));

    let table = RopeTable::plain(8, 1e4).unwrap();
    let tape = &mut Tape::recording();
    let x = tape.leaf(tensor(&[2, 1, 6], 1));
    assert!(refusal(ops::rope(tape, &x, &ints(&[0, 1]), &table)).contains("[T, H, 8]"));
    let x = tape.leaf(tensor(&[2, 1, 8], 1));
    assert_eq!(
        refusal(ops::rope(tape, &x, &ints(&[0, -3]), &table)),
        "rope: position -3 of token 1 is negative"
    );
    assert!(refusal(ops::rope(tape, &x, &ints(&[0]), &table)).contains("positions"));
}
