//! AdamW and clipping against plain f64.

mod common;

use common::{ROUNDING, close, numbers, refusal, tensor, threads, wide};
use proptest::prelude::*;
use tercet_tensor::{AdamW, AdamWConfig, AdamWState, DType, Grads, Tensor, clip};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

/// The formula of the paper.
fn adamw(w: &mut [f64], m: &mut [f64], v: &mut [f64], g: &[f64], lr: f64, t: i32, decay: f64) {
    for i in 0..w.len() {
        m[i] = 0.9 * m[i] + 0.1 * g[i];
        v[i] = 0.95 * v[i] + 0.05 * g[i] * g[i];
        let (mean, square) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.95f64.powi(t)));
        w[i] -= lr * decay * w[i] + lr * mean / (square.sqrt() + 1e-8);
    }
}

fn grads_of(tensors: &[Tensor]) -> Grads {
    let mut grads = Grads::new(tensors.len());
    for (slot, tensor) in tensors.iter().enumerate() {
        grads.set(slot, tensor.clone()).unwrap();
    }
    grads
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn steps_follow_the_formula(count in 0usize..100, seed in 0u64..1000, scale in 0.1f32..1.0) {
        let shapes = [vec![count], vec![3, 5]];
        let mut params: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, s)| tensor(s, seed + i as u64)).collect();
        let mut exact: Vec<Vec<f64>> = params.iter().map(wide).collect();
        let mut moments: Vec<[Vec<f64>; 2]> =
            exact.iter().map(|w| [vec![0.0; w.len()], vec![0.0; w.len()]]).collect();
        let mut optimizer = AdamW::new(CONFIG, &params, &[false, true]).unwrap();
        for t in 1..=5 {
            let lr = 0.01 * f64::from(t);
            let given: Vec<Tensor> = (shapes.iter().enumerate())
                .map(|(i, s)| tensor(s, seed + 10 * t as u64 + i as u64))
                .collect();
            optimizer.step(&mut params, &grads_of(&given), lr, scale).unwrap();
            for (i, decay) in [0.0, 0.1].into_iter().enumerate() {
                let [m, v] = &mut moments[i];
                let g: Vec<f64> = wide(&given[i]).iter().map(|g| g * f64::from(scale)).collect();
                adamw(&mut exact[i], m, v, &g, lr, t, decay);
            }
        }
        assert_eq!(optimizer.state().step, 5);
        for (i, slot) in optimizer.state().slots.iter().enumerate() {
            // Weights below 2, five steps of a handful of roundings; a step is below lr·10, and
            // m may cancel, so its quotient carries the roundings of terms below 1.
            close("weight", &wide(&params[i]), &exact[i], 400.0 * ROUNDING, 0.0);
            let m: Vec<f64> = slot.m.iter().map(|&m| f64::from(m)).collect();
            close("m", &m, &moments[i][0], 20.0 * ROUNDING, 0.0);
            let v: Vec<f64> = slot.v.iter().map(|&v| f64::from(v)).collect();
            close("v", &v, &moments[i][1], 20.0 * ROUNDING, 0.0);
        }
    }
}

#[test]
fn bf16_parameters_are_the_rounding_of_their_masters() {
    let full = [tensor(&[40, 7], 1)];
    let mut whole = full.to_vec();
    let mut half = vec![full[0].to_dtype(DType::BF16).unwrap()];
    whole[0] = half[0].to_dtype(DType::F32).unwrap();
    let mut a = AdamW::new(CONFIG, &whole, &[true]).unwrap();
    let mut b = AdamW::new(CONFIG, &half, &[true]).unwrap();
    for t in 0..20 {
        // Far below what bf16 alone could follow: without masters nothing would move.
        let grads = grads_of(&[tensor(&[40, 7], 2 + t)]);
        a.step(&mut whole, &grads, 1e-5, 1.0).unwrap();
        b.step(&mut half, &grads, 1e-5, 1.0).unwrap();
    }
    let master = b.state().slots[0].master.as_ref().unwrap();
    assert_eq!(master[..], *whole[0].as_f32().unwrap());
    let rounded = whole[0].to_dtype(DType::BF16).unwrap();
    assert_eq!(half[0].as_bf16().unwrap(), rounded.as_bf16().unwrap());
}

#[test]
fn a_restored_state_goes_on_with_the_same_bits() {
    for dtype in [DType::F32, DType::BF16] {
        let mut params = vec![tensor(&[33, 5], 1).to_dtype(dtype).unwrap()];
        let grads: Vec<Grads> = (0..6).map(|t| grads_of(&[tensor(&[33, 5], 9 + t)])).collect();
        let mut through = AdamW::new(CONFIG, &params, &[true]).unwrap();
        for g in &grads[..3] {
            through.step(&mut params, g, 0.01, 1.0).unwrap();
        }
        let (saved, mut copy) = (through.state().clone(), params.clone());
        let mut resumed = AdamW::restore(CONFIG, &copy, &[true], saved).unwrap();
        for g in &grads[3..] {
            through.step(&mut params, g, 0.01, 1.0).unwrap();
            resumed.step(&mut copy, g, 0.01, 1.0).unwrap();
        }
        assert_eq!(through.state(), resumed.state());
        assert_eq!(params[0].to_vec_f32().unwrap(), copy[0].to_vec_f32().unwrap());
    }
}

#[test]
fn parameters_without_a_gradient_stay() {
    let mut params = vec![tensor(&[4], 1), tensor(&[4], 2)];
    let before = params[1].to_vec_f32().unwrap();
    let mut grads = Grads::new(2);
    grads.set(0, tensor(&[4], 3)).unwrap();
    let mut optimizer = AdamW::new(CONFIG, &params, &[true, true]).unwrap();
    optimizer.step(&mut params, &grads, 0.1, 1.0).unwrap();
    assert_eq!(params[1].as_f32().unwrap(), before);
    assert_ne!(params[0].as_f32().unwrap(), tensor(&[4], 1).as_f32().unwrap());
}

#[test]
fn a_shared_tensor_is_not_written() {
    let kept = tensor(&[2000], 1);
    let mut params = vec![kept.clone()];
    let mut optimizer = AdamW::new(CONFIG, &params, &[true]).unwrap();
    optimizer.step(&mut params, &grads_of(&[tensor(&[2000], 2)]), 0.1, 1.0).unwrap();
    assert_eq!(kept.as_f32().unwrap(), tensor(&[2000], 1).as_f32().unwrap());
    assert_ne!(params[0].as_f32().unwrap(), kept.as_f32().unwrap());
}

#[test]
fn states_and_settings_that_do_not_fit_are_refused() {
    let mut params = vec![tensor(&[4], 1)];
    let bad = AdamWConfig { beta2: 1.0, ..CONFIG };
    assert!(refusal(AdamW::new(bad, &params, &[true])).contains("beta2 = 1"));
    assert!(refusal(AdamW::new(CONFIG, &params, &[])).contains("0 decay flags"));
    let other = AdamW::new(CONFIG, &[tensor(&[5], 1)], &[true]).unwrap().state().clone();
    let text = refusal(AdamW::restore(CONFIG, &params, &[true], other));
    assert_eq!(text, "adamw: the state of slot 0 does not fit Tensor(f32, [4])");
    let none = AdamWState::default();
    assert!(refusal(AdamW::restore(CONFIG, &params, &[true], none)).contains("0 states"));

    let mut optimizer = AdamW::new(CONFIG, &params, &[true]).unwrap();
    let before = optimizer.state().clone();
    let wrong = grads_of(&[tensor(&[2, 2], 1)]);
    assert!(refusal(optimizer.step(&mut params, &wrong, 0.1, 1.0)).contains("does not fit"));
    assert_eq!(optimizer.state(), &before, "an error leaves everything as it was");
}

#[test]
fn the_global_norm_is_exact_and_independent_of_threads() {
    let tensors = [tensor(&[300, 401], 1), tensor(&[7], 2), tensor(&[0], 3)];
    let mut grads = Grads::new(4);
    for (slot, tensor) in tensors.iter().enumerate() {
        grads.set(slot, tensor.clone()).unwrap();
    }
    let want = tensors.iter().flat_map(wide).map(|g| g * g).sum::<f64>().sqrt();
    let norm = threads(1, || clip::global_norm(&grads).unwrap());
    // 120,307 additions of f64, each within 2⁻⁵³ of a growing sum.
    assert!((norm - want).abs() <= want * 120_307.0 * f64::EPSILON);
    for count in [2, 5] {
        assert_eq!(norm.to_bits(), threads(count, || clip::global_norm(&grads).unwrap()).to_bits());
    }
    assert_eq!(clip::global_norm(&Grads::new(3)).unwrap(), 0.0);
    // f32 squares would overflow here.
    let mut grads = Grads::new(1);
    grads.set(0, Tensor::from_f32(vec![3e30, 4e30], &[2]).unwrap()).unwrap();
    assert!((clip::global_norm(&grads).unwrap() / 5e30 - 1.0).abs() < 1e-6);
}

#[test]
fn clipping_shortens_only_what_is_too_long() {
    assert_eq!(clip::clip_factor(0.5, 1.0), 1.0);
    assert_eq!(clip::clip_factor(0.0, 1.0), 1.0);
    assert!((f64::from(clip::clip_factor(4.0, 1.0)) - 0.25).abs() < 1e-6);
    assert_eq!(clip::clip_factor(f64::INFINITY, 1.0), 0.0);
    assert!(clip::clip_factor(f64::NAN, 1.0).is_nan());
}

#[test]
fn numbers_are_not_all_alike() {
    // The tests above mean nothing if their inputs do.
    let x = numbers(1000, 1);
    let mean = x.iter().sum::<f32>() / 1000.0;
    assert!(mean.abs() < 0.1 && x.iter().any(|x| *x > 0.9) && x.iter().any(|x| *x < -0.9));
    assert_ne!(x, numbers(1000, 2));
}
