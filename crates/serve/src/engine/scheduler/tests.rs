//! Scheduling without a model: a world that does what the worker does, and counts.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use serde_json::json;
use tercet_tensor::DType;

use super::*;

const RULES: Rules = Rules { running: 4, prefill_tokens: 128, chunk: 64, replay: 32 };

/// One page more for every 64 tokens, and one for the rings.
fn costs() -> Costs {
    let config = serde_json::from_value(json!({
        "model_type": "tercet", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 4096,
        "nsa": { "compress_block": 8, "compress_stride": 8, "select_block": 8,
                 "select_count": 4, "window": 16 },
    }));
    let costs = Costs::new(&config.unwrap(), DType::F32);
    assert_eq!((costs.pages(1), costs.pages(64), costs.pages(65)), (2, 2, 3));
    costs
}

/// Runs a scheduler as the worker does, with answers of given lengths and no model.
struct World {
    scheduler: Scheduler,
    /// Prompt and answer to be written, of those that live.
    goals: BTreeMap<Id, (usize, usize)>,
    written: BTreeMap<Id, usize>,
    /// What is in each place: `None` is cleared.
    places: BTreeMap<usize, usize>,
    /// Chunks that were read, of each.
    chunks: BTreeMap<Id, Vec<Range<usize>>>,
    read: BTreeMap<Id, usize>,
}

impl World {
    fn new(pages: usize, kept: usize) -> Self {
        Self::of(RULES, pages, kept)
    }

    fn of(rules: Rules, pages: usize, kept: usize) -> Self {
        Self {
            scheduler: Scheduler::new(rules, costs(), pages, kept),
            goals: BTreeMap::new(),
            written: BTreeMap::new(),
            places: BTreeMap::new(),
            chunks: BTreeMap::new(),
            read: BTreeMap::new(),
        }
    }

    fn add(&mut self, id: Id, prompt: &[u32], answer: usize) {
        let keys = Keys::new("", None, prompt, RULES.chunk);
        self.scheduler.add(id, prompt.len(), Some(keys));
        self.goals.insert(id, (prompt.len(), answer));
        self.written.insert(id, 0);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Clear(slot) => drop(self.places.remove(&slot)),
            Op::Copy { from, to, id } => {
                assert!(self.places.insert(to, self.places[&from]).is_none());
                assert_eq!(self.places[&to], self.scheduler.held(id), "hits are whole");
            }
        }
    }

    fn end(&mut self, id: Id) {
        if let Some(op) = self.scheduler.remove(id) {
            self.apply(op);
        }
        self.goals.remove(&id);
    }

    fn chose(&mut self, id: Id) {
        let written = self.written.get_mut(&id).unwrap();
        *written += 1;
        self.scheduler.wrote(id);
        if *written >= self.goals[&id].1 {
            self.end(id);
        }
    }

    fn step(&mut self) -> Plan {
        let plan = self.scheduler.step();
        plan.ops.iter().for_each(|&op| self.apply(op));
        for &id in &plan.decode {
            let slot = self.scheduler.slot(id).unwrap();
            let held = self.scheduler.held(id);
            assert_eq!(self.places[&slot], held);
            let (prompt, all) = (self.goals[&id].0, self.goals[&id].0 + self.written[&id]);
            let again = self.scheduler.rules.replay == 0 && (prompt..all).contains(&held);
            assert!(held == all - 1 || again);
            self.places.insert(slot, held + 1);
            self.scheduler.holds(id, held + 1);
            if held + 1 == all {
                self.chose(id);
            }
        }
        let mut tokens = 0;
        for (id, range) in plan.reads.clone() {
            tokens += range.len();
            let slot = self.scheduler.slot(id).unwrap();
            assert_eq!(self.places.get(&slot).copied().unwrap_or(0), range.start);
            let (prompt, _) = self.goals[&id];
            assert!(range.end <= prompt || range.len() <= self.scheduler.rules.replay);
            assert!(range.start >= prompt || range.start % RULES.chunk == 0, "same chunks");
            self.places.insert(slot, range.end);
            self.scheduler.holds(id, range.end);
            self.chunks.entry(id).or_default().push(range.clone());
            *self.read.entry(id).or_default() += range.len();
            let mut ops = Vec::new();
            let kept = self.scheduler.keep(id, &mut ops);
            ops.into_iter().for_each(|op| self.apply(op));
            if let Some((_, to)) = kept {
                assert!(self.places.insert(to, range.end).is_none());
            }
            if range.end == prompt && self.written[&id] == 0 {
                for other in self.scheduler.followers(id) {
                    let to = self.scheduler.slot(other).unwrap();
                    self.places.insert(to, prompt);
                    self.scheduler.holds(other, prompt);
                    self.chose(other);
                }
                self.chose(id);
            }
        }
        assert!(tokens <= RULES.prefill_tokens);
        self.check();
        plan
    }

    /// Every page has one holder, every place one sequence.
    fn check(&self) {
        let Scheduler { pages, running, prefix, free_slots, .. } = &self.scheduler;
        assert_eq!(pages.used(), running.values().map(|item| item.pages).sum::<usize>());
        assert_eq!(pages.cached(), prefix.pages());
        let held = |item: &Item| costs().pages(item.held) <= item.pages;
        assert!(running.values().all(held), "more is held than was paid for");
        let taken: BTreeSet<usize> = running.values().map(|item| item.slot).collect();
        assert_eq!(taken.len(), running.len());
        assert_eq!(taken.len() + free_slots.len(), RULES.running);
        let in_use = self.places.keys().filter(|&&slot| slot < RULES.running);
        assert!(in_use.copied().all(|slot| taken.contains(&slot)), "not cleared");
        let kept = self.places.keys().filter(|&&slot| slot >= RULES.running).count();
        assert_eq!(kept, prefix.len());
    }

    /// Until all is answered; more steps than that are a standstill.
    fn finish(&mut self) {
        for _ in 0..20_000 {
            if self.scheduler.is_idle() {
                assert_eq!(self.scheduler.pages.used(), 0);
                assert!(self.goals.is_empty());
                return;
            }
            self.step();
        }
        panic!("{} sequences are not answered", self.goals.len());
    }
}

fn prompt(tokens: usize, first: u32) -> Vec<u32> {
    (0..tokens as u32).map(|i| i + first).collect()
}

#[test]
fn a_long_prompt_does_not_stall_short_ones() {
    let mut world = World::new(10_000, 0);
    for long in 0..3 {
        world.add(long, &prompt(65_536, long as u32), 1);
    }
    world.step();
    world.add(3, &prompt(100, 9), 5);
    // Two chunks of four prompts' turns, 64 tokens each, 128 tokens a step.
    let mut steps = 0;
    while world.written[&3] == 0 {
        world.step();
        steps += 1;
    }
    assert!(steps <= 2 * 4 * 64 / 128, "{steps} steps");
    for _ in 0..4 {
        assert_eq!(world.step().decode, [3], "answers grow with every step");
    }
    let read: Vec<usize> = (0..3).map(|long| world.read[&long]).collect();
    assert!(read.iter().max().unwrap() - read.iter().min().unwrap() <= 64, "{read:?}");
}

#[test]
fn short_prompts_do_not_starve_a_long_one() {
    let mut world = World::new(10_000, 0);
    world.add(0, &prompt(640, 0), 1);
    // As many short ones as there is room for, always.
    let mut next = 1;
    for _ in 0..10 * 4 {
        while world.goals.len() < 8 {
            world.add(next, &prompt(64, 1000 * next as u32), 1);
            next += 1;
        }
        world.step();
    }
    assert_eq!(world.written[&0], 1, "10 chunks, each after at most 4 chunks of 64");
}

#[test]
fn one_that_does_not_fit_is_overtaken_only_so_often() {
    let mut world = World::new(12, 0);
    world.add(0, &prompt(400, 0), 50);
    world.step();
    world.add(1, &prompt(500, 0), 1);
    let (mut next, mut younger) = (2, 0);
    while world.scheduler.slot(1).is_none() {
        while world.goals.len() < 6 {
            world.add(next, &prompt(10, next as u32), 1);
            next += 1;
        }
        let admitted = world.step().admitted;
        younger += admitted.iter().take_while(|&&id| id != 1).count();
    }
    assert_eq!(younger, OVERTAKEN);
}

#[test]
fn the_oldest_is_never_preempted() {
    let mut world = World::new(14, 0);
    (0..4).for_each(|id| world.add(id, &prompt(100, id as u32), 300));
    let mut preempted = BTreeSet::new();
    while !world.scheduler.is_idle() {
        let oldest = *world.goals.keys().next().unwrap();
        let plan = world.step();
        assert!(!plan.preempted.contains(&oldest));
        preempted.extend(plan.preempted);
    }
    assert!(!preempted.is_empty());
}

/// What was written before a preemption grows back a token a step, and is not read in chunks.
#[test]
fn without_replay_answers_grow_back_among_the_others() {
    let mut world = World::of(Rules { replay: 0, ..RULES }, 14, 0);
    (0..4).for_each(|id| world.add(id, &prompt(100, id as u32), 300));
    let (mut preempted, mut together) = (0, 0);
    while !world.scheduler.is_idle() {
        let plan = world.step();
        preempted += plan.preempted.len();
        together = together.max(plan.decode.len());
        assert!(plan.reads.iter().all(|(_, range)| range.end <= 100));
    }
    assert!(preempted > 0 && together > 1);
}

#[test]
fn equal_prompts_are_read_once() {
    let mut world = World::new(1000, 0);
    (0..4).for_each(|id| world.add(id, &prompt(300, 5), 3));
    world.finish();
    assert_eq!(world.read.values().sum::<usize>(), 300);
    // When the reader goes, the next one reads.
    (4..7).for_each(|id| world.add(id, &prompt(300, 6), 3));
    world.step();
    world.end(4);
    world.finish();
    assert_eq!(world.read[&5], 300);
    assert!(!world.read.contains_key(&6));
}

#[test]
fn a_kept_prefix_is_not_read_again_and_gives_way_to_sequences() {
    let mut world = World::new(14, 8);
    world.add(0, &prompt(200, 0), 2);
    world.finish();
    assert_eq!(world.scheduler.pages.cached(), costs().pages(192));
    world.add(1, &prompt(250, 0), 2);
    world.finish();
    assert_eq!(world.chunks[&1].first(), Some(&(192..250)));
    world.add(2, &prompt(800, 7000), 2);
    world.finish();
    assert!(
        world.scheduler.prefix.get(&Keys::new("", None, &prompt(250, 0), 64).blocks[2]).is_none()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]
    /// Random arrivals, lengths, shared beginnings, and cancels at random steps: all
    /// invariants after each step (`World::check`), and everything is answered and returned.
    #[test]
    fn random_traffic_returns_every_page(
        pages in 12usize..80,
        kept in 0usize..6,
        replay in prop_oneof![Just(0), Just(32)],
        traffic in prop::collection::vec((0usize..4, 1usize..500, 0u32..3, 1usize..120, 0u64..40), 1..60),
    ) {
        let mut world = World::of(Rules { replay, ..RULES }, pages, kept);
        let most = costs().tokens(pages);
        let mut cancels: Vec<(u64, Id)> = Vec::new();
        let mut clock = 0;
        for (id, (wait, length, shared, answer, cancel)) in traffic.into_iter().enumerate() {
            for _ in 0..wait {
                clock += 1;
                cancels.retain(|&(at, id)| {
                    if at <= clock {
                        world.end(id);
                    }
                    at > clock
                });
                world.step();
            }
            let length = length.min(most - 1);
            world.add(id as Id, &prompt(length, shared * 1000), answer.min(most - length));
            if cancel < 20 {
                cancels.push((clock + cancel, id as Id));
            }
        }
        world.finish();
        // What is kept can be given up to the last page.
        let mut ops = Vec::new();
        while world.scheduler.evict(&mut ops) {}
        ops.into_iter().for_each(|op| world.apply(op));
        prop_assert_eq!(world.scheduler.pages, Pages::new(pages));
        prop_assert!(world.places.is_empty());
    }
}

/// The bar: 1,000 sequences cancelled at any moment leave nothing behind.
#[test]
fn a_thousand_cancels_return_every_page() {
    let mut world = World::new(40, 0);
    let mut state = 1u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let (mut next, mut cancelled) = (0, 0);
    while cancelled < 1000 {
        if world.goals.len() < 8 {
            let length = 1 + random(700) as usize;
            world.add(next, &prompt(length, 1000 * next as u32), 1000);
            next += 1;
        }
        world.step();
        if random(3) == 0 && !world.goals.is_empty() {
            let at = random(world.goals.len() as u64) as usize;
            let id = *world.goals.keys().nth(at).unwrap();
            world.end(id);
            world.check();
            cancelled += 1;
        }
    }
    let left: Vec<Id> = world.goals.keys().copied().collect();
    left.into_iter().for_each(|id| world.end(id));
    assert_eq!(world.scheduler.pages, Pages::new(40));
    assert!(world.places.is_empty());
}

/// Places and pages are counted apart: where the counts disagree nobody is put into a place that
/// is another's, or admitted without pages.
#[test]
fn without_a_place_or_pages_nobody_is_admitted() {
    let mut scheduler = Scheduler::new(RULES, costs(), 3, 0);
    scheduler.add(0, 10, None);
    let mut item = scheduler.waiting.remove(&0).unwrap();
    let mut plan = Plan::default();
    let places = std::mem::take(&mut scheduler.free_slots);
    assert_eq!(scheduler.place(0, &mut item, 2, &mut plan), None);
    scheduler.free_slots = places;
    assert_eq!(scheduler.place(0, &mut item, 4, &mut plan), None);
    assert_eq!((plan, scheduler.pages.free()), (Plan::default(), 3));
    assert_eq!(scheduler.free_slots.len(), RULES.running);
    let mut plan = Plan::default();
    assert_eq!(scheduler.place(0, &mut item, 2, &mut plan), Some(()));
    assert_eq!((plan.admitted, item.slot, scheduler.pages.free()), (vec![0], 0, 1));
}
