//! Slots on a GPU: one cache a layer for all of them, whose sequences take pages as they grow, and
//! captured steps for numbers of rows.

use tercet_tensor::caches::{Pages, Partial};
use tercet_tensor::{Device, Draw, Drawn, Draws, Gpu, Tensor};

use crate::cache::LayerCache;
use crate::cache_cuda::Room;
use crate::decode_graph::{DecodeGraph, Places, Token};
use crate::recent::Recent;
use crate::{Model, Result};

/// Steps that are held, each for some weights and a number of rows, with its logits and all that
/// lies before them. A load uses a few numbers of rows (powers of two) with each adapter. The step
/// that was unused longest gives way and is made again when it is needed: with more adapters than
/// this answering side by side, at every step.
const STEPS: usize = 32;

/// See the module.
pub(crate) struct OnDevice {
    gpu: Gpu,
    pub layers: Vec<LayerCache>,
    /// `None` where every layer has a window, of which each slot has a ring of its own.
    pages: Option<Pages>,
    /// Slots.
    count: usize,
    /// Tokens that a slot has room for.
    tokens: usize,
    /// See [`Model::turns`]: of all those tokens, for all steps.
    turns: Option<Tensor>,
    /// Captured steps, by weights and rows.
    graphs: Recent<(u64, usize), DecodeGraph>,
    /// The same of steps that cannot be captured: where their rows stand.
    places: Recent<(u64, usize), Places>,
    /// Whether a step may be captured: experts are counted on the host.
    fixed: bool,
    /// Whether captured steps may draw.
    draws: bool,
    /// Rows of every step; `None`: as many as it needs, rounded up.
    rows: Option<usize>,
    /// Of each slot, the row in which the layers keep what its last token selected.
    chosen: Vec<Option<usize>>,
}

impl OnDevice {
    /// `count` slots of at most `tokens` tokens each, with `pages` pages together.
    pub fn new(model: &Model, gpu: Gpu, [count, tokens]: [usize; 2], pages: usize) -> Result<Self> {
        let config = model.config();
        let pages = match config.keeps_every_token() {
            true => Some(Pages::new(&gpu, config.nsa.as_ref(), [count, tokens], pages)?),
            false => None,
        };
        let room = Room { sequences: count, tokens, pages: pages.as_ref() };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| LayerCache::on_device(model, &gpu, layer, room))
            .collect::<Result<Vec<_>>>()?;
        let fixed = config.moe.is_none();
        let draws = fixed && config.vocab_size <= Draws::VOCAB;
        let turns = model.turns(&Device::Cuda(gpu.clone()), tokens)?;
        Ok(Self {
            gpu,
            layers,
            pages,
            count,
            tokens,
            turns,
            graphs: Recent::new(STEPS),
            places: Recent::new(STEPS),
            fixed,
            draws,
            rows: None,
            chosen: vec![None; count],
        })
    }

    pub fn bytes(&self) -> usize {
        let tables = self.pages.as_ref().map_or(0, Pages::bytes);
        tables + self.layers.iter().map(LayerCache::bytes).sum::<usize>()
    }

    /// Pages that no slot holds.
    pub fn free_pages(&self) -> Option<usize> {
        self.pages.as_ref().map(Pages::free)
    }

    /// See [`crate::slots::Slots::fix_rows`].
    pub fn fix_rows(&mut self, rows: usize) {
        self.rows = Some(rows);
    }

    /// Rows of steps, when they are fixed.
    pub fn rows(&self) -> Option<usize> {
        self.rows
    }

    /// Whether steps draw.
    pub fn draws(&self) -> bool {
        self.draws
    }

    /// Gives slots the pages for so many tokens: all, or none and an error.
    pub fn reserve(&self, wants: &[(usize, usize)]) -> Result<()> {
        Ok(self.pages.as_ref().map_or(Ok(()), |pages| pages.reserve(wants))?)
    }

    /// Slot `to` gives up its pages and shares those of the `tokens` tokens of `from`, another
    /// slot; the layers' part of the copy is left to [`OnDevice::copy`]. An error changes nothing.
    pub fn share(&self, from: usize, to: usize, tokens: usize) -> Result<Partial> {
        let Some(pages) = &self.pages else { return Ok(Partial::default()) };
        Ok(pages.copy(from, to, tokens)?)
    }

    /// See [`OnDevice::share`].
    pub fn copy(&mut self, from: usize, to: usize, partial: Partial) -> Result<()> {
        self.chosen[to] = self.chosen[from];
        self.layers.iter_mut().try_for_each(|layer| layer.copy(from, to, partial))
    }

    pub fn clear(&mut self, slot: usize) -> Result<()> {
        self.chosen[slot] = None;
        self.layers.iter_mut().try_for_each(|layer| layer.clear(slot))?;
        Ok(self.pages.as_ref().map_or(Ok(()), |pages| pages.clear(slot))?)
    }

    /// The layers, into which tokens of a slot are about to be read.
    pub fn reading(&mut self, slot: usize) -> &mut [LayerCache] {
        self.chosen.fill(None);
        self.chosen[slot] = Some(0);
        &mut self.layers
    }

    /// What the last token of a slot selected, by layer, when nobody else's came since.
    pub fn selected(&self, slot: usize) -> Result<Option<Vec<Vec<i32>>>> {
        let Some(row) = self.chosen.get(slot).copied().flatten() else { return Ok(None) };
        let chosen = |layer: &LayerCache| match layer {
            LayerCache::CudaNsa(layer) => layer.chosen(row),
            _ => Ok(None),
        };
        self.layers.iter().map(chosen).collect()
    }

    /// A step of some rows, no more than are fixed; the slots are ready for it. Tokens are drawn as
    /// [`OnDevice::draws`] allows; there are no logits unless they are wanted. `own` takes those
    /// that no graph holds.
    pub fn step<'l>(
        &'l mut self,
        model: &Model,
        tokens: &[Token],
        (draws, wanted): (&[Option<Draw>], bool),
        own: &'l mut Vec<f32>,
    ) -> Result<(Vec<Option<Drawn>>, &'l [f32])> {
        let rows = self.rows.unwrap_or(tokens.len().next_power_of_two().min(self.count));
        let spec = model.config().nsa.as_ref();
        self.chosen.fill(None);
        let made = if self.fixed {
            let capture = || {
                let (layers, room) = (&mut self.layers, (self.tokens, self.turns.clone()));
                DecodeGraph::capture(model, &self.gpu, layers, rows, room)
            };
            let graph = self.graphs.get_or_make((model.stamp, rows), capture)?;
            graph.run(tokens, spec, (draws, wanted))?
        } else {
            let make =
                || Places::new(model, &Device::Cuda(self.gpu.clone()), rows, self.turns.clone());
            let places = self.places.get_or_make((model.stamp, rows), make)?;
            places.write(tokens, spec)?;
            let logits = model.step(places, &mut self.layers)?;
            *own = logits.rows(0..tokens.len())?.to_vec_f32()?;
            (Vec::new(), &own[..])
        };
        let sequences: Vec<usize> = tokens.iter().map(|token| token.sequence).collect();
        self.layers.iter_mut().try_for_each(|layer| layer.advance(&sequences))?;
        sequences.iter().enumerate().for_each(|(row, &slot)| self.chosen[slot] = Some(row));
        Ok(made)
    }
}
