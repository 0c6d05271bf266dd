//! Places for a fixed number of sequences that are decoded side by side, by whichever device the
//! model is on: what sampling of many answers and serving stand on.

use tercet_tensor::caches::{Pages, Partial};
use tercet_tensor::{Device, Draw, Drawn};

use crate::batch::{Inputs, check_ids};
use crate::cache::Cache;
use crate::decode_graph::Token;
use crate::slots_cuda::OnDevice;
use crate::{Error, Model, Result};

/// Tokens of a page.
pub const PAGE: usize = Pages::ROWS;

/// Some sequences' keys and values; each sequence has its number, from 0 on.
pub struct Slots {
    held: Held,
    states: Vec<State>,
    tokens: usize,
    /// Of the last step, where no graph holds them.
    logits: Vec<f32>,
}

/// What is known of a slot.
#[derive(Clone, Copy, Default)]
struct State {
    /// Tokens held.
    len: usize,
    /// Of the weights that they were computed with; see [`Model`].
    stamp: u64,
    /// It has taken steps, after which a GPU's NSA caches take nothing else.
    stepped: bool,
    /// An error left its layers at odds.
    broken: bool,
}

/// What a step gave.
pub struct Stepped<'s> {
    /// The tokens that were drawn, `[n]`; empty where no draw was given.
    pub drawn: Vec<Option<Drawn>>,
    /// The logits, `[n, vocab]`; empty where they were not wanted.
    pub logits: &'s [f32],
}

enum Held {
    Cpu(Vec<Option<Cache>>),
    Cuda(Box<OnDevice>),
}

impl Model {
    /// `count` empty slots with room for `tokens` tokens each, at most the model's context. A GPU
    /// takes their memory at once, the CPU as sequences grow.
    pub fn slots(&self, count: usize, tokens: usize) -> Result<Slots> {
        let pages = count.saturating_mul(tokens.div_ceil(PAGE));
        self.slots_within(count, tokens, pages)
    }

    /// As [`Model::slots`]; on a GPU all slots together hold at most `pages` pages of [`PAGE`]
    /// tokens: a slot takes a page as it grows into it, a copy shares the full pages of what it is
    /// a copy of until both are cleared. [`ModelConfig::slots_bytes`] says what they cost.
    ///
    /// [`ModelConfig::slots_bytes`]: crate::ModelConfig::slots_bytes
    pub fn slots_within(&self, count: usize, tokens: usize, pages: usize) -> Result<Slots> {
        let context = self.config().max_position_embeddings;
        if count == 0 || tokens == 0 || tokens > context || pages == 0 {
            return Err(Error::Batch(format!(
                "{count} slots of {tokens} tokens in {pages} pages; expected at least 1 of each, \
                 and at most the model's context of {context} tokens"
            )));
        }
        let held = if let Device::Cuda(gpu) = self.device() {
            Held::Cuda(Box::new(OnDevice::new(self, gpu, [count, tokens], pages)?))
        } else {
            Held::Cpu((0..count).map(|_| None).collect())
        };
        Ok(Slots { held, states: vec![State::default(); count], tokens, logits: Vec::new() })
    }
}

impl Slots {
    /// How many slots there are.
    pub fn count(&self) -> usize {
        self.states.len()
    }

    /// Tokens that a slot has room for.
    pub fn capacity(&self) -> usize {
        self.tokens
    }

    /// Tokens held by a slot; 0 for one that does not exist.
    pub fn len(&self, slot: usize) -> usize {
        self.states.get(slot).map_or(0, |state| state.len)
    }

    /// Bytes of keys and values: in use on a CPU, of all pages and rings on a GPU.
    pub fn bytes(&self) -> usize {
        match &self.held {
            Held::Cpu(caches) => caches.iter().flatten().map(Cache::bytes).sum(),
            Held::Cuda(device) => device.bytes(),
        }
    }

    /// Pages of [`PAGE`] tokens that no slot holds; `None` where slots do not share any: on a CPU,
    /// and where every layer has a window.
    pub fn free_pages(&self) -> Option<usize> {
        match &self.held {
            Held::Cpu(_) => None,
            Held::Cuda(device) => device.free_pages(),
        }
    }

    /// From here on every step on a GPU computes `rows` rows, those without a token resting, and
    /// takes at most so many tokens. A product's bits depend on its size, so that after this what
    /// a slot computes no longer depends on how many others are in the step; not so where tokens
    /// are dealt to experts, unless `rows` is 1. On a CPU no bit ever does.
    pub fn fix_rows(&mut self, rows: usize) -> Result<()> {
        if rows == 0 || rows > self.count() {
            let count = self.count();
            return Err(Error::Batch(format!("steps of {rows} rows; expected 1 to {count}")));
        }
        if let Held::Cuda(device) = &mut self.held {
            device.fix_rows(rows);
        }
        Ok(())
    }

    /// Forgets what a slot holds. After an error it takes nothing until it is cleared.
    pub fn clear(&mut self, slot: usize) -> Result<()> {
        self.state(slot)?.broken = true;
        match &mut self.held {
            Held::Cpu(caches) => caches[slot] = None,
            Held::Cuda(device) => device.clear(slot)?,
        }
        *self.state(slot)? = State::default();
        Ok(())
    }

    /// Slot `to` becomes a copy of `from`, without the model. On a GPU full pages are shared, and
    /// an error for want of a page changes nothing.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        let state = *self.state(from)?;
        self.state(to)?;
        if from == to {
            return Ok(());
        }
        let partial = match &self.held {
            Held::Cpu(_) => Partial::default(),
            Held::Cuda(device) => device.share(from, to, state.len)?,
        };
        self.states[to].broken = true;
        match &mut self.held {
            Held::Cpu(caches) => {
                let fork = caches[from].as_ref().map(|cache| cache.fork().ok_or_else(gone));
                caches[to] = fork.transpose()?;
            }
            Held::Cuda(device) => device.copy(from, to, partial)?,
        }
        *self.state(to)? = state;
        Ok(())
    }

    /// Appends a chunk of a prompt to a slot; returns the logits after its last token, `[vocab]`. A
    /// slot for which there are not enough pages stays as it is.
    pub fn read(&mut self, model: &Model, slot: usize, tokens: &[i32]) -> Result<Vec<f32>> {
        let held = self.check_chunk(model, slot, tokens)?;
        self.state(slot)?.broken = true;
        let stepped = self.states[slot].stepped;
        let logits = match &mut self.held {
            Held::Cpu(caches) => {
                let cache = begun(&mut caches[slot], model)?;
                model.read(cache, tokens)?
            }
            // What no block is made of yet stands where steps read it.
            Held::Cuda(device) if stepped && model.config().nsa.is_some() => {
                let mut logits = Vec::new();
                for (i, &id) in tokens.iter().enumerate() {
                    let token = Token { sequence: slot, id, position: held + i };
                    let (_, after) = device.step(model, &[token], (&[], true), &mut self.logits)?;
                    logits = after.to_vec();
                }
                logits
            }
            Held::Cuda(device) => model.read_device(device.reading(slot), (slot, held), tokens)?,
        };
        let state = self.state(slot)?;
        (state.len, state.stamp, state.broken) = (held + tokens.len(), model.stamp, false);
        Ok(logits)
    }

    /// As [`Slots::read`], with the logits after every token: see [`Model::read_each`].
    pub fn read_each(
        &mut self,
        model: &Model,
        slot: usize,
        tokens: &[i32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let held = self.check_chunk(model, slot, tokens)?;
        if !self.on_cpu() && self.states[slot].stepped && model.config().nsa.is_some() {
            for (i, token) in tokens.iter().enumerate() {
                each(i, &self.read(model, slot, &[*token])?);
            }
            return Ok(());
        }
        self.state(slot)?.broken = true;
        match &mut self.held {
            Held::Cpu(caches) => {
                let cache = begun(&mut caches[slot], model)?;
                model.read_each(cache, tokens, each)?;
            }
            Held::Cuda(device) => {
                model.read_device_each(device.reading(slot), (slot, held), tokens, each)?;
            }
        }
        let state = self.state(slot)?;
        (state.len, state.stamp, state.broken) = (held + tokens.len(), model.stamp, false);
        Ok(())
    }

    /// What the last token of a slot selected, layer by layer, see [`Cache::selected`]. On a GPU it
    /// is known until tokens of other slots are read or stepped, and read back when asked for;
    /// errors are the device's.
    pub fn selected(&self, slot: usize) -> Result<Option<Vec<Vec<i32>>>> {
        match &self.held {
            Held::Cpu(caches) => {
                let selected = caches.get(slot).and_then(|cache| cache.as_ref()?.selected());
                Ok(selected.map(|layers| layers.into_iter().map(<[i32]>::to_vec).collect()))
            }
            Held::Cuda(device) => device.selected(slot),
        }
    }

    fn on_cpu(&self) -> bool {
        matches!(self.held, Held::Cpu(_))
    }

    /// Appends one token to each of the named slots, all different; returns the logits after each,
    /// `[n, vocab]`, in that order. Refused before anything changes: tokens outside the vocabulary,
    /// a slot without room, one that holds nothing, one filled under other weights or left behind
    /// by an error, and slots for which there are not enough pages.
    pub fn step(&mut self, model: &Model, tokens: &[(usize, i32)]) -> Result<&[f32]> {
        Ok(self.step_drawing(model, tokens, &[], true)?.logits)
    }

    /// Whether [`Slots::step_drawing`] draws: on a GPU, where no experts are.
    pub fn draws(&self) -> bool {
        match &self.held {
            Held::Cpu(_) => false,
            Held::Cuda(device) => device.draws(),
        }
    }

    /// As [`Slots::step`]; where [`Slots::draws`], the next token of each slot is chosen where the
    /// logits are if a draw is given for it, and the logits are read only if they are `wanted`.
    pub fn step_drawing(
        &mut self,
        model: &Model,
        tokens: &[(usize, i32)],
        draws: &[Option<Draw>],
        wanted: bool,
    ) -> Result<Stepped<'_>> {
        if !draws.is_empty() && (!self.draws() || draws.len() != tokens.len()) {
            return Err(Error::Batch(format!(
                "{} draws for a step of {} tokens; expected one each on a GPU, none elsewhere",
                draws.len(),
                tokens.len()
            )));
        }
        let ids: Vec<i32> = tokens.iter().map(|&(_, id)| id).collect();
        check_ids(model.config(), &ids)?;
        let mut rows = Vec::with_capacity(tokens.len());
        let mut seen = vec![false; self.count()];
        for &(slot, id) in tokens {
            let position = self.check(model, slot, 1)?;
            if position == 0 {
                return Err(Error::Batch(format!(
                    "slot {slot} holds nothing; read a prompt first"
                )));
            }
            if std::mem::replace(&mut seen[slot], true) {
                return Err(Error::Batch(format!("slot {slot} is named twice in one step")));
            }
            rows.push(Token { sequence: slot, id, position });
        }
        if rows.is_empty() {
            return Ok(Stepped { drawn: Vec::new(), logits: &[] });
        }
        if let Held::Cuda(device) = &self.held {
            let most = device.rows().unwrap_or(rows.len());
            if rows.len() > most {
                let got = rows.len();
                return Err(Error::Batch(format!("a step of {got} tokens; its rows are {most}")));
            }
            let want = |row: &Token| (row.sequence, row.position + 1);
            device.reserve(&rows.iter().map(want).collect::<Vec<_>>())?;
        }
        rows.iter().for_each(|row| self.states[row.sequence].broken = true);
        let (drawn, logits): (_, &[f32]) = match &mut self.held {
            Held::Cpu(caches) => {
                // In the order of the tokens, whatever the order of the slots.
                let mut own: Vec<Option<&mut Cache>> =
                    caches.iter_mut().map(Option::as_mut).collect();
                let mut named = Vec::with_capacity(rows.len());
                for row in &rows {
                    named.push(own[row.sequence].take().ok_or_else(gone)?);
                }
                self.logits = model.extend_many(&mut named, &ids)?;
                (Vec::new(), &self.logits)
            }
            Held::Cuda(device) => {
                for row in rows.iter().filter(|row| !self.states[row.sequence].stepped) {
                    device.layers.iter_mut().try_for_each(|layer| layer.prime(row.sequence))?;
                }
                device.step(model, &rows, (draws, wanted), &mut self.logits)?
            }
        };
        for row in &rows {
            let state = &mut self.states[row.sequence];
            (state.len, state.stepped, state.broken) = (state.len + 1, true, false);
        }
        Ok(Stepped { drawn, logits })
    }

    fn state(&mut self, slot: usize) -> Result<&mut State> {
        let count = self.states.len();
        let none = || Error::Batch(format!("there is no slot {slot}; there are {count}, from 0"));
        self.states.get_mut(slot).ok_or_else(none)
    }

    /// Tokens held by a slot that is to take a chunk of a prompt.
    fn check_chunk(&mut self, model: &Model, slot: usize, tokens: &[i32]) -> Result<usize> {
        let held = self.check(model, slot, tokens.len())?;
        if tokens.is_empty() {
            return Err(Error::Batch("no token to append; a prompt needs at least one".into()));
        }
        Inputs::appended(model.config(), &Device::Cpu, tokens, held)?;
        if let Held::Cuda(device) = &self.held {
            device.reserve(&[(slot, held + tokens.len())])?;
        }
        Ok(held)
    }

    /// Tokens held by a slot that is to take `more` of them.
    fn check(&mut self, model: &Model, slot: usize, more: usize) -> Result<usize> {
        let capacity = self.tokens;
        let State { len, stamp, broken, .. } = *self.state(slot)?;
        if broken || (len > 0 && stamp != model.stamp) {
            return Err(Error::Batch(format!(
                "slot {slot} was filled under other weights, or an earlier call with it failed; \
                 clear it and read its tokens again"
            )));
        }
        if len + more > capacity {
            return Err(Error::Batch(format!(
                "slot {slot} holds {len} tokens and has room for {capacity}, not for {more} more"
            )));
        }
        Ok(len)
    }
}

/// A slot's cache, an empty one if there is none.
fn begun<'c>(cache: &'c mut Option<Cache>, model: &Model) -> Result<&'c mut Cache> {
    Ok(match cache {
        Some(cache) => cache,
        none => none.insert(model.cache()?),
    })
}

fn gone() -> Error {
    Error::Batch("a slot without its cache; clear it and read its tokens again".into())
}
