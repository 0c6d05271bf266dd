//! Which beginnings of prompts are kept, so that the next prompt with the same one is read from
//! there on only.
//!
//! What is kept is a whole cache of the first n tokens, a copy in a place of its own that costs
//! the pages of a sequence of n tokens. A beginning is named by a hash chained from its namespace
//! and adapter over its blocks of tokens: to be found it has to be of the same owner and equal to
//! the last token. Kept are, of each prompt that is read, the last whole block before its last
//! token (a conversation goes on from there), and the last block that it shares with a prompt
//! read before (a system prompt, from its second use on). The one that was unused longest gives
//! way.

use std::collections::{HashMap, HashSet, VecDeque};

use sha2::{Digest, Sha256};

/// The name of a beginning.
pub(super) type Key = [u8; 32];

/// Names that are remembered of prompts read before, whether their caches are kept or not.
const SEEN: usize = 1 << 16;

/// Names of a prompt's beginnings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    /// Tokens of a block.
    pub grain: usize,
    /// Of the first i + 1 blocks. The last token of the prompt is in none, since its logits are
    /// wanted.
    pub blocks: Vec<Key>,
    /// Of the prompt as a whole.
    pub whole: Key,
}

impl Keys {
    pub fn new(namespace: &str, adapter: Option<&str>, prompt: &[u32], grain: usize) -> Self {
        let mut hash = Sha256::new();
        // Lengths first, so that no two pairs of texts are one text.
        hash.update((namespace.len() as u64).to_le_bytes());
        hash.update(namespace);
        hash.update(adapter.map_or(u64::MAX, |name| name.len() as u64).to_le_bytes());
        hash.update(adapter.unwrap_or_default());
        let mut at: Key = hash.finalize().into();
        let chain = |at: Key, tokens: &[u32]| -> Key {
            let mut hash = Sha256::new();
            hash.update(at);
            tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
            hash.finalize().into()
        };
        let mut blocks = Vec::new();
        for block in prompt[..prompt.len().saturating_sub(1)].chunks_exact(grain) {
            at = chain(at, block);
            blocks.push(at);
        }
        let whole = chain(at, &prompt[blocks.len() * grain..]);
        Self { grain, blocks, whole }
    }

    /// The name of the first `tokens`, when they are whole blocks.
    pub fn at(&self, tokens: usize) -> Option<Key> {
        if tokens == 0 || !tokens.is_multiple_of(self.grain) {
            return None;
        }
        self.blocks.get(tokens / self.grain - 1).copied()
    }
}

/// A beginning that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Where its cache is.
    pub slot: usize,
    /// Tokens it holds.
    pub tokens: usize,
    /// Pages it costs.
    pub pages: usize,
    used_at: u64,
}

/// The kept beginnings.
pub(super) struct Prefix {
    kept: HashMap<Key, Kept>,
    free_slots: Vec<usize>,
    clock: u64,
    seen: HashSet<Key>,
    seen_order: VecDeque<Key>,
}

impl Prefix {
    /// None yet, and these places to keep them in.
    pub fn new(slots: std::ops::Range<usize>) -> Self {
        Self {
            kept: HashMap::new(),
            free_slots: slots.rev().collect(),
            clock: 0,
            seen: HashSet::new(),
            seen_order: VecDeque::new(),
        }
    }

    /// The longest kept beginning, marked as used now.
    pub fn find(&mut self, keys: &Keys) -> Option<Key> {
        let key = *keys.blocks.iter().rev().find(|key| self.kept.contains_key(*key))?;
        self.clock += 1;
        if let Some(kept) = self.kept.get_mut(&key) {
            kept.used_at = self.clock;
        }
        Some(key)
    }

    pub fn get(&self, key: &Key) -> Option<Kept> {
        self.kept.get(key).copied()
    }

    /// Tokens after which a prompt's cache should be kept, ascending, and remembers the prompt.
    pub fn cuts(&mut self, keys: &Keys) -> Vec<usize> {
        let shared = keys.blocks.iter().rposition(|key| self.seen.contains(key));
        for &key in &keys.blocks {
            if self.seen.insert(key) {
                self.seen_order.push_back(key);
            }
        }
        while self.seen_order.len() > SEEN
            && let Some(key) = self.seen_order.pop_front()
        {
            self.seen.remove(&key);
        }
        let last = keys.blocks.len().checked_sub(1);
        let mut cuts: Vec<usize> =
            shared.into_iter().chain(last).map(|block| (block + 1) * keys.grain).collect();
        cuts.dedup();
        cuts
    }

    /// Whether there is a place left for one more.
    pub fn has_room(&self) -> bool {
        !self.free_slots.is_empty()
    }

    /// A place for a new beginning. `None` when it is kept already or no place is left.
    pub fn insert(&mut self, key: Key, tokens: usize, pages: usize) -> Option<Kept> {
        if self.kept.contains_key(&key) {
            return None;
        }
        let slot = self.free_slots.pop()?;
        self.clock += 1;
        let kept = Kept { slot, tokens, pages, used_at: self.clock };
        self.kept.insert(key, kept);
        Some(kept)
    }

    /// Gives up the one that was unused longest.
    pub fn evict(&mut self) -> Option<Kept> {
        let key = *self.kept.iter().min_by_key(|(_, kept)| kept.used_at)?.0;
        self.remove(&key)
    }

    /// Gives up one.
    pub fn remove(&mut self, key: &Key) -> Option<Kept> {
        let kept = self.kept.remove(key)?;
        self.free_slots.push(kept.slot);
        Some(kept)
    }
}

#[cfg(test)]
impl Prefix {
    /// How many are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// The pages of all of them.
    pub fn pages(&self) -> usize {
        self.kept.values().map(|kept| kept.pages).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_owners_adapters_and_tokens_apart() {
        let prompt: Vec<u32> = (0..200).collect();
        let keys = Keys::new("a", None, &prompt, 64);
        assert_eq!(keys.blocks.len(), 3);
        assert_eq!(Keys::new("a", None, &prompt[..193], 64).blocks, keys.blocks);
        // A prompt of whole blocks: the last one holds its last token.
        assert_eq!(Keys::new("a", None, &prompt[..192], 64).blocks, keys.blocks[..2]);
        let others = [
            Keys::new("b", None, &prompt, 64),
            Keys::new("", None, &prompt, 64),
            Keys::new("a", Some(""), &prompt, 64),
            Keys::new("", Some("a"), &prompt, 64),
        ];
        for other in &others {
            assert!(other.blocks.iter().all(|key| !keys.blocks.contains(key)));
            assert_ne!(other.whole, keys.whole);
        }
        let mut changed = prompt.clone();
        changed[70] = 7;
        let changed = Keys::new("a", None, &changed, 64);
        assert_eq!(changed.blocks[0], keys.blocks[0]);
        assert_ne!(changed.blocks[1], keys.blocks[1]);
        assert_ne!(changed.blocks[2], keys.blocks[2], "chained");
        assert_ne!(Keys::new("a", None, &prompt[..199], 64).whole, keys.whole);
    }

    #[test]
    fn the_longest_is_found_and_the_longest_unused_gives_way() {
        let mut prefix = Prefix::new(10..12);
        let prompt: Vec<u32> = (0..300).collect();
        let (long, short) =
            (Keys::new("", None, &prompt, 64), Keys::new("", None, &prompt[..100], 64));
        assert_eq!(prefix.find(&long), None);
        let a = prefix.insert(short.blocks[0], 64, 1).unwrap();
        let b = prefix.insert(long.blocks[3], 256, 4).unwrap();
        assert_ne!(a.slot, b.slot);
        assert!(prefix.insert(long.blocks[1], 128, 2).is_none(), "two places");
        assert_eq!(prefix.find(&long), Some(long.blocks[3]));
        assert_eq!(prefix.find(&short), Some(short.blocks[0]));
        assert_eq!(prefix.evict().unwrap().tokens, 256, "the short one was used last");
        assert_eq!(prefix.find(&long), Some(short.blocks[0]));
    }

    #[test]
    fn what_a_second_prompt_shares_is_kept() {
        let mut prefix = Prefix::new(0..4);
        let system: Vec<u32> = (0..130).collect();
        let ask = |with: u32| [&system[..], &vec![with; 200]].concat();
        let [one, two] = [500, 600].map(|with| Keys::new("", None, &ask(with), 64));
        assert_eq!(prefix.cuts(&one), [320]);
        assert_eq!(prefix.cuts(&two), [128, 320]);
        let other = Keys::new("someone else", None, &ask(700), 64);
        assert_eq!(prefix.cuts(&other), [320]);
        assert_eq!(prefix.cuts(&Keys::new("", None, &system[..64], 64)), [0; 0]);
    }
}
