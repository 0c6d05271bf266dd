//! The newest raw tokens of the compression branch, for a φ with parameters.

use tercet_cuda::{Args, Source};

use super::super::plain::int;
use super::super::{Plan, Slice};
use super::view::CacheView;
use crate::shape::check_len;
use crate::{Dims, NsaSpec, Result};

pub(super) static TAILS: Source = Source {
    name: "decode_tails",
    text: include_str!("tails.cu"),
    headers: &[("decode.cuh", include_str!("decode.cuh"))],
};

const THREADS: u32 = 128;

/// Writes a block's tokens of each row's sequence, from its entry of `starts` (i32 `[n]`) on, to k
/// `[n·l, K, D]` and v `[n·l, K, V]`; without `sequences` row i is of sequence i. Rows whose start is
/// no block's stay as they are.
pub(super) fn tails(
    plan: &Plan,
    raw: &CacheView,
    spec: &NsaSpec,
    (starts, sequences): (Slice, Option<Slice>),
    [k, v]: [Slice; 2],
) -> Result<()> {
    let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
    let (count, length) = (starts.len(), spec.compress_block);
    let rows = count * length;
    check_len("tails of keys", k.len(), &[('R', rows), ('K', kv_heads), ('D', key_dim)])?;
    check_len("tails of values", v.len(), &[('R', rows), ('K', kv_heads), ('V', value_dim)])?;
    let stride = spec.compress_stride;
    let constants = [("D", key_dim), ("V", value_dim), ("LENGTH", length), ("STRIDE", stride)];
    let mut defines = vec![plan.number.define()];
    defines.extend(constants.map(|(name, value)| (name, value.to_string())));
    let kernel = plan.gpu.kernel(&TAILS, "tails", &defines)?;
    let args = Args::new().value(raw.raw()).ptr(starts.ptr());
    let args = args.ptr(sequences.map_or(0, Slice::ptr)).ptr(k.ptr()).ptr(v.ptr());
    let grid = [int(length) as u32, int(count * kv_heads) as u32, 1];
    // SAFETY: the kernel's arguments; lengths were checked, the ring holds every sequence, and
    // addresses are the caller's promise.
    unsafe { kernel.launch(grid, [THREADS, 1, 1], 0, args.i32(int(kv_heads)))? };
    Ok(())
}
