//! Where sequences are held: a numbered place for each.

use tercet_model::{Cache, Error, Model, Result};

/// Places for sequences, each empty or with what a model remembers of one.
pub(super) struct Slots {
    held: Vec<Option<Cache>>,
}

impl Slots {
    pub fn new(count: usize) -> Self {
        Self { held: (0..count).map(|_| None).collect() }
    }

    /// Empties a place, after which another model may fill it.
    pub fn clear(&mut self, slot: usize) {
        self.held[slot] = None;
    }

    /// Makes `to` a copy of `from`; fails where caches are not copied, on a GPU.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        let copy = match &self.held[from] {
            None => None,
            Some(cache) => Some(cache.fork().ok_or_else(|| {
                Error::Batch("caches on a GPU are not copied; read the tokens again".into())
            })?),
        };
        self.held[to] = copy;
        Ok(())
    }

    /// Appends a part of a prompt; the logits after its last token, `[vocab]`.
    pub fn read(&mut self, model: &Model, slot: usize, tokens: &[i32]) -> Result<Vec<f32>> {
        model.read(self.at(model, slot)?, tokens)
    }

    /// The same with the logits after each token, see [`Model::read_each`].
    pub fn read_each(
        &mut self,
        model: &Model,
        slot: usize,
        tokens: &[i32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        model.read_each(self.at(model, slot)?, tokens, each)
    }

    /// Appends one token to each of the named places, all different: logits `[n, vocab]`.
    pub fn step(&mut self, model: &Model, tokens: &[(usize, i32)]) -> Result<Vec<f32>> {
        let mut taken = Vec::with_capacity(tokens.len());
        for &(slot, _) in tokens {
            taken.push(self.held[slot].take());
        }
        let mut caches: Vec<&mut Cache> = taken.iter_mut().flatten().collect();
        let ids: Vec<i32> = tokens.iter().map(|&(_, id)| id).collect();
        let logits = model.extend_many(&mut caches, &ids);
        for (&(slot, _), cache) in tokens.iter().zip(taken) {
            self.held[slot] = cache;
        }
        logits
    }

    /// See [`Cache::selected`].
    pub fn selected(&self, slot: usize) -> Option<Vec<&[i32]>> {
        self.held[slot].as_ref()?.selected()
    }

    fn at(&mut self, model: &Model, slot: usize) -> Result<&mut Cache> {
        let place = &mut self.held[slot];
        match place {
            Some(cache) => Ok(cache),
            None => Ok(place.insert(model.cache()?)),
        }
    }
}
