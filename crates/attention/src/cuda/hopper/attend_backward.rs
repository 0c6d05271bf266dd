//! Gradients of masked attention on Hopper: corrections, dK and dV, dQ.

use tercet_cuda::{Args, Buffer, Label, Number, Source, Swizzle, TensorMap};

use super::super::attend::{Branch, Grads, Upstream, Visible};
use super::super::plain::{self, int, items};
use super::super::{Plan, Slice};
use super::{Sequences, aligned, boxes, defines, padded};
use crate::cpu::Mask;
use crate::{Dims, Result};

const HEADERS: &[(&str, &str)] = &[
    ("products.cuh", include_str!("products.cuh")),
    ("backward.cuh", include_str!("backward.cuh")),
    ("sequences.cuh", include_str!("sequences.cuh")),
];
static KEYS: Source = Source {
    name: "attend_backward_keys",
    text: include_str!("attend_backward_keys.cu"),
    headers: HEADERS,
};
static QUERIES: Source = Source {
    name: "attend_backward_queries",
    text: include_str!("attend_backward_queries.cu"),
    headers: HEADERS,
};
static DELTA: Source = Source { name: "delta", text: include_str!("delta.cu"), headers: &[] };

/// Threads of a block: a warpgroup that fetches, two that compute.
const THREADS: u32 = 384;
/// Queries of a tile of the keys' kernel, and of the queries' kernel.
const KEYS_QUERIES: usize = 64;
const QUERIES_TILE: usize = 128;
/// Blocks that keep a device busy to the end when the longest come first; a constant, so that the
/// order of sums depends on shapes alone.
const ENOUGH: usize = 1024;
/// Below this many blocks, ranges of queries are split too.
const FEW: usize = 256;
/// Fewest tiles of queries in a range.
const RANGE: usize = 32;

/// Head dims of keys and values whose gradients a device has checked. The kernels compile for all
/// usual dims; the others are left to the plain ones until `lab/attend_backward.py check` has run.
const CHECKED: [(usize, usize); 3] = [(64, 64), (128, 128), (192, 128)];

/// Whether these kernels serve a plan's dims and storage type.
pub(in super::super) fn knows(plan: &Plan) -> bool {
    plan.hopper() && CHECKED.contains(&(plan.dims.key_dim, plan.dims.value_dim))
}

/// Whether these kernels serve a call.
pub(in super::super) fn serves(branch: &Branch, up: Upstream, grads: Grads) -> bool {
    let branch_slices = [branch.q, branch.k, branch.v, up.d_out];
    knows(branch.plan) && aligned(&branch_slices) && aligned(&[grads.q, grads.k, grads.v])
}

/// Backward of a masked branch with `keys` rows of keys; [`serves`] must hold and there must be
/// tokens. Without an f32 sum, dQ adds up in its own storage type. Masked pairs are multiplied by 0,
/// which does not do where a number is not finite: where the flag at `not_finite` is set, nothing
/// that counts is written.
pub(in super::super) fn attend_grads(
    branch: &Branch,
    visible: Visible,
    keys: usize,
    up: Upstream,
    grads: Grads,
    not_finite: u64,
) -> Result<()> {
    let call = Call::new(branch, visible, keys, up, not_finite)?;
    call.queries(grads)?;
    if keys == 0 {
        return Ok(());
    }
    call.keys(grads)
}

/// MASK of a window.
const WINDOW: usize = 2;

/// `Visible` of `backward.cuh`, and MASK.
fn mask(visible: Visible) -> ([i32; 3], usize) {
    match visible {
        Visible::Mask(Mask::Causal) => ([0, 1, 1], 0),
        Visible::Compressed(spec) => ([0, int(spec.compress_block), int(spec.compress_stride)], 1),
        Visible::Mask(Mask::Window(window)) => ([int(window), 1, 1], WINDOW),
    }
}

/// `Params` of `attend_backward_keys.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct KeyParams {
    sequences: Sequences,
    tiles: i32,
    group: i32,
    kv_heads: i32,
    head_parts: i32,
    range_parts: i32,
    scale_log2: f32,
    scale: f32,
    visible: [i32; 3],
    d_k: u64,
    d_v: u64,
    k_parts: u64,
    v_parts: u64,
    keys: i64,
    not_finite: u64,
}

/// `Params` of `attend_backward_queries.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct QueryParams {
    sequences: Sequences,
    tiles: i32,
    heads: i32,
    group: i32,
    kv_heads: i32,
    scale_log2: f32,
    scale: f32,
    visible: [i32; 3],
    rows: u64,
    tokens: i32,
    first: i32,
    last: i32,
    d_q: u64,
    sum: u64,
    not_finite: u64,
}

/// `Rows` of `delta.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RowParams {
    lse: u64,
    delta: u64,
    gate: u64,
    gate_index: i32,
    tokens: i32,
    heads: i32,
    spare: i32,
    rows: u64,
}

/// `Delta` of `delta.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeltaParams {
    d_out: u64,
    branches: [u64; 3],
    gate: u64,
    d_gate: u64,
    delta: u64,
    rows: i64,
}

/// Bytes of a row of keys and values, or of q and dOut, in shared memory.
fn row_bytes(dims: Dims) -> usize {
    2 * (padded(dims.key_dim) + padded(dims.value_dim))
}

/// Whether [`corrections`] serves a call.
pub(in super::super) fn corrects(plan: &Plan, branches: &[Slice], d_out: Slice) -> bool {
    knows(plan) && aligned(branches) && aligned(&[d_out])
}

/// Each branch's Δ, f32 `[3, rows]` at `delta`, and the gates' gradients `[rows, 3]` at `d_gate` if
/// not 0, from `d_out` and the branches' outputs `[rows, V]` (0: no such branch);
/// [`corrects`] must hold.
pub(in super::super) fn corrections(
    plan: &Plan,
    gate: u64,
    branches: [u64; 3],
    d_out: Slice,
    (d_gate, delta): (u64, u64),
    rows: usize,
) -> Result<()> {
    let value_dim = plan.dims.value_dim;
    let lanes = (value_dim / 8).next_power_of_two().max(8);
    let kernel = plan.gpu.kernel(&DELTA, "delta", &defines(plan))?;
    let params =
        DeltaParams { d_out: d_out.ptr(), branches, gate, d_gate, delta, rows: rows as i64 };
    let blocks = (rows * lanes).div_ceil(256);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, blocks, 256, 0, Args::new().value(params)) }
}

/// What both passes of a call share.
struct Call<'a> {
    branch: &'a Branch<'a>,
    visible: [i32; 3],
    mask: usize,
    keys: usize,
    d_out: Slice,
    not_finite: u64,
    /// `[H, T, 4]`: log-sum-exp (base 2), gate, δ, 0.
    rows: Buffer,
}

impl<'a> Call<'a> {
    fn new(
        branch: &'a Branch,
        visible: Visible,
        keys: usize,
        up: Upstream,
        not_finite: u64,
    ) -> Result<Self> {
        let (plan, tokens, heads) = (branch.plan, branch.batch.tokens, branch.plan.dims.heads);
        let label = Label::shaped("rows of the attention's backward", &[heads, tokens, 4]);
        let rows = plan.gpu.alloc_for(heads * tokens * 16, label)?;
        let (gate, gate_index) = up.gate.map_or((0, 0), |(gate, index)| (gate.ptr(), int(index)));
        let params = RowParams {
            lse: up.lse.ptr(),
            delta: up.delta,
            gate,
            gate_index,
            tokens: int(tokens),
            heads: int(heads),
            spare: 0,
            rows: rows.ptr(),
        };
        let kernel = plan.gpu.kernel(&DELTA, "rows", &defines(plan))?;
        let grid = [tokens.div_ceil(32) as u32, heads.div_ceil(32) as u32, 1];
        // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's
        // promise.
        unsafe { kernel.launch(grid, [256, 1, 1], 0, Args::new().value(params))? };
        let (visible, mask) = mask(visible);
        Ok(Call { branch, visible, mask, keys, d_out: up.d_out, not_finite, rows })
    }

    fn defines(&self, more: &[(&'static str, usize)]) -> Vec<(&'static str, String)> {
        let mut all = defines(self.branch.plan);
        all.push(("MASK", self.mask.to_string()));
        all.extend(more.iter().map(|&(name, value)| (name, value.to_string())));
        all
    }

    /// Boxes of `size` queries of q and of dOut.
    fn query_maps(&self, size: usize) -> Result<[TensorMap; 2]> {
        let (plan, tokens) = (self.branch.plan, self.branch.batch.tokens);
        let Dims { heads, key_dim, value_dim, .. } = plan.dims;
        Ok([
            boxes(plan, self.branch.q, [tokens, heads, key_dim], [size, 1])?,
            boxes(plan, self.d_out, [tokens, heads, value_dim], [size, 1])?,
        ])
    }

    /// Boxes of `size` keys and values. Where there are none nothing is fetched, but a map needs an
    /// address: a row of the queries' serves.
    fn key_maps(&self, size: usize) -> Result<[TensorMap; 2]> {
        let plan = self.branch.plan;
        let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
        let (k, v) = match self.keys {
            0 => (self.branch.q, self.d_out),
            _ => (self.branch.k, self.branch.v),
        };
        let rows = self.keys.max(1);
        Ok([
            boxes(plan, k, [rows, kv_heads, key_dim], [size, 1])?,
            boxes(plan, v, [rows, kv_heads, value_dim], [size, 1])?,
        ])
    }

    fn queries(&self, grads: Grads) -> Result<()> {
        let (plan, batch) = (self.branch.plan, self.branch.batch);
        let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
        let keys = match (key_dim, value_dim) {
            (..=64, ..=128) => 128,
            (..=128, ..=128) => 96,
            (..=192, _) => 64,
            _ => 32,
        };
        // A window's keys are few: small tiles waste little.
        let keys = if self.mask == WINDOW { keys.min(64) } else { keys };
        let bytes = |queries: usize, keys_ahead: usize| {
            (queries * QUERIES_TILE + keys_ahead * keys) * row_bytes(plan.dims) + 256
        };
        let most = plan.gpu.info().shared_per_block_optin as usize;
        let fits = |&(q, k): &(usize, usize)| bytes(q, k) <= most;
        let (q_stages, k_stages) = [(2, 3), (1, 3)].into_iter().find(fits).unwrap_or((1, 2));
        let shared = bytes(q_stages, k_stages);
        let tiles = items(batch.tokens, QUERIES_TILE, batch.count());
        let params = QueryParams {
            sequences: Sequences::of(batch),
            tiles: int(tiles),
            heads: int(heads),
            group: int(plan.dims.group()),
            kv_heads: int(kv_heads),
            scale_log2: self.branch.scale * std::f32::consts::LOG2_E,
            scale: self.branch.scale,
            visible: self.visible,
            rows: self.rows.ptr(),
            tokens: int(batch.tokens),
            first: grads.first.into(),
            last: grads.last.into(),
            d_q: grads.q.ptr(),
            sum: grads.sum,
            not_finite: self.not_finite,
        };
        let defines = self.defines(&[
            ("BN", keys),
            ("Q_STAGES", q_stages),
            ("K_STAGES", k_stages),
            ("V_STAGES", k_stages),
        ]);
        let kernel = plan.gpu.kernel(&QUERIES, "attend_backward_queries", &defines)?;
        let ([q, o], [k, v]) = (self.query_maps(QUERIES_TILE)?, self.key_maps(keys)?);
        let args = Args::new().map(q).map(o).map(k).map(v).value(params);
        let blocks = (tiles * heads).min(plan.gpu.multiprocessors() as usize);
        // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's
        // promise.
        unsafe { plain::launch(&kernel, blocks, THREADS, shared as u32, args) }
    }

    fn keys(&self, grads: Grads) -> Result<()> {
        let (plan, batch) = (self.branch.plan, self.branch.batch);
        let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
        let group = plan.dims.group();
        let wide = key_dim.max(value_dim) > 128;
        let tile = if wide { 64 } else { 128 };
        let stages = if key_dim + value_dim > 256 { 2 } else { 3 };
        let exchange = if wide { 16 << 10 } else { 16 };
        let stage = KEYS_QUERIES * (row_bytes(plan.dims) + 16);
        let shared = tile * row_bytes(plan.dims) + stages * stage + exchange + 8 * (5 + 2 * stages);

        let tiles = items(self.keys, tile, batch.count());
        let longest = batch.sequences.iter().map(|s| s.len()).max().unwrap_or(0);
        let (head_parts, range_parts) = split(tiles * kv_heads, group, longest / KEYS_QUERIES);
        let parts = head_parts * range_parts;
        let sums = |dim: usize| -> Result<Option<Buffer>> {
            if parts == 1 {
                return Ok(None);
            }
            let shape = [parts, self.keys, kv_heads, dim];
            let label = Label::shaped("partial sums of keys' gradients", &shape);
            Ok(Some(plan.gpu.alloc_for(shape.iter().product::<usize>() * 4, label)?))
        };
        let (k_parts, v_parts) = (sums(key_dim)?, sums(value_dim)?);
        let at = |buffer: &Option<Buffer>| buffer.as_ref().map_or(0, Buffer::ptr);
        let params = KeyParams {
            sequences: Sequences::of(batch),
            tiles: int(tiles),
            group: int(group),
            kv_heads: int(kv_heads),
            head_parts: int(head_parts),
            range_parts: int(range_parts),
            scale_log2: self.branch.scale * std::f32::consts::LOG2_E,
            scale: self.branch.scale,
            visible: self.visible,
            d_k: grads.k.ptr(),
            d_v: grads.v.ptr(),
            k_parts: at(&k_parts),
            v_parts: at(&v_parts),
            keys: self.keys as i64,
            not_finite: self.not_finite,
        };
        let defines = self.defines(&[("STAGES", stages)]);
        let kernel = plan.gpu.kernel(&KEYS, "attend_backward_keys", &defines)?;
        let ([k, v], [q, o]) = (self.key_maps(tile)?, self.query_maps(KEYS_QUERIES)?);
        let tokens = batch.tokens as u64;
        let rows = TensorMap::tiled(
            Number::F32,
            self.rows.ptr(),
            &[4, tokens, heads as u64],
            &[16, tokens * 16],
            &[4, KEYS_QUERIES as u32, 1],
            Swizzle::None,
        )?;
        let args = Args::new().map(k).map(v).map(q).map(o).map(rows).value(params);
        // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's
        // promise. The buffers are freed in the stream's order, after the kernels.
        unsafe { plain::launch(&kernel, tiles * kv_heads * parts, THREADS, shared as u32, args)? };
        for (sums, out, dim) in [(&k_parts, grads.k, key_dim), (&v_parts, grads.v, value_dim)] {
            let Some(sums) = sums else { continue };
            let size = self.keys * kv_heads * dim;
            let kernel = plan.gpu.kernel(&KEYS, "attend_backward_sum", &defines)?;
            let args = Args::new().ptr(sums.ptr()).ptr(out.ptr()).len(size).i32(int(parts));
            // SAFETY: as above.
            unsafe { plain::launch(&kernel, size.div_ceil(4 * 256), 256, 0, args)? };
        }
        Ok(())
    }
}

/// Into how many parts the heads of a group, and the tiles of queries, are split when there are so
/// many `blocks` without.
fn split(blocks: usize, group: usize, query_tiles: usize) -> (usize, usize) {
    let enough = |parts: &usize| group.is_multiple_of(*parts) && blocks * parts >= ENOUGH;
    let heads = (1..=group).find(enough).unwrap_or(group);
    let mut ranges = 1;
    while blocks * heads * ranges < FEW && query_tiles >= RANGE * ranges {
        ranges *= 2;
    }
    (heads, ranges)
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn work_is_split_where_keys_are_few() {
        assert_eq!(split(2048, 16, 1024), (1, 1));
        assert_eq!(split(128, 16, 1024), (8, 1));
        assert_eq!(split(200, 12, 1024), (6, 1));
        assert_eq!(split(4, 1, 1024), (1, 64));
        assert_eq!(split(1, 1, 8), (1, 1));
    }
}
