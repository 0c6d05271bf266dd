//! The benchmark's rows on a GPU: timed between events of the stream, the level 2 cache flushed
//! before every run.

use anyhow::Context;
use half::bf16;
use tercet_attention::cpu::Mask;
use tercet_attention::cuda::decode::{CacheView, NsaCaches, Rows, dense_rows, nsa_rows};
use tercet_attention::cuda::{
    AttendGrads, AttendInput, Batch, NsaBatch, NsaGrads, NsaInput, Plan as Kernels, Slice,
    attend_backward, attend_forward, nsa_backward, nsa_forward, nsa_forward_into, pieces,
};
use tercet_attention::{Dims, NsaSpec};
use tercet_cuda::{Buffer, Gpu, Number};
use tercet_tensor::{Compressor, Device, Grads, Tape, Tensor, ops};

use super::flops;
use super::operands::{Random, compress_flops};
use super::operator::Measured;
use super::timing::Effort;

/// Which rows to run, how long, and who hears of each.
pub struct Plan<'a> {
    /// True for a row that is wanted.
    pub wanted: &'a dyn Fn(&str) -> bool,
    /// Time per row.
    pub effort: Effort,
    /// Called with each row as it is done.
    pub each: &'a mut dyn FnMut(Measured),
}

/// Numbers that inputs repeat; a prime, so that no pattern falls on heads or blocks.
const PERIOD: usize = (1 << 20) - 3;

/// Tokens that a cache's page is a multiple of.
const PAGE: usize = 64;

/// One length's inputs on the device.
struct Bench<'a> {
    gpu: &'a Gpu,
    kernels: Kernels,
    dims: Dims,
    spec: &'a NsaSpec,
    tokens: usize,
    number: Number,
    numbers: Vec<f32>,
    flush: Buffer,
}

impl Bench<'_> {
    /// `len` random numbers in the storage type.
    fn random(&self, len: usize, unit: bool) -> anyhow::Result<Buffer> {
        let numbers = (0..len).map(|i| {
            let x = self.numbers[i % PERIOD];
            if unit { 0.5 + x / 8.0 } else { x }
        });
        Ok(match self.number {
            Number::F32 => self.gpu.upload(&numbers.collect::<Vec<f32>>())?,
            _ => self
                .gpu
                .upload(&numbers.map(|x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>())?,
        })
    }

    fn room(&self, len: usize) -> anyhow::Result<Buffer> {
        Ok(self.gpu.alloc(len * self.number.bytes())?)
    }

    /// A buffer of numbers in the storage type.
    fn of(&self, buffer: &Buffer) -> Slice {
        slice(buffer, self.number.bytes())
    }

    /// The median of repeated runs.
    fn time(
        &self,
        effort: Effort,
        mut work: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<(f64, usize)> {
        work()?;
        self.gpu.synchronize()?;
        let (mut times, mut spent) = (Vec::new(), 0.0);
        while times.len() < 3 || (spent < effort.seconds && times.len() < 100) {
            self.flush.fill(times.len() as u8)?;
            let seconds = f64::from(self.gpu.time(&mut work)?) / 1e3;
            spent += seconds;
            times.push(seconds);
        }
        times.sort_by(f64::total_cmp);
        Ok((times[times.len() / 2], times.len()))
    }

    fn row(
        &self,
        plan: &mut Plan,
        row: &'static str,
        flops: f64,
        work: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if !(plan.wanted)(row) {
            return Ok(());
        }
        self.gpu.reset_peak();
        let (seconds, runs) = self.time(plan.effort, work).with_context(|| row)?;
        let peak_bytes = Some(self.gpu.memory_use()?.peak);
        let tokens = self.tokens;
        (plan.each)(Measured { row, tokens, seconds, runs, flops, of_branch: None, peak_bytes });
        Ok(())
    }
}

/// Numbers of `bytes` each in a buffer that outlives the benchmark of its row.
fn slice(buffer: &Buffer, bytes: usize) -> Slice {
    // SAFETY: buffers are freed in the stream's order, after all work that was given the slice.
    unsafe { Slice::new(buffer.ptr(), buffer.bytes() / bytes) }
}

/// Runs every wanted row for one length.
pub fn measure(
    gpu: &Gpu,
    number: Number,
    (dims, spec): (Dims, &NsaSpec),
    tokens: usize,
    seed: u64,
    plan: &mut Plan,
) -> anyhow::Result<()> {
    let bench = Bench {
        gpu,
        kernels: Kernels::new(gpu, dims, number)?,
        dims,
        spec,
        tokens,
        number,
        numbers: Random(seed).numbers(PERIOD),
        flush: gpu.alloc(2 * gpu.info().l2 as usize)?,
    };
    compression(&bench, plan)?;
    let Dims { heads, kv_heads, key_dim, value_dim } = dims;
    let q = bench.random(tokens * heads * key_dim, false)?;
    // Whole pages, for the rows that read keys and values as a cache.
    let held = tokens.next_multiple_of(PAGE);
    let k = bench.random(held * kv_heads * key_dim, false)?;
    let v = bench.random(held * kv_heads * value_dim, false)?;
    dense(&bench, [&q, &k, &v], plan)?;
    sparse(&bench, [&q, &k, &v], plan)
}

/// φ of keys and values, forward and backward, by the op that models use.
fn compression(bench: &Bench, plan: &mut Plan) -> anyhow::Result<()> {
    let rows = ["forward/compress", "backward/compress"];
    if !rows.iter().any(|row| (plan.wanted)(row)) {
        return Ok(());
    }
    let (dims, spec, tokens) = (bench.dims, bench.spec, bench.tokens);
    let device = Device::Cuda(bench.gpu.clone());
    let tensor = |shape: &[usize], factor: f32| -> anyhow::Result<Tensor> {
        let len: usize = shape.iter().product();
        let values = (0..len).map(|i| factor * bench.numbers[i % PERIOD]).collect();
        let stored = match bench.number {
            Number::F32 => tercet_tensor::DType::F32,
            _ => tercet_tensor::DType::BF16,
        };
        Ok(Tensor::from_f32(values, shape)?.to_dtype(stored)?.to_device(&device)?)
    };
    let mut sides = Vec::new();
    for dim in [dims.key_dim, dims.value_dim] {
        let (k, l) = (dims.kv_heads, spec.compress_block);
        let small = 1.0 / (l * dim) as f32;
        let phi = match spec.compressor {
            Compressor::Mean => Vec::new(),
            Compressor::Linear => {
                vec![tensor(&[k, l * dim, dim], small)?, tensor(&[k, l, dim], 0.1)?]
            }
            Compressor::Mlp => vec![
                tensor(&[k, l * dim, dim], small)?,
                tensor(&[k, dim], 0.1)?,
                tensor(&[k, dim, dim], small)?,
                tensor(&[k, dim], 0.1)?,
                tensor(&[k, l, dim], 0.1)?,
            ],
        };
        sides.push((tensor(&[tokens, k, dim], 1.0)?, phi));
    }
    let cu_seqlens = [0, tokens as i32];
    let both = |tape: &mut Tape| -> anyhow::Result<Vec<tercet_tensor::Var>> {
        let mut made = Vec::new();
        for (side, (x, phi)) in sides.iter().enumerate() {
            let var = |i: usize| tape.param(phi[i].clone(), 2 + 5 * side + i);
            let phi = match spec.compressor {
                Compressor::Mean => ops::Phi::Mean,
                Compressor::Linear => ops::Phi::Linear { weight: var(0), pe: var(1) },
                Compressor::Mlp => ops::Phi::Mlp {
                    weight1: var(0),
                    bias1: var(1),
                    weight2: var(2),
                    bias2: var(3),
                    pe: var(4),
                },
            };
            let x = tape.param(x.clone(), side);
            made.push(ops::compress(tape, &x, &phi, spec, &cu_seqlens)?);
        }
        Ok(made)
    };
    let flops = compress_flops(dims, spec, tokens);
    bench.row(plan, rows[0], flops, || both(&mut Tape::inference()).map(drop))?;
    if !(plan.wanted)(rows[1]) {
        return Ok(());
    }
    // A loss that is the sum of all compressed numbers times a constant gradient.
    let work = if spec.compressor == Compressor::Mean { flops } else { 2.0 * flops };
    let mut grads = Grads::new(12);
    let mut forward_and_back = || -> anyhow::Result<()> {
        let mut tape = Tape::recording();
        for y in both(&mut tape)? {
            let flat = y.reshape(&[1, y.value().len()])?;
            let ones = tape.leaf(flat.value().clone());
            let loss = ops::linear(&mut tape, &flat, &ones, None)?;
            grads.zero();
            tape.backward(&loss, &mut grads)?;
        }
        Ok(())
    };
    bench.gpu.reset_peak();
    let (all, runs) = bench.time(plan.effort, &mut forward_and_back)?;
    let (forward, _) = bench.time(plan.effort, || both(&mut Tape::inference()).map(drop))?;
    let peak_bytes = Some(bench.gpu.memory_use()?.peak);
    let (row, tokens, seconds) = (rows[1], bench.tokens, (all - forward).max(0.0));
    (plan.each)(Measured { row, tokens, seconds, runs, flops: work, of_branch: None, peak_bytes });
    Ok(())
}

fn dense(bench: &Bench, [q, k, v]: [&Buffer; 3], plan: &mut Plan) -> anyhow::Result<()> {
    let rows = ["forward/dense", "backward/dense", "decode/dense"];
    if !rows.iter().any(|row| (plan.wanted)(row)) {
        return Ok(());
    }
    let (dims, t, scale) = (bench.dims, bench.tokens, bench.dims.scale());
    let batch = Batch::new(bench.gpu, &[0, t as i32])?;
    let kernels = &bench.kernels;
    let input = AttendInput {
        plan: kernels,
        batch: &batch,
        scale,
        q: bench.of(q),
        k: first(bench.of(k), t * dims.kv_heads * dims.key_dim),
        v: first(bench.of(v), t * dims.kv_heads * dims.value_dim),
    };
    let out = bench.room(t * dims.heads * dims.value_dim)?;
    let lse = bench.gpu.alloc(t * dims.heads * 4)?;
    let (out, lse) = (bench.of(&out), slice(&lse, 4));
    let pairs = flops::causal_pairs(t);
    attend_forward(&input, Mask::Causal, out, lse)?;
    bench.row(plan, rows[0], flops::forward(dims, pairs), || {
        Ok(attend_forward(&input, Mask::Causal, out, lse)?)
    })?;
    if (plan.wanted)(rows[1]) {
        let d_out = bench.random(out.len(), false)?;
        let like = |x: &Buffer| bench.gpu.alloc(x.bytes());
        let (d_q, d_k, d_v) = (like(q)?, like(k)?, like(v)?);
        let grads = AttendGrads { q: bench.of(&d_q), k: bench.of(&d_k), v: bench.of(&d_v) };
        bench.row(plan, rows[1], flops::backward(dims, pairs), || {
            Ok(attend_backward(&input, Mask::Causal, out, lse, bench.of(&d_out), grads)?)
        })?;
    }
    let cache = page(bench, k, v);
    let positions = bench.gpu.upload(&[t as i32 - 1])?;
    let one = query_row(bench, q, &positions);
    let out = first(out, dims.heads * dims.value_dim);
    bench.row(plan, rows[2], flops::forward(dims, t as u64), || {
        Ok(dense_rows(&one, Mask::Causal, &cache, out)?)
    })
}

/// Keys and values as a cache of one page.
fn page(bench: &Bench, k: &Buffer, v: &Buffer) -> CacheView {
    let (k, v) = (bench.of(k), bench.of(v));
    let page = k.len() / (bench.dims.kv_heads * bench.dims.key_dim);
    CacheView { k, v, table: None, page, interleaved: false, ring: false }
}

/// The first numbers of a slice.
fn first(slice: Slice, len: usize) -> Slice {
    // SAFETY: part of a slice that is valid as long.
    unsafe { Slice::new(slice.ptr(), len.min(slice.len())) }
}

fn query_row<'a>(bench: &'a Bench, q: &Buffer, positions: &Buffer) -> Rows<'a> {
    let dims = bench.dims;
    Rows {
        plan: &bench.kernels,
        scale: dims.scale(),
        q: first(bench.of(q), dims.heads * dims.key_dim),
        positions: slice(positions, 4),
        sequences: None,
        count: 1,
        longest: bench.tokens,
    }
}

fn sparse(bench: &Bench, [q, k, v]: [&Buffer; 3], plan: &mut Plan) -> anyhow::Result<()> {
    let all = super::operator::ROWS;
    let mine = |row: &str| !row.ends_with("/dense") && !row.ends_with("/compress");
    if !all.iter().any(|row| mine(row) && (plan.wanted)(row)) {
        return Ok(());
    }
    let (dims, spec, t, gpu) = (bench.dims, bench.spec, bench.tokens, bench.gpu);
    let Dims { heads, kv_heads, key_dim, value_dim } = dims;
    let batch = NsaBatch::new(gpu, spec, &[0, t as i32])?;
    let (blocks, held) = (batch.blocks(), batch.blocks().next_multiple_of(PAGE));
    let k_cmp = bench.random(held * kv_heads * key_dim, false)?;
    let v_cmp = bench.random(held * kv_heads * value_dim, false)?;
    let gate = bench.random(t * heads * 3, true)?;
    let input = NsaInput {
        plan: &bench.kernels,
        batch: &batch,
        scale: dims.scale(),
        q: bench.of(q),
        k_cmp: first(bench.of(&k_cmp), blocks * kv_heads * key_dim),
        v_cmp: first(bench.of(&v_cmp), blocks * kv_heads * value_dim),
        k_slc: first(bench.of(k), t * kv_heads * key_dim),
        v_slc: first(bench.of(v), t * kv_heads * value_dim),
        k_win: first(bench.of(k), t * kv_heads * key_dim),
        v_win: first(bench.of(v), t * kv_heads * value_dim),
        gate: bench.of(&gate),
    };
    let out = bench.room(t * heads * value_dim)?;
    let out = bench.of(&out);
    let saved = nsa_forward(&input, out, true)?.context("the forward kept nothing")?;
    let state = saved.state();
    let mut chosen = vec![0i32; t * kv_heads * spec.select_count];
    saved.indices().download(&mut chosen)?;
    let cmp = flops::compressed_pairs(t, spec);
    let slc = flops::selected_pairs(&chosen, t, kv_heads, spec);
    let win = flops::window_pairs(t, spec.window);
    let blend = (t * heads * value_dim * 6) as f64;
    let one = |pairs: u64| flops::forward(dims, pairs);

    bench.row(plan, "forward/cmp", one(cmp), || {
        Ok(pieces::compressed(&input, state.outs[0], state.lses[0])?)
    })?;
    let scores = (heads * 2 * key_dim) as f64 * cmp as f64;
    bench.row(plan, "forward/score+select", scores, || {
        Ok(pieces::select(&input, state.lses[0], state.indices)?)
    })?;
    bench.row(plan, "forward/slc", one(slc), || {
        Ok(pieces::selected(&input, state.indices, state.outs[1], state.lses[1])?)
    })?;
    bench.row(plan, "forward/win", one(win), || {
        Ok(pieces::window(&input, state.outs[2], state.lses[2])?)
    })?;
    bench.row(plan, "forward/gate", blend, || Ok(pieces::gate(&input, state.outs, out)?))?;
    let whole = one(cmp + slc + win) + scores + blend;
    bench.row(plan, "forward/nsa", whole, || Ok(nsa_forward(&input, out, false).map(drop)?))?;
    backward(bench, plan, &input, &state, [cmp, slc, win], blend)?;
    drop(saved);

    let positions = gpu.upload(&[t as i32 - 1])?;
    let row = query_row(bench, q, &positions);
    let caches = NsaCaches {
        spec,
        gate: first(input.gate, heads * 3),
        cmp: page(bench, &k_cmp, &v_cmp),
        slc: page(bench, k, v),
        win: page(bench, k, v),
    };
    let read = spec.compressed_blocks(t) + (spec.select_count * spec.select_block).min(t);
    let pairs = (read + spec.window.min(t)) as u64;
    let out = first(out, heads * value_dim);
    bench.row(plan, "decode/nsa", one(pairs), || Ok(nsa_rows(&row, &caches, out, None)?))
}

fn backward(
    bench: &Bench,
    plan: &mut Plan,
    input: &NsaInput,
    state: &tercet_attention::cuda::NsaState,
    [cmp, slc, win]: [u64; 3],
    blend: f64,
) -> anyhow::Result<()> {
    let rows = ["backward/cmp", "backward/slc", "backward/win", "backward/gate", "backward/nsa"];
    if !rows.iter().any(|row| (plan.wanted)(row)) {
        return Ok(());
    }
    let (dims, gpu) = (bench.dims, bench.gpu);
    let d_out = bench.random(state.outs[0].len(), false)?;
    let d_out = bench.of(&d_out);
    // The branches' saved outputs must be those of these inputs.
    let out = bench.room(d_out.len())?;
    nsa_forward_into(input, bench.of(&out), state)?;
    drop(out);
    let like = |x: Slice| gpu.alloc(x.len() * bench.number.bytes());
    let inputs = [input.q, input.k_cmp, input.v_cmp, input.k_slc, input.v_slc, input.k_win];
    let mut room = Vec::new();
    for x in inputs.into_iter().chain([input.v_win, input.gate]) {
        room.push(like(x)?);
    }
    let d: Vec<Slice> = room.iter().map(|buffer| bench.of(buffer)).collect();
    let deltas = gpu.alloc(3 * state.lses[0].len() * 4)?;
    pieces::gate_backward(input, state.outs, d_out, d[7], slice(&deltas, 4))?;
    let above = |index: usize| {
        let len = state.lses[index].len();
        // SAFETY: the branch's third of a buffer that lives to the end of this function.
        let delta = unsafe { Slice::new(deltas.ptr() + (index * len * 4) as u64, len) };
        pieces::Above { d_out, lse: state.lses[index], delta }
    };
    let of = |pairs: u64| flops::backward(dims, pairs);
    let grads = |k: usize| AttendGrads { q: d[0], k: d[k], v: d[k + 1] };
    bench.row(plan, rows[0], of(cmp), || {
        Ok(pieces::compressed_backward(input, above(0), grads(1))?)
    })?;
    bench.row(plan, rows[1], of(slc), || {
        Ok(pieces::selected_backward(input, state.indices, above(1), grads(3))?)
    })?;
    bench
        .row(plan, rows[2], of(win), || Ok(pieces::window_backward(input, above(2), grads(5))?))?;
    bench.row(plan, rows[3], blend, || {
        Ok(pieces::gate_backward(input, state.outs, d_out, d[7], slice(&deltas, 4))?)
    })?;
    let all = NsaGrads {
        q: d[0],
        k_cmp: d[1],
        v_cmp: d[2],
        k_slc: d[3],
        v_slc: d[4],
        k_win: d[5],
        v_win: d[6],
        gate: d[7],
    };
    bench.row(plan, rows[4], of(cmp + slc + win) + blend, || {
        Ok(nsa_backward(input, state, d_out, all)?)
    })
}
