//! Gradients: the reference's against finite differences, the fast code's against the reference.

mod common;

use common::{
    Case, DIMS, Floor, GROUPS, MASKS, Random, Row, Way, Wide, dims, fast_ways, largest, pass, spec,
    twice, twice_of, two_times_rule_attend,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tercet_attention::cpu::Mask;
use tercet_attention::{Compressor, Dims, reference};

/// ⟨out, d_out⟩ with the blocks held fixed.
fn loss(wide: &Wide, indices: &[i32], d_out: &[f32]) -> f64 {
    let input = wide.input();
    let (k_cmp, v_cmp) = input.compressed().unwrap();
    let output = reference::nsa_forward_chosen(&input.ready(&k_cmp, &v_cmp), indices).unwrap();
    output.out.iter().zip(d_out).map(|(o, d)| o * f64::from(*d)).sum()
}

/// Central differences of step h are off by h²/6 of the third derivative and by 2⁻⁵³/h of the
/// loss; with h = 1e-4 both are below 1e-8 here, and a wrong term is not.
fn check_differences(case: &Case, seed: u64) {
    const STEP: f64 = 1e-4;
    let exact = common::reference(case).unwrap();
    let mut wide = Wide::of(case);
    let mut random = Random(seed);
    for name in case.tensors.keys().filter(|name| *name != "d_out") {
        let gradient = exact.get(&format!("d_{name}"));
        let tolerance = 1e-6 * (1.0 + largest(gradient));
        for _ in 0..12 {
            let i = random.next() as usize % gradient.len();
            let mut at = |shift: f64| {
                wide.get_mut(name)[i] += shift;
                let loss = loss(&wide, &exact.indices, case.get("d_out"));
                wide.get_mut(name)[i] -= shift;
                loss
            };
            let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let error = (slope - gradient[i]).abs();
            assert!(error <= tolerance, "{name}[{i}]: gradient {}, slope {slope}", gradient[i]);
        }
    }
}

#[test]
fn the_references_gradients_are_slopes() {
    for (i, compressor) in
        [Compressor::Mean, Compressor::Linear, Compressor::Mlp].iter().enumerate()
    {
        let spec = spec([4, 2, 6, 3, 5], *compressor);
        let case = Case::random(&spec, dims(4, 2, 3, 5), &[1, 25, 0, 10], 30 + i as u64);
        check_differences(&case, i as u64);
        let case = Case::random(&spec, dims(3, 1, 5, 2), &[33], 40 + i as u64);
        check_differences(&case, i as u64);
    }
}

#[test]
fn the_references_dense_gradients_are_slopes() {
    let spec = spec([4, 2, 6, 3, 5], Compressor::Mean);
    let case = Case::random(&spec, dims(4, 2, 3, 5), &[12, 0, 9], 50);
    let wide = Wide::of(&case);
    let raw = wide.input().raw;
    let d_out: Vec<f64> = case.get("d_out").iter().map(|&x| f64::from(x)).collect();
    for mask in [Mask::Causal, Mask::Window(4)] {
        let input = reference::AttendInput {
            dims: raw.dims,
            cu_seqlens: raw.cu_seqlens,
            scale: raw.scale,
            q: raw.q,
            k: raw.k_slc,
            v: raw.v_slc,
        };
        let loss = |x: [&[f64]; 3]| -> f64 {
            let input = reference::AttendInput { q: x[0], k: x[1], v: x[2], ..input };
            let out = reference::attend_forward(&input, mask).unwrap().out;
            out.iter().zip(&d_out).map(|(o, d)| o * d).sum()
        };
        let attended = reference::attend_forward(&input, mask).unwrap();
        let d = reference::attend_backward(&input, mask, &attended, &d_out).unwrap();
        for (part, gradient) in [&d.q, &d.k, &d.v].into_iter().enumerate() {
            for i in (0..gradient.len()).step_by(7) {
                let at = |shift: f64| {
                    let mut x = [input.q, input.k, input.v].map(<[f64]>::to_vec);
                    x[part][i] += shift;
                    loss([&x[0], &x[1], &x[2]])
                };
                let slope = (at(1e-4) - at(-1e-4)) / 2e-4;
                assert!((slope - gradient[i]).abs() < 1e-6, "{mask:?} input {part} element {i}");
            }
        }
    }
}

#[test]
fn every_group_size() {
    for (heads, kv_heads) in GROUPS {
        let spec = spec([8, 4, 16, 4, 24], Compressor::Linear);
        let case = Case::random(&spec, dims(heads, kv_heads, 16, 12), &[90, 5, 40], 60);
        twice(&format!("{heads} heads of {kv_heads}"), &case, Floor::Magnitude, 1e-6);
    }
}

#[test]
fn key_and_value_dims_up_to_256() {
    for (d, v) in DIMS {
        let spec = spec([8, 4, 16, 4, 24], Compressor::Mean);
        let case = Case::random(&spec, dims(4, 2, d, v), &[100], 61);
        twice(&format!("D {d}, V {v}"), &case, Floor::Magnitude, 1e-6);
    }
}

#[test]
fn dense_and_window_attention() {
    for d in [dims(4, 2, 64, 64), dims(15, 1, 19, 33), dims(2, 2, 192, 128), dims(64, 1, 8, 8)] {
        let spec = spec([8, 4, 16, 4, 24], Compressor::Mean);
        let case = Case::random(&spec, d, &[0, 1, 150, 33], 62);
        for (name, mask) in MASKS {
            for way in &fast_ways() {
                pass(Row::of("property", format!("{d:?} {name} {}", way.name), |tally| {
                    two_times_rule_attend(tally, way, &case, mask)
                }));
            }
        }
    }
}

#[test]
fn the_papers_spec_past_the_first_thousand_tokens() {
    // 1024 = n·l' tokens select everything; the ranking starts there.
    let spec = spec([32, 16, 64, 16, 512], Compressor::Mean);
    let case = Case::random(&spec, dims(4, 1, 16, 16), &[1400], 63);
    twice_of(&Way::cpu_f32(), "the paper's spec", &case, Floor::Storage, 1e-6);
}

/// Any valid spec of small numbers, shape and lengths.
fn any_case() -> impl Strategy<Value = Case> {
    let spec =
        (1usize..6, 1usize..4, 0usize..3, 1usize..6, (0usize..3, 0usize..4), 1usize..40, 0usize..3);
    let shape = (1usize..4, 1usize..7, 1usize..40, 1usize..40);
    let lengths = prop::collection::vec(0usize..110, 1..4);
    (spec, shape, lengths, any::<u64>()).prop_map(|(s, shape, lengths, seed)| {
        let (stride, blocks, more, count, (initial, local), window, phi) = s;
        let compressor = [Compressor::Mean, Compressor::Linear, Compressor::Mlp][phi];
        let spec = tercet_attention::NsaSpec {
            compress_block: stride * blocks,
            compress_stride: stride,
            select_block: stride * (blocks + more),
            select_count: (initial + local).max(count),
            select_initial: initial,
            select_local: local,
            window,
            compressor,
        };
        spec.validate().unwrap();
        let (kv_heads, group, key_dim, value_dim) = shape;
        let dims = Dims { heads: kv_heads * group, kv_heads, key_dim, value_dim };
        Case::random(&spec, dims, &lengths, seed)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, rng_seed: RngSeed::Fixed(2), ..ProptestConfig::default() })]

    #[test]
    fn any_spec_shape_and_lengths_in_f32(case in any_case()) {
        twice_of(&Way::cpu_f32(), "any", &case, Floor::Magnitude, 2e-6);
    }

    #[test]
    fn any_spec_shape_and_lengths_in_bf16(case in any_case()) {
        twice_of(&Way::cpu_bf16(), "any", &case, Floor::Magnitude, 2e-6);
    }
}
