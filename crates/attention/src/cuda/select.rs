//! Which blocks a query reads, from the compressed branch's keys and log-sum-exps.

use tercet_cuda::Label;

use super::Slice;
use super::attend::Branch;
use super::hopper;
use super::plain::{self, SQUARE, THREADS, Tile, int, items, width};
use crate::{NsaSpec, Result};

/// Heaps of more blocks than this live in device memory.
const SHARED_HEAP: usize = 64;

/// Writes `indices` `[T, K, S]`; `branch` is the compressed one and `lse` its log-sum-exps
/// `[T, H]`. The one place that chooses the kernel.
pub(super) fn select(branch: &Branch, spec: &NsaSpec, lse: Slice, indices: Slice) -> Result<()> {
    if branch.batch.tokens == 0 {
        return Ok(());
    }
    if hopper::select::serves(branch, spec) {
        return hopper::select::select(branch, spec, lse, indices);
    }
    plain_select(branch, spec, lse, indices)
}

fn plain_select(branch: &Branch, spec: &NsaSpec, lse: Slice, indices: Slice) -> Result<()> {
    let (plan, batch, dims) = (branch.plan, branch.batch, branch.plan.dims);
    let free = spec.select_count - spec.select_initial - spec.select_local;
    let queries = |rows: usize| rows / dims.group().min(rows);
    let heap = if free <= SHARED_HEAP { 2 * free } else { 0 };
    let (tile, shared) = Tile::fitting(&plan.gpu, &SQUARE, |Tile { rows, keys }| {
        let tiles = (rows + keys) * width(dims.key_dim) + rows * (2 * keys + 5);
        4 * (tiles + queries(rows) * heap)
    })?;
    let spill = if free <= SHARED_HEAP {
        None
    } else {
        let shape = [batch.tokens, dims.kv_heads, free];
        let bytes = shape.iter().product::<usize>() * 4;
        Some(plan.gpu.alloc_for(bytes, Label::shaped("scores of selected blocks", &shape))?)
    };
    let addresses = [branch.q.ptr(), branch.k.ptr()];
    let kernel = plain::kernel(plan, &plain::SELECT, "select_blocks", tile, &addresses)?;
    let args = tercet_cuda::Args::new().ptr(branch.q.ptr()).ptr(branch.k.ptr());
    let args = args.ptr(lse.ptr()).ptr(indices.ptr());
    let args = branch.arguments(args.ptr(spill.as_ref().map_or(0, |buffer| buffer.ptr())));
    let args = args.i32(int(spec.compress_block)).i32(int(spec.compress_stride));
    let args = args.i32(int(spec.select_block)).i32(int(spec.select_count));
    let args = args.i32(int(spec.select_initial)).i32(int(spec.select_local));
    let blocks = items(batch.tokens, queries(tile.rows), batch.count()) * dims.kv_heads;
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, blocks, THREADS, shared, args) }
}
