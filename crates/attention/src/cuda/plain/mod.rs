//! The plain kernels: sources, tile shapes, launches.

use tercet_cuda::{Args, Gpu, Kernel, Source};

use super::Plan;
use crate::{Error, Result};

const HEADERS: &[(&str, &str)] = &[("tile.cuh", include_str!("tile.cuh"))];
const fn source(name: &'static str, text: &'static str) -> Source {
    Source { name, text, headers: HEADERS }
}

pub(in super::super) static ATTEND: Source = source("plain_attend", include_str!("attend.cu"));
pub(in super::super) static SELECT: Source = source("plain_select", include_str!("select.cu"));
pub(in super::super) static BACKWARD: Source =
    source("plain_backward", include_str!("backward.cu"));
pub(in super::super) static INVERSE: Source = source("plain_inverse", include_str!("inverse.cu"));
pub(in super::super) static GATE: Source = source("plain_gate", include_str!("gate.cu"));

/// Threads of the tiled kernels.
pub(in super::super) const THREADS: u32 = 256;

/// Shared memory that lets two blocks share a multiprocessor of an A100 or newer.
const COMFORTABLE: usize = 80 << 10;

/// Query rows and keys of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Tile {
    pub rows: usize,
    pub keys: usize,
}

impl Tile {
    /// The largest of these tiles that is comfortable in shared memory, else the largest that
    /// fits at all; `bytes` says what one takes.
    pub fn fitting(
        gpu: &Gpu,
        tiles: &[Tile],
        bytes: impl Fn(Tile) -> usize,
    ) -> Result<(Tile, u32)> {
        let most = gpu.info().shared_per_block_optin as usize;
        let comfortable = tiles.iter().find(|tile| bytes(**tile) <= COMFORTABLE.min(most));
        let smallest = tiles.iter().find(|tile| bytes(**tile) <= most);
        match comfortable.or(smallest) {
            Some(&tile) => Ok((tile, bytes(tile) as u32)),
            None => Err(Error::Dims(format!(
                "these head dims and select_count need more shared memory than the {most} bytes \
                 a block of this device has"
            ))),
        }
    }
}

/// Square tiles, the largest first.
pub(in super::super) const SQUARE: [Tile; 3] =
    [Tile { rows: 64, keys: 64 }, Tile { rows: 32, keys: 32 }, Tile { rows: 16, keys: 16 }];

/// Tiles for blocks that own one query's heads: no more rows than a group needs.
pub(in super::super) fn group_tiles(group: usize) -> Vec<Tile> {
    let rows = group.next_multiple_of(16).next_power_of_two().min(64);
    let shapes = [(rows, 64), (rows.min(32), 32), (16, 32), (16, 16)];
    shapes.map(|(rows, keys)| Tile { rows, keys }).to_vec()
}

/// The dim that a kernel is compiled for: few kernels serve all dims.
fn compiled(dim: usize) -> usize {
    if dim <= 32 { 32 } else { dim.next_multiple_of(64) }
}

/// f32s between rows of a shared tile; `Width<DIM>::row` of `tile.cuh`.
pub(in super::super) fn width(dim: usize) -> usize {
    4 * ((compiled(dim) / 4) | 1)
}

/// How many numbers may be loaded at once from these addresses: 16 bytes of them, or one.
fn vector(plan: &Plan, addresses: &[u64]) -> usize {
    let most = 16 / plan.number.bytes();
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    let whole = (plan.dims.key_dim | plan.dims.value_dim).is_multiple_of(most);
    if aligned && whole { most } else { 1 }
}

/// A kernel for this plan's type, without tiles.
pub(in super::super) fn flat_kernel(plan: &Plan, source: &Source, entry: &str) -> Result<Kernel> {
    let defines = [plan.number.define(), ("VECTOR", "1".into())];
    Ok(plan.gpu.kernel(source, entry, &defines)?)
}

/// A kernel for this plan's type and dims, a tile, and memory at these addresses.
pub(in super::super) fn kernel(
    plan: &Plan,
    source: &Source,
    entry: &str,
    tile: Tile,
    addresses: &[u64],
) -> Result<Kernel> {
    // Constants differ between the entries of a source: only the one that is wanted is compiled.
    let only = format!("ENTRY_{entry}");
    let defines = [
        plan.number.define(),
        ("ONE_ENTRY", "1".into()),
        (&only, "1".into()),
        ("DIM_K", compiled(plan.dims.key_dim).to_string()),
        ("DIM_V", compiled(plan.dims.value_dim).to_string()),
        ("ROWS", tile.rows.to_string()),
        ("KEYS", tile.keys.to_string()),
        ("VECTOR", vector(plan, addresses).to_string()),
    ];
    Ok(plan.gpu.kernel(source, entry, &defines)?)
}

/// Enqueues `blocks` blocks.
///
/// # Safety
/// As [`Kernel::launch`].
pub(in super::super) unsafe fn launch(
    kernel: &Kernel,
    blocks: usize,
    threads: u32,
    shared: u32,
    args: Args,
) -> Result<()> {
    let Some(blocks) = u32::try_from(blocks).ok().filter(|&n| n <= i32::MAX as u32) else {
        return Err(Error::Dims(format!(
            "{blocks} thread blocks; a launch takes at most 2^31 - 1"
        )));
    };
    // SAFETY: promised by the caller.
    unsafe { kernel.launch([blocks, 1, 1], [threads, 1, 1], shared, args)? };
    Ok(())
}

/// Work items of all sequences together when `unit` rows make one and every sequence starts a new
/// one; see `find_item` of `tile.cuh`.
pub(in super::super) fn items(rows: usize, unit: usize, sequences: usize) -> usize {
    rows / unit + sequences
}

/// A size as a kernel's `int`; sizes here are at most 2³¹, and larger windows see as much.
pub(in super::super) fn int(size: usize) -> i32 {
    size.min(i32::MAX as usize) as i32
}
