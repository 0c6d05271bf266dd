//! Attention under a mask: dense, window, and the compressed branch.

use tercet_cuda::{Args, Label};

use super::batch::Batch;
use super::finite::not_finite;
use super::gate::correction;
use super::hopper;
use super::plain::{self, SQUARE, THREADS, Tile, int, items, width};
use super::{Plan, Slice};
use crate::cpu::Mask;
use crate::shape::{check_len, check_scale};
use crate::{Dims, Error, NsaSpec, Result};

/// Inputs of dense or window attention.
#[derive(Clone, Copy)]
pub struct AttendInput<'a> {
    /// Device, dims, storage.
    pub plan: &'a Plan,
    /// Sequences.
    pub batch: &'a Batch,
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[T, H, D]`.
    pub q: Slice,
    /// Keys `[T, K, D]`.
    pub k: Slice,
    /// Values `[T, K, V]`.
    pub v: Slice,
}

/// Where the gradients of [`attend_backward`] go; overwritten.
#[derive(Clone, Copy)]
pub struct AttendGrads {
    /// `[T, H, D]`.
    pub q: Slice,
    /// `[T, K, D]`.
    pub k: Slice,
    /// `[T, K, V]`.
    pub v: Slice,
}

/// Which keys a query sees.
#[derive(Clone, Copy)]
pub(super) enum Visible<'a> {
    Mask(Mask),
    /// Compressed blocks that end at or before it.
    Compressed(&'a NsaSpec),
}

impl Visible<'_> {
    /// kind, w, l, d of the kernels' `Mask`.
    pub fn arguments(self, args: Args) -> Args {
        let [kind, window, block, stride] = match self {
            Visible::Mask(Mask::Causal) => [0, 0, 1, 1],
            Visible::Mask(Mask::Window(w)) => [1, int(w), 1, 1],
            Visible::Compressed(spec) => {
                [2, 0, int(spec.compress_block), int(spec.compress_stride)]
            }
        };
        args.i32(kind).i32(window).i32(block).i32(stride)
    }
}

/// What a branch reads.
#[derive(Clone, Copy)]
pub(super) struct Branch<'a> {
    pub plan: &'a Plan,
    pub batch: &'a Batch,
    pub scale: f32,
    pub q: Slice,
    pub k: Slice,
    pub v: Slice,
}

/// Where a branch's results go.
#[derive(Clone, Copy, Default)]
pub(super) struct Outputs {
    /// The branch alone `[T, H, V]`.
    pub branch: Option<Slice>,
    /// `[T, H]`.
    pub lse: Option<Slice>,
    /// Its share of the operator's output.
    pub blend: Option<Blend>,
}

/// One branch's share of Σ g_c · o_c.
#[derive(Clone, Copy)]
pub(super) struct Blend {
    /// `[T, H, V]`.
    pub out: Slice,
    /// `[T, H, 3]`.
    pub gate: Slice,
    /// The branch's place in the gates.
    pub index: usize,
    /// Whether `out` holds the branches before.
    pub add: bool,
}

impl Outputs {
    /// branch, lse, out, gate, index, add of the kernels' `Output`.
    pub fn arguments(self, args: Args) -> Args {
        let ptr = |slice: Option<Slice>| slice.map_or(0, Slice::ptr);
        let args = args.ptr(ptr(self.branch)).ptr(ptr(self.lse));
        match self.blend {
            Some(b) => args.ptr(b.out.ptr()).ptr(b.gate.ptr()).i32(int(b.index)).i32(b.add.into()),
            None => args.ptr(0).ptr(0).i32(0).i32(0),
        }
    }
}

/// What a branch's backward gets from above.
#[derive(Clone, Copy)]
pub(super) struct Upstream {
    /// Gradient of the operator's output `[T, H, V]`.
    pub d_out: Slice,
    /// Gates `[T, H, 3]` and the branch's place in them; 1 when absent.
    pub gate: Option<(Slice, usize)>,
    /// `[T, H]`.
    pub lse: Slice,
    /// Δ `[T, H]`, f32.
    pub delta: u64,
}

impl Upstream {
    /// d_out, gate, index, lse, delta of the kernels' `Upstream`.
    pub fn arguments(self, args: Args) -> Args {
        let (gate, index) = self.gate.map_or((0, 0), |(gate, index)| (gate.ptr(), index));
        let args = args.ptr(self.d_out.ptr()).ptr(gate).i32(int(index));
        args.ptr(self.lse.ptr()).ptr(self.delta)
    }
}

/// Where a branch's gradients go. dQ is summed over branches in f32, or in its own storage type.
#[derive(Clone, Copy)]
pub(super) struct Grads {
    /// `[T, H, D]`, written by the last branch.
    pub q: Slice,
    /// f32 `[T, H, D]`; 0: branches add up in `q` itself.
    pub sum: u64,
    pub first: bool,
    pub last: bool,
    pub k: Slice,
    pub v: Slice,
}

impl Grads {
    /// d_q, sum, first, last of the kernels' `QueryGrad`.
    pub fn query_arguments(self, args: Args) -> Args {
        args.ptr(self.q.ptr()).ptr(self.sum).i32(self.first.into()).i32(self.last.into())
    }
}

impl Branch<'_> {
    /// sequences, count, heads, kv_heads, dim_k, dim_v, scale.
    pub fn arguments(&self, args: Args) -> Args {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.plan.dims;
        let args = args.ptr(self.batch.table.ptr()).i32(int(self.batch.count()));
        let args = args.i32(int(heads)).i32(int(kv_heads));
        args.i32(int(key_dim)).i32(int(value_dim)).f32(self.scale)
    }

    /// q, k, v.
    pub fn inputs(&self) -> Args {
        Args::new().ptr(self.q.ptr()).ptr(self.k.ptr()).ptr(self.v.ptr())
    }

    /// Blocks of kernels that own tiles of query rows.
    fn row_blocks(&self, rows: usize) -> usize {
        let dims = self.plan.dims;
        items(self.batch.tokens * dims.group(), rows, self.batch.count()) * dims.kv_heads
    }
}

/// Forward of any masked branch: the one place that chooses its kernel.
pub(super) fn attend(branch: &Branch, visible: Visible, to: Outputs) -> Result<()> {
    if branch.batch.tokens == 0 {
        return Ok(());
    }
    if !hopper::attend::serves(branch, to) {
        return plain_attend(branch, visible, to, 0);
    }
    let flag = not_finite(branch.plan, &[branch.v])?;
    hopper::attend::attend(branch, visible, to, flag.ptr())?;
    plain_attend(branch, visible, to, flag.ptr())
}

/// Backward of any masked branch: the one place that chooses its kernels. `keys` is how many rows
/// the keys have.
pub(super) fn attend_grads(
    branch: &Branch,
    visible: Visible,
    keys: usize,
    up: Upstream,
    grads: Grads,
) -> Result<()> {
    if branch.batch.tokens == 0 {
        return Ok(());
    }
    if !hopper::attend_backward::serves(branch, up, grads) {
        return plain_attend_grads(branch, visible, keys, up, grads, 0);
    }
    let flag = not_finite(branch.plan, &[branch.q, branch.k, branch.v, up.d_out])?;
    hopper::attend_backward::attend_grads(branch, visible, keys, up, grads, flag.ptr())?;
    plain_attend_grads(branch, visible, keys, up, grads, flag.ptr())
}

/// Does nothing where `wanted` (a flag on the device, or 0) is not set.
fn plain_attend(branch: &Branch, visible: Visible, to: Outputs, wanted: u64) -> Result<()> {
    let Dims { key_dim, value_dim, .. } = branch.plan.dims;
    let (k, v) = (width(key_dim), width(value_dim));
    let (tile, shared) = Tile::fitting(&branch.plan.gpu, &SQUARE, |Tile { rows, keys }| {
        4 * (rows * k + keys * k.max(v) + rows * (keys + 4) + keys)
    })?;
    let addresses = [branch.q.ptr(), branch.k.ptr(), branch.v.ptr()];
    let kernel = plain::kernel(branch.plan, &plain::ATTEND, "attend", tile, &addresses)?;
    let args = visible.arguments(branch.arguments(to.arguments(branch.inputs()))).ptr(wanted);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, branch.row_blocks(tile.rows), THREADS, shared, args) }
}

/// Shared memory of the kernels that own query rows.
pub(super) fn query_bytes(dims: Dims, Tile { rows, keys }: Tile) -> usize {
    let both = width(dims.key_dim) + width(dims.value_dim);
    4 * ((rows + keys) * both + rows * (keys + 4) + keys)
}

/// Shared memory of the kernels that own keys.
pub(super) fn key_bytes(dims: Dims, Tile { rows, keys }: Tile) -> usize {
    let both = width(dims.key_dim) + width(dims.value_dim);
    4 * ((rows + keys) * both + 2 * keys * (rows + 4) + 3 * rows)
}

fn plain_attend_grads(
    branch: &Branch,
    visible: Visible,
    keys: usize,
    up: Upstream,
    grads: Grads,
    wanted: u64,
) -> Result<()> {
    let (plan, dims) = (branch.plan, branch.plan.dims);
    let addresses = [branch.q.ptr(), branch.k.ptr(), branch.v.ptr(), up.d_out.ptr()];

    let (tile, shared) = Tile::fitting(&plan.gpu, &SQUARE, |tile| query_bytes(dims, tile))?;
    let kernel = plain::kernel(plan, &plain::BACKWARD, "attend_queries", tile, &addresses)?;
    let args = grads.query_arguments(up.arguments(branch.inputs()));
    let args = visible.arguments(branch.arguments(args)).ptr(wanted);
    // SAFETY: the kernel's arguments; lengths were checked and addresses are the caller's promise.
    unsafe { plain::launch(&kernel, branch.row_blocks(tile.rows), THREADS, shared, args)? };

    let (tile, shared) = Tile::fitting(&plan.gpu, &SQUARE, |tile| key_bytes(dims, tile))?;
    let kernel = plain::kernel(plan, &plain::BACKWARD, "attend_keys", tile, &addresses)?;
    let args = up.arguments(branch.inputs()).ptr(grads.k.ptr()).ptr(grads.v.ptr());
    let args = visible.arguments(branch.arguments(args)).ptr(wanted);
    let blocks = items(keys, tile.keys, branch.batch.count()) * dims.kv_heads;
    // SAFETY: as above.
    unsafe { plain::launch(&kernel, blocks, THREADS, shared, args) }
}

impl<'a> AttendInput<'a> {
    fn check(&self, mask: Mask) -> Result<Branch<'a>> {
        let &AttendInput { plan, batch, scale, q, k, v } = self;
        check_scale(scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = plan.dims;
        let tokens = batch.tokens;
        check_len("q", q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
        check_len("k", k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
        check_len("v", v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
        if mask == Mask::Window(0) {
            return Err(Error::Dims("a window of 0 keys, expected at least 1".into()));
        }
        Ok(Branch { plan, batch, scale, q, k, v })
    }
}

/// Writes `out` `[T, H, V]` and the natural-log sum of exponentials `lse` `[T, H]`, f32.
pub fn attend_forward(input: &AttendInput, mask: Mask, out: Slice, lse: Slice) -> Result<()> {
    let branch = input.check(mask)?;
    let Dims { heads, value_dim, .. } = input.plan.dims;
    let tokens = input.batch.tokens;
    check_len("out", out.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    check_len("lse", lse.len(), &[('T', tokens), ('H', heads)])?;
    let to = Outputs { branch: Some(out), lse: Some(lse), blend: None };
    attend(&branch, Visible::Mask(mask), to)
}

/// Gradients of [`attend_forward`] from its outputs and `d_out` `[T, H, V]`.
pub fn attend_backward(
    input: &AttendInput,
    mask: Mask,
    out: Slice,
    lse: Slice,
    d_out: Slice,
    grads: AttendGrads,
) -> Result<()> {
    let branch = input.check(mask)?;
    let Dims { heads, kv_heads, key_dim, value_dim } = input.plan.dims;
    let tokens = input.batch.tokens;
    for (name, got) in [("out", out), ("d_out", d_out)] {
        check_len(name, got.len(), &[('T', tokens), ('H', heads), ('V', value_dim)])?;
    }
    check_len("lse", lse.len(), &[('T', tokens), ('H', heads)])?;
    check_len("d_q", grads.q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
    check_len("d_k", grads.k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
    check_len("d_v", grads.v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
    if tokens == 0 {
        return Ok(());
    }
    let label = Label::shaped("softmax corrections", &[tokens, heads]);
    let delta = input.plan.gpu.alloc_for(tokens * heads * 4, label)?;
    correction(input.plan, out, d_out, delta.ptr(), tokens * heads)?;
    let up = Upstream { d_out, gate: None, lse, delta: delta.ptr() };
    let AttendGrads { q, k, v } = grads;
    let grads = Grads { q, sum: 0, first: true, last: true, k, v };
    attend_grads(&branch, Visible::Mask(mask), tokens, up, grads)
}
