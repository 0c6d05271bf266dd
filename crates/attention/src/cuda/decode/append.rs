//! New tokens enter the caches.

use tercet_cuda::{Args, Source};

use super::super::plain::int;
use super::super::{Plan, Slice};
use super::view::{CacheView, RawCache};
use crate::shape::check_len;
use crate::{Compressor, Dims, Error, NsaSpec, Result};

pub(super) static APPEND: Source = Source {
    name: "decode_append",
    text: include_str!("append.cu"),
    headers: &[("decode.cuh", include_str!("decode.cuh"))],
};

const THREADS: u32 = 128;

/// Most caches that one launch fills.
const TARGETS: usize = 3;

/// Keys and values of new tokens, and where they go.
#[derive(Clone, Copy)]
pub(super) struct New {
    /// `[R, K, D]`.
    pub k: Slice,
    /// `[R, K, V]`.
    pub v: Slice,
    pub cache: CacheView,
}

/// Where new tokens stand.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    pub plan: &'a Plan,
    /// i32 `[R]`, −1: the row is idle.
    pub positions: Slice,
    /// i32 `[R]`; `None`: row i is of sequence i.
    pub sequences: Option<Slice>,
}

/// What averages a block that a token completes; the ring of raw tokens is the first target.
#[derive(Clone, Copy)]
pub(super) struct Compress<'a> {
    pub spec: &'a NsaSpec,
    pub cmp: CacheView,
    /// Cosines and sines that turn keys, f32 `[positions, 2, D/2]`.
    pub turns: Option<Slice>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Target {
    k: u64,
    v: u64,
    cache: RawCache,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Append {
    targets: [Target; TARGETS],
    positions: u64,
    sequences: u64,
    kv_heads: i32,
    padding: i32,
    cmp: RawCache,
    turns: u64,
}

/// Writes new tokens, at most three caches' worth, one token a row.
pub(super) fn append(places: &Places, new: &[New], compress: Option<Compress>) -> Result<()> {
    let plan = places.plan;
    let Dims { kv_heads, key_dim, value_dim, .. } = plan.dims;
    let rows = places.positions.len();
    let mut targets = [Target::default(); TARGETS];
    for (target, new) in targets.iter_mut().zip(new) {
        check_len("new keys", new.k.len(), &[('R', rows), ('K', kv_heads), ('D', key_dim)])?;
        check_len("new values", new.v.len(), &[('R', rows), ('K', kv_heads), ('V', value_dim)])?;
        *target = Target { k: new.k.ptr(), v: new.v.ptr(), cache: new.cache.raw() };
    }
    let mut defines =
        vec![plan.number.define(), ("D", key_dim.to_string()), ("V", value_dim.to_string())];
    if let Some(Compress { spec, .. }) = compress {
        if spec.compressor != Compressor::Mean {
            return Err(Error::Phi(
                "a step on the device averages blocks; other compressors hand over ready ones"
                    .into(),
            ));
        }
        defines.push(("COMPRESS_BLOCK", spec.compress_block.to_string()));
        defines.push(("COMPRESS_STRIDE", spec.compress_stride.to_string()));
    }
    let args = Append {
        targets,
        positions: places.positions.ptr(),
        sequences: places.sequences.map_or(0, Slice::ptr),
        kv_heads: int(kv_heads),
        padding: 0,
        cmp: compress.map_or_else(RawCache::default, |c| c.cmp.raw()),
        turns: compress.and_then(|c| c.turns).map_or(0, Slice::ptr),
    };
    let kernel = plan.gpu.kernel(&APPEND, "append", &defines)?;
    let blocks = int(rows * kv_heads) as u32;
    // SAFETY: the kernel's parameter; lengths were checked and addresses are the caller's promise.
    unsafe { kernel.launch([blocks, 1, 1], [THREADS, 1, 1], 0, Args::new().value(args))? };
    Ok(())
}
