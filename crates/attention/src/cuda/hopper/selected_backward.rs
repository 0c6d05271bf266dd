//! Gradients of the selected branch on Hopper: the inverse index, dK and dV, dQ.

use tercet_cuda::{Args, Buffer, Kernel, Label, Source};

use super::super::attend::{Branch, Grads, Upstream};
use super::super::plain::{self, int, items};
use super::super::{Plan, Slice};
use super::{MOST_GROUP, Sequences, aligned, boxes, defines, padded};
use crate::{Dims, NsaSpec, Result};

const HEADERS: &[(&str, &str)] = &[
    ("products.cuh", include_str!("products.cuh")),
    ("selected.cuh", include_str!("selected.cuh")),
    ("sequences.cuh", include_str!("sequences.cuh")),
];
static INVERSE: Source =
    Source { name: "inverse", text: include_str!("inverse.cu"), headers: HEADERS };
static KEYS: Source = Source {
    name: "selected_backward_keys",
    text: include_str!("selected_backward_keys.cu"),
    headers: HEADERS,
};
static QUERIES: Source = Source {
    name: "selected_backward_queries",
    text: include_str!("selected_backward_queries.cu"),
    headers: HEADERS,
};

/// Most pieces that tokens are cut into, and fewest tokens of one: the histograms of all pieces
/// stay a fraction of the indices.
const PIECES: usize = 256;
const PIECE: usize = 64;
/// Into about how many work items all lists together are cut, and the shortest that is cut.
const CHUNKS: usize = 512;
const CHUNK: usize = 256;
/// Keys of a tile that owns dK and dV.
const KEY_TILE: usize = 64;
/// Bytes of an `Item` of `selected.cuh`.
const ITEM: usize = 48;
/// Keys of a stage of the queries' kernel.
const KEY_STAGE: usize = 32;
/// Shared memory that may hold counters of blocks.
const COUNTERS: usize = 48 << 10;

/// Whether these kernels serve a call.
pub(in super::super) fn serves(
    branch: &Branch,
    spec: &NsaSpec,
    up: Upstream,
    grads: Grads,
) -> bool {
    let slices = [branch.q, branch.k, branch.v, up.d_out, grads.q, grads.k, grads.v];
    branch.plan.hopper()
        && branch.plan.dims.group() <= MOST_GROUP
        && spec.select_block.is_multiple_of(KEY_TILE)
        && aligned(&slices)
        && QueryShape::new(branch.plan, spec).stages >= 2
}

/// Bytes of dQ's shares that one KV head may need, and that the KV heads of one launch may need
/// when there are several.
const HEAD_SHARES: usize = 8 << 30;
const LAUNCH_SHARES: usize = 2304 << 20;

/// Backward of the selected branch; [`serves`] must hold and there must be tokens. Does nothing to
/// the gradients where `not_finite`, a flag on the device, is set.
///
/// dQ comes from the kernel that makes dK and dV, as a share for every (query, block) that a second
/// kernel adds up, where memory for the shares is in proportion; else from a kernel of its own.
pub(in super::super) fn selected_grads(
    branch: &Branch,
    spec: &NsaSpec,
    indices: Slice,
    up: Upstream,
    grads: Grads,
    not_finite: u64,
) -> Result<()> {
    let Dims { kv_heads, key_dim, value_dim, .. } = branch.plan.dims;
    let shares = indices.len() / kv_heads * branch.plan.dims.group() * key_dim * 2;
    let fits = key_dim.max(value_dim) <= 128 && spec.select_block == KEY_TILE;
    if fits && shares <= HEAD_SHARES {
        let heads = (LAUNCH_SHARES / shares).clamp(1, kv_heads);
        let inverse = Inverse::new(branch, spec, indices, heads, true)?;
        return key_grads(branch, spec, &inverse, up, grads, Some(heads * shares), not_finite);
    }
    query_grads(branch, spec, indices, up, grads, not_finite)?;
    let inverse = Inverse::new(branch, spec, indices, kv_heads, false)?;
    key_grads(branch, spec, &inverse, up, grads, None, not_finite)
}

fn label(what: &'static str, shape: &[usize]) -> Label {
    Label::shaped(what, shape)
}

/// Bytes of a row of keys and of values in shared memory.
fn row_bytes(dims: Dims) -> usize {
    2 * (padded(dims.key_dim) + padded(dims.value_dim))
}

/// `Sequences` of `inverse.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BlockSequences {
    at: u64,
    count: i32,
    block_tokens: i32,
}

/// The queries of every block, and the work items of the keys' kernel.
struct Inverse {
    /// Where lists start, i64 `[K · J + 1]`, and the lists.
    starts: Buffer,
    queries: Buffer,
    /// u32 `[T, K, S]`: where a query stands in its blocks' lists; empty if nobody asks.
    places: Buffer,
    /// Work items, and i32 `[K + 1]` where those of each KV head start.
    items: Buffer,
    heads: Buffer,
    /// KV heads a launch, and the most items it may have.
    heads_a_launch: usize,
    capacity: usize,
    /// How many partial sums there may be.
    slots: usize,
    /// J, the numbers that blocks of all sequences together go by.
    blocks: usize,
}

impl Inverse {
    fn new(
        branch: &Branch,
        spec: &NsaSpec,
        indices: Slice,
        heads_a_launch: usize,
        with_places: bool,
    ) -> Result<Self> {
        let (plan, batch) = (branch.plan, branch.batch);
        let (gpu, kv_heads) = (&plan.gpu, plan.dims.kv_heads);
        let blocks = items(batch.tokens, spec.select_block, batch.count());
        let (bins, pairs) = (kv_heads * blocks, indices.len());
        let piece = batch.tokens.div_ceil(PIECES).max(PIECE);
        let pieces = batch.tokens.div_ceil(piece);
        let launched = pairs / kv_heads * heads_a_launch;
        let chunk = (launched / CHUNKS).next_power_of_two().max(CHUNK);
        let (capacity, slots) = (bins + pairs / chunk, 2 * (pairs / chunk));

        let shape = [pieces, kv_heads, blocks];
        let counts =
            gpu.alloc_for(pieces * bins * 4, label("histograms of chosen blocks", &shape))?;
        let totals = gpu.alloc_for(bins * 4, label("sizes of the inverse index", &[bins]))?;
        let starts =
            gpu.alloc_for((bins + 1) * 8, label("starts of the inverse index", &[bins]))?;
        let queries = gpu.alloc_for(pairs * 4, label("inverse index", &[pairs]))?;
        let table = gpu.alloc_for(capacity * ITEM, label("work items of keys", &[capacity]))?;
        let heads = gpu.alloc_for((kv_heads + 1) * 4, label("work items a head", &[kv_heads]))?;
        let placed = if with_places { pairs } else { 0 };
        let places = gpu.alloc_for(placed * 4, label("places in the inverse index", &[placed]))?;

        let sequences = BlockSequences {
            at: batch.table.ptr(),
            count: int(batch.count()),
            block_tokens: int(spec.select_block),
        };
        let kernel = |entry| -> Result<Kernel> { Ok(plan.gpu.kernel(&INVERSE, entry, &[])?) };
        let lists = || {
            let args = Args::new().value(sequences).ptr(indices.ptr()).i32(int(batch.tokens));
            let args = args.i32(int(kv_heads)).i32(int(spec.select_count)).i32(int(blocks));
            args.i32(int(piece)).ptr(counts.ptr())
        };
        let grid = [int(pieces) as u32, int(kv_heads) as u32, 1];
        let shared = if blocks * 4 <= COUNTERS { blocks * 4 } else { 0 };
        // SAFETY: the kernels' arguments; the buffers were sized above, the indices' length checked
        // by the caller, and whatever they hold is passed over unless it is a block of its query's.
        unsafe {
            kernel("inverse_count")?.launch(grid, [256, 1, 1], 0, lists())?;
            let args = Args::new().ptr(counts.ptr()).ptr(totals.ptr());
            let args = args.i32(int(pieces)).i32(int(bins));
            plain::launch(&kernel("inverse_pieces")?, bins.div_ceil(128), 128, 0, args)?;
            let args = Args::new().value(sequences).ptr(totals.ptr()).ptr(starts.ptr());
            let args = args.ptr(table.ptr()).ptr(heads.ptr()).i32(int(capacity)).i32(int(chunk));
            let args = args.i32(int(kv_heads)).i32(int(blocks));
            plain::launch(&kernel("inverse_blocks")?, 1, 1024, 0, args)?;
            let args = lists().ptr(starts.ptr()).ptr(queries.ptr()).ptr(places.ptr());
            let args = args.i32((shared > 0).into());
            kernel("inverse_fill")?.launch(grid, [32, 1, 1], shared as u32, args)?;
        }
        let capacity = heads_a_launch * blocks + pairs / chunk;
        Ok(Inverse {
            starts,
            queries,
            places,
            items: table,
            heads,
            heads_a_launch,
            capacity,
            slots,
            blocks,
        })
    }
}

/// `Params` of `selected_backward_keys.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct KeyParams {
    items: u64,
    item_heads: u64,
    starts: u64,
    queries: u64,
    places: u64,
    q: u64,
    d_out: u64,
    gate: u64,
    lse: u64,
    delta: u64,
    d_k: u64,
    d_v: u64,
    sums: u64,
    shares: u64,
    d_q: u64,
    d_q_sum: u64,
    not_finite: u64,
    tokens: i32,
    heads: i32,
    kv_heads: i32,
    gate_index: i32,
    first_head: i32,
    end_head: i32,
    blocks: i32,
    listed: i32,
    first: i32,
    last: i32,
    scale: f32,
}

/// dK and dV; with `shares`, bytes of a launch's shares of dQ, dQ as well.
fn key_grads(
    branch: &Branch,
    spec: &NsaSpec,
    inverse: &Inverse,
    up: Upstream,
    grads: Grads,
    shares: Option<usize>,
    not_finite: u64,
) -> Result<()> {
    let (plan, tokens) = (branch.plan, branch.batch.tokens);
    let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
    let (parts, group) = (spec.select_block / KEY_TILE, plan.dims.group());
    let rows = [inverse.slots, parts * KEY_TILE, key_dim + value_dim];
    let sums = rows.iter().product::<usize>() * 4;
    let sums = plan.gpu.alloc_for(sums, label("partial sums of keys' gradients", &rows))?;
    let share = [inverse.heads_a_launch * tokens, spec.select_count, group, key_dim];
    let share = label("blocks' shares of the query's gradient", &share);
    let share = plan.gpu.alloc_for(shares.unwrap_or(0), share)?;

    // A stage: rows of q and dOut, four numbers of each, two barriers. Held: keys and values, dS.
    let tile = KEY_TILE * row_bytes(plan.dims);
    let stage = tile + 16 * KEY_TILE + 16;
    let held = tile + 16 + if shares.is_some() { 4 * KEY_TILE * KEY_TILE + 16 } else { 0 };
    let most = plan.gpu.info().shared_per_block_optin as usize;
    let stages = ((most - held) / stage).min(6);
    let shared = (held + stages * stage) as u32;
    let mut constants = defines(plan);
    constants.extend([
        ("G", group.to_string()),
        ("SB", spec.select_block.to_string()),
        ("STAGES", stages.to_string()),
    ]);
    if shares.is_some() {
        constants.push(("WITH_QUERIES", "1".into()));
    }
    let kernel = |entry| -> Result<Kernel> { Ok(plan.gpu.kernel(&KEYS, entry, &constants)?) };
    let (gate, gate_index) = up.gate.map_or((0, 0), |(gate, index)| (gate.ptr(), int(index)));
    for first_head in (0..kv_heads).step_by(inverse.heads_a_launch) {
        let end_head = (first_head + inverse.heads_a_launch).min(kv_heads);
        let params = KeyParams {
            items: inverse.items.ptr(),
            item_heads: inverse.heads.ptr(),
            starts: inverse.starts.ptr(),
            queries: inverse.queries.ptr(),
            places: inverse.places.ptr(),
            q: branch.q.ptr(),
            d_out: up.d_out.ptr(),
            gate,
            lse: up.lse.ptr(),
            delta: up.delta,
            d_k: grads.k.ptr(),
            d_v: grads.v.ptr(),
            sums: sums.ptr(),
            shares: share.ptr(),
            d_q: grads.q.ptr(),
            d_q_sum: grads.sum,
            not_finite,
            tokens: int(tokens),
            heads: int(heads),
            kv_heads: int(kv_heads),
            gate_index,
            first_head: int(first_head),
            end_head: int(end_head),
            blocks: int(inverse.blocks),
            listed: int(spec.select_count),
            first: grads.first.into(),
            last: grads.last.into(),
            scale: branch.scale,
        };
        let args = Args::new()
            .map(boxes(plan, branch.q, [tokens, heads, key_dim], [1, group])?)
            .map(boxes(plan, up.d_out, [tokens, heads, value_dim], [1, group])?)
            .map(boxes(plan, branch.k, [tokens, kv_heads, key_dim], [KEY_TILE, 1])?)
            .map(boxes(plan, branch.v, [tokens, kv_heads, value_dim], [KEY_TILE, 1])?)
            .value(params);
        let params = || Args::new().value(params);
        let blocks = inverse.capacity * parts;
        // SAFETY: the kernels' arguments; lengths were checked and addresses are the caller's
        // promise. The buffers are freed in the stream's order, after the kernels.
        unsafe {
            plain::launch(&kernel("selected_backward_keys")?, blocks, 384, shared, args)?;
            plain::launch(&kernel("selected_backward_keys_sum")?, blocks, 256, 0, params())?;
            if shares.is_some() {
                let rows = tokens * (end_head - first_head);
                let threads = (group * key_dim).div_ceil(256) as u32 * 32;
                let sum = kernel("selected_backward_queries_sum")?;
                plain::launch(&sum, rows, threads, 0, params())?;
            }
        }
    }
    Ok(())
}

/// How the queries' kernel is cut for a plan and spec.
struct QueryShape {
    warps: usize,
    /// Heads of a group, padded.
    heads: usize,
    /// Queries of a tile.
    queries: usize,
    stages: usize,
    shared: usize,
}

impl QueryShape {
    fn new(plan: &Plan, spec: &NsaSpec) -> Self {
        let dims = plan.dims;
        let both = dims.key_dim + dims.value_dim;
        let warps = if both <= 384 { 8 } else { 4 };
        let (rows, heads) = (16 * warps, dims.group().next_power_of_two());
        let queries = rows / heads;
        // Lists: four bytes an entry, a bit a query, and eight bytes of order; q and dOut where
        // registers do not hold them.
        let words = queries.div_ceil(32);
        let lists = queries * spec.select_count * (12 + 4 * words);
        let plans = if lists <= 16384 { 2 } else { 1 };
        let lists = plans * (lists + 48) + 64;
        let held = if both <= 256 { 32 } else { rows * row_bytes(dims) };
        let stage = KEY_STAGE * row_bytes(dims) + 16;
        let most = plan.gpu.info().shared_per_block_optin as usize;
        let stages = (most.saturating_sub(held + lists) / stage).min(24);
        QueryShape { warps, heads, queries, stages, shared: stages * stage + held + lists }
    }
}

/// `Params` of `selected_backward_queries.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct QueryParams {
    sequences: Sequences,
    q: u64,
    d_out: u64,
    gate: u64,
    lse: u64,
    delta: u64,
    indices: u64,
    d_q: u64,
    sum: u64,
    not_finite: u64,
    tile_count: i32,
    heads: i32,
    kv_heads: i32,
    group: i32,
    gate_index: i32,
    first: i32,
    last: i32,
    scale: f32,
}

fn query_grads(
    branch: &Branch,
    spec: &NsaSpec,
    indices: Slice,
    up: Upstream,
    grads: Grads,
    not_finite: u64,
) -> Result<()> {
    let (plan, batch) = (branch.plan, branch.batch);
    let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
    let shape = QueryShape::new(plan, spec);
    let mut constants = defines(plan);
    constants.extend([
        ("GP", shape.heads.to_string()),
        ("SB", spec.select_block.to_string()),
        ("S", spec.select_count.to_string()),
        ("STAGES", shape.stages.to_string()),
    ]);
    let tiles = items(batch.tokens, shape.queries, batch.count());
    let (gate, gate_index) = up.gate.map_or((0, 0), |(gate, index)| (gate.ptr(), int(index)));
    let params = QueryParams {
        sequences: Sequences::of(batch),
        q: branch.q.ptr(),
        d_out: up.d_out.ptr(),
        gate,
        lse: up.lse.ptr(),
        delta: up.delta,
        indices: indices.ptr(),
        d_q: grads.q.ptr(),
        sum: grads.sum,
        not_finite,
        tile_count: int(tiles),
        heads: int(heads),
        kv_heads: int(kv_heads),
        group: int(plan.dims.group()),
        gate_index,
        first: grads.first.into(),
        last: grads.last.into(),
        scale: branch.scale,
    };
    let tokens = batch.tokens;
    let args = Args::new()
        .map(boxes(plan, branch.k, [tokens, kv_heads, key_dim], [KEY_STAGE, 1])?)
        .map(boxes(plan, branch.v, [tokens, kv_heads, value_dim], [KEY_STAGE, 1])?)
        .value(params);
    let kernel = plan.gpu.kernel(&QUERIES, "selected_backward_queries", &constants)?;
    let threads = 128 + 32 * shape.warps as u32;
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    let blocks = (tiles * kv_heads).min(plan.gpu.multiprocessors() as usize);
    unsafe { plain::launch(&kernel, blocks, threads, shape.shared as u32, args) }
}
