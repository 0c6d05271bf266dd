//! Attention to the chosen blocks on Hopper.

use tercet_cuda::{Args, Source};

use super::super::attend::{Branch, Outputs};
use super::super::plain::{self, int, items};
use super::super::{Plan, Slice};
use super::{MOST_GROUP, Sequences, boxes, defines, padded};
use crate::{Dims, NsaSpec, Result};

static SOURCE: Source = Source {
    name: "selected",
    text: include_str!("selected.cu"),
    headers: &[("sequences.cuh", include_str!("sequences.cuh"))],
};

/// Rows (queries × padded heads) of a block of threads.
const ROWS: usize = 128;
/// Keys of a stage.
const KEYS: usize = 64;
/// Threads: two warpgroups that compute and a producer's.
const THREADS: u32 = 384;

/// `Params` of `selected.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    sequences: Sequences,
    not_finite: u64,
    q: u64,
    indices: u64,
    branch: u64,
    out: u64,
    gate: u64,
    lse: u64,
    tile_count: i32,
    heads: i32,
    group: i32,
    count: i32,
    gate_index: i32,
    accumulate: i32,
    scale_log2: f32,
}

/// How the kernel is cut for a plan and spec.
struct Shape {
    /// Heads of a group, padded.
    group: usize,
    /// Keys and values in flight.
    stages: usize,
    shared: usize,
}

impl Shape {
    fn new(plan: &Plan, spec: &NsaSpec) -> Self {
        let Dims { key_dim, value_dim, .. } = plan.dims;
        let group = plan.dims.group().next_power_of_two().min(ROWS);
        let queries = ROWS / group;
        let tag = 4 + 4 * queries.div_ceil(32);
        let stage = 2 * KEYS * (padded(key_dim) + padded(value_dim)) + tag + 4 * 8;
        let rest = ROWS * (2 * value_dim + 16) + queries * spec.select_count * 4 + 8;
        let most = plan.gpu.info().shared_per_block_optin as usize;
        let stages = most.saturating_sub(rest) / stage;
        Shape { group, stages, shared: stages * stage + rest }
    }
}

/// Whether the kernel serves a call.
pub(in super::super) fn serves(branch: &Branch, spec: &NsaSpec, to: Outputs) -> bool {
    let outputs = [to.branch, to.blend.map(|blend| blend.out)];
    branch.plan.hopper()
        && branch.plan.dims.group() <= MOST_GROUP
        && super::aligned(&[branch.q, branch.k, branch.v])
        && outputs.into_iter().flatten().all(|out| super::aligned(&[out]))
        && spec.select_block.is_multiple_of(KEYS)
        && Shape::new(branch.plan, spec).stages >= 2
}

/// Forward, from `indices` `[T, K, S]`; [`serves`] must hold. Does nothing where `not_finite`, a flag
/// on the device, is set.
pub(in super::super) fn selected(
    branch: &Branch,
    spec: &NsaSpec,
    indices: Slice,
    to: Outputs,
    not_finite: u64,
) -> Result<()> {
    let (plan, batch) = (branch.plan, branch.batch);
    let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
    let shape = Shape::new(plan, spec);
    let mut defines = defines(plan);
    defines.extend([
        ("GP", shape.group.to_string()),
        ("SB", spec.select_block.to_string()),
        ("STAGES", shape.stages.to_string()),
    ]);
    let kernel = plan.gpu.kernel(&SOURCE, "selected", &defines)?;
    let tiles = items(batch.tokens, ROWS / shape.group, batch.count());
    let blend = to.blend;
    let params = Params {
        sequences: Sequences::of(batch),
        not_finite,
        q: branch.q.ptr(),
        indices: indices.ptr(),
        branch: to.branch.map_or(0, |out| out.ptr()),
        out: blend.map_or(0, |b| b.out.ptr()),
        gate: blend.map_or(0, |b| b.gate.ptr()),
        lse: to.lse.map_or(0, |lse| lse.ptr()),
        tile_count: int(tiles),
        heads: int(heads),
        group: int(plan.dims.group()),
        count: int(spec.select_count),
        gate_index: blend.map_or(0, |b| int(b.index)),
        accumulate: blend.is_some_and(|b| b.add).into(),
        scale_log2: branch.scale * std::f32::consts::LOG2_E,
    };
    let args = Args::new()
        .map(boxes(plan, branch.k, [batch.tokens, kv_heads, key_dim], [KEYS, 1])?)
        .map(boxes(plan, branch.v, [batch.tokens, kv_heads, value_dim], [KEYS, 1])?)
        .value(params);
    let blocks = (tiles * kv_heads).min(plan.gpu.multiprocessors() as usize);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, blocks, THREADS, shape.shared as u32, args) }
}
