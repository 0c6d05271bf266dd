//! Attention under a mask on Hopper.

use tercet_cuda::{Args, Source};

use super::super::Plan;
use super::super::attend::{Branch, Outputs, Visible};
use super::super::plain::{self, int, items};
use super::{Sequences, boxes, defines, padded};
use crate::cpu::Mask;
use crate::{Dims, Error, Result};

static SOURCE: Source = Source {
    name: "attend",
    text: include_str!("attend.cu"),
    headers: &[
        ("products.cuh", include_str!("products.cuh")),
        ("sequences.cuh", include_str!("sequences.cuh")),
    ],
};

/// Queries of a tile.
const ROWS: usize = 128;
/// Threads: a producer's warpgroup and two that compute.
const THREADS: u32 = 384;

/// `Params` of `attend.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    sequences: Sequences,
    not_finite: u64,
    branch: u64,
    out: u64,
    gate: u64,
    lse: u64,
    tile_count: i32,
    heads: i32,
    group: i32,
    window: i32,
    block: i32,
    stride: i32,
    gate_index: i32,
    accumulate: i32,
    scale_log2: f32,
}

/// Keys of a tile and the shared memory of a block: the most keys that fit twice beside q and the
/// staged output.
fn shape(plan: &Plan) -> Option<(usize, usize)> {
    let Dims { key_dim, value_dim, .. } = plan.dims;
    let (k, v) = (padded(key_dim), padded(value_dim));
    [128, 112, 64, 32].into_iter().find_map(|keys| {
        let tiles = 2 * ROWS * k + 2 * 2 * keys * (k + v);
        let shared = tiles + ROWS * (2 * value_dim + 16) + 10 * 8;
        (shared <= plan.gpu.info().shared_per_block_optin as usize).then_some((keys, shared))
    })
}

/// Whether the kernel serves a call.
pub(in super::super) fn serves(branch: &Branch, to: Outputs) -> bool {
    let outputs = [to.branch, to.blend.map(|blend| blend.out)];
    branch.plan.hopper()
        && !branch.k.is_empty()
        && super::aligned(&[branch.q, branch.k, branch.v])
        && outputs.into_iter().flatten().all(|out| super::aligned(&[out]))
        && shape(branch.plan).is_some()
}

/// Forward of a masked branch; [`serves`] must hold. Does nothing where
/// `not_finite`, a flag on the device, is set.
pub(in super::super) fn attend(
    branch: &Branch,
    visible: Visible,
    to: Outputs,
    not_finite: u64,
) -> Result<()> {
    let (plan, batch) = (branch.plan, branch.batch);
    let Some((keys, shared)) = shape(plan) else {
        return Err(Error::Dims(format!(
            "{:?} on Hopper, expected what `serves` allows",
            plan.dims
        )));
    };
    let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
    let (mask, window, block, stride) = match visible {
        Visible::Mask(Mask::Causal) => (0, 0, 0, 0),
        Visible::Compressed(spec) => (1, 0, spec.compress_block, spec.compress_stride),
        Visible::Mask(Mask::Window(window)) => (2, window, 0, 0),
    };
    let mut defines = defines(plan);
    defines.extend([("BN", keys.to_string()), ("MASK", mask.to_string())]);
    let kernel = plan.gpu.kernel(&SOURCE, "attend", &defines)?;
    let tiles = items(batch.tokens, ROWS, batch.count());
    let rows = branch.k.len() / (kv_heads * key_dim);
    let blend = to.blend;
    let params = Params {
        sequences: Sequences::of(batch),
        not_finite,
        branch: to.branch.map_or(0, |out| out.ptr()),
        out: blend.map_or(0, |b| b.out.ptr()),
        gate: blend.map_or(0, |b| b.gate.ptr()),
        lse: to.lse.map_or(0, |lse| lse.ptr()),
        tile_count: int(tiles),
        heads: int(heads),
        group: int(plan.dims.group()),
        window: int(window),
        block: int(block),
        stride: int(stride),
        gate_index: blend.map_or(0, |b| int(b.index)),
        accumulate: blend.is_some_and(|b| b.add).into(),
        scale_log2: branch.scale * std::f32::consts::LOG2_E,
    };
    let args = Args::new()
        .map(boxes(plan, branch.q, [batch.tokens, heads, key_dim], [ROWS, 1])?)
        .map(boxes(plan, branch.k, [rows, kv_heads, key_dim], [keys, 1])?)
        .map(boxes(plan, branch.v, [rows, kv_heads, value_dim], [keys, 1])?)
        .value(params);
    let blocks = (tiles * heads).min(plan.gpu.multiprocessors() as usize);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, blocks, THREADS, shared as u32, args) }
}
