//! What is run on a GPU: all suites in three storage types, and what only a device can get wrong.

use std::collections::BTreeMap;

use half::{bf16, f16};
use rayon::prelude::*;
use tercet_cuda::Gpu;

use super::cuda::{Device, Guarded, nsa_grads, nsa_input};
use super::fast::Narrow;
use super::{
    Case, Check, Fault, Floor, Golden, INPUTS, Outcome, Random, Row, Storage, Tally, UNIT32, Way,
    check_same_bits, dims, distance, ensure, largest, run, same_bits, spec, two_times_rule,
    two_times_rule_attend,
};
use crate::cpu::{self, Mask};
use crate::cuda::{NsaBatch, nsa_backward, nsa_forward, nsa_forward_into, pieces};
use crate::{Compressor, Dims, NsaSpec};

/// Repeats that must be bit-equal.
const REPEATS: usize = 50;

/// A part of the suites that runs by itself: its name, and what hears of every row.
pub type Part<'a> = (String, Box<dyn Fn(&mut dyn FnMut(Row)) + 'a>);

/// Runs all suites on a device; `each` hears of every row as it is done.
pub fn run_cuda(gpu: &Gpu, golden: &[Golden], long: bool, each: &mut dyn FnMut(Row)) {
    for (_, part) in cuda_parts(gpu, golden, long) {
        part(each);
    }
}

/// The suites on a device in parts, for whoever wants some of them.
pub fn cuda_parts<'a>(gpu: &Gpu, golden: &'a [Golden], long: bool) -> Vec<Part<'a>> {
    let device = Device::new(gpu);
    let plain = device.clone().plain();
    let ways = || {
        [
            device.way::<f32>("cuda f32", Storage::F32),
            device.way::<bf16>("cuda bf16", Storage::Bf16),
            device.way::<f16>("cuda f16", Storage::F16),
        ]
    };
    let mut parts: Vec<Part> = Vec::new();
    for way in ways().into_iter().filter(|way| long || way.storage != Storage::F16) {
        let name = format!("suites, {}", way.name);
        parts.push((
            name,
            Box::new(move |each| run(std::slice::from_ref(&way), golden, long, each)),
        ));
    }
    // Every fact is asked of the kernels for the usual dims too.
    let wide = device.clone().wide();
    for way in [
        wide.way::<bf16>("cuda bf16, padded", Storage::Bf16),
        wide.way::<f16>("cuda f16, padded", Storage::F16),
    ]
    .into_iter()
    .filter(|way| long || way.storage != Storage::F16)
    {
        let name = format!("suites, {}", way.name);
        parts.push((
            name,
            Box::new(move |each| run(std::slice::from_ref(&way), golden, long, each)),
        ));
    }
    let [f32, _, f16] = ways();
    let plain = plain.way::<bf16>("cuda bf16, plain", Storage::Bf16);
    let shapes = if long { SHAPES.len() } else { SHORT_SHAPES };
    for (shape, dims) in SHAPES.into_iter().enumerate().take(shapes) {
        let way = device.way::<bf16>("cuda bf16", Storage::Bf16);
        parts.push((
            format!("dims {dims:?}, {}", way.name),
            Box::new(move |each| usual(&way, &shape_cases(shape, long), each)),
        ));
    }
    let way = device.way::<bf16>("cuda bf16", Storage::Bf16);
    let name = format!("specs, {}", way.name);
    parts.push((name, Box::new(move |each| usual(&way, &spec_cases(), each))));
    for way in [f16, plain] {
        let name = format!("dims {:?}, {}", SHAPES[2], way.name);
        parts.push((name, Box::new(move |each| usual(&way, &shape_cases(2, long), each))));
    }
    let name = "only devices".to_string();
    let own = device.clone();
    parts.push((name, Box::new(move |each| only_devices(&own, &f32, each))));
    if long {
        parts.push((
            "beyond 2^31 numbers".into(),
            Box::new(move |each| {
                each(Row::of("property", "more than 2^31 numbers · cuda bf16", |_| {
                    beyond(&device)
                }));
            }),
        ));
    }
    parts
}

/// What only a device can get wrong.
fn only_devices(device: &Device, f32: &Way, each: &mut dyn FnMut(Row)) {
    let misaligned = device.clone().misaligned();
    for way in [
        misaligned.way::<f32>("cuda f32, unaligned", Storage::F32),
        misaligned.way::<bf16>("cuda bf16, unaligned", Storage::Bf16),
    ] {
        let case = Case::random(&default_like(), dims(8, 2, 64, 64), &[70, 200], 90);
        each(twice("addresses of one number's alignment", &way, &case));
    }
    for (what, device) in [("cuda f32", device), ("cuda f32, unaligned", &misaligned)] {
        each(Row::of("hostile", format!("indices of any kind · {what}"), |tally| {
            hostile_indices(device, tally)
        }));
    }
    for way in [f32, &device.way::<bf16>("cuda bf16", Storage::Bf16)] {
        each(Row::of("bitwise", format!("{REPEATS} repeats · {}", way.name), |_| repeats(way)));
        each(Row::of("bitwise", format!("permuted batch · {}", way.name), |_| permuted(way)));
    }
    each(Row::of("hostile", "a hundred selected blocks · cuda f32", |tally| {
        many_blocks(f32, tally)
    }));
    each(Row::of("property", "memory of inference · cuda bf16", |tally| memory(device, tally)));
}

fn twice(what: &str, way: &Way, case: &Case) -> Row {
    Row::of("property", format!("{what} · {}", way.name), |tally| {
        two_times_rule(tally, way, case, Floor::Magnitude, 2e-6)
    })
}

/// The default spec but for a smaller count and window, so that short sequences rank.
fn default_like() -> NsaSpec {
    NsaSpec { select_count: 4, window: 70, ..NsaSpec::default() }
}

/// Head dims that special kernels are for; the short suites take the first few.
const SHAPES: [(usize, usize); 7] =
    [(128, 128), (64, 64), (192, 128), (96, 96), (192, 192), (256, 256), (64, 128)];
/// How many of them the short suites take.
const SHORT_SHAPES: usize = 3;

/// Query heads and key/value heads.
const USUAL_GROUPS: [(usize, usize); 6] = [(16, 1), (8, 2), (4, 4), (2, 1), (32, 1), (64, 1)];

/// A case of the 2× rule, and whether dense and window attention are asked of it too.
type Usual = (String, Case, bool);

/// Groups and lengths at usual dims: all at the commonest dims, two of them elsewhere.
fn shape_cases(shape: usize, long: bool) -> Vec<Usual> {
    let lengths: [&[usize]; 3] = [&[270], &[129, 1, 0, 150], &[31, 32, 33, 200]];
    let (d, v) = SHAPES[shape];
    let wanted = |j: usize| long || shape == 0 || j == 0 || j == 1 + shape % 5;
    let groups = USUAL_GROUPS.into_iter().enumerate().filter(|(j, _)| wanted(*j));
    let case = |(j, (heads, kv_heads)): (usize, (usize, usize))| {
        let (lengths, seed) = (lengths[(shape + j) % 3], 500 + 10 * shape + j);
        let case = Case::random(&default_like(), dims(heads, kv_heads, d, v), lengths, seed as u64);
        (format!("{heads} heads of {kv_heads}, dims {d}/{v}, {lengths:?}"), case, j < 2)
    };
    groups.map(case).collect()
}

/// Specs at the commonest dims.
fn spec_cases() -> Vec<Usual> {
    let of = |numbers| spec(numbers, Compressor::Mean);
    let forced = |select_initial, select_local| NsaSpec {
        select_initial,
        select_local,
        ..of([32, 16, 64, 4, 9])
    };
    let specs = [
        ("overlap 4", of([64, 16, 64, 5, 64])),
        ("blocks alike", of([64, 64, 64, 4, 64])),
        ("blocks of 128", of([32, 16, 128, 3, 128])),
        ("stride 8", of([32, 8, 64, 6, 33])),
        ("no forced blocks", forced(0, 0)),
        ("only forced blocks", forced(2, 2)),
    ];
    let mut cases: Vec<Usual> = Vec::new();
    for (what, spec) in specs {
        let case = Case::random(&spec, dims(8, 1, 128, 128), &[500, 40], 800);
        cases.push((what.into(), case, false));
    }
    // The paper's spec beyond the tokens that see everything.
    let case = Case::random(&NsaSpec::default(), dims(4, 1, 128, 128), &[1500], 801);
    cases.push(("the default spec, 1500 tokens".into(), case, false));
    cases
}

/// Cases side by side: the float64 side takes most of the time.
fn usual(way: &Way, cases: &[Usual], each: &mut dyn FnMut(Row)) {
    let rows_of = |(what, case, masks): &Usual| {
        let mut rows = vec![twice(what, way, case)];
        for (name, mask) in [("dense", Mask::Causal), ("window 100", Mask::Window(100))] {
            if *masks {
                let what = format!("{name}, {what} · {}", way.name);
                rows.push(Row::of("property", what, |tally| {
                    two_times_rule_attend(tally, way, case, mask)
                }));
            }
        }
        rows
    };
    let rows: Vec<Vec<Row>> = cases.par_iter().map(rows_of).collect();
    rows.into_iter().flatten().for_each(each);
}

/// A call's forward and backward with other indices than its own: `out_slc`, `lse_slc` and the
/// selected branch's gradients.
fn with_indices(device: &Device, case: &Case, indices: &[i32]) -> Check<Outcome> {
    let plan = device.plan::<f32>(case.dims)?;
    let batch = NsaBatch::new(&device.gpu, &case.spec, &case.cu_seqlens)?;
    let narrow = Narrow::<f32>::of(case);
    let Dims { kv_heads, key_dim, value_dim, .. } = case.dims;
    let rows = case.compressed_rows() * kv_heads;
    let (mut k_cmp, mut v_cmp) = (vec![0.0; rows * key_dim], vec![0.0; rows * value_dim]);
    cpu::compress_forward(&narrow.compress("k"), &mut k_cmp)?;
    cpu::compress_forward(&narrow.compress("v"), &mut v_cmp)?;
    let mut inputs = Vec::new();
    for name in INPUTS {
        inputs.push(match name {
            "k_cmp" => device.hold(&k_cmp)?,
            "v_cmp" => device.hold(&v_cmp)?,
            name => device.hold(narrow.get(name))?,
        });
    }
    let input = nsa_input(&plan, &batch, &inputs);
    let d_out = device.hold(narrow.get("d_out"))?;
    let out = device.poison::<f32>(case.get("d_out").len())?;
    let mut state = device.state::<f32>(case)?;
    nsa_forward_into(&input, out.slice(), &state.slices())?;
    let bytes: Vec<u8> = indices.iter().flat_map(|x| x.to_le_bytes()).collect();
    state.indices = Guarded::holding(&device.gpu, &bytes, 4, device.margin)?;
    let now = state.slices();
    pieces::selected(&input, now.indices, now.outs[1], now.lses[1])?;
    let mut grads = Vec::new();
    for input in &inputs {
        grads.push(device.poison::<f32>(input.slice().len())?);
    }
    nsa_backward(&input, &now, d_out.slice(), nsa_grads(&grads))?;
    let mut tensors = BTreeMap::new();
    tensors.insert("out_slc".into(), state.outs[1].widen::<f32>()?);
    tensors.insert("lse_slc".into(), state.lses[1].widen::<f32>()?);
    for (name, i) in [("d_q", 0), ("d_k_slc", 3), ("d_v_slc", 4), ("d_gate", 7)] {
        tensors.insert(name.into(), grads[i].widen::<f32>()?);
    }
    Ok(Outcome { indices: state.indices.integers()?, tensors })
}

/// Lists that no selection makes: what is none of a query's blocks, or was there before, counts
/// for nothing; nothing crashes.
fn hostile_indices(device: &Device, tally: &mut Tally) -> Check<()> {
    let spec = spec([8, 4, 16, 6, 12], Compressor::Mean);
    let case = Case::random(&spec, dims(6, 2, 16, 12), &[70, 90, 1], 91);
    let (count, kv_heads) = (spec.select_count, case.dims.kv_heads);
    let mut current = Vec::new();
    for sequence in case.sequences() {
        let of = |p: usize| std::iter::repeat_n((p / spec.select_block) as i32, kv_heads);
        current.extend((0..sequence.len()).flat_map(of));
    }
    let mut random = Random(92);
    let mut pick = |n: usize| (random.next() % n as u64) as i32;
    type List<'a> = &'a mut dyn FnMut(i32) -> Vec<i32>;
    let mut lists: Vec<(&str, List)> = Vec::new();
    let (mut nothing, mut least) = (|_| vec![-1; 6], |_| vec![i32::MIN; 6]);
    let mut beyond = |c: i32| vec![0, c + 1, c + 2, 1 << 20, i32::MAX, i32::MAX - 1];
    let mut twice = |c: i32| vec![0, 0, c / 2, c / 2, c, c];
    let mut falling = |c: i32| vec![c, c - 1, 0, -1, -1, -1];
    let mut holes = |c: i32| vec![-1, 0, -1, c / 2, i32::MIN, c];
    let mut any = |c: i32| (0..6).map(|_| pick(c as usize + 4) - 2).collect::<Vec<i32>>();
    lists.push(("all -1", &mut nothing));
    lists.push(("all INT_MIN", &mut least));
    lists.push(("out of range", &mut beyond));
    lists.push(("duplicates", &mut twice));
    lists.push(("descending", &mut falling));
    lists.push(("holes", &mut holes));
    lists.push(("random", &mut any));
    for (what, list) in lists {
        let hostile: Vec<i32> = current.iter().flat_map(|&c| list(c)).collect();
        let mut clean = Vec::new();
        for (list, &c) in hostile.chunks(count).zip(&current) {
            let mut kept: Vec<i32> = list.iter().copied().filter(|j| (0..=c).contains(j)).collect();
            kept.sort_unstable();
            kept.dedup();
            kept.resize(count, -1);
            clean.extend(kept);
        }
        let got = with_indices(device, &case, &hostile)?;
        let want = with_indices(device, &case, &clean)?;
        for (name, x) in &got.tensors {
            let y = want.get(name);
            // Another order of at most so many sums.
            let terms = (count * spec.select_block).max(90 * case.dims.group());
            let allowed = 2.0 * terms as f64 * UNIT32 * (1.0 + finite_largest(y));
            tally.hold(&format!("{what}: {name}"), distance(x, y), allowed);
        }
    }
    Ok(())
}

fn finite_largest(x: &[f64]) -> f64 {
    largest(x.iter().filter(|x| x.is_finite()))
}

/// The same call many times.
fn repeats(way: &Way) -> Check<()> {
    let case = Case::random(&default_like(), dims(8, 2, 64, 64), &[257, 3, 130], 93);
    let case = way.stored(&case);
    let first = (way.run)(&case)?;
    for i in 1..REPEATS {
        check_same_bits(&format!("repeat {i}"), &first, &(way.run)(&case)?)?;
    }
    Ok(())
}

/// The same sequences in another order.
fn permuted(way: &Way) -> Check<()> {
    let lengths = [100, 33, 0, 257];
    let case = Case::random(&default_like(), dims(8, 2, 64, 64), &lengths, 94);
    let case = way.stored(&case);
    let order = [3, 1, 2, 0];
    let mut other = case.clone();
    let sequences = case.sequences();
    for (name, x) in &mut other.tensors {
        if !name.starts_with("phi_") {
            let width = case.get(name).len() / case.tokens();
            let rows =
                |b: usize| &case.get(name)[sequences[b].start * width..sequences[b].end * width];
            *x = order.iter().flat_map(|&b| rows(b)).copied().collect();
        }
    }
    let mut at = 0;
    other.cu_seqlens = vec![0];
    for b in order {
        at += lengths[b] as i32;
        other.cu_seqlens.push(at);
    }
    let (a, b) = ((way.run)(&case)?, (way.run)(&other)?);
    for (place, &sequence) in order.iter().enumerate() {
        let (from, to) = (sequences[sequence].start, other.cu_seqlens[place] as usize);
        for t in 0..lengths[sequence] {
            for name in a.tensors.keys().filter(|name| !name.starts_with("compressed")) {
                let same = same_bits(
                    a.row(name, from + t, case.tokens()),
                    b.row(name, to + t, case.tokens()),
                );
                ensure(same, || format!("{name} of token {t} of sequence {sequence}"))?;
            }
        }
    }
    Ok(())
}

/// More selected blocks than a list in shared memory holds.
fn many_blocks(way: &Way, tally: &mut Tally) -> Check<()> {
    let spec = spec([2, 1, 2, 100, 5], Compressor::Mean);
    let case = Case::random(&spec, dims(4, 2, 8, 8), &[330], 95);
    two_times_rule(tally, way, &case, Floor::Magnitude, 2e-6)
}

/// Without saving, a call takes at most a tenth of q + k + v + o (a quarter is promised).
fn memory(device: &Device, tally: &mut Tally) -> Check<()> {
    let case_dims = dims(64, 4, 128, 128);
    let tokens = 1024;
    let plan = device.plan::<bf16>(case_dims)?;
    let batch = NsaBatch::new(&device.gpu, &NsaSpec::default(), &[0, tokens as i32])?;
    let Dims { heads, kv_heads, key_dim, value_dim } = case_dims;
    let [k, v] = [kv_heads * key_dim, kv_heads * value_dim];
    let (t, n) = (tokens, batch.blocks());
    let mut inputs = Vec::new();
    for len in [t * heads * key_dim, n * k, n * v, t * k, t * v, t * k, t * v, t * heads * 3] {
        inputs.push(device.hold(&vec![bf16::ONE; len])?);
    }
    let out = device.poison::<bf16>(t * heads * value_dim)?;
    let input = nsa_input(&plan, &batch, &inputs);
    nsa_forward(&input, out.slice(), false)?;
    device.gpu.synchronize()?;
    let before = device.gpu.memory_use()?.used;
    device.gpu.reset_peak();
    nsa_forward(&input, out.slice(), false)?;
    let extra = device.gpu.memory_use()?.peak - before;
    let whole = 2 * t * (heads * (key_dim + value_dim) + k + v);
    let rows = out.widen::<bf16>()?;
    for (t, row) in rows.chunks(heads * value_dim).enumerate() {
        // The first tokens see no compressed block.
        let want = if t + 1 < NsaSpec::default().compress_block { 2.0 } else { 3.0 };
        ensure(row.iter().all(|x| *x == want), || format!("ones at token {t} give {:?}", row[0]))?;
    }
    tally.hold("share of q + k + v + o", extra as f64 / whole as f64, 0.1);
    Ok(())
}

/// The same sequence so often that every tensor has more than 2³¹ numbers: the last copy must hold
/// the bits of the first, forward and backward.
fn beyond(device: &Device) -> Check<()> {
    let (tokens, copies) = (2048, 33);
    let case_dims = dims(256, 256, 128, 128);
    let spec = spec([32, 16, 64, 3, 64], Compressor::Mean);
    let numbers = tokens * copies * 256 * 128;
    // Eight inputs and their gradients, the branches, dO, dQ in f32.
    let wanted = (numbers * 2 * (6 + 6 + 4 + 2) + numbers * 4) as u64 / 10 * 11;
    let (free, _) = device.gpu.memory()?;
    ensure(free >= wanted, || format!("needs {wanted} bytes of device memory; {free} are free"))?;
    let plan = device.plan::<bf16>(case_dims)?;
    let cu_seqlens: Vec<i32> = (0..=copies).map(|b| (b * tokens) as i32).collect();
    let batch = NsaBatch::new(&device.gpu, &spec, &cu_seqlens)?;
    let blocks = batch.blocks() / copies;
    let mut random = Random(96);
    let mut fill = |rows: usize, width: usize| -> Check<Guarded> {
        let one: Vec<bf16> =
            random.normals(rows * width, 0.5).into_iter().map(bf16::from_f32).collect();
        let all = Guarded::poison(&device.gpu, rows * width * copies, 2, 0)?;
        let one = device.gpu.upload(&one.iter().map(|x| x.to_bits()).collect::<Vec<u16>>())?;
        for copy in 0..copies {
            let to = all.slice().ptr() + (copy * rows * width * 2) as u64;
            // SAFETY: both ranges are inside their buffers, which are apart.
            unsafe { device.gpu.copy(to, one.ptr(), one.bytes())? };
        }
        Ok(all)
    };
    let row = 256 * 128;
    let inputs = [
        fill(tokens, row)?,
        fill(blocks, row)?,
        fill(blocks, row)?,
        fill(tokens, row)?,
        fill(tokens, row)?,
        fill(tokens, row)?,
        fill(tokens, row)?,
        fill(tokens, 256 * 3)?,
    ];
    let input = nsa_input(&plan, &batch, &inputs);
    let out = Guarded::poison(&device.gpu, numbers, 2, 0)?;
    let saved = nsa_forward(&input, out.slice(), true)?;
    let state = saved.as_ref().ok_or_else(|| Fault("nothing was saved".into()))?.state();
    let mut grads = Vec::new();
    for input in &inputs {
        grads.push(Guarded::poison(&device.gpu, input.slice().len(), 2, 0)?);
    }
    // The output stands for its gradient.
    nsa_backward(&input, &state, out.slice(), nsa_grads(&grads))?;
    for (name, x) in INPUTS.iter().zip(&grads).chain([(&"out", &out)]) {
        let (first, last) = x.ends(copies)?;
        ensure(first == last, || format!("{name}: the last copy differs from the first"))?;
        ensure(first.iter().any(|byte| *byte != 0xff), || format!("{name} was not written"))?;
    }
    Ok(())
}
