//! The rows of the benchmark: what is run, how often, and how much work it is.

use tercet_attention::cpu::{
    self, AttendGrads, CompressTail, DenseCache, Mask, NsaCache, NsaGrads, NsaInput, NsaStep,
    pieces,
};
use tercet_attention::{Compressor, Element, Result};

use super::flops;
use super::operands::Operands;
use super::timing::{self, Effort};
use crate::machine;

/// Names of all rows, in the order they are run: `phase/piece`.
pub const ROWS: [&str; 17] = [
    "forward/dense",
    "forward/compress",
    "forward/cmp",
    "forward/score+select",
    "forward/slc",
    "forward/win",
    "forward/gate",
    "forward/nsa",
    "backward/dense",
    "backward/compress",
    "backward/cmp",
    "backward/slc",
    "backward/win",
    "backward/gate",
    "backward/nsa",
    "decode/dense",
    "decode/nsa",
];

/// One measured row.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Measured {
    /// One of [`ROWS`].
    pub row: &'static str,
    /// Tokens of the sequence, or of the cache a decode step reads.
    pub tokens: usize,
    /// Median seconds.
    pub seconds: f64,
    /// Runs the median is taken from.
    pub runs: usize,
    /// Floating-point operations of one run; 0 where there is hardly any arithmetic.
    pub flops: f64,
    /// For `score+select`: its time as a share of the compressed branch's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_branch: Option<f64>,
    /// Peak resident memory of the process while it ran, bytes (Linux).
    pub peak_bytes: Option<u64>,
}

/// Which rows to run, how long, and who hears of each.
pub struct Plan<'a> {
    /// True for a row that is wanted.
    pub wanted: &'a dyn Fn(&str) -> bool,
    /// Time per row.
    pub effort: Effort,
    /// Called with each row as it is done.
    pub each: &'a mut dyn FnMut(Measured),
}

impl Plan<'_> {
    fn row(
        &mut self,
        row: &'static str,
        tokens: usize,
        flops: f64,
        work: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        if !(self.wanted)(row) {
            return Ok(());
        }
        machine::reset_peak_memory();
        let (seconds, runs) = timing::median(self.effort, work)?;
        let peak_bytes = machine::peak_memory();
        (self.each)(Measured { row, tokens, seconds, runs, flops, of_branch: None, peak_bytes });
        Ok(())
    }

    fn any(&self, rows: &[&str]) -> bool {
        rows.iter().any(|r| (self.wanted)(r))
    }
}

/// Runs every wanted row on one set of operands.
pub fn measure<E: Element>(ops: &Operands<E>, plan: &mut Plan) -> Result<()> {
    dense(ops, plan)?;
    sparse(ops, plan)?;
    decode_dense(ops, plan)?;
    decode_sparse(ops, plan)
}

fn zeros<E: Element>(like: &[E]) -> Vec<E> {
    vec![E::default(); like.len()]
}

fn dense<E: Element>(ops: &Operands<E>, plan: &mut Plan) -> Result<()> {
    if !plan.any(&["forward/dense", "backward/dense"]) {
        return Ok(());
    }
    let (input, dims, t) = (ops.dense(), ops.dims, ops.tokens);
    let pairs = flops::causal_pairs(t);
    let mut out = vec![E::default(); t * dims.heads * dims.value_dim];
    let mut lse = vec![0.0; t * dims.heads];
    plan.row("forward/dense", t, flops::forward(dims, pairs), || {
        cpu::attend_forward(&input, Mask::Causal, &mut out, &mut lse)
    })?;
    if !plan.any(&["backward/dense"]) {
        return Ok(());
    }
    cpu::attend_forward(&input, Mask::Causal, &mut out, &mut lse)?;
    let d_out = ops.d_out();
    let (mut d_q, mut d_k, mut d_v) = (zeros(&ops.q), zeros(&ops.k), zeros(&ops.v));
    plan.row("backward/dense", t, flops::backward(dims, pairs), || {
        let grads = AttendGrads { q: &mut d_q, k: &mut d_k, v: &mut d_v };
        cpu::attend_backward(&input, Mask::Causal, &out, &lse, &d_out, grads)
    })
}

fn sparse<E: Element>(ops: &Operands<E>, plan: &mut Plan) -> Result<()> {
    if !ROWS[1..15].iter().any(|r| *r != "backward/dense" && (plan.wanted)(r)) {
        return Ok(());
    }
    let (input, dims, spec, t) = (ops.nsa(), ops.dims, &ops.spec, ops.tokens);
    let mut out = vec![E::default(); t * dims.heads * dims.value_dim];
    let mut saved = cpu::nsa_forward(&input, &mut out)?;

    let cmp = flops::compressed_pairs(t, spec);
    let slc = flops::selected_pairs(&saved.indices, t, dims.kv_heads, spec);
    let win = flops::window_pairs(t, spec.window);
    let gate = (t * dims.heads * dims.value_dim * 6) as f64;

    let (mut k_cmp, mut v_cmp) = (zeros(&ops.k_cmp), zeros(&ops.v_cmp));
    plan.row("forward/compress", t, ops.compress_flops(), || ops.compress(&mut k_cmp, &mut v_cmp))?;
    plan.row("forward/cmp", t, flops::forward(dims, cmp), || {
        pieces::cmp_forward(&input).map(drop)
    })?;
    ranking(&input, t, plan)?;
    plan.row("forward/slc", t, flops::forward(dims, slc), || {
        pieces::slc_forward(&input, &mut saved)
    })?;
    plan.row("forward/win", t, flops::forward(dims, win), || {
        pieces::win_forward(&input, &mut saved)
    })?;
    plan.row("forward/gate", t, gate, || {
        pieces::gate_forward(&input, &saved, &mut out);
        Ok(())
    })?;
    let all = ops.compress_flops() + flops::forward(dims, cmp + slc + win) + gate;
    plan.row("forward/nsa", t, all, || {
        ops.compress(&mut k_cmp, &mut v_cmp)?;
        cpu::nsa_forward(&input, &mut out).map(drop)
    })?;
    if !ROWS[9..15].iter().any(|r| (plan.wanted)(r)) {
        return Ok(());
    }

    let d_out = ops.d_out();
    let (mut d_q, mut d_gate) = (zeros(&ops.q), zeros(&ops.gate));
    let (mut d_k_cmp, mut d_v_cmp) = (zeros(&ops.k_cmp), zeros(&ops.v_cmp));
    let (mut d_k_slc, mut d_v_slc) = (zeros(&ops.k), zeros(&ops.v));
    let (mut d_k_win, mut d_v_win) = (zeros(&ops.k), zeros(&ops.v));
    let mut phi = ops.phi_gradients();
    // Twice the forward's products, once for φ's parameters and once for its input; the mean has
    // only its input.
    let compress_flops = match spec.compressor {
        Compressor::Mean => ops.compress_flops(),
        _ => 2.0 * ops.compress_flops(),
    };
    plan.row("backward/compress", t, compress_flops, || {
        let d_x = (&mut d_k_slc[..], &mut d_v_slc[..]);
        ops.compress_backward((&ops.k_cmp, &ops.v_cmp), d_x, &mut phi)
    })?;
    let delta = pieces::gate_backward_piece(&input, &saved, &d_out, &mut d_gate);
    plan.row("backward/cmp", t, flops::backward(dims, cmp), || {
        let grads = AttendGrads { q: &mut d_q, k: &mut d_k_cmp, v: &mut d_v_cmp };
        pieces::cmp_backward(&input, &saved, &delta[0], &d_out, grads)
    })?;
    plan.row("backward/slc", t, flops::backward(dims, slc), || {
        let grads = AttendGrads { q: &mut d_q, k: &mut d_k_slc, v: &mut d_v_slc };
        pieces::slc_backward(&input, &saved, &delta[1], &d_out, grads)
    })?;
    plan.row("backward/win", t, flops::backward(dims, win), || {
        let grads = AttendGrads { q: &mut d_q, k: &mut d_k_win, v: &mut d_v_win };
        pieces::win_backward(&input, &saved, &delta[2], &d_out, grads)
    })?;
    plan.row("backward/gate", t, gate, || {
        pieces::gate_backward_piece(&input, &saved, &d_out, &mut d_gate);
        Ok(())
    })?;
    let (mut d_k, mut d_v) = (zeros(&ops.k), zeros(&ops.v));
    let all = flops::backward(dims, cmp + slc + win) + gate + compress_flops;
    plan.row("backward/nsa", t, all, || {
        let grads = NsaGrads {
            q: &mut d_q,
            k_cmp: &mut d_k_cmp,
            v_cmp: &mut d_v_cmp,
            k_slc: &mut d_k_slc,
            v_slc: &mut d_v_slc,
            k_win: &mut d_k_win,
            v_win: &mut d_v_win,
            gate: &mut d_gate,
        };
        cpu::nsa_backward(&input, &saved, &d_out, grads)?;
        ops.compress_backward((&d_k_cmp, &d_v_cmp), (&mut d_k, &mut d_v), &mut phi)
    })
}

/// Ranking reuses the compressed branch's probabilities, so it is timed as what it adds: the
/// median of both together less the median of the branch alone.
fn ranking<E: Element>(input: &NsaInput<E>, t: usize, plan: &mut Plan) -> Result<()> {
    const ROW: &str = "forward/score+select";
    if !plan.any(&[ROW]) {
        return Ok(());
    }
    machine::reset_peak_memory();
    let (alone, _) = timing::median(plan.effort, || pieces::cmp_forward(input).map(drop))?;
    let (both, runs) =
        timing::median(plan.effort, || pieces::cmp_score_select_forward(input).map(drop))?;
    let peak_bytes = machine::peak_memory();
    let seconds = (both - alone).max(0.0);
    let of_branch = Some(seconds / alone);
    (plan.each)(Measured { row: ROW, tokens: t, seconds, runs, flops: 0.0, of_branch, peak_bytes });
    Ok(())
}

/// One token's slice of a `[T, …]` tensor.
fn token<E>(x: &[E], tokens: usize, at: usize) -> &[E] {
    let width = x.len() / tokens;
    &x[at * width..(at + 1) * width]
}

fn decode_dense<E: Element>(ops: &Operands<E>, plan: &mut Plan) -> Result<()> {
    if !plan.any(&["decode/dense"]) {
        return Ok(());
    }
    let (dims, t, scale) = (ops.dims, ops.tokens, ops.dims.scale());
    let mut cache = DenseCache::new(dims, Mask::Causal)?;
    let mut out = vec![E::default(); t * dims.heads * dims.value_dim];
    cache.extend(scale, &ops.q, &ops.k, &ops.v, &mut out)?;
    let width = dims.heads * dims.value_dim;
    let mut at = 0;
    plan.row("decode/dense", t, flops::forward(dims, t as u64), || {
        let (q, k, v) = (token(&ops.q, t, at), token(&ops.k, t, at), token(&ops.v, t, at));
        at = (at + 1) % t;
        cache.extend(scale, q, k, v, &mut out[..width])
    })
}

fn decode_sparse<E: Element>(ops: &Operands<E>, plan: &mut Plan) -> Result<()> {
    if !plan.any(&["decode/nsa"]) {
        return Ok(());
    }
    let (dims, spec, t, scale) = (ops.dims, &ops.spec, ops.tokens, ops.dims.scale());
    let (keys, values) = (ops.keys(), ops.values());
    let mut cache = NsaCache::new(spec, dims)?;
    let mut k_tail = CompressTail::new(spec, dims.kv_heads, dims.key_dim)?;
    let mut v_tail = CompressTail::new(spec, dims.kv_heads, dims.value_dim)?;
    let mut out = vec![E::default(); t * dims.heads * dims.value_dim];
    let mut step = |q: &[E], k: &[E], v: &[E], gate: &[E]| {
        let (k_cmp, v_cmp) = (&k_tail.push(k, keys.phi)?, &v_tail.push(v, values.phi)?);
        let (k_slc, v_slc, k_win, v_win) = (k, v, k, v);
        let out = &mut out[..q.len() / dims.key_dim * dims.value_dim];
        let step = NsaStep { scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
        cache.extend(&step, out).map(drop)
    };
    step(&ops.q, &ops.k, &ops.v, &ops.gate)?;
    let read = spec.compressed_blocks(t) + (spec.select_count * spec.select_block).min(t);
    let pairs = (read + spec.window.min(t)) as u64;
    let work = flops::forward(dims, pairs);
    let mut at = 0;
    plan.row("decode/nsa", t, work, || {
        let (q, k, v) = (token(&ops.q, t, at), token(&ops.k, t, at), token(&ops.v, t, at));
        let gate = token(&ops.gate, t, at);
        at = (at + 1) % t;
        step(q, k, v, gate)
    })
}
