//! From text on disk to packed batches of token ids.
//!
//! `discover` finds files, `documents` reads them, `corpus` fingerprints them, `tokenise` turns
//! them once into memory-mapped `shards`, `order` shuffles and `pack` makes batches.

mod corpus;
mod discover;
mod documents;
mod order;
mod pack;
mod rows;
mod shards;
mod tokenise;
mod zstd;

pub use corpus::{Corpus, Skipped};
pub use order::permutation;
pub use pack::Stream;
pub use rows::{Row, read_rows};
pub use shards::Shards;
pub use tokenise::{Tokenised, tokenise};

use tercet_model::Batch;

use crate::error::{Error, Result};

/// The two sides of the split, ready to be drawn from.
pub struct Split {
    /// Shuffled training pieces, epoch after epoch.
    pub train: Stream,
    /// Documents it is made of.
    pub train_documents: usize,
    /// The evaluation batches, always the same.
    pub validation: Vec<Batch>,
    /// Held-out documents.
    pub validation_documents: usize,
}

/// How to split and cut a tokenized corpus.
#[derive(Clone, Copy, Debug)]
pub struct SplitRule {
    /// Share of documents held out.
    pub share: f64,
    /// Longest sequence.
    pub context: usize,
    /// Of the training order.
    pub seed: u64,
    /// Positions in an evaluation batch.
    pub batch: usize,
    /// Evaluation batches, at most.
    pub batches: usize,
}

/// Splits the documents by the hash of their text: equal documents fall on the same side, and
/// adding text never moves a document. When the share selects none, the document with the lowest
/// hash is held out.
pub fn split(shards: &Shards, rule: &SplitRule) -> Result<Split> {
    let held_out = |document: &usize| is_held_out(shards.hash_of(*document), rule.share);
    let (mut validation, mut train): (Vec<usize>, Vec<usize>) =
        (0..shards.len()).partition(held_out);
    if rule.share > 0.0 && validation.is_empty() {
        let lowest = train.iter().map(|&document| shards.hash_of(document)).min();
        (validation, train) =
            train.into_iter().partition(|&document| Some(shards.hash_of(document)) == lowest);
    }
    if train.is_empty() {
        return Err(Error::Data(format!(
            "holding out documents leaves none of {} to train on; add text, or set \
             data.validation = 0",
            shards.len()
        )));
    }
    // In the order of their hashes, so that a few batches are a fair sample of all.
    validation.sort_by_key(|&document| (shards.hash_of(document), document));
    let train_stream = Stream::new(shards, &train, rule.context, Some(rule.seed))?;
    let mut held_out = Stream::new(shards, &validation, rule.context, None)?;
    let total = held_out.positions().min((rule.batch as u64).saturating_mul(rule.batches as u64));
    let batches = (0..total)
        .step_by(rule.batch)
        .map(|start| held_out.batch(shards, start, rule.batch.min((total - start) as usize)))
        .collect();
    Ok(Split {
        train: train_stream,
        train_documents: train.len(),
        validation: batches,
        validation_documents: validation.len(),
    })
}

/// Whether something with this hash is among the `share` that is held out: the same wherever it
/// stands and whatever stands beside it.
pub fn is_held_out(hash: u64, share: f64) -> bool {
    // The upper 53 bits, so that the fraction is exact.
    ((hash >> 11) as f64) < share * (1u64 << 53) as f64
}

/// Entropy in nats of the distribution of the targets themselves: the loss of the best model
/// that ignores the context, fitted to these very tokens.
pub fn unigram_entropy(batches: &[Batch]) -> f64 {
    let mut counts = std::collections::BTreeMap::new();
    let mut total = 0u64;
    for target in batches.iter().flat_map(|batch| &batch.targets) {
        *counts.entry(target).or_insert(0u64) += 1;
        total += 1;
    }
    counts
        .values()
        .map(|&count| {
            let p = count as f64 / total as f64;
            -p * p.ln()
        })
        .sum()
}
