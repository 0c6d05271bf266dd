//! What a forward pass reads: token ids, what each should predict, and where sequences start.

use std::ops::Range;

use tercet_attention::NsaSpec;
use tercet_tensor::{Device, Tensor};

use crate::config::ModelConfig;
use crate::{Error, Result};

/// A target that does not count.
pub const IGNORE: i32 = -100;

/// Packed sequences. Attention never crosses from one to the next, and positions restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids `[T]`.
    pub input_ids: Vec<i32>,
    /// The token each position should predict `[T]`; [`IGNORE`] where none counts.
    pub targets: Vec<i32>,
    /// Offsets of the sequences, B+1, from 0 to T.
    pub cu_seqlens: Vec<i32>,
}

impl Batch {
    /// Sequences that each predict their own next token; the last token of each predicts none.
    pub fn next_token(sequences: &[&[i32]]) -> Self {
        let mut batch = Self { input_ids: vec![], targets: vec![], cu_seqlens: vec![0] };
        for sequence in sequences {
            batch.input_ids.extend_from_slice(sequence);
            if let Some((_, rest)) = sequence.split_first() {
                batch.targets.extend_from_slice(rest);
                batch.targets.push(IGNORE);
            }
            batch.cu_seqlens.push(batch.input_ids.len() as i32);
        }
        batch
    }

    /// Fills up with sequences of at most `context` tokens (of id 0) that predict nothing, to the
    /// next multiple of `rows`, itself a multiple of 128, and returns how many rows were there.
    ///
    /// Products choose the order of their sums by the number of rows, so that in the last bits a
    /// sequence's numbers depend on what else is in the batch. In batches that all have the same,
    /// large number of rows they do not: from 1024 rows on none of the paths for few rows is
    /// taken. Private training needs that, since whoever else is drawn must change nothing.
    pub fn fill_up(&mut self, rows: usize, context: usize) -> Result<usize> {
        let own = self.input_ids.len();
        if rows == 0 || !rows.is_multiple_of(128) || context == 0 {
            return Err(Error::Batch(format!(
                "cannot fill up to a multiple of {rows} rows with sequences of {context}; expected \
                 a multiple of 128 and at least one token"
            )));
        }
        let all = own.max(1).checked_next_multiple_of(rows).filter(|&all| all <= i32::MAX as usize);
        let Some(all) = all else {
            return Err(Error::Batch(format!(
                "a batch of {own} rows cannot be filled up to {rows}s"
            )));
        };
        self.input_ids.resize(all, 0);
        self.targets.resize(all, IGNORE);
        self.cu_seqlens.extend((own..all).step_by(context).skip(1).map(|at| at as i32));
        if all > own {
            self.cu_seqlens.push(all as i32);
        }
        Ok(own)
    }
}

/// Token ids and positions as the ops want them, checked against the model.
pub(crate) struct Inputs {
    /// Ids I32 `[T]`.
    pub ids: Tensor,
    /// Position of each token in its sequence, I32 `[T]`.
    pub positions: Tensor,
    /// Position of each compressed block (its first token), I32 `[N]`; empty without NSA.
    pub block_positions: Tensor,
    /// Offsets, B+1.
    pub cu_seqlens: Vec<i32>,
}

impl Inputs {
    /// Checks ids, offsets and lengths; the tensors go to `device`.
    pub fn new(
        config: &ModelConfig,
        device: &Device,
        ids: &[i32],
        cu_seqlens: &[i32],
    ) -> Result<Self> {
        check_ids(config, ids)?;
        let sequences = tercet_attention::sequences(cu_seqlens, ids.len())
            .map_err(|e| Error::Batch(e.to_string()))?;
        let longest = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
        if longest > config.max_position_embeddings {
            return Err(Error::Batch(format!(
                "a sequence of {longest} tokens is longer than the model's context of {} \
                 (max_position_embeddings)",
                config.max_position_embeddings
            )));
        }
        let positions: Vec<i32> = sequences.iter().flat_map(|s| 0..s.len() as i32).collect();
        let blocks = config.nsa.iter().flat_map(|spec| {
            let of = |s: &Range<usize>| block_starts(spec, 0, spec.compressed_blocks(s.len()));
            sequences.iter().flat_map(of)
        });
        Ok(Self {
            ids: tensor_i32(device, ids.to_vec())?,
            positions: tensor_i32(device, positions)?,
            block_positions: tensor_i32(device, blocks.collect())?,
            cu_seqlens: cu_seqlens.to_vec(),
        })
    }

    /// New tokens of one sequence that already holds `held` tokens in a cache.
    pub fn appended(
        config: &ModelConfig,
        device: &Device,
        ids: &[i32],
        held: usize,
    ) -> Result<Self> {
        check_ids(config, ids)?;
        let total = held + ids.len();
        if total > config.max_position_embeddings {
            return Err(Error::Batch(format!(
                "{held} tokens in the cache and {} new ones are more than the model's context of \
                 {} (max_position_embeddings)",
                ids.len(),
                config.max_position_embeddings
            )));
        }
        Ok(Self {
            ids: tensor_i32(device, ids.to_vec())?,
            positions: tensor_i32(device, (held as i32..total as i32).collect())?,
            block_positions: tensor_i32(device, Vec::new())?,
            cu_seqlens: vec![0, ids.len() as i32],
        })
    }
}

impl Inputs {
    /// One new token of each of some sequences, `held[i]` tokens of which are in a cache.
    pub fn one_each(
        config: &ModelConfig,
        device: &Device,
        ids: &[i32],
        held: &[usize],
    ) -> Result<Self> {
        check_ids(config, ids)?;
        let context = config.max_position_embeddings;
        if let Some(full) = held.iter().position(|&tokens| tokens >= context) {
            return Err(Error::Batch(format!(
                "sequence {full} holds {} tokens, and the model's context of {context} \
                 (max_position_embeddings) has no room for another",
                held[full]
            )));
        }
        Ok(Self {
            ids: tensor_i32(device, ids.to_vec())?,
            positions: tensor_i32(device, held.iter().map(|&tokens| tokens as i32).collect())?,
            block_positions: tensor_i32(device, Vec::new())?,
            cu_seqlens: (0..=ids.len() as i32).collect(),
        })
    }
}

/// First tokens of `count` compressed blocks from block `first` on.
pub(crate) fn block_starts(
    spec: &NsaSpec,
    first: usize,
    count: usize,
) -> impl Iterator<Item = i32> + use<> {
    let stride = spec.compress_stride;
    (first..first + count).map(move |block| (block * stride) as i32)
}

pub(crate) fn tensor_i32(device: &Device, values: Vec<i32>) -> Result<Tensor> {
    let len = values.len();
    Ok(Tensor::from_i32(values, &[len])?.to_device(device)?)
}

/// Refuses ids outside the vocabulary.
pub(crate) fn check_ids(config: &ModelConfig, ids: &[i32]) -> Result<()> {
    let vocab = config.vocab_size;
    match ids.iter().position(|&id| id < 0 || id as usize >= vocab) {
        None => Ok(()),
        Some(at) => Err(Error::Batch(format!(
            "token id {} at position {at} is outside the model's vocabulary of {vocab}",
            ids[at]
        ))),
    }
}
