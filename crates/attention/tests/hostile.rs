//! Whatever a caller passes, the answer is an error that names the culprit, never a panic.

mod common;

use common::{Case, Narrow, dims, spec};
use tercet_attention::cpu::{self, Mask};
use tercet_attention::{Compressor, Dims, Error, NsaSpec, reference};

fn small() -> Case {
    Case::random(&spec([8, 4, 16, 4, 12], Compressor::Mean), dims(4, 2, 8, 6), &[20, 30], 70)
}

/// Owned inputs of both doors, to be broken one field at a time.
struct Inputs {
    spec: NsaSpec,
    dims: Dims,
    cu_seqlens: Vec<i32>,
    /// q, k_cmp, v_cmp (ready), k_slc, v_slc, k_win, v_win, gate.
    tensors: [Vec<f32>; 8],
    d_out: Vec<f32>,
}

const NAMES: [&str; 8] = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"];

impl Inputs {
    fn new() -> Self {
        let case = small();
        let blocks: usize = [20, 30].iter().map(|&n| case.spec.compressed_blocks(n)).sum();
        let tensors = NAMES.map(|name| match name {
            "k_cmp" => vec![0.5; blocks * 2 * 8],
            "v_cmp" => vec![0.5; blocks * 2 * 6],
            name => case.get(name).to_vec(),
        });
        Self {
            spec: case.spec.clone(),
            dims: case.dims,
            cu_seqlens: case.cu_seqlens.clone(),
            d_out: case.get("d_out").to_vec(),
            tensors,
        }
    }

    fn cpu(&self) -> cpu::NsaInput<'_, f32> {
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &self.tensors;
        cpu::NsaInput {
            spec: &self.spec,
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: 0.3,
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gate,
        }
    }

    fn attend(&self) -> cpu::AttendInput<'_, f32> {
        cpu::AttendInput {
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: 0.3,
            q: &self.tensors[0],
            k: &self.tensors[3],
            v: &self.tensors[4],
        }
    }

    /// The error of the reference and of the fast forward pass, which must be the same.
    fn error(&self) -> String {
        let wide = self.tensors.each_ref().map(|x| x.iter().map(|&x| f64::from(x)).collect());
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate]: &[Vec<f64>; 8] = &wide;
        let input = reference::NsaInput {
            spec: &self.spec,
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: 0.3,
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gate,
        };
        let reference = reference::nsa_forward(&input).unwrap_err();
        let fast = cpu::nsa_forward(&self.cpu(), &mut vec![0.0; self.d_out.len()]).err().unwrap();
        let kind = std::mem::discriminant::<Error>;
        assert_eq!(kind(&reference), kind(&fast), "{reference} / {fast}");
        fast.to_string()
    }
}

#[test]
fn the_untouched_inputs_are_fine() {
    let inputs = Inputs::new();
    cpu::nsa_forward(&inputs.cpu(), &mut vec![0.0; inputs.d_out.len()]).unwrap();
}

#[test]
fn bad_cu_seqlens() {
    for (cu_seqlens, word) in [
        (vec![], "empty"),
        (vec![1, 50], "starts at 1"),
        (vec![0, 30, 20, 50], "decreases"),
        (vec![0, -5, 50], "decreases"),
        (vec![-3, 50], "starts at -3"),
    ] {
        let error = Inputs { cu_seqlens, ..Inputs::new() }.error();
        assert!(error.contains("cu_seqlens") && error.contains(word), "{error}");
    }
    for cu_seqlens in [vec![0], vec![0, 49], vec![0, 51], vec![0, i32::MAX], vec![0, 0]] {
        let inputs = Inputs { cu_seqlens, ..Inputs::new() };
        let out = &mut vec![0.0; inputs.d_out.len()];
        assert!(cpu::nsa_forward(&inputs.cpu(), out).is_err(), "{:?}", inputs.cu_seqlens);
        let lse = &mut vec![0.0; 200];
        assert!(cpu::attend_forward(&inputs.attend(), Mask::Causal, out, lse).is_err());
    }
}

#[test]
fn other_sequences_need_other_compressed_blocks() {
    // One sequence of 50 tokens has 11 compressed blocks; 20 + 30 have 4 + 6.
    let error = Inputs { cu_seqlens: vec![0, 50], ..Inputs::new() }.error();
    assert!(error.contains("k_cmp") && error.contains("N 11"), "{error}");
}

#[test]
fn every_tensor_of_a_wrong_length_is_named() {
    for (i, name) in NAMES.iter().enumerate() {
        let mut lengths = vec![0, 1];
        lengths.push(Inputs::new().tensors[i].len() + 1);
        for n in lengths {
            let mut inputs = Inputs::new();
            inputs.tensors[i].resize(n, 0.0);
            let error = inputs.error();
            assert!(error.starts_with(&format!("{name} has {n} elements")), "{error}");
        }
    }
}

#[test]
fn heads_and_dims_that_cannot_be() {
    let max = usize::MAX;
    for d in [
        dims(0, 2, 8, 6),
        dims(4, 0, 8, 6),
        dims(0, 0, 8, 6),
        dims(5, 2, 8, 6),
        dims(2, 4, 8, 6),
        dims(4, 2, 0, 6),
        dims(4, 2, 8, 0),
        dims(4, 2, 257, 6),
        dims(4, 2, 8, max),
        dims(max, 2, 8, 6),
    ] {
        let error = Inputs { dims: d, ..Inputs::new() }.error();
        assert!(error.starts_with("attention dims"), "{d:?}: {error}");
        assert!(cpu::NsaCache::new(&NsaSpec::default(), d).is_err(), "{d:?}");
        assert!(cpu::DenseCache::new(d, Mask::Causal).is_err(), "{d:?}");
    }
}

#[test]
fn sizes_whose_products_overflow() {
    for d in [dims(1 << 62, 1 << 62, 8, 8), dims(1 << 40, 1, 256, 256), dims(1 << 63, 2, 1, 1)] {
        let inputs = Inputs { dims: d, ..Inputs::new() };
        assert!(inputs.error().starts_with("attention dims"), "{d:?}");
        let (out, lse) = (&mut vec![0.0; 10], &mut vec![0.0; 10]);
        assert!(cpu::attend_forward(&inputs.attend(), Mask::Causal, out, lse).is_err(), "{d:?}");
        // With no tokens every product is 0, whatever the heads.
        let mut inputs = Inputs { dims: d, cu_seqlens: vec![0, 0], ..Inputs::new() };
        inputs.tensors.iter_mut().for_each(Vec::clear);
        let _ = cpu::nsa_forward(&inputs.cpu(), &mut []);
        let _ = cpu::attend_forward(&inputs.attend(), Mask::Causal, &mut [], &mut []);
    }
}

#[test]
fn specs_that_break_a_rule() {
    let bad = |change: fn(&mut NsaSpec)| {
        let mut inputs = Inputs::new();
        change(&mut inputs.spec);
        let error = inputs.error();
        assert!(error.starts_with("nsa spec"), "{error}");
        assert!(cpu::NsaCache::new(&inputs.spec, inputs.dims).is_err());
        assert!(cpu::CompressTail::<f32>::new(&inputs.spec, 2, 8).is_err());
        let case = small();
        let narrow = Narrow::<f32>::of(&case);
        let input = cpu::CompressInput { spec: &inputs.spec, ..narrow.compress("k") };
        assert!(cpu::compress_forward(&input, &mut [0.0; 160]).is_err());
    };
    bad(|s| s.compress_block = 0);
    bad(|s| s.compress_stride = 0);
    bad(|s| s.compress_stride = 3);
    bad(|s| s.compress_block = 32);
    bad(|s| s.select_block = usize::MAX);
    bad(|s| s.select_count = 0);
    bad(|s| s.select_count = 2);
    bad(|s| s.window = 0);
    bad(|s| s.select_local = usize::MAX);
    bad(|s| (s.select_initial, s.select_local) = (usize::MAX, usize::MAX));
}

#[test]
fn a_window_of_any_size_is_no_overflow() {
    let mut inputs = Inputs::new();
    inputs.spec.window = usize::MAX;
    cpu::nsa_forward(&inputs.cpu(), &mut vec![0.0; inputs.d_out.len()]).unwrap();
    let (out, lse) = (&mut vec![0.0; inputs.d_out.len()], &mut vec![0.0; 200]);
    cpu::attend_forward(&inputs.attend(), Mask::Window(usize::MAX), out, lse).unwrap();
}

#[test]
fn a_window_of_nothing_is_refused() {
    let inputs = Inputs::new();
    let (out, lse) = (&mut vec![0.0; inputs.d_out.len()], &mut vec![0.0; 200]);
    assert!(cpu::attend_forward(&inputs.attend(), Mask::Window(0), out, lse).is_err());
    assert!(cpu::DenseCache::new(inputs.dims, Mask::Window(0)).is_err());
}

#[test]
fn outputs_of_a_wrong_length() {
    let inputs = Inputs::new();
    let n = inputs.d_out.len();
    for wrong in [0, n - 1, n + 1] {
        let error = cpu::nsa_forward(&inputs.cpu(), &mut vec![0.0; wrong]).err().unwrap();
        assert!(error.to_string().starts_with("out has"), "{error}");
        let (out, lse) = (&mut vec![0.0; wrong], &mut vec![0.0; 200]);
        assert!(cpu::attend_forward(&inputs.attend(), Mask::Causal, out, lse).is_err());
    }
    for wrong in [0, 199, 201] {
        let (out, lse) = (&mut vec![0.0; n], &mut vec![0.0; wrong]);
        let error = cpu::attend_forward(&inputs.attend(), Mask::Causal, out, lse).unwrap_err();
        assert!(error.to_string().starts_with("lse has"), "{error}");
    }
}

/// Runs the backward pass with saved state and gradients of lengths that `change` sets.
fn backward(
    change: impl Fn(&mut cpu::NsaSaved, &mut [Vec<f32>; 8], &mut Vec<f32>),
) -> Result<(), Error> {
    let mut inputs = Inputs::new();
    let mut saved = cpu::nsa_forward(&inputs.cpu(), &mut vec![0.0; inputs.d_out.len()]).unwrap();
    let mut grads = inputs.tensors.clone();
    let mut d_out = std::mem::take(&mut inputs.d_out);
    change(&mut saved, &mut grads, &mut d_out);
    let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &mut grads;
    let grads = cpu::NsaGrads { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
    cpu::nsa_backward(&inputs.cpu(), &saved, &d_out, grads)
}

#[test]
fn a_backward_pass_that_does_not_fit_its_forward_pass() {
    backward(|_, _, _| {}).unwrap();
    backward(|_, _, d_out| d_out.truncate(5)).unwrap_err();
    for i in 0..8 {
        backward(|_, grads, _| grads[i].truncate(3)).unwrap_err();
        backward(|_, grads, _| grads[i].push(0.0)).unwrap_err();
    }
    for change in [
        |s: &mut cpu::NsaSaved| s.out_cmp.truncate(1),
        |s: &mut cpu::NsaSaved| s.out_slc.truncate(1),
        |s: &mut cpu::NsaSaved| s.out_win.clear(),
        |s: &mut cpu::NsaSaved| s.lse_cmp.truncate(1),
        |s: &mut cpu::NsaSaved| s.lse_slc.push(0.0),
        |s: &mut cpu::NsaSaved| s.lse_win.clear(),
        |s: &mut cpu::NsaSaved| s.indices.truncate(7),
    ] {
        backward(|saved, _, _| change(saved)).unwrap_err();
    }
}

#[test]
fn saved_indices_that_no_selection_made() {
    for (at, j) in [(0, 999), (0, -1), (0, 1), (0, i32::MIN), (8 * 19, i32::MAX), (1, -2), (1, 0)] {
        let result = backward(|saved, _, _| saved.indices[at] = j);
        assert!(matches!(result, Err(Error::Indices(_))), "indices[{at}] = {j}: {result:?}");
    }
}

#[test]
fn attend_backward_of_wrong_lengths() {
    let inputs = Inputs::new();
    let n = inputs.d_out.len();
    let (mut out, mut lse) = (vec![0.0; n], vec![0.0; 200]);
    cpu::attend_forward(&inputs.attend(), Mask::Causal, &mut out, &mut lse).unwrap();
    let run = |out: usize, lse: usize, d_out: usize, less: [usize; 3]| {
        let input = inputs.attend();
        let [mut q, mut k, mut v] = [0, 1, 2]
            .map(|i| vec![0.0f32; [input.q.len(), input.k.len(), input.v.len()][i] - less[i]]);
        let grads = cpu::AttendGrads { q: &mut q, k: &mut k, v: &mut v };
        let (out, lse, d_out) = (vec![0.0; out], vec![0.0; lse], vec![0.0; d_out]);
        cpu::attend_backward(&input, Mask::Causal, &out, &lse, &d_out, grads)
    };
    run(n, 200, n, [0; 3]).unwrap();
    run(n - 1, 200, n, [0; 3]).unwrap_err();
    run(n, 201, n, [0; 3]).unwrap_err();
    run(n, 200, 0, [0; 3]).unwrap_err();
    run(n, 200, n, [1, 0, 0]).unwrap_err();
    run(n, 200, n, [0, 1, 0]).unwrap_err();
    run(n, 200, n, [0, 0, 1]).unwrap_err();
}

#[test]
fn phi_of_wrong_lengths() {
    for compressor in [Compressor::Linear, Compressor::Mlp] {
        let spec = spec([8, 4, 16, 4, 12], compressor);
        let case = Case::random(&spec, dims(4, 2, 8, 6), &[20], 71);
        for name in case.phi_names() {
            let mut broken = case.clone();
            broken.get_mut(&name).pop();
            let narrow = Narrow::<f32>::of(&broken);
            let letter = &name[4..5];
            let input = narrow.compress(letter);
            let rows = spec.compressed_blocks(20) * 2;
            let out = &mut vec![0.0; rows * input.dim];
            assert!(cpu::compress_forward(&input, out).is_err(), "{name}");
            let mut tail = cpu::CompressTail::<f32>::new(&spec, 2, input.dim).unwrap();
            assert!(tail.push(input.x, input.phi).is_err(), "{name} of a tail");
        }
    }
}

#[test]
fn compression_of_absurd_sizes() {
    let case = small();
    let narrow = Narrow::<f32>::of(&case);
    let good = narrow.compress("k");
    let out = &mut vec![0.0; 10 * 16];
    cpu::compress_forward(&good, out).unwrap();
    let max = usize::MAX;
    for (kv_heads, dim) in [(0, 8), (2, 0), (max, 8), (2, max), (1 << 62, 8), (2, 257)] {
        let input = cpu::CompressInput { kv_heads, dim, ..good };
        assert!(cpu::compress_forward(&input, out).is_err(), "K {kv_heads}, C {dim}");
        let mut d_x = vec![0.0; good.x.len()];
        let result = cpu::compress_backward(&input, &[0.0; 160], &mut d_x, cpu::PhiGrads::Mean);
        assert!(result.is_err(), "K {kv_heads}, C {dim}");
    }
    let empty: &[f32] = &[];
    for hidden in [0, 1, max, 1 << 60] {
        let phi = cpu::Phi::Mlp {
            weight1: empty,
            bias1: empty,
            weight2: empty,
            bias2: empty,
            pe: empty,
            hidden,
        };
        let input = cpu::CompressInput { phi, ..good };
        assert!(cpu::compress_forward(&input, out).is_err(), "M {hidden}");
    }
    assert!(cpu::compress_forward(&good, &mut [0.0; 3]).is_err());
    assert!(cpu::compress_forward(&cpu::CompressInput { x: &good.x[1..], ..good }, out).is_err());
    for (kv_heads, dim) in [(0, 8), (2, 0), (2, 257)] {
        assert!(cpu::CompressTail::<f32>::new(&case.spec, kv_heads, dim).is_err());
    }
}

#[test]
fn gradients_of_another_phi() {
    let spec = spec([8, 4, 16, 4, 12], Compressor::Linear);
    let case = Case::random(&spec, dims(4, 2, 8, 6), &[20], 72);
    let narrow = Narrow::<f32>::of(&case);
    let input = narrow.compress("k");
    let d_out = vec![0.0; spec.compressed_blocks(20) * 16];
    let mut d_x = vec![0.0; input.x.len()];
    let mut run = |d_phi: cpu::PhiGrads| cpu::compress_backward(&input, &d_out, &mut d_x, d_phi);
    assert!(run(cpu::PhiGrads::Mean).is_err());
    let (mut weight, mut pe) = (vec![0.0; 2 * 64 * 8], vec![0.0; 2 * 64]);
    run(cpu::PhiGrads::Linear { weight: &mut weight, pe: &mut pe }).unwrap();
    assert!(run(cpu::PhiGrads::Linear { weight: &mut weight[1..], pe: &mut pe }).is_err());
    assert!(run(cpu::PhiGrads::Linear { weight: &mut weight, pe: &mut [] }).is_err());
}

#[test]
fn cache_steps_that_do_not_fit() {
    let case = small().rows(0, 20);
    let narrow = Narrow::<f32>::of(&case);
    let mut tails = [8, 6].map(|dim| cpu::CompressTail::<f32>::new(&case.spec, 2, dim).unwrap());
    let k_cmp = tails[0].push(narrow.get("k_cmp"), cpu::Phi::Mean).unwrap();
    let v_cmp = tails[1].push(narrow.get("v_cmp"), cpu::Phi::Mean).unwrap();
    assert!(tails[0].push(&[0.0; 15], cpu::Phi::Mean).is_err(), "not a whole number of rows");
    let good = cpu::NsaStep {
        scale: 0.3,
        q: narrow.get("q"),
        k_cmp: &k_cmp,
        v_cmp: &v_cmp,
        k_slc: narrow.get("k_slc"),
        v_slc: narrow.get("v_slc"),
        k_win: narrow.get("k_win"),
        v_win: narrow.get("v_win"),
        gate: narrow.get("gate"),
    };
    let mut cache = cpu::NsaCache::new(&case.spec, case.dims).unwrap();
    let out = &mut vec![0.0; 20 * 24];
    let empty: &[f32] = &[];
    for step in [
        cpu::NsaStep { q: &good.q[1..], ..good },
        cpu::NsaStep { q: empty, ..good },
        // 20 tokens complete 4 blocks, no more and no fewer.
        cpu::NsaStep { k_cmp: empty, v_cmp: empty, ..good },
        cpu::NsaStep { k_cmp: &k_cmp[16..], v_cmp: &v_cmp[12..], ..good },
        cpu::NsaStep { v_cmp: &v_cmp[1..], ..good },
        cpu::NsaStep { k_slc: &good.k_slc[16..], ..good },
        cpu::NsaStep { v_slc: &good.v_slc[1..], ..good },
        cpu::NsaStep { k_win: empty, ..good },
        cpu::NsaStep { v_win: &good.v_win[12..], ..good },
        cpu::NsaStep { gate: &good.gate[1..], ..good },
    ] {
        assert!(cache.extend(&step, out).is_err());
        assert_eq!(cache.len(), 0, "a refused step leaves the cache as it was");
    }
    assert!(cache.extend(&good, &mut out[1..]).is_err());
    cache.extend(&good, out).unwrap();
    assert_eq!(cache.len(), 20);

    let mut cache = cpu::DenseCache::new(case.dims, Mask::Causal).unwrap();
    let (q, k, v) = (good.q, good.k_slc, good.v_slc);
    assert!(cache.extend(0.3, &q[1..], k, v, out).is_err());
    assert!(cache.extend(0.3, q, &k[16..], v, out).is_err());
    assert!(cache.extend(0.3, q, k, &v[12..], out).is_err());
    assert!(cache.extend(0.3, q, k, v, &mut out[24..]).is_err());
    assert_eq!(cache.len(), 0, "a refused step leaves the cache as it was");
    cache.extend(0.3, q, k, v, out).unwrap();
}
