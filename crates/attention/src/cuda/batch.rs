//! Where the sequences of a call begin and end, checked once and kept on the device.

use std::ops::Range;

use tercet_cuda::{Buffer, Gpu, Label};

use crate::shape::{cu_compressed, sequences, total_tokens};
use crate::{NsaSpec, Result};

/// Sequences, concatenated.
pub struct Batch {
    pub(super) sequences: Vec<Range<usize>>,
    /// Tokens of all sequences.
    pub(super) tokens: usize,
    /// The kernels' `Sequence` for each, eight i32: query, queries, position, key, keys, block,
    /// blocks, 0.
    pub(super) table: Buffer,
}

/// A [`Batch`] for the sparse operator, whose compressed blocks restart at each sequence.
pub struct NsaBatch {
    pub(super) batch: Batch,
    pub(super) spec: NsaSpec,
    /// Compressed blocks of all sequences (N).
    pub(super) blocks: usize,
}

impl Batch {
    /// From B+1 offsets that start at 0 and never decrease.
    pub fn new(gpu: &Gpu, cu_seqlens: &[i32]) -> Result<Self> {
        let tokens = total_tokens(cu_seqlens);
        let sequences = sequences(cu_seqlens, tokens)?;
        let none = vec![0; sequences.len() + 1];
        Self::upload(gpu, sequences, tokens, &none)
    }

    fn upload(
        gpu: &Gpu,
        sequences: Vec<Range<usize>>,
        tokens: usize,
        blocks: &[usize],
    ) -> Result<Self> {
        // Offsets of tokens are i32, and there are no more blocks than tokens.
        let row = |(s, b): (&Range<usize>, &[usize])| {
            [s.start, s.len(), 0, s.start, s.len(), b[0], b[1] - b[0], 0].map(|x| x as i32)
        };
        let rows: Vec<i32> = sequences.iter().zip(blocks.windows(2)).flat_map(row).collect();
        let table = gpu.alloc_for(rows.len() * 4, Label::new("sequence offsets"))?;
        table.write(0, &rows)?;
        Ok(Batch { sequences, tokens, table })
    }

    /// Tokens of all sequences (T).
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many sequences there are (B).
    pub(super) fn count(&self) -> usize {
        self.sequences.len()
    }
}

impl NsaBatch {
    /// From a spec and B+1 offsets that start at 0 and never decrease.
    pub fn new(gpu: &Gpu, spec: &NsaSpec, cu_seqlens: &[i32]) -> Result<Self> {
        spec.validate()?;
        let tokens = total_tokens(cu_seqlens);
        let sequences = sequences(cu_seqlens, tokens)?;
        let offsets = cu_compressed(spec, &sequences);
        let blocks = offsets[sequences.len()];
        let batch = Batch::upload(gpu, sequences, tokens, &offsets)?;
        Ok(NsaBatch { batch, spec: spec.clone(), blocks })
    }

    /// Tokens of all sequences (T).
    pub fn tokens(&self) -> usize {
        self.batch.tokens
    }

    /// Compressed blocks of all sequences (N).
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks, counts and window.
    pub fn spec(&self) -> &NsaSpec {
        &self.spec
    }
}
