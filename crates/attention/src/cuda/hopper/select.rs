//! Ranking and choice of blocks on Hopper.

use tercet_cuda::{Args, Source};

use super::super::attend::Branch;
use super::super::plain::{self, int, items};
use super::super::{Plan, Slice};
use super::{MOST_GROUP, Sequences, boxes, defines, padded};
use crate::{Dims, NsaSpec, Result};

static SOURCE: Source = Source {
    name: "select",
    text: include_str!("select.cu"),
    headers: &[
        ("products.cuh", include_str!("products.cuh")),
        ("sequences.cuh", include_str!("sequences.cuh")),
    ],
};

/// Most blocks a query may select: one a lane of a warp.
const MOST_SELECTED: usize = 32;

/// `Params` of `select.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    sequences: Sequences,
    lse: u64,
    indices: u64,
    tile_count: i32,
    heads: i32,
    group: i32,
    block: i32,
    stride: i32,
    select_block: i32,
    count: i32,
    initial: i32,
    local: i32,
    scale_log2: f32,
}

/// How the kernel is cut for a plan and spec.
struct Shape {
    /// Heads of a group, padded.
    group: usize,
    /// Warpgroups that rank.
    consumers: usize,
    /// Compressed keys of a tile.
    keys: usize,
    shared: usize,
}

impl Shape {
    fn new(plan: &Plan, spec: &NsaSpec) -> Self {
        let group = plan.dims.group().next_power_of_two();
        let k = padded(plan.dims.key_dim);
        let consumers = if group == 1 { 2 } else { 3 };
        let keys = if k <= 128 && group > 2 { 128 } else { 64 };
        let kept = (spec.compress_block / spec.compress_stride - 1).next_multiple_of(4);
        let rows = 4 * consumers * if group < 16 { 16 / group } else { 1 };
        let tiles = 2 * 64 * consumers * k + 2 * 2 * keys * k;
        let shared = tiles + 4 * rows * (kept + keys) + 4 * consumers * 64 * 8 + 8 + 6 * 8;
        Shape { group, consumers, keys, shared }
    }

    fn rows(&self) -> usize {
        64 * self.consumers
    }
}

/// Whether the kernel serves a call.
pub(in super::super) fn serves(branch: &Branch, spec: &NsaSpec) -> bool {
    let plan = branch.plan;
    let shape = Shape::new(plan, spec);
    plan.hopper()
        && plan.dims.group() <= MOST_GROUP
        && !branch.k.is_empty()
        && super::aligned(&[branch.q, branch.k])
        && spec.select_count <= MOST_SELECTED
        && shape.keys.is_multiple_of(spec.select_block / spec.compress_stride)
        && shape.shared <= plan.gpu.info().shared_per_block_optin as usize
}

/// Writes `indices` `[T, K, S]`; [`serves`] must hold.
pub(in super::super) fn select(
    branch: &Branch,
    spec: &NsaSpec,
    lse: Slice,
    indices: Slice,
) -> Result<()> {
    let (plan, batch) = (branch.plan, branch.batch);
    let Dims { heads, kv_heads, key_dim, .. } = plan.dims;
    let shape = Shape::new(plan, spec);
    let mut defines = defines(plan);
    defines.extend([
        ("GP", shape.group.to_string()),
        ("BN", shape.keys.to_string()),
        ("L", (spec.compress_block / spec.compress_stride).to_string()),
        ("R", (spec.select_block / spec.compress_stride).to_string()),
    ]);
    let kernel = plan.gpu.kernel(&SOURCE, "select", &defines)?;
    let queries = shape.rows() / shape.group;
    let tiles = items(batch.tokens, queries, batch.count());
    let rows = branch.k.len() / (kv_heads * key_dim);
    let params = Params {
        sequences: Sequences::of(batch),
        lse: lse.ptr(),
        indices: indices.ptr(),
        tile_count: int(tiles),
        heads: int(heads),
        group: int(plan.dims.group()),
        block: int(spec.compress_block),
        stride: int(spec.compress_stride),
        select_block: int(spec.select_block),
        count: int(spec.select_count),
        initial: int(spec.select_initial),
        local: int(spec.select_local),
        scale_log2: branch.scale * std::f32::consts::LOG2_E,
    };
    let args = Args::new()
        .map(boxes(plan, branch.q, [batch.tokens, heads, key_dim], [queries, shape.group])?)
        .map(boxes(plan, branch.k, [rows, kv_heads, key_dim], [shape.keys, 1])?)
        .value(params);
    let blocks = (tiles * kv_heads).min(plan.gpu.multiprocessors() as usize);
    let threads = 128 * (shape.consumers as u32 + 1);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, blocks, threads, shape.shared as u32, args) }
}
