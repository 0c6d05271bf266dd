//! Memory of a graph: what is allocated while a graph is captured belongs to the graph, so that
//! no later launch writes where somebody else's numbers have moved in.

use std::sync::Mutex;

use crate::error::check;
use crate::gpu::lock;
use crate::memory::Label;
use crate::{Gpu, Result};
use cudarc::driver::sys;

/// A piece may be used for a request of at least this share of its size.
const FIT: usize = 4;

/// The allocations of one graph. Pieces given back are used again within the capture; all are
/// freed when the graph and the last buffer from here are gone.
pub(crate) struct Arena {
    gpu: Gpu,
    pieces: Mutex<Pieces>,
}

#[derive(Default)]
struct Pieces {
    all: Vec<u64>,
    /// Address and bytes of what may be used again.
    idle: Vec<(u64, usize)>,
    /// The same, given back while branches run: one of them may still be using it.
    later: Vec<(u64, usize)>,
    sizes: std::collections::HashMap<u64, usize>,
}

impl Arena {
    pub(crate) fn new(gpu: Gpu) -> Self {
        Arena { gpu, pieces: Mutex::default() }
    }

    /// `bytes` that nothing else in the capture uses from here on.
    pub(crate) fn take(&self, bytes: usize, label: Label) -> Result<u64> {
        let mut pieces = lock(&self.pieces);
        let fits = |&(_, size): &(u64, usize)| size >= bytes && size / FIT <= bytes;
        let best = pieces
            .idle
            .iter()
            .enumerate()
            .filter(|(_, piece)| fits(piece))
            .min_by_key(|(_, piece)| piece.1)
            .map(|(i, _)| i);
        if let Some(best) = best {
            return Ok(pieces.idle.swap_remove(best).0);
        }
        // The captured stream cannot allocate what is to last; another one can.
        let ptr = self.gpu.take_from_pool(bytes, self.gpu.0.side, label)?;
        // SAFETY: the side stream is alive and not captured.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.gpu.0.side) })?;
        pieces.all.push(ptr);
        pieces.sizes.insert(ptr, bytes);
        Ok(ptr)
    }

    /// Takes back a piece for use later in the capture.
    pub(crate) fn give_back(&self, ptr: u64) {
        let beside = self.gpu.branch().is_some();
        let mut pieces = lock(&self.pieces);
        if let Some(&bytes) = pieces.sizes.get(&ptr) {
            let to = &mut *pieces;
            if beside { &mut to.later } else { &mut to.idle }.push((ptr, bytes));
        }
    }

    /// All branches have ended for whatever comes.
    pub(crate) fn joined(&self) {
        let pieces = &mut *lock(&self.pieces);
        pieces.idle.append(&mut pieces.later);
    }

    /// Keeps an allocation from before the capture that the graph may still read.
    pub(crate) fn adopt(&self, ptr: u64) {
        lock(&self.pieces).all.push(ptr);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            for &ptr in &lock(&self.pieces).all {
                self.gpu.free(ptr);
            }
        }
    }
}
