//! Who is computed next: plain bookkeeping over lengths, pages and places, without a model.
//!
//! Each step has two parts. First every answer that is being written grows by a token. Then at
//! most `prefill_tokens` tokens of prompts are read, a chunk of each prompt in turn.
//!
//! * **Fair.** Prompts take turns by chunks: when R prompts are being read, one of c chunks is
//!   read after at most c·R chunks, however long the others are. Answers wait for at most
//!   `prefill_tokens` tokens of prompts between two of their own.
//! * **In order.** Sequences are admitted as they came. One that does not fit the memory yet is
//!   overtaken by at most [`OVERTAKEN`] younger ones, then nothing is admitted before it.
//! * **The oldest goes on.** When pages run out, kept prefixes give way, then the youngest
//!   sequence, which is computed again later; so the oldest always gets to its end.
//! * **Same chunks.** A prompt is cut at multiples of `chunk` from its start, whatever else
//!   happens, and what was written is read again by at most `replay` tokens at a time, or where
//!   only steps have the bits of steps grows back among the answers: sums have the same order
//!   every time.
//! * **Read once.** Of equal prompts that are there together one is read, and the others take a
//!   copy.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use crate::engine::pages::{Costs, Pages};
use crate::engine::prefix::{Key, Keys, Prefix};

/// A sequence; smaller came earlier.
pub(super) type Id = u64;

/// Sequences that may be admitted before an older one that does not fit yet.
const OVERTAKEN: usize = 32;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Sequences side by side, each in a place of its own, from 0 on.
    pub running: usize,
    /// Tokens of prompts read in a step; at least `chunk`.
    pub prefill_tokens: usize,
    /// Tokens of a prompt read at once.
    pub chunk: usize,
    /// Written tokens read again at once; 0: a token a step, as they were written.
    pub replay: usize,
}

/// What to do with places, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Clear(usize),
    /// `id` begins with what a kept prefix holds; an error is told to [`Scheduler::not_copied`].
    Copy {
        from: usize,
        to: usize,
        id: Id,
    },
}

/// A step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub ops: Vec<Op>,
    /// Sequences that have a place now.
    pub admitted: Vec<Id>,
    /// Sequences that lost theirs.
    pub preempted: Vec<Id>,
    /// Sequences that grow by a token, ascending: one that was just chosen, or with
    /// [`Rules::replay`] 0 the next of those that were written before a preemption.
    pub decode: Vec<Id>,
    /// Then, one after the other: which tokens of whom are read.
    pub reads: Vec<(Id, Range<usize>)>,
}

/// One sequence as far as scheduling goes.
#[derive(Debug)]
struct Item {
    /// Names of its beginnings; `None` when nothing is shared.
    keys: Option<Keys>,
    /// Lengths after which its cache is to be kept.
    cuts: Vec<usize>,
    /// Tokens of the prompt, at least 1.
    prompt: usize,
    /// Tokens written.
    written: usize,
    /// Tokens in its place.
    held: usize,
    pages: usize,
    slot: usize,
    /// When it was last served; the smallest is next.
    turn: u64,
    overtaken: usize,
}

impl Item {
    /// Tokens to be held before the next one can be chosen or, where that was, be appended.
    fn goal(&self) -> usize {
        self.prompt + self.written.saturating_sub(1)
    }

    /// The prompt is being read for the first time.
    fn begins(&self) -> bool {
        self.written == 0 && self.held < self.prompt
    }
}

/// See the module.
pub(super) struct Scheduler {
    rules: Rules,
    costs: Costs,
    pages: Pages,
    prefix: Prefix,
    waiting: BTreeMap<Id, Item>,
    running: BTreeMap<Id, Item>,
    free_slots: Vec<usize>,
    turn: u64,
}

impl Scheduler {
    /// `kept` places after those of the running sequences hold prefixes.
    pub fn new(rules: Rules, costs: Costs, pages: usize, kept: usize) -> Self {
        Self {
            rules,
            costs,
            pages: Pages::new(pages),
            prefix: Prefix::new(rules.running..rules.running + kept),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            free_slots: (0..rules.running).rev().collect(),
            turn: 0,
        }
    }

    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn slot(&self, id: Id) -> Option<usize> {
        self.running.get(&id).map(|item| item.slot)
    }

    /// Tokens in a running sequence's place.
    pub fn held(&self, id: Id) -> usize {
        self.running.get(&id).map_or(0, |item| item.held)
    }

    /// Takes a sequence whose pages fit at all.
    pub fn add(&mut self, id: Id, prompt: usize, keys: Option<Keys>) {
        let item = Item {
            keys,
            cuts: Vec::new(),
            prompt,
            written: 0,
            held: 0,
            pages: 0,
            slot: 0,
            turn: 0,
            overtaken: 0,
        };
        self.waiting.insert(id, item);
    }

    /// Forgets a sequence that ended; its pages are free, and its place once it is cleared.
    pub fn remove(&mut self, id: Id) -> Option<Op> {
        self.waiting.remove(&id);
        let item = self.running.remove(&id)?;
        Some(self.release(&item))
    }

    /// Sends a running sequence back to be computed again.
    pub fn again(&mut self, id: Id) -> Option<Op> {
        let mut item = self.running.remove(&id)?;
        let op = self.release(&item);
        (item.held, item.pages) = (0, 0);
        self.waiting.insert(id, item);
        Some(op)
    }

    fn release(&mut self, item: &Item) -> Op {
        self.pages.give(item.pages);
        self.free_slots.push(item.slot);
        Op::Clear(item.slot)
    }

    /// What comes next.
    pub fn step(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.grow(&mut plan);
        self.admit(&mut plan);
        self.read(&mut plan);
        plan
    }

    /// Tokens of a sequence that are read rather than stepped.
    fn read_until(&self, item: &Item) -> usize {
        if self.rules.replay == 0 { item.prompt } else { item.goal() }
    }

    /// A page more for each answer that needs one.
    fn grow(&mut self, plan: &mut Plan) {
        let decoding = |item: &Item| item.written > 0 && item.held >= self.read_until(item);
        let ids: Vec<Id> =
            self.running.iter().filter(|(_, item)| decoding(item)).map(|(&id, _)| id).collect();
        for id in ids {
            while let Some(item) = self.running.get_mut(&id) {
                let more = self.costs.pages(item.held + 1).saturating_sub(item.pages);
                if self.pages.take(more) {
                    item.pages += more;
                    plan.decode.push(id);
                    break;
                }
                if self.evict(&mut plan.ops) {
                    continue;
                }
                // Not older than this one, so none that is in the plan already.
                let youngest = self.running.last_key_value().map_or(id, |(&id, _)| id);
                plan.ops.extend(self.again(youngest));
                plan.preempted.push(youngest);
            }
        }
    }

    fn admit(&mut self, plan: &mut Plan) {
        if self.free_slots.is_empty() {
            return;
        }
        let mut stuck: Option<Id> = None;
        let ids: Vec<Id> = self.waiting.keys().copied().collect();
        for id in ids {
            if self.free_slots.is_empty() {
                return;
            }
            let Some(item) = self.waiting.get(&id) else { continue };
            let need = self.costs.pages(item.goal());
            // A page for each answer to go on with, or what is admitted now is preempted soon.
            let spare = self.running.len();
            if need + spare > self.pages.free() + self.pages.cached() {
                if item.overtaken >= OVERTAKEN {
                    return;
                }
                stuck = stuck.or(Some(id));
                continue;
            }
            let Some(mut item) = self.waiting.remove(&id) else { continue };
            if self.place(id, &mut item, need, plan).is_none() {
                self.waiting.insert(id, item);
                return;
            }
            self.running.insert(id, item);
            if let Some(older) = stuck.and_then(|id| self.waiting.get_mut(&id)) {
                older.overtaken += 1;
                if older.overtaken >= OVERTAKEN {
                    return;
                }
            }
        }
    }

    /// Gives a sequence its pages, its place, and what is kept of its prompt. The caller saw that
    /// there are enough of both; if not, it gets neither and is not admitted.
    fn place(&mut self, id: Id, item: &mut Item, need: usize, plan: &mut Plan) -> Option<()> {
        let slot = *self.free_slots.last()?;
        let hit = item.keys.as_ref().and_then(|keys| self.prefix.find(keys));
        while !self.pages.take(need) {
            if !self.evict(&mut plan.ops) {
                return None;
            }
        }
        self.free_slots.pop();
        (item.pages, item.slot) = (need, slot);
        item.cuts = item.keys.as_ref().map_or_else(Vec::new, |keys| self.prefix.cuts(keys));
        item.held = 0;
        self.turn += 1;
        item.turn = self.turn;
        // It may have had to give way to the pages.
        if let Some(kept) = hit.and_then(|key| self.prefix.get(&key)) {
            item.held = kept.tokens;
            plan.ops.push(Op::Copy { from: kept.slot, to: item.slot, id });
        }
        plan.admitted.push(id);
        Some(())
    }

    /// Hands out the step's tokens of prompts.
    fn read(&mut self, plan: &mut Plan) {
        let leaders = self.leaders();
        let reading = |(&id, item): (&Id, &Item)| {
            let follows = item.begins() && leader(&leaders, item).is_some_and(|other| other != id);
            (item.held < self.read_until(item) && !follows).then_some((item.turn, id, item.held))
        };
        let mut order: Vec<(u64, Id, usize)> = self.running.iter().filter_map(reading).collect();
        order.sort_unstable();
        let mut order: VecDeque<(Id, usize)> =
            order.into_iter().map(|(_, id, held)| (id, held)).collect();
        let mut left = self.rules.prefill_tokens;
        while let Some((id, held)) = order.pop_front() {
            let Some(until) = self.running.get(&id).map(|item| self.read_until(item)) else {
                continue;
            };
            let Some(item) = self.running.get_mut(&id) else { continue };
            let end = match held < item.prompt {
                true => item.prompt.min((held / self.rules.chunk + 1) * self.rules.chunk),
                false => item.goal().min(held + self.rules.replay),
            };
            // Chunks are not cut; it comes first in the next step.
            if end - held > left {
                return;
            }
            left -= end - held;
            self.turn += 1;
            item.turn = self.turn;
            plan.reads.push((id, held..end));
            if end < until {
                order.push_back((id, end));
            }
        }
    }

    /// Of each prompt that is being read, who reads it: whoever is furthest, the oldest of them.
    fn leaders(&self) -> HashMap<Key, Id> {
        let mut leaders: HashMap<Key, (Reverse<usize>, Id)> = HashMap::new();
        for (&id, item) in self.running.iter().filter(|(_, item)| item.begins()) {
            if let Some(keys) = &item.keys {
                let rank = (Reverse(item.held), id);
                let best = leaders.entry(keys.whole).or_insert(rank);
                *best = rank.min(*best);
            }
        }
        leaders.into_iter().map(|(key, (_, id))| (key, id)).collect()
    }

    /// Those that wait for the prompt that `id` has just read.
    pub fn followers(&self, id: Id) -> Vec<Id> {
        let Some(keys) = self.running.get(&id).and_then(|item| item.keys.as_ref()) else {
            return Vec::new();
        };
        let same = |item: &Item| {
            item.begins() && item.keys.as_ref().is_some_and(|other| other.whole == keys.whole)
        };
        self.running.iter().filter(|(_, item)| same(item)).map(|(&id, _)| id).collect()
    }

    /// Notes that a sequence's place holds `held` tokens now.
    pub fn holds(&mut self, id: Id, held: usize) {
        if let Some(item) = self.running.get_mut(&id) {
            item.held = held;
        }
    }

    /// Notes that a token was chosen.
    pub fn wrote(&mut self, id: Id) {
        if let Some(item) = self.running.get_mut(&id) {
            item.written += 1;
        }
    }

    /// Notes that caches cannot be copied into this sequence's place: it reads for itself.
    pub fn not_copied(&mut self, id: Id) {
        if let Some(item) = self.running.get_mut(&id) {
            (item.held, item.keys) = (0, None);
        }
    }

    /// Finds a place for a copy of what `id` holds, when that is to be kept; first come places to
    /// clear. An error of the copy is told to [`Scheduler::not_kept`].
    pub fn keep(&mut self, id: Id, ops: &mut Vec<Op>) -> Option<(Key, usize)> {
        let item = self.running.get(&id)?;
        let tokens = item.held;
        if !item.cuts.contains(&tokens) {
            return None;
        }
        let key = item.keys.as_ref()?.at(tokens)?;
        let need = self.costs.pages(tokens);
        if self.prefix.get(&key).is_some() || need > self.pages.free() + self.pages.cached() {
            return None;
        }
        while need > self.pages.free() || !self.prefix.has_room() {
            if !self.evict(ops) {
                return None;
            }
        }
        let kept = self.prefix.insert(key, tokens, need)?;
        if !self.pages.keep(need) {
            self.prefix.remove(&key);
            return None;
        }
        Some((key, kept.slot))
    }

    /// Forgets a prefix whose copy failed.
    pub fn not_kept(&mut self, key: &Key) -> Option<Op> {
        let kept = self.prefix.remove(key)?;
        self.pages.drop_kept(kept.pages);
        Some(Op::Clear(kept.slot))
    }

    /// Gives up a kept prefix, if there is one.
    fn evict(&mut self, ops: &mut Vec<Op>) -> bool {
        let Some(kept) = self.prefix.evict() else { return false };
        self.pages.drop_kept(kept.pages);
        ops.push(Op::Clear(kept.slot));
        true
    }
}

fn leader(leaders: &HashMap<Key, Id>, item: &Item) -> Option<Id> {
    leaders.get(&item.keys.as_ref()?.whole).copied()
}

#[cfg(test)]
mod tests;
