//! Whether inputs hold NaN or infinity, asked on the device.
//!
//! A tile of keys that a query sees in part is multiplied whole, with weight 0 where nothing is
//! seen; but 0 · NaN is NaN. The Hopper kernels therefore stand back when a number that weights
//! multiply is not finite, and the plain ones, which never touch what is not seen, do the work.
//! Nobody waits: both are enqueued and read the flag.

use tercet_cuda::{Args, Buffer, Label, Source};

use super::plain::{self, flat_kernel};
use super::{Plan, Slice};
use crate::Result;

static FINITE: Source = Source { name: "finite", text: include_str!("finite.cu"), headers: &[] };

/// Blocks for each multiprocessor.
const BLOCKS: usize = 8;

/// A flag that is 1 where some of these numbers is NaN or infinite, else 0. They start at
/// multiples of 16 bytes.
pub(super) fn not_finite(plan: &Plan, slices: &[Slice]) -> Result<Buffer> {
    let flag = plan.gpu.alloc_for(4, Label::new("whether all is finite"))?;
    flag.fill(0)?;
    let kernel = flat_kernel(plan, &FINITE, "not_finite")?;
    let blocks = BLOCKS * plan.gpu.multiprocessors() as usize;
    for slice in slices {
        let args = Args::new().ptr(slice.ptr()).len(slice.len()).ptr(flag.ptr());
        // SAFETY: the kernel's arguments; the slice's numbers are valid by its maker's promise.
        unsafe { plain::launch(&kernel, blocks.min(slice.len().div_ceil(2048)), 256, 0, args)? };
    }
    Ok(flag)
}
