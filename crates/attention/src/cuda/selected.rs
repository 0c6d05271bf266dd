//! Attention to the blocks that each query chose.

use tercet_cuda::Args;

use super::Slice;
use super::attend::{Branch, Grads, Outputs, Upstream, key_bytes, query_bytes};
use super::finite::not_finite;
use super::hopper;
use super::inverse::Inverse;
use super::plain::{self, SQUARE, THREADS, Tile, group_tiles, int, width};
use crate::{Dims, NsaSpec, Result};

/// Forward, from `indices` `[T, K, S]`, of which entries that are none of their query's blocks,
/// and repeated ones, are passed over. The one place that chooses the kernel.
pub(super) fn selected(branch: &Branch, spec: &NsaSpec, indices: Slice, to: Outputs) -> Result<()> {
    if branch.batch.tokens == 0 {
        return Ok(());
    }
    if !hopper::selected::serves(branch, spec, to) {
        return plain_selected(branch, spec, indices, to, 0);
    }
    let flag = not_finite(branch.plan, &[branch.v])?;
    hopper::selected::selected(branch, spec, indices, to, flag.ptr())?;
    plain_selected(branch, spec, indices, to, flag.ptr())
}

/// Backward: the one place that chooses the kernels.
pub(super) fn selected_grads(
    branch: &Branch,
    spec: &NsaSpec,
    indices: Slice,
    up: Upstream,
    grads: Grads,
) -> Result<()> {
    if branch.batch.tokens == 0 {
        return Ok(());
    }
    if !hopper::selected_backward::serves(branch, spec, up, grads) {
        return plain_selected_grads(branch, spec, indices, up, grads, 0);
    }
    let flag = not_finite(branch.plan, &[branch.q, branch.k, branch.v, up.d_out])?;
    hopper::selected_backward::selected_grads(branch, spec, indices, up, grads, flag.ptr())?;
    plain_selected_grads(branch, spec, indices, up, grads, flag.ptr())
}

/// indices, length, block of the kernels.
fn lists(spec: &NsaSpec, indices: Slice, args: Args) -> Args {
    args.ptr(indices.ptr()).i32(int(spec.select_count)).i32(int(spec.select_block))
}

/// Blocks of kernels that own one query's heads, or as many as a tile has rows.
fn query_blocks(branch: &Branch, tile: Tile) -> usize {
    let dims = branch.plan.dims;
    branch.batch.tokens * dims.kv_heads * dims.group().div_ceil(tile.rows)
}

/// Does nothing where `wanted` (a flag on the device, or 0) is not set.
fn plain_selected(
    branch: &Branch,
    spec: &NsaSpec,
    indices: Slice,
    to: Outputs,
    wanted: u64,
) -> Result<()> {
    let dims = branch.plan.dims;
    let Dims { key_dim, value_dim, .. } = dims;
    let (k, v) = (width(key_dim), width(value_dim));
    let tiles = group_tiles(dims.group());
    let (tile, shared) = Tile::fitting(&branch.plan.gpu, &tiles, |Tile { rows, keys }| {
        let list = 1 + spec.select_count;
        4 * (rows * k + keys * k.max(v) + rows * (keys + 4) + keys + list)
    })?;
    let addresses = [branch.q.ptr(), branch.k.ptr(), branch.v.ptr()];
    let kernel = plain::kernel(branch.plan, &plain::ATTEND, "selected", tile, &addresses)?;
    let args = branch.arguments(to.arguments(branch.inputs()));
    let args = lists(spec, indices, args).ptr(wanted);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, query_blocks(branch, tile), THREADS, shared, args) }
}

fn plain_selected_grads(
    branch: &Branch,
    spec: &NsaSpec,
    indices: Slice,
    up: Upstream,
    grads: Grads,
    wanted: u64,
) -> Result<()> {
    let (plan, dims) = (branch.plan, branch.plan.dims);
    let addresses = [branch.q.ptr(), branch.k.ptr(), branch.v.ptr(), up.d_out.ptr()];

    let tiles = group_tiles(dims.group());
    let (tile, shared) = Tile::fitting(&plan.gpu, &tiles, |tile| {
        query_bytes(dims, tile) + 4 * (1 + spec.select_count)
    })?;
    let kernel = plain::kernel(plan, &plain::BACKWARD, "selected_queries", tile, &addresses)?;
    let args = grads.query_arguments(up.arguments(branch.inputs()));
    let args = lists(spec, indices, branch.arguments(args)).ptr(wanted);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, query_blocks(branch, tile), THREADS, shared, args)? };

    let inverse = Inverse::new(branch, spec, indices, wanted)?;
    let (tile, shared) = Tile::fitting(&plan.gpu, &SQUARE, |tile| key_bytes(dims, tile))?;
    let longest = branch.batch.sequences.iter().map(|s| s.len()).max().unwrap_or(0);
    let parts = spec.select_block.min(longest).div_ceil(tile.keys);
    let kernel = plain::kernel(plan, &plain::BACKWARD, "selected_keys", tile, &addresses)?;
    let args = up.arguments(branch.inputs()).ptr(grads.k.ptr()).ptr(grads.v.ptr());
    let args = branch.arguments(args).ptr(inverse.starts.ptr()).ptr(inverse.queries.ptr());
    let args = args.i32(int(inverse.blocks)).i32(int(spec.select_block)).i32(int(parts));
    let args = args.ptr(wanted);
    let blocks = inverse.blocks * dims.kv_heads * parts;
    // SAFETY: as above; the inverse index is freed in the stream's order, after the kernel.
    unsafe { plain::launch(&kernel, blocks, THREADS, shared, args) }
}
