//! Places for a fixed number of sequences that are decoded side by side, by whichever device the
//! model is on: what sampling of many answers and serving stand on.

use tercet_tensor::{Device, Gpu};

use crate::batch::{Inputs, check_ids};
use crate::cache::{Cache, LayerCache};
use crate::cache_cuda::Room;
use crate::decode_graph::{DecodeGraph, Places, Token};
use crate::{Error, Model, Result};

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

enum Held {
    Cpu(Vec<Option<Cache>>),
    Cuda(Box<OnDevice>),
}

/// All slots of a layer in one cache, and captured steps for numbers of rows.
struct OnDevice {
    gpu: Gpu,
    layers: Vec<LayerCache>,
    /// Slots.
    count: usize,
    graphs: Vec<(u64, DecodeGraph)>,
    /// Whether a step may be captured: experts are counted on the host.
    fixed: bool,
}

impl Model {
    /// `count` empty slots with room for `tokens` tokens each, at most the model's context. A GPU
    /// takes their memory at once, the CPU as sequences grow.
    pub fn slots(&self, count: usize, tokens: usize) -> Result<Slots> {
        let context = self.config().max_position_embeddings;
        if count == 0 || tokens == 0 || tokens > context {
            return Err(Error::Batch(format!(
                "{count} slots of {tokens} tokens; expected at least 1 of each, and at most the \
                 model's context of {context}"
            )));
        }
        let held = if let Device::Cuda(gpu) = self.device() {
            let room = Room { sequences: count, tokens };
            let layers = (0..self.config().num_hidden_layers)
                .map(|layer| LayerCache::on_device(self, &gpu, layer, room))
                .collect::<Result<Vec<_>>>()?;
            let fixed = self.config().moe.is_none();
            Held::Cuda(Box::new(OnDevice { gpu, layers, count, graphs: Vec::new(), fixed }))
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

    /// Bytes of keys and values: in use on a CPU, reserved on a GPU.
    pub fn bytes(&self) -> usize {
        match &self.held {
            Held::Cpu(caches) => caches.iter().flatten().map(Cache::bytes).sum(),
            Held::Cuda(device) => device.layers.iter().map(LayerCache::bytes).sum(),
        }
    }

    /// Forgets what a slot holds.
    pub fn clear(&mut self, slot: usize) -> Result<()> {
        *self.state(slot)? = State::default();
        match &mut self.held {
            Held::Cpu(caches) => caches[slot] = None,
            Held::Cuda(device) => {
                device.layers.iter_mut().try_for_each(|layer| layer.clear(slot))?;
            }
        }
        Ok(())
    }

    /// Slot `to` becomes a copy of `from`, without the model.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        let state = *self.state(from)?;
        self.state(to)?.broken = true;
        match &mut self.held {
            Held::Cpu(caches) => {
                let fork = caches[from].as_ref().map(|cache| cache.fork().ok_or_else(gone));
                caches[to] = fork.transpose()?;
            }
            Held::Cuda(device) => {
                device.layers.iter_mut().try_for_each(|layer| layer.copy(from, to))?;
            }
        }
        *self.state(to)? = state;
        Ok(())
    }

    /// Appends a chunk of a prompt to a slot; returns the logits after its last token, `[vocab]`.
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
                    logits = device.step(model, self.tokens, &[token], &mut self.logits)?.to_vec();
                }
                logits
            }
            Held::Cuda(device) => model.read_device(&mut device.layers, (slot, held), tokens)?,
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
                model.read_device_each(&mut device.layers, (slot, held), tokens, each)?;
            }
        }
        let state = self.state(slot)?;
        (state.len, state.stamp, state.broken) = (held + tokens.len(), model.stamp, false);
        Ok(())
    }

    /// What the last token of a slot selected, see [`Cache::selected`].
    pub fn selected(&self, slot: usize) -> Option<Vec<&[i32]>> {
        match &self.held {
            Held::Cpu(caches) => caches.get(slot)?.as_ref()?.selected(),
            Held::Cuda(_) => None,
        }
    }

    fn on_cpu(&self) -> bool {
        matches!(self.held, Held::Cpu(_))
    }

    /// Appends one token to each of the named slots, all different; returns the logits after each,
    /// `[n, vocab]`, in that order. Refused before anything changes: tokens outside the vocabulary,
    /// a slot without room, one that holds nothing, one filled under other weights or left behind
    /// by an error.
    pub fn step(&mut self, model: &Model, tokens: &[(usize, i32)]) -> Result<&[f32]> {
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
            return Ok(&[]);
        }
        rows.iter().for_each(|row| self.states[row.sequence].broken = true);
        let logits: &[f32] = match &mut self.held {
            Held::Cpu(caches) => {
                // In the order of the tokens, whatever the order of the slots.
                let mut own: Vec<Option<&mut Cache>> =
                    caches.iter_mut().map(Option::as_mut).collect();
                let mut named = Vec::with_capacity(rows.len());
                for row in &rows {
                    named.push(own[row.sequence].take().ok_or_else(gone)?);
                }
                self.logits = model.extend_many(&mut named, &ids)?;
                &self.logits
            }
            Held::Cuda(device) => {
                for row in rows.iter().filter(|row| !self.states[row.sequence].stepped) {
                    device.layers.iter_mut().try_for_each(|layer| layer.prime(row.sequence))?;
                }
                device.step(model, self.tokens, &rows, &mut self.logits)?
            }
        };
        for row in &rows {
            let state = &mut self.states[row.sequence];
            (state.len, state.stepped, state.broken) = (state.len + 1, true, false);
        }
        Ok(logits)
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

impl OnDevice {
    /// A step of some rows; the slots are ready for it. `own` takes the logits that no graph holds.
    fn step<'l>(
        &'l mut self,
        model: &Model,
        capacity: usize,
        tokens: &[Token],
        own: &'l mut Vec<f32>,
    ) -> Result<&'l [f32]> {
        let stamp = model.stamp;
        let rows = tokens.len().next_power_of_two().min(self.count);
        let spec = model.config().nsa.as_ref();
        let logits = if self.fixed {
            let known = |(of, graph): &(u64, DecodeGraph)| *of == stamp && graph.rows() == rows;
            let at = match self.graphs.iter().position(known) {
                Some(at) => at,
                None => {
                    let layers = &mut self.layers;
                    let graph = DecodeGraph::capture(model, &self.gpu, layers, rows, capacity)?;
                    self.graphs.push((stamp, graph));
                    self.graphs.len() - 1
                }
            };
            self.graphs[at].1.run(tokens, spec)?
        } else {
            let places = Places::new(model, &Device::Cuda(self.gpu.clone()), rows, capacity)?;
            places.write(tokens, spec)?;
            let logits = model.step(&places, &mut self.layers)?;
            *own = logits.rows(0..tokens.len())?.to_vec_f32()?;
            own
        };
        let sequences: Vec<usize> = tokens.iter().map(|token| token.sequence).collect();
        self.layers.iter_mut().try_for_each(|layer| layer.advance(&sequences))?;
        Ok(logits)
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
