//! Token ids with a mark on each that is learnt, packed into batches that need no padding.

use std::ops::Range;

use sha2::{Digest, Sha256};
use tercet_model::{Batch, IGNORE};

/// One sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<i32>,
    /// Whether each token is learnt: predicted from those before it, and counted in the loss.
    pub learnt: Vec<bool>,
}

impl Example {
    /// A prompt, of which nothing is learnt, and a completion, of which everything is.
    pub fn completion(prompt: &[i32], completion: &[i32]) -> Self {
        let mut learnt = vec![false; prompt.len()];
        learnt.resize(prompt.len() + completion.len(), true);
        Self { ids: [prompt, completion].concat(), learnt }
    }

    /// Tokens that count. The first of a sequence has nothing before it and never does.
    pub fn counted(&self) -> usize {
        self.learnt.iter().skip(1).filter(|&&learnt| learnt).count()
    }

    /// Cuts the end off beyond `context` tokens; whether there was something to cut.
    pub fn truncate(&mut self, context: usize) -> bool {
        let long = self.ids.len() > context;
        self.ids.truncate(context);
        self.learnt.truncate(context);
        long
    }

    /// Feeds what decides the example to a hash.
    pub fn absorb(&self, hasher: &mut Sha256) {
        hasher.update((self.ids.len() as u64).to_le_bytes());
        for (id, learnt) in self.ids.iter().zip(&self.learnt) {
            hasher.update(id.to_le_bytes());
            hasher.update([u8::from(*learnt)]);
        }
    }

    /// The hash of one example, for choosing held-out rows: equal examples fall on one side.
    pub fn hash(&self) -> u64 {
        let mut hasher = Sha256::new();
        self.absorb(&mut hasher);
        let digest: [u8; 32] = hasher.finalize().into();
        u64::from_le_bytes([
            digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7],
        ])
    }
}

/// Packs examples, one sequence each; position t predicts token t + 1 where that is learnt.
pub fn pack<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Batch {
    let mut batch = Batch { input_ids: vec![], targets: vec![], cu_seqlens: vec![0] };
    for example in examples {
        batch.input_ids.extend_from_slice(&example.ids);
        let next = example.ids.iter().zip(&example.learnt).skip(1);
        batch.targets.extend(next.map(|(&id, &learnt)| if learnt { id } else { IGNORE }));
        if !example.ids.is_empty() {
            batch.targets.push(IGNORE);
        }
        batch.cu_seqlens.push(batch.input_ids.len() as i32);
    }
    batch
}

/// Cuts a row of lengths into runs of at most `most` together; a longer one goes alone.
pub fn portions(lengths: impl IntoIterator<Item = usize>, most: usize) -> Vec<Range<usize>> {
    let mut portions: Vec<Range<usize>> = Vec::new();
    let mut held = 0;
    for (i, len) in lengths.into_iter().enumerate() {
        match portions.last_mut() {
            Some(last) if held + len <= most => {
                last.end = i + 1;
                held += len;
            }
            _ => {
                portions.push(i..i + 1);
                held = len;
            }
        }
    }
    portions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_next_learnt_tokens_of_their_own_sequence() {
        let a = Example::completion(&[1, 2], &[3, 4]);
        let b = Example::completion(&[5], &[6]);
        let batch = pack([&a, &b]);
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5, 6]);
        assert_eq!(batch.targets, [IGNORE, 3, 4, IGNORE, 6, IGNORE]);
        assert_eq!(batch.cu_seqlens, [0, 4, 6]);
        assert_eq!(a.counted() + b.counted(), batch.targets.iter().filter(|t| **t >= 0).count());
    }

    #[test]
    fn portions_hold_everything_once_in_order_and_no_more_than_asked() {
        assert_eq!(portions([3, 4, 3, 20, 1, 1], 7), vec![0..2, 2..3, 3..4, 4..6]);
        assert!(portions([], 7).is_empty());
        assert_eq!(portions([9], 7), vec![0..1]);
    }
}
