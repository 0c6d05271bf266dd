//! Launches of `group_product.cu`: the gradients that groups of rows give a narrow weight, such as a
//! LoRA matrix. Products of a few hundred rows each, by the dozen: one launch instead of one a group.

use std::ops::Range;

use tercet_cuda::{Args, Gpu, Source};

use super::kernel;
use crate::{DType, Result};

const SOURCE: Source = Source::new("group_product", include_str!("group_product.cu"));

/// The narrow side of a weight has at most so many numbers; the products of others are large enough
/// for launches of their own.
pub(super) const NARROW: usize = 64;
/// Groups of a launch.
const GROUPS: usize = 128;
/// Threads of a block and slices of rows, and numbers of the narrow side that each thread sums; as in
/// the kernel.
const THREADS: [usize; 2] = [128, 4];
const TILE: usize = 8;

/// First row of each group and the end of the last.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rows {
    at: [u32; GROUPS + 1],
}

/// `sums[g] (+)= dy[g]ᵀ·x[g]` in f32 for the rows of each group: dy `[T, outer]`, x `[T, inner]`, sums
/// `[groups, outer, inner]`, all addresses. The shorter of `outer` and `inner` is the narrow side.
pub(super) fn launch(
    gpu: &Gpu,
    dtype: DType,
    (dy, x, sums): (u64, u64, u64),
    groups: &[Range<usize>],
    [outer, inner]: [usize; 2],
    add: bool,
) -> Result<()> {
    let defines = [("GROUPS", GROUPS.to_string())];
    let kernel = kernel(gpu, &SOURCE, "group_product", dtype, &defines)?;
    let across = outer <= inner;
    let (wide, narrow, width, narrows) =
        if across { (x, dy, inner, outer) } else { (dy, x, outer, inner) };
    let grid = [width.div_ceil(THREADS[0]) as u32, narrows.div_ceil(TILE) as u32];
    for (i, groups) in groups.chunks(GROUPS).enumerate() {
        let end = groups.last().map_or(0, |last| last.end) as u32;
        let mut rows = Rows { at: [end; GROUPS + 1] };
        rows.at.iter_mut().zip(groups).for_each(|(at, group)| *at = group.start as u32);
        let to = sums + (i * GROUPS * width * narrows * size_of::<f32>()) as u64;
        let args = Args::new()
            .ptr(wide)
            .ptr(narrow)
            .ptr(to)
            .value(rows)
            .len(width)
            .len(narrows)
            .i32(across.into())
            .i32(add.into());
        let grid = [grid[0], grid[1], groups.len() as u32];
        // SAFETY: the groups' rows lie inside dy and x, and `to` has room for a gradient of each.
        unsafe { kernel.launch(grid, [THREADS[0] as u32, THREADS[1] as u32, 1], 0, args)? };
    }
    Ok(())
}
