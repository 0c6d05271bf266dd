//! Kernels for 16-bit types and usual head dims on Hopper (sm_90a).

pub(super) mod attend;
pub(super) mod attend_backward;
pub(super) mod select;
pub(super) mod selected;
pub(super) mod selected_backward;

use tercet_cuda::{Swizzle, TensorMap};

use super::batch::Batch;
use super::plain::int;
use super::{Plan, Slice};
use crate::Result;

/// Most query heads of a KV head.
const MOST_GROUP: usize = 64;

/// `Batch` of `sequences.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sequences {
    table: u64,
    count: i32,
    spare: i32,
}

impl Sequences {
    fn of(batch: &Batch) -> Self {
        Sequences { table: batch.table.ptr(), count: int(batch.count()), spare: 0 }
    }
}

/// A head dim as shared memory holds it, in panels of 64.
fn padded(dim: usize) -> usize {
    dim.next_multiple_of(64)
}

/// Storage type and head dims.
fn defines(plan: &Plan) -> Vec<(&'static str, String)> {
    let (d, v) = (plan.dims.key_dim.to_string(), plan.dims.value_dim.to_string());
    vec![plan.number.define(), ("D", d), ("V", v)]
}

/// Whether TMA and 16-byte accesses can start there.
fn aligned(slices: &[Slice]) -> bool {
    slices.iter().all(|slice| slice.ptr().is_multiple_of(16))
}

/// Boxes of 64 columns, `heads` heads and `rows` rows (`size`) of `[rows, heads, dim]`.
fn boxes(
    plan: &Plan,
    slice: Slice,
    [rows, heads, dim]: [usize; 3],
    size: [usize; 2],
) -> Result<TensorMap> {
    let bytes = plan.number.bytes();
    let dims = [dim as u64, heads as u64, rows as u64];
    let strides = [(dim * bytes) as u64, (heads * dim * bytes) as u64];
    let size = [64, size[1] as u32, size[0] as u32];
    Ok(TensorMap::tiled(plan.number, slice.ptr(), &dims, &strides, &size, Swizzle::B128)?)
}
