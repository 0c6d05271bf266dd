//! Launches of `sum_parts.cu`: sums of columns in a fixed order.

use tercet_cuda::{Args, Gpu, Source};

use super::kernel;
use crate::{DType, Result};

const SOURCE: Source = Source::new("sum_parts", include_str!("sum_parts.cu"));

/// Columns of a block and its slices.
const BLOCK: usize = 32;

/// Rows above which a sum is made in two steps, so that enough blocks take part.
const PER: usize = 2048;

/// The columns of f32 `parts` `[count, width]` added into `out` (on top of what it holds when
/// `add`).
pub(super) fn sum_parts(
    gpu: &Gpu,
    parts: u64,
    out: u64,
    [count, width]: [usize; 2],
    add: bool,
) -> Result<()> {
    launch(gpu, "sum_parts", DType::F32, parts, out, [count, width, count.max(1)], add)
}

/// As [`sum_parts`] of `x` `[count, width]` of any storage type and any number of rows.
pub(super) fn column_sums(
    gpu: &Gpu,
    dtype: DType,
    x: u64,
    out: u64,
    [count, width]: [usize; 2],
    add: bool,
) -> Result<()> {
    if count <= PER {
        return launch(gpu, "sum_rows", dtype, x, out, [count, width, PER], add);
    }
    let parts = count.div_ceil(PER);
    let scratch = gpu.alloc(parts * width * size_of::<f32>())?;
    launch(gpu, "sum_rows", dtype, x, scratch.ptr(), [count, width, PER], false)?;
    sum_parts(gpu, scratch.ptr(), out, [parts, width], add)
}

fn launch(
    gpu: &Gpu,
    entry: &str,
    dtype: DType,
    from: u64,
    to: u64,
    [count, width, per]: [usize; 3],
    add: bool,
) -> Result<()> {
    let kernel = kernel(gpu, &SOURCE, entry, dtype, &[])?;
    let grid = [width.div_ceil(BLOCK) as u32, count.div_ceil(per).max(1) as u32, 1];
    let args = Args::new().ptr(from).ptr(to).len(count).len(width).len(per).i32(add.into());
    // SAFETY: `from` holds count·width numbers and `to` width f32 for each row of the grid.
    Ok(unsafe { kernel.launch(grid, [BLOCK as u32, BLOCK as u32, 1], 0, args) }?)
}
