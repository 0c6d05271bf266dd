//! How the fast kernel is cut: blocks of a cluster, tiles in flight, blocks of a multiprocessor.

use tercet_cuda::Number;

use super::super::Plan;
use crate::{Dims, NsaSpec};

/// Most blocks of a cluster.
const CLUSTER: usize = 16;

/// Query heads of one block.
const HEADS: usize = 16;

/// Worker threads of a block.
const WORKERS: u32 = 128;

/// Threads that ask for tiles.
const PRODUCERS: u32 = 32;

/// Static shared memory of the kernel and what aligns the dynamic, rounded up.
const STATIC: usize = 8 << 10;

/// Bytes that a barrier in shared memory counts.
const COUNTED: usize = 1 << 20;

/// The constants of `step.cu` that are free to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Blocks that share the keys.
    pub splits: usize,
    /// Blocks that share the heads of a group.
    pub head_tiles: usize,
    /// Tiles in flight.
    pub slots: usize,
    /// Tokens of a tile.
    pub tile: usize,
    /// Threads that rank blocks.
    pub choosers: u32,
    /// Blocks of a multiprocessor.
    pub resident: usize,
    /// Whether logits are too many for shared memory.
    pub global: bool,
}

/// What a launch of so many rows must hold.
#[derive(Clone, Copy)]
pub(super) struct Load<'a> {
    pub plan: &'a Plan,
    pub spec: Option<&'a NsaSpec>,
    /// (row, KV head) pairs.
    pub pairs: usize,
    /// Most tokens that a row sees.
    pub longest: usize,
}

impl Shape {
    pub fn threads(&self) -> u32 {
        WORKERS + PRODUCERS + self.choosers
    }

    pub fn cluster(&self) -> usize {
        self.splits * self.head_tiles
    }

    /// Compressed blocks of one split.
    pub fn slice(&self, load: &Load) -> usize {
        let blocks = load.spec.map_or(0, |spec| spec.compressed_blocks(load.longest));
        blocks.div_ceil(self.tile).div_ceil(self.splits) * self.tile
    }

    /// Dynamic shared memory.
    pub fn shared(&self, load: &Load) -> usize {
        let Dims { key_dim, value_dim, .. } = load.plan.dims;
        let panels = key_dim.max(value_dim).div_ceil(64);
        let slots = self.slots * self.tile * 128 * panels;
        let branches = if load.spec.is_some() { 3 } else { 1 };
        let inbox = if self.splits > 1 { HEADS * branches * value_dim } else { 0 };
        let Some(spec) = load.spec else { return slots + 4 * inbox };
        let keys = spec.selection_blocks(load.longest).next_multiple_of(4);
        let joint = if self.head_tiles > 1 { self.head_tiles * self.slice(load) } else { 0 };
        let logits = if self.global { 0 } else { self.logits(load) };
        slots + 4 * (keys + joint + inbox.max(logits))
    }

    /// A block's logits.
    fn logits(&self, load: &Load) -> usize {
        HEADS * (self.slice(load) + 8)
    }

    /// The kernel's f32s of scratch for all rows.
    pub fn scratch(&self, load: &Load) -> usize {
        if self.global { load.pairs * self.cluster() * self.logits(load) } else { 0 }
    }

    /// Whether a split's tiles hold whole selection blocks, and the one before what else these need.
    fn suits(&self, spec: &NsaSpec) -> bool {
        let ratio = spec.select_block / spec.compress_stride;
        spec.select_block.is_multiple_of(self.tile)
            && self.tile.is_multiple_of(ratio)
            && spec.compress_block / spec.compress_stride <= self.tile
    }

    fn fits(&self, load: &Load) -> bool {
        let most = load.plan.gpu.info().shared_per_block_optin as usize;
        // A multiprocessor has 1 KB more than a block may ask for, and keeps 1 KB a block.
        let own = (most + 1024) / self.resident - 1024;
        self.cluster() <= CLUSTER
            && self.shared(load) + STATIC <= own
            && load.spec.is_none_or(|spec| self.suits(spec))
            && 4 * self.head_tiles * self.slice(load) < COUNTED
    }
}

/// The shape for a launch; `None`: the fast kernel does not serve it.
pub(super) fn choose(load: &Load) -> Option<Shape> {
    let plan = load.plan;
    if !plan.hopper() || plan.number == Number::F32 {
        return None;
    }
    let head_tiles = plan.dims.group().div_ceil(HEADS);
    let units = load.pairs * head_tiles;
    let machine = plan.gpu.multiprocessors() as usize;
    let dims = plan.dims.key_dim.max(plan.dims.value_dim);
    // Two blocks share a multiprocessor's registers only while rows are short.
    let together = if dims <= 128 { 2 } else { 1 };
    let base = Shape {
        splits: 1,
        head_tiles,
        slots: 4,
        tile: 32,
        choosers: 64,
        resident: together,
        global: false,
    };
    let wide = Shape { tile: 64, choosers: 128, resident: 1, ..base };
    let narrow = if load.spec.is_some() { base } else { Shape { tile: 64, choosers: 32, ..base } };
    // Enough rows to fill the machine: as few splits as the logits allow. Else as many as help; of
    // the largest clusters fewer fit than multiprocessors say, since each needs one group of them.
    let room = if units <= 6 { CLUSTER } else { CLUSTER / 2 };
    let most = below(CLUSTER / head_tiles);
    let wanted = below((machine / units.max(1)).clamp(1, room)).min(most);
    let splits = |from: usize| (0..5).map(|i| 1 << i).filter(move |&s| s >= from);
    let tried = |shape: Shape, slots: &'static [usize], from: usize| {
        splits(from).flat_map(move |splits| {
            slots.iter().map(move |&slots| Shape { splits, slots, ..shape })
        })
    };
    let crowded = if wanted <= 1 { Some(tried(narrow, &[4], 1)) } else { None };
    crowded
        .into_iter()
        .flatten()
        .chain(tried(wide, &[8, 6, 4], wanted))
        .chain(tried(Shape { resident: 1, ..narrow }, &[6, 4, 3], wanted))
        .chain(tried(Shape { global: true, ..wide }, &[6, 4, 3], most))
        .find(|shape| shape.fits(load))
}

/// The largest power of two that is no more than `x`, which is at least 1.
fn below(x: usize) -> usize {
    1 << x.ilog2()
}
