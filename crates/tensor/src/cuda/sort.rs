//! Launches of `sort.cu`: small integers in stable order.

use tercet_cuda::{Args, Buffer, Gpu, Source};

use super::kernel;
use crate::{DType, Result};

const SOURCE: Source = Source::new("sort", include_str!("sort.cu"));

/// Keys of a block and values of a digit; `sort.cu` has them too.
const TILE: usize = 2048;
const DIGITS: usize = 256;

/// Keys in order.
pub(super) struct Sorted {
    /// The keys, i32.
    pub(super) keys: Buffer,
    /// Where each stood before, i32; equal keys keep their order.
    pub(super) places: Buffer,
    /// For v in `0..=limit` the first place whose key is at least v, i32.
    pub(super) starts: Buffer,
}

/// Sorts `count` i32 at `keys`; those outside `0..limit` count as `limit`. `inverse`, unless 0,
/// takes the new place of each old one.
pub(super) fn sort(
    gpu: &Gpu,
    keys: u64,
    count: usize,
    limit: usize,
    inverse: u64,
) -> Result<Sorted> {
    let tiles = count.div_ceil(TILE);
    let bits = usize::BITS - limit.leading_zeros();
    let counts = gpu.alloc(tiles * DIGITS * size_of::<i32>())?;
    let get = |entry| kernel(gpu, &SOURCE, entry, DType::F32, &[]);
    let (grid, block) = ([tiles as u32, 1, 1], [DIGITS as u32, 1, 1]);
    let mut held: Option<(Buffer, Buffer)> = None;
    for shift in (0..bits.max(1)).step_by(8) {
        let (from, places) = held.as_ref().map_or((keys, 0), |(k, p)| (k.ptr(), p.ptr()));
        let to = (gpu.alloc(count * size_of::<i32>())?, gpu.alloc(count * size_of::<i32>())?);
        let end = |args: Args| args.len(count).i32(limit as i32).i32(shift as i32);
        let inverse = if shift + 8 >= bits { inverse } else { 0 };
        let scatter = Args::new().ptr(from).ptr(places).ptr(counts.ptr());
        let scatter = scatter.ptr(to.0.ptr()).ptr(to.1.ptr()).ptr(inverse);
        // SAFETY: keys and places hold `count` numbers each, `counts` DIGITS for every tile.
        unsafe {
            let args = end(Args::new().ptr(from).ptr(counts.ptr()));
            get("sort_count")?.launch(grid, block, 0, args)?;
            let args = Args::new().ptr(counts.ptr()).len(tiles * DIGITS);
            get("sort_scan")?.launch([1, 1, 1], [1024, 1, 1], 0, args)?;
            get("sort_scatter")?.launch(grid, block, 0, end(scatter))?;
        }
        held = Some(to);
    }
    let (keys, places) = match held {
        Some(held) => held,
        None => (gpu.alloc(0)?, gpu.alloc(0)?),
    };
    let starts = gpu.alloc((limit + 1) * size_of::<i32>())?;
    let args = Args::new().ptr(keys.ptr()).ptr(starts.ptr()).len(count).len(limit);
    let grid = [(limit + 1).div_ceil(DIGITS) as u32, 1, 1];
    // SAFETY: `starts` holds limit + 1 numbers.
    unsafe { get("sort_starts")?.launch(grid, block, 0, args)? };
    Ok(Sorted { keys, places, starts })
}
