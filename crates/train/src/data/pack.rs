//! Documents packed into batches, none of which lets attention cross from one to another.
//!
//! Every document is `start, tokens…, end`; its inputs are all but the last of these and its
//! targets all but the first, so that every position has a target of its own document. Documents
//! longer than the context are split into *pieces* (each still has its true targets). An epoch is
//! all pieces in a shuffled row; a batch is the next so many positions of it, and a piece that a
//! batch's end cuts continues in the next batch as a sequence of its own.

use tercet_model::Batch;

use super::order::permutation;
use super::shards::Shards;
use crate::error::{Error, Result};

/// A part of a document no longer than the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    document: u32,
    /// First position in the document.
    start: u32,
    /// Positions.
    len: u32,
}

/// An endless (shuffled, epoch after epoch) or single (in order) row of pieces.
pub struct Stream {
    pieces: Vec<Piece>,
    /// Positions of one epoch.
    positions: u64,
    seed: Option<u64>,
    epoch: Epoch,
}

/// One epoch laid out: which piece comes when, and where each ends.
struct Epoch {
    number: u64,
    order: Vec<u32>,
    ends: Vec<u64>,
}

impl Stream {
    /// The pieces of `documents`; shuffled anew in each epoch when there is a seed.
    pub fn new(
        shards: &Shards,
        documents: &[usize],
        context: usize,
        seed: Option<u64>,
    ) -> Result<Self> {
        let mut pieces = Vec::new();
        for &document in documents {
            let positions = shards.tokens_of(document) - 1;
            for start in (0..positions).step_by(context) {
                let len = context.min(positions - start) as u32;
                pieces.push(Piece { document: document as u32, start: start as u32, len });
            }
        }
        if u32::try_from(pieces.len()).is_err() || u32::try_from(shards.len()).is_err() {
            return Err(Error::Data(
                "the corpus has more than 2³² documents; use fewer files".into(),
            ));
        }
        let positions = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let epoch = Epoch::lay_out(&pieces, seed, 0);
        Ok(Self { pieces, positions, seed, epoch })
    }

    /// Positions of one epoch.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// Positions of each piece: the lengths of the sequences, batch ends aside.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.pieces.iter().map(|piece| piece.len as usize)
    }

    /// The `len` positions from `start` on; a stream without positions gives an empty batch. A
    /// pure function of its arguments (what is kept between calls only saves time).
    pub fn batch(&mut self, shards: &Shards, start: u64, len: usize) -> Batch {
        let mut packed = Batch {
            input_ids: Vec::with_capacity(len),
            targets: Vec::with_capacity(len),
            cu_seqlens: vec![0],
        };
        while packed.input_ids.len() < len && self.positions > 0 {
            let at = start + packed.input_ids.len() as u64;
            let (number, within) = (at / self.positions, at % self.positions);
            if number != self.epoch.number {
                self.epoch = Epoch::lay_out(&self.pieces, self.seed, number);
            }
            let place = self.epoch.ends.partition_point(|&end| end <= within);
            let piece = self.pieces[self.epoch.order[place] as usize];
            let left = (self.epoch.ends[place] - within) as usize;
            let take = left.min(len - packed.input_ids.len());
            let from = (piece.start + piece.len) as usize - left;
            push(&mut packed, shards, piece.document as usize, from, take);
        }
        packed
    }
}

impl Epoch {
    fn lay_out(pieces: &[Piece], seed: Option<u64>, number: u64) -> Self {
        let count = pieces.len() as u32;
        let order = match seed {
            Some(seed) => permutation(seed, number, count),
            None => (0..count).collect(),
        };
        let mut end = 0;
        let ends = order
            .iter()
            .map(|&piece| {
                end += u64::from(pieces[piece as usize].len);
                end
            })
            .collect();
        Self { number, order, ends }
    }
}

/// Appends `len` positions of a document as a sequence of its own.
fn push(batch: &mut Batch, shards: &Shards, document: usize, from: usize, len: usize) {
    shards.read(document, from, from + len, &mut batch.input_ids);
    shards.read(document, from + 1, from + len + 1, &mut batch.targets);
    batch.cu_seqlens.push(batch.input_ids.len() as i32);
}
