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
    /// What is too much for shared memory.
    pub global: Global,
}

/// What stands in global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) enum Global {
    Nothing,
    Logits,
    /// And importance.
    All,
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
    /// Threads of a block; dense attention chooses nothing.
    pub fn threads(&self, load: &Load) -> u32 {
        WORKERS + PRODUCERS + if load.spec.is_some() { self.choosers } else { 0 }
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
        let ranking = load.spec.map_or(0, |spec| {
            let keys = spec.selection_blocks(load.longest).next_multiple_of(4);
            let importance = if self.global < Global::All { self.importance(load) } else { 0 };
            let logits = if self.global < Global::Logits { self.logits(load) } else { 0 };
            importance + keys + logits
        });
        slots + 4 * (inbox + ranking)
    }

    /// A block's logits.
    fn logits(&self, load: &Load) -> usize {
        HEADS * (self.slice(load) + 8)
    }

    /// A cluster's importance, f32s.
    fn importance(&self, load: &Load) -> usize {
        self.head_tiles * self.splits * self.slice(load)
    }

    /// The kernel's f32s of scratch for all rows.
    pub fn scratch(&self, load: &Load) -> usize {
        let logits = self.cluster() * self.logits(load);
        load.pairs
            * match self.global {
                Global::Nothing => 0,
                Global::Logits => logits,
                Global::All => logits + self.importance(load),
            }
    }

    fn fits(&self, load: &Load) -> bool {
        let most = load.plan.gpu.info().shared_per_block_optin as usize;
        // A multiprocessor has 1 KB more than a block may ask for, and keeps 1 KB a block.
        let own = (most + 1024) / self.resident - 1024;
        self.cluster() <= CLUSTER
            && self.shared(load) + STATIC <= own
            && load.spec.is_none_or(|spec| spec.select_block.is_multiple_of(self.tile))
            && (self.global == Global::All || 4 * self.importance(load) < COUNTED)
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
        global: Global::Nothing,
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
    // Of rows of 64 numbers a multiprocessor holds more blocks, and does best when all run at once.
    let halves = Shape { splits: 2, slots: 4, resident: 2, ..wide };
    let thirds = Shape { resident: 3, ..narrow };
    let short = usize::from(dims <= 64 && wanted <= 1 && units <= 3 * machine) * 2;
    let one_wave = if units <= machine { halves } else { thirds };
    let one_wave = [Global::Nothing, Global::Logits].map(|global| Shape { global, ..one_wave });
    // A crowd does best without splits, even if logits then go through the L2.
    let alone = |shape: Shape, slots: &'static [usize]| tried(shape, slots, 1).take(slots.len());
    let far = Shape { global: Global::Logits, ..wide };
    let crowd = usize::from(wanted <= 1) * usize::MAX;
    one_wave
        .into_iter()
        .take(short)
        .chain(alone(narrow, &[4]))
        .chain(alone(far, &[10, 6, 4]))
        .take(crowd)
        .chain(tried(wide, &[8, 6, 4], wanted))
        .chain(tried(Shape { resident: 1, ..narrow }, &[6, 4, 3], wanted))
        .chain(tried(far, &[6, 4, 3], most))
        .chain(tried(Shape { global: Global::All, ..wide }, &[6, 4, 3], most))
        .find(|shape| shape.fits(load))
}

/// The largest power of two that is no more than `x`, which is at least 1.
fn below(x: usize) -> usize {
    1 << x.ilog2()
}
