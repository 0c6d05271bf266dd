//! Slots on a GPU: one cache a layer for all of them, whose sequences take pages as they grow, and
//! captured steps for numbers of rows.

use tercet_tensor::caches::{Pages, Partial};
use tercet_tensor::{Device, Gpu};

use crate::cache::LayerCache;
use crate::cache_cuda::Room;
use crate::decode_graph::{DecodeGraph, Places, Token};
use crate::{Model, Result};

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
    graphs: Vec<(u64, DecodeGraph)>,
    /// Whether a step may be captured: experts are counted on the host.
    fixed: bool,
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
        let (graphs, chosen) = (Vec::new(), vec![None; count]);
        Ok(Self { gpu, layers, pages, count, tokens, graphs, fixed, rows: None, chosen })
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

    /// A step of some rows, no more than are fixed; the slots are ready for it. `own` takes the logits that no graph holds.
    pub fn step<'l>(
        &'l mut self,
        model: &Model,
        tokens: &[Token],
        own: &'l mut Vec<f32>,
    ) -> Result<&'l [f32]> {
        let (stamp, capacity) = (model.stamp, self.tokens);
        let rows = self.rows.unwrap_or(tokens.len().next_power_of_two().min(self.count));
        let spec = model.config().nsa.as_ref();
        self.chosen.fill(None);
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
        sequences.iter().enumerate().for_each(|(row, &slot)| self.chosen[slot] = Some(row));
        Ok(logits)
    }
}
