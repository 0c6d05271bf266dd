//! Caches on the device do what the CPU's do: the same choice of blocks and the same output to the
//! storage type's rounding, however tokens are cut into chunks. Without a device there is nothing
//! to see, and the tests say so.

use half::{bf16, f16};
use tercet_attention::cpu::{self, Mask, Phi};
use tercet_attention::cuda::decode::{DenseCache, NsaCache, NsaStep, NsaToken, Pages};
use tercet_attention::cuda::{Gpu, Number, Plan, Slice};
use tercet_attention::{Dims, Element, NsaSpec};
use tercet_cuda::Buffer;

/// The device, or none and a line that says why.
fn device() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => {
            gpu.use_cache(Some(std::env::temp_dir().join("tercet-test-kernels")));
            Some(gpu)
        }
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}

/// How a type of the CPU is stored on the device.
trait Stored: Element + PartialEq + std::fmt::Debug {
    const NUMBER: Number;
    /// Largest relative error of an output against the CPU's: rounding of inputs is shared, what
    /// differs is probabilities in the storage type and the output itself.
    const ALLOWED: f64;
    fn bytes(values: &[Self]) -> Vec<u8>;
    fn values(bytes: &[u8]) -> Vec<Self>;
}
macro_rules! stored {
    ($t:ty, $number:expr, $allowed:expr) => {
        impl Stored for $t {
            const NUMBER: Number = $number;
            const ALLOWED: f64 = $allowed;
            fn bytes(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            fn values(bytes: &[u8]) -> Vec<Self> {
                let read = |b: &[u8]| <$t>::from_le_bytes(b.try_into().unwrap());
                bytes.chunks_exact(size_of::<$t>()).map(read).collect()
            }
        }
    };
}
stored!(f32, Number::F32, 1e-5);
stored!(bf16, Number::BF16, 8e-3);
stored!(f16, Number::F16, 1e-3);

/// Numbers around 0 from a counter.
fn random<E: Element>(seed: u64, count: usize) -> Vec<E> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count)
        .map(|_| E::from_f32((uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7))
        .collect()
}

/// Numbers on the device and a slice of them.
struct Held(Buffer, Slice);

fn hold<E: Stored>(gpu: &Gpu, values: &[E]) -> Held {
    let buffer = gpu.upload(&E::bytes(values)).unwrap();
    // SAFETY: the buffer is kept beside the slice.
    let slice = unsafe { Slice::new(buffer.ptr(), values.len()) };
    Held(buffer, slice)
}

/// An output filled with NaN bytes.
fn poisoned(gpu: &Gpu, count: usize, bytes: usize) -> Held {
    let buffer = gpu.alloc(count * bytes).unwrap();
    buffer.fill(0xff).unwrap();
    // SAFETY: the buffer is kept beside the slice.
    let slice = unsafe { Slice::new(buffer.ptr(), count) };
    Held(buffer, slice)
}

fn read<E: Stored>(held: &Held) -> Vec<E> {
    let mut bytes = vec![0u8; held.0.bytes()];
    held.0.download(&mut bytes).unwrap();
    E::values(&bytes)
}

fn read_indices(held: &Held) -> Vec<i32> {
    let mut values = vec![0i32; held.0.bytes() / 4];
    held.0.download(&mut values).unwrap();
    values
}

fn distance<E: Element>(got: &[E], want: &[E]) -> f64 {
    let wide = |x: &E| f64::from(x.to_f32());
    let error: f64 = got.iter().zip(want).map(|(a, b)| (wide(a) - wide(b)).powi(2)).sum();
    let norm: f64 = want.iter().map(|x| wide(x).powi(2)).sum();
    (error / norm.max(1e-300)).sqrt()
}

/// One sequence's inputs.
struct Case<E> {
    dims: Dims,
    spec: NsaSpec,
    q: Vec<E>,
    k: [Vec<E>; 3],
    v: [Vec<E>; 3],
    gate: Vec<E>,
}

impl<E: Stored> Case<E> {
    fn new(dims: Dims, spec: &NsaSpec, tokens: usize, seed: u64) -> Self {
        let Dims { heads, kv_heads, key_dim, value_dim } = dims;
        let k = [1, 2, 3].map(|i| random(seed + i, tokens * kv_heads * key_dim));
        let v = [4, 5, 6].map(|i| random(seed + i, tokens * kv_heads * value_dim));
        let gate = random::<E>(seed + 7, tokens * heads * 3);
        let gate = gate.iter().map(|x| E::from_f32(1.0 / (1.0 + (-x.to_f32()).exp()))).collect();
        let q = random(seed, tokens * heads * key_dim);
        Case { dims, spec: spec.clone(), q, k, v, gate }
    }

    /// Outputs and indices of the CPU's cache, and the compressed blocks of each chunk.
    fn on_cpu(&self, cuts: &[usize]) -> (Vec<E>, Vec<i32>, Vec<[Vec<E>; 2]>) {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let mut cache = cpu::NsaCache::new(&self.spec, self.dims).unwrap();
        let mut k_tail = cpu::CompressTail::new(&self.spec, kv_heads, key_dim).unwrap();
        let mut v_tail = cpu::CompressTail::new(&self.spec, kv_heads, value_dim).unwrap();
        let (mut out, mut indices, mut blocks, mut at) = (vec![], vec![], vec![], 0);
        for &c in cuts {
            let k = |i: usize| rows(&self.k[i], at, c, kv_heads * key_dim);
            let v = |i: usize| rows(&self.v[i], at, c, kv_heads * value_dim);
            let k_cmp = k_tail.push(k(0), Phi::Mean).unwrap();
            let v_cmp = v_tail.push(v(0), Phi::Mean).unwrap();
            let step = cpu::NsaStep {
                scale: self.dims.scale(),
                q: rows(&self.q, at, c, heads * key_dim),
                k_cmp: &k_cmp,
                v_cmp: &v_cmp,
                k_slc: k(1),
                v_slc: v(1),
                k_win: k(2),
                v_win: v(2),
                gate: rows(&self.gate, at, c, heads * 3),
            };
            let mut own = vec![E::default(); c * heads * value_dim];
            indices.extend(cache.extend(&step, &mut own).unwrap());
            out.extend(own);
            blocks.push([k_cmp, v_cmp]);
            at += c;
        }
        (out, indices, blocks)
    }
}

fn rows<E>(x: &[E], first: usize, count: usize, width: usize) -> &[E] {
    &x[first * width..(first + count) * width]
}

/// Chunks of a prompt, then single tokens, against the CPU in the same chunks: in a place of the
/// sequence's own, then in pages between those of another.
fn check_nsa<E: Stored>(gpu: &Gpu, dims: Dims, spec: &NsaSpec, cuts: &[usize], plain: bool) {
    check_nsa_in::<E>(gpu, dims, spec, cuts, plain, None);
    let tokens = cuts.iter().sum::<usize>();
    let pages = 2 * tokens.div_ceil(Pages::ROWS);
    let pages = Pages::new(gpu, Some(spec), [2, tokens], pages).unwrap();
    check_nsa_in::<E>(gpu, dims, spec, cuts, plain, Some(&pages));
}

fn check_nsa_in<E: Stored>(
    gpu: &Gpu,
    dims: Dims,
    spec: &NsaSpec,
    cuts: &[usize],
    plain: bool,
    pages: Option<&Pages>,
) {
    let Dims { heads, kv_heads, key_dim, value_dim } = dims;
    let tokens = cuts.iter().sum();
    let case = Case::<E>::new(dims, spec, tokens, 11);
    let (want, want_indices, blocks) = case.on_cpu(cuts);
    let plan = Plan::new(gpu, dims, E::NUMBER).unwrap();
    let plan = if plain { plan.plain() } else { plan };
    let mut cache = match pages {
        None => NsaCache::new(&plan, spec, 2, 64).unwrap(),
        Some(pages) => NsaCache::paged(&plan, spec, pages).unwrap(),
    };
    let (mut got, mut indices, mut at) = (vec![], vec![], 0);
    for (&c, [k_cmp, v_cmp]) in cuts.iter().zip(&blocks) {
        let k = |i: usize| hold(gpu, rows(&case.k[i], at, c, kv_heads * key_dim));
        let v = |i: usize| hold(gpu, rows(&case.v[i], at, c, kv_heads * value_dim));
        let own = [
            hold(gpu, rows(&case.q, at, c, heads * key_dim)),
            hold(gpu, k_cmp),
            hold(gpu, v_cmp),
            k(1),
            v(1),
            k(2),
            v(2),
            hold(gpu, rows(&case.gate, at, c, heads * 3)),
        ];
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = own.each_ref().map(|x| x.1);
        let scale = dims.scale();
        let step = NsaStep { scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
        let out = poisoned(gpu, c * heads * value_dim, E::NUMBER.bytes());
        let chosen = poisoned(gpu, c * kv_heads * spec.select_count, 4);
        if let Some(pages) = pages {
            let lacking = (at + c).div_ceil(Pages::ROWS) > at.div_ceil(Pages::ROWS);
            assert!(!lacking || cache.extend(1, &step, out.1, None).is_err());
            pages.reserve(&[(0, at + c), (1, at + c)]).unwrap();
        }
        cache.extend(1, &step, out.1, Some(chosen.1)).unwrap();
        got.extend(read::<E>(&out));
        indices.extend(read_indices(&chosen));
        at += c;
        assert_eq!((cache.len(0), cache.len(1)), (0, at));
    }
    let error = distance(&got, &want);
    assert!(error <= E::ALLOWED, "{dims:?} {:?} plain {plain}: {error:e}", E::NUMBER);
    assert_eq!(indices, want_indices, "{dims:?} {:?} plain {plain}", E::NUMBER);
}

fn dims(heads: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Dims {
    Dims { heads, kv_heads, key_dim, value_dim }
}

/// Blocks of 32 tokens, so that a few hundred tokens need ranking.
fn small() -> NsaSpec {
    NsaSpec {
        compress_block: 16,
        compress_stride: 8,
        select_block: 32,
        select_count: 6,
        window: 40,
        ..NsaSpec::default()
    }
}

fn cuts(tokens: usize, singles: usize) -> Vec<usize> {
    let mut cuts = vec![1, 30, 7, 100];
    cuts.push(tokens - cuts.iter().sum::<usize>());
    cuts.extend(vec![1; singles]);
    cuts
}

#[test]
fn nsa_caches_do_what_the_cpus_do() {
    let Some(gpu) = device() else { return };
    let cuts = cuts(700, 20);
    check_nsa::<f32>(&gpu, dims(6, 2, 24, 40), &small(), &cuts, false);
    check_nsa::<f32>(&gpu, dims(4, 1, 128, 128), &NsaSpec::default(), &[1500, 1, 1], false);
    check_nsa::<bf16>(&gpu, dims(4, 4, 64, 64), &small(), &cuts, true);
    for (heads, kv_heads) in [(32, 2), (3, 3), (40, 2), (64, 1)] {
        check_nsa::<bf16>(&gpu, dims(heads, kv_heads, 64, 64), &small(), &cuts, false);
    }
    check_nsa::<bf16>(&gpu, dims(16, 1, 192, 128), &small(), &cuts, false);
    check_nsa::<f16>(&gpu, dims(8, 2, 96, 256), &small(), &cuts, false);
}

#[test]
fn captured_steps_do_what_the_cpu_does() {
    let Some(gpu) = device() else { return };
    fn check<E: Stored>(gpu: &Gpu, dims: Dims, spec: &NsaSpec) {
        let Dims { heads, kv_heads, key_dim, value_dim } = dims;
        // Two sequences of different lengths; the first rests at times.
        let (prompts, steps) = ([0, 333], 150);
        let cases = [21, 22].map(|seed| Case::<E>::new(dims, spec, 333 + steps, seed));
        let plan = Plan::new(gpu, dims, E::NUMBER).unwrap();
        let mut cache = NsaCache::new(&plan, spec, 2, 600).unwrap();
        let mut wants = vec![];
        for (i, case) in cases.iter().enumerate() {
            let mut cut = vec![prompts[i]];
            cut.extend(vec![1; steps]);
            cut.retain(|&c| c > 0);
            let (want, _, blocks) = case.on_cpu(&cut);
            wants.push(want);
            let c = prompts[i];
            if c > 0 {
                let k = |j: usize| hold(gpu, rows(&case.k[j], 0, c, kv_heads * key_dim));
                let v = |j: usize| hold(gpu, rows(&case.v[j], 0, c, kv_heads * value_dim));
                let own = [
                    hold(gpu, rows(&case.q, 0, c, heads * key_dim)),
                    hold(gpu, &blocks[0][0]),
                    hold(gpu, &blocks[0][1]),
                    k(1),
                    v(1),
                    k(2),
                    v(2),
                    hold(gpu, rows(&case.gate, 0, c, heads * 3)),
                ];
                let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] =
                    own.each_ref().map(|x| x.1);
                let scale = dims.scale();
                let step = NsaStep { scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
                let out = poisoned(gpu, c * heads * value_dim, E::NUMBER.bytes());
                cache.extend(i, &step, out.1, None).unwrap();
                cache.prime(i, k(0).1, v(0).1).unwrap();
                gpu.synchronize().unwrap();
            }
        }
        let zero = |n: usize| hold(gpu, &vec![E::default(); 2 * n]);
        let inputs = [
            zero(heads * key_dim),
            zero(kv_heads * key_dim),
            zero(kv_heads * value_dim),
            zero(kv_heads * key_dim),
            zero(kv_heads * value_dim),
            zero(kv_heads * key_dim),
            zero(kv_heads * value_dim),
            zero(heads * 3),
        ];
        let positions = gpu.upload(&[0i32; 2]).unwrap();
        let out = poisoned(gpu, 2 * heads * value_dim, E::NUMBER.bytes());
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = inputs.each_ref().map(|x| x.1);
        let token = NsaToken {
            scale: dims.scale(),
            // SAFETY: the buffer outlives the graph.
            positions: unsafe { Slice::new(positions.ptr(), 2) },
            q,
            k_cmp,
            v_cmp,
            ready: None,
            sequences: None,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gate,
            turns: None,
        };
        // Once outside the graph, resting: kernels are compiled.
        positions.write(0, &[-1i32; 2]).unwrap();
        cache.step(&token, out.1, None).unwrap();
        let (graph, ()) = gpu.capture(|| cache.step(&token, out.1, None)).unwrap();
        let mut got = [vec![], vec![]];
        let mut turn = 0;
        while got[1].len() < steps * heads * value_dim {
            let active = [turn % 3 != 1 && cache.len(0) < steps, true];
            let mut all = [const { Vec::<E>::new() }; 8];
            let mut at = [-1i32; 2];
            for (i, case) in cases.iter().enumerate() {
                let t = if active[i] { cache.len(i) } else { 0 };
                at[i] = if active[i] { t as i32 } else { -1 };
                let (k, v) = (kv_heads * key_dim, kv_heads * value_dim);
                let parts = [
                    rows(&case.q, t, 1, heads * key_dim),
                    rows(&case.k[0], t, 1, k),
                    rows(&case.v[0], t, 1, v),
                    rows(&case.k[1], t, 1, k),
                    rows(&case.v[1], t, 1, v),
                    rows(&case.k[2], t, 1, k),
                    rows(&case.v[2], t, 1, v),
                    rows(&case.gate, t, 1, heads * 3),
                ];
                all.iter_mut().zip(parts).for_each(|(all, part)| all.extend_from_slice(part));
            }
            for (input, values) in inputs.iter().zip(&all) {
                input.0.write(0, &E::bytes(values)).unwrap();
            }
            positions.write(0, &at).unwrap();
            out.0.fill(0xff).unwrap();
            graph.launch().unwrap();
            cache.advance((0..2).filter(|&i| active[i])).unwrap();
            let row = read::<E>(&out);
            for i in 0..2 {
                let own = rows(&row, i, 1, heads * value_dim);
                if active[i] {
                    got[i].extend_from_slice(own);
                } else {
                    assert!(own.iter().all(|x| x.to_f32() == 0.0), "a resting row is 0");
                }
            }
            turn += 1;
        }
        for i in 0..2 {
            let want = &wants[i][prompts[i] * heads * value_dim..];
            let error = distance(&got[i], &want[..got[i].len()]);
            assert!(error <= E::ALLOWED, "{dims:?} {:?} sequence {i}: {error:e}", E::NUMBER);
        }
    }
    check::<f32>(&gpu, dims(6, 2, 24, 40), &small());
    check::<bf16>(&gpu, dims(32, 2, 64, 64), &small());
    check::<bf16>(&gpu, dims(16, 4, 128, 128), &small());
}

#[test]
fn dense_and_window_caches_do_what_the_cpus_do() {
    let Some(gpu) = device() else { return };
    fn check<E: Stored>(gpu: &Gpu, dims: Dims, mask: Mask, paged: bool) {
        let Dims { heads, kv_heads, key_dim, value_dim } = dims;
        let case = Case::<E>::new(dims, &small(), 1720, 31);
        let cuts = cuts(1700, 20);
        let plan = Plan::new(gpu, dims, E::NUMBER).unwrap();
        let pages = Pages::new(gpu, None, [2, 1720], 2 * 27).unwrap();
        let mut cache = match paged {
            false => DenseCache::new(&plan, mask, 1, 100).unwrap(),
            true => DenseCache::paged(&plan, &pages).unwrap(),
        };
        let mut own = cpu::DenseCache::new(dims, mask).unwrap();
        let (mut got, mut want, mut at) = (vec![], vec![], 0);
        for c in cuts {
            let q = rows(&case.q, at, c, heads * key_dim);
            let k = rows(&case.k[0], at, c, kv_heads * key_dim);
            let v = rows(&case.v[0], at, c, kv_heads * value_dim);
            let mut row = vec![E::default(); c * heads * value_dim];
            own.extend(dims.scale(), q, k, v, &mut row).unwrap();
            want.extend(row);
            let held = [hold(gpu, q), hold(gpu, k), hold(gpu, v)];
            let out = poisoned(gpu, c * heads * value_dim, E::NUMBER.bytes());
            pages.reserve(&[(1, at + c), (0, at + c)]).unwrap();
            cache.extend(0, dims.scale(), held.each_ref().map(|x| x.1), out.1).unwrap();
            got.extend(read::<E>(&out));
            at += c;
            assert_eq!(cache.len(0), at);
        }
        let error = distance(&got, &want);
        assert!(error <= E::ALLOWED, "{dims:?} {mask:?} {:?}: {error:e}", E::NUMBER);
    }
    for mask in [Mask::Causal, Mask::Window(1), Mask::Window(100), Mask::Window(5000)] {
        for paged in [false, true] {
            if paged && mask != Mask::Causal {
                continue;
            }
            check::<f32>(&gpu, dims(6, 2, 24, 40), mask, paged);
            check::<bf16>(&gpu, dims(8, 2, 64, 128), mask, paged);
            check::<bf16>(&gpu, dims(32, 2, 128, 128), mask, paged);
        }
    }
}
