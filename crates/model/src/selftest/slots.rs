//! Slots on a device: pages that are shared, given back and run out; what was selected; a
//! sequence's bits in company.

use tercet_attention::selftest::{Check, Tally, ensure};
use tercet_tensor::{DType, Device, Draw, exp_quantile};

use super::{error, fault, ids, model, whole_and_allowed};
use crate::Model;
use crate::slots::{Slots, Stepped};

/// Two sequences that begin alike, and what is known of their logits.
struct Pair {
    model: Model,
    ids: [Vec<i32>; 2],
    whole: [Vec<f32>; 2],
    allowed: f64,
}

/// Enough blocks for more than one page of them, averaged by the steps themselves; the other model
/// of averages has fewer in its context.
pub(super) const MANY_BLOCKS: (&str, &str) = (
    "nsa, mean, many blocks",
    r#"{"model_type": "tercet", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 512, "nsa": {"compress_block": 8,
        "compress_stride": 4, "select_block": 16, "select_count": 4, "window": 24}}"#,
);

/// Tokens of the sequences.
const TOKENS: usize = 340;

/// Tokens that the two have in common: four pages and a part of the next; with a block every four
/// tokens one page of those and a part of the next, too.
const ALIKE: usize = 290;

impl Pair {
    fn new(config: &str, device: &Device, dtype: DType) -> Check<Self> {
        let one = ids(TOKENS, 96);
        let mut two = one.clone();
        two[ALIKE..].reverse();
        let (model, first, near) = whole_and_allowed(config, device, dtype, super::model, &one)?;
        let (_, second, far) = whole_and_allowed(config, device, dtype, super::model, &two)?;
        Ok(Self { model, ids: [one, two], whole: [first, second], allowed: near.max(far) })
    }

    fn hold(&self, tally: &mut Tally, what: &str, of: usize, at: usize, got: &[f32]) {
        let vocab = self.model.config().vocab_size;
        let want = &self.whole[of][(at - 1) * vocab..at * vocab];
        tally.hold(&format!("{what} after {at} tokens"), error(got, want), self.allowed);
    }

    /// A token more for slots, each of which holds one of the two sequences.
    fn step(
        &self,
        tally: &mut Tally,
        what: &str,
        slots: &mut Slots,
        named: &[(usize, usize)],
    ) -> Check<()> {
        let lens: Vec<usize> = named.iter().map(|&(slot, _)| slots.len(slot)).collect();
        let token = |(&(slot, of), &len): (&(usize, usize), &usize)| (slot, self.ids[of][len]);
        let tokens: Vec<(usize, i32)> = named.iter().zip(&lens).map(token).collect();
        // Of three rows one takes the highest, one is drawn, one asks for nothing.
        let draw =
            |row: usize| (row % 3 < 2).then_some(Draw { temperature: (row % 3) as f32, at: 0.37 });
        let draws: Vec<Option<Draw>> = match slots.draws() {
            true => (0..tokens.len()).map(draw).collect(),
            false => Vec::new(),
        };
        let Stepped { drawn, logits } =
            slots.step_drawing(&self.model, &tokens, &draws, true).map_err(fault)?;
        let rows = logits.chunks(self.model.config().vocab_size);
        for (row, ((&(_, of), len), got)) in named.iter().zip(lens).zip(rows).enumerate() {
            self.hold(tally, what, of, len + 1, got);
            let highest = got.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let want = draws.get(row).copied().flatten().map(|draw| match draw.temperature {
                0.0 => got.iter().position(|&x| x == highest),
                temperature => exp_quantile(got, highest, 1.0 / temperature, draw.at),
            });
            let found = drawn.get(row).copied().flatten();
            let found = found.map(|drawn| drawn.token.map(|token| token as usize));
            ensure(found == want, || format!("row {row} drew {found:?}, not {want:?}"))?;
        }
        Ok(())
    }

    fn read(
        &self,
        tally: &mut Tally,
        slots: &mut Slots,
        (slot, of): (usize, usize),
        count: usize,
    ) -> Check<()> {
        let got = slots.read(&self.model, slot, &self.ids[of][..count]).map_err(fault)?;
        self.hold(tally, "a prompt", of, count, &got);
        Ok(())
    }
}

/// So many pages are free, where slots share any.
fn free(slots: &Slots, want: usize) -> Check<()> {
    let got = slots.free_pages();
    ensure(got.is_none_or(|got| got == want), || format!("{got:?} pages are free, not {want}"))
}

/// A copy in the middle of a page goes on apart from what it is a copy of; what is given back is
/// used again while others read what they shared with it.
pub(super) fn shared(tally: &mut Tally, config: &str, device: &Device, dtype: DType) -> Check<()> {
    let pair = Pair::new(config, device, dtype)?;
    let mut slots = pair.model.slots_within(4, TOKENS, 13).map_err(fault)?;
    if slots.free_pages().is_some() {
        let (want, got) = (pair.model.config().slots_bytes([4, TOKENS], 13, dtype), slots.bytes());
        ensure(got as u64 == want, || format!("{got} bytes, planned were {want}"))?;
    }
    pair.read(tally, &mut slots, (0, 0), ALIKE)?;
    free(&slots, 13 - 5)?;
    slots.copy(0, 1).map_err(fault)?;
    free(&slots, 7)?;
    // Both over the end of the page, their order changing.
    for turn in 0..35 {
        let named = if turn % 2 == 0 { [(0, 0), (1, 1)] } else { [(1, 1), (0, 0)] };
        pair.step(tally, "a copy and its source", &mut slots, &named)?;
    }
    free(&slots, 5)?;
    // After steps, too; and onto a slot that held something.
    slots.copy(1, 2).map_err(fault)?;
    free(&slots, 4)?;
    slots.copy(0, 2).map_err(fault)?;
    free(&slots, 4)?;
    slots.clear(0).map_err(fault)?;
    // Its last page; the others are still read.
    free(&slots, 5)?;
    pair.read(tally, &mut slots, (3, 1), 70)?;
    free(&slots, 3)?;
    for _ in 0..10 {
        pair.step(tally, "pages used again", &mut slots, &[(3, 1), (2, 0), (1, 1)])?;
    }
    for slot in 1..4 {
        slots.clear(slot).map_err(fault)?;
    }
    free(&slots, 13)
}

/// Without a page left, an error changes nothing; with one given back, all goes on.
pub(super) fn none_left(
    tally: &mut Tally,
    config: &str,
    device: &Device,
    dtype: DType,
) -> Check<()> {
    let pair = Pair::new(config, device, dtype)?;
    let mut slots = pair.model.slots_within(3, 150, 3).map_err(fault)?;
    pair.read(tally, &mut slots, (0, 0), 128)?;
    pair.read(tally, &mut slots, (1, 1), 60)?;
    if slots.free_pages().is_none() {
        return Ok(());
    }
    let refused = |what: &str, done: crate::Result<()>| match done {
        Err(error) if error.to_string().contains("pages") => Ok(()),
        Err(error) => ensure(false, || format!("{what}: {error}")),
        Ok(()) => ensure(false, || format!("{what} was taken without a page")),
    };
    let next = [(1, pair.ids[1][60]), (0, pair.ids[0][128])];
    refused("a step", slots.step(&pair.model, &next).map(|_| ()))?;
    refused("a prompt", slots.read(&pair.model, 2, &pair.ids[0][..5]).map(|_| ()))?;
    refused("a chunk", slots.read(&pair.model, 1, &pair.ids[1][60..70]).map(|_| ()))?;
    refused("a copy", slots.copy(1, 2))?;
    let lens = [0, 1, 2].map(|slot| slots.len(slot));
    ensure(lens == [128, 60, 0], || format!("{lens:?} tokens are held"))?;
    free(&slots, 0)?;
    // What fits into the page that it has goes on.
    for _ in 60..64 {
        pair.step(tally, "beside a full pool", &mut slots, &[(1, 1)])?;
    }
    slots.clear(1).map_err(fault)?;
    pair.step(tally, "with a page given back", &mut slots, &[(0, 0)])?;
    refused("a prompt", slots.read(&pair.model, 1, &pair.ids[1][..5]).map(|_| ()))?;
    slots.clear(0).map_err(fault)?;
    pair.read(tally, &mut slots, (2, 1), 149)?;
    pair.step(tally, "all pages", &mut slots, &[(2, 1)])
}

/// What is read back is what the CPU selects, in f32; in bf16, where near-ties may fall the other
/// way, blocks that could have been.
pub(super) fn selected(config: &str, device: &Device, dtype: DType) -> Check<()> {
    let (own, ids) = (model(config, device, dtype)?, ids(150, 96));
    let cpu = model(config, &Device::Cpu, DType::F32)?;
    let mut slots = own.slots(4, 150).map_err(fault)?;
    let mut exact = cpu.slots(4, 150).map_err(fault)?;
    let Some(spec) = own.config().nsa.clone() else {
        slots.read(&own, 0, &ids[..5]).map_err(fault)?;
        let none = slots.selected(0).map_err(fault)?.is_none();
        return ensure(none, || "a dense model selected".into());
    };
    let compare = |slots: &Slots, exact: &Slots, slot: usize| {
        let at = slots.len(slot);
        let got = slots.selected(slot).map_err(fault)?;
        let want = exact.selected(slot).map_err(fault)?;
        let (Some(got), Some(want)) = (got, want) else {
            return ensure(false, || format!("slot {slot} selected nothing after {at} tokens"));
        };
        if dtype == DType::F32 {
            return ensure(got == want, || format!("after {at} tokens: {got:?}, not {want:?}"));
        }
        let current = ((at - 1) / spec.select_block) as i32;
        let fine = |blocks: &[i32]| {
            let some: Vec<i32> = blocks.iter().copied().filter(|&block| block >= 0).collect();
            let ends = some.first() == Some(&0) && some.last() == Some(&current);
            some.is_sorted_by(|a, b| a < b) && ends
        };
        let groups = || got.iter().flat_map(|layer| layer.chunks(spec.select_count));
        ensure(groups().all(fine), || format!("after {at} tokens: {got:?}"))
    };
    let both = |slots: &mut Slots, exact: &mut Slots, slot: usize, upto: usize| {
        let from = slots.len(slot);
        slots.read(&own, slot, &ids[from..upto]).map_err(fault)?;
        exact.read(&cpu, slot, &ids[from..upto]).map_err(fault)?;
        compare(slots, exact, slot)
    };
    for (slot, upto) in [(0, 70), (1, 33), (0, 100), (2, 1)] {
        both(&mut slots, &mut exact, slot, upto)?;
    }
    for (from, to) in [(2, 3), (0, 3)] {
        slots.copy(from, to).map_err(fault)?;
        exact.copy(from, to).map_err(fault)?;
    }
    for turn in 0..40 {
        let mut named: Vec<usize> = (0..4).filter(|slot| (turn + slot) % 3 != 0).collect();
        named.rotate_left(turn % 2);
        let tokens: Vec<(usize, i32)> =
            named.iter().map(|&slot| (slot, ids[slots.len(slot)])).collect();
        slots.step(&own, &tokens).map_err(fault)?;
        exact.step(&cpu, &tokens).map_err(fault)?;
        for slot in named {
            compare(&slots, &exact, slot)?;
        }
    }
    Ok(())
}

/// Slots of the test of company: more than a tile of any product has rows.
const CROWD: usize = 150;

/// With a fixed number of rows a sequence has the same bits alone, in the first row, and in any
/// other among many, in pages of its own or shared ones.
pub(super) fn company(config: &str, device: &Device, dtype: DType) -> Check<()> {
    let (own, ids) = (model(config, device, dtype)?, ids(100, 96));
    let mut slots = own.slots_within(CROWD, 150, CROWD + 20).map_err(fault)?;
    // Which experts others go to changes bits on a GPU; then it is one row or nothing.
    let apart = own.config().moe.is_some();
    slots.fix_rows(if apart { 1 } else { CROWD }).map_err(fault)?;
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let mut alone = Vec::new();
    slots.read(&own, 0, &ids[..64]).map_err(fault)?;
    alone.push(bits(&slots.read(&own, 0, &ids[64..70]).map_err(fault)?));
    for &id in &ids[70..90] {
        alone.push(bits(slots.step(&own, &[(0, id)]).map_err(fault)?));
    }
    slots.clear(0).map_err(fault)?;

    // The others hold a token or two; of the last one the first chunk is a copy.
    slots.read(&own, 1, &ids[5..6]).map_err(fault)?;
    slots.read(&own, 2, &ids[7..9]).map_err(fault)?;
    for slot in 3..CROWD - 2 {
        slots.copy(1 + slot % 2, slot).map_err(fault)?;
    }
    slots.read(&own, CROWD - 2, &ids[..64]).map_err(fault)?;
    slots.copy(CROWD - 2, CROWD - 1).map_err(fault)?;
    let last = CROWD - 1;
    let vocab = own.config().vocab_size;
    let mut together = vec![bits(&slots.read(&own, last, &ids[64..70]).map_err(fault)?)];
    for (turn, &id) in ids[70..90].iter().enumerate() {
        // Among ever more others, at the end and in the middle of the rows.
        let others = (1..CROWD - 1).step_by(1 + (20 - turn) / 4);
        let mut tokens: Vec<(usize, i32)> = others.map(|slot| (slot, ids[slot % 100])).collect();
        let at = if turn % 2 == 0 { tokens.len() } else { tokens.len() / 2 };
        tokens.insert(at, (last, id));
        if apart {
            tokens = vec![(last, id)];
        }
        let at = if apart { 0 } else { at };
        let got = slots.step(&own, &tokens).map_err(fault)?;
        together.push(bits(&got[at * vocab..(at + 1) * vocab]));
    }
    for (turn, (alone, together)) in alone.iter().zip(&together).enumerate() {
        ensure(alone == together, || format!("other bits after {turn} steps in company"))?;
    }
    Ok(())
}
