//! The end of a step: noise on the sum, and out with it.
//!
//! Noise may be drawn while the sum is still being made. It leaves only on a sum, against the receipt
//! of a line on disk, whose stream must be its own.

use rayon::prelude::*;

use super::{ClippedSum, Grid};
use crate::mechanism::ledger::Spent;
use crate::mechanism::noise::{self, Noise};
use crate::{Error, Result};

/// How much noise a sum is to get.
#[derive(Clone, Debug)]
pub struct Wanted {
    grid: Grid,
    /// Standard deviations by block.
    scales: Vec<f64>,
    /// The unit of each block.
    units: Vec<f64>,
    /// Elements and standard deviation in units, by slot.
    slots: Vec<(usize, f64)>,
}

impl Wanted {
    /// Draws it from the words of a stream ([`crate::mechanism::ledger::Ledger::next_stream`]).
    ///
    /// # Errors
    /// [`Error::Step`] when it cannot be drawn on this grid.
    pub fn draw(self, noise: &Noise, stream: u64) -> Result<Drawn> {
        let noise = noise.draw(self.grid, stream, &self.slots)?;
        Ok(Drawn { wanted: self, stream, noise })
    }
}

/// Noise that has been drawn. Nothing reads it but [`ClippedSum::release_drawn`].
pub struct Drawn {
    wanted: Wanted,
    stream: u64,
    noise: Vec<Vec<i128>>,
}

impl ClippedSum {
    /// The noise for this sum, at its thresholds: `scales` are the standard deviations by block
    /// ([`noise::Split`]).
    ///
    /// # Errors
    /// [`Error::Step`] when there is not one for each block.
    pub fn wanted(&self, scales: &[f64]) -> Result<Wanted> {
        if scales.len() != self.bounds.len() {
            let (got, expected) = (scales.len(), self.bounds.len());
            return Err(Error::Step(format!("there is noise for {got} blocks, not {expected}")));
        }
        let slots = self.blocks.sizes.iter().zip(&self.blocks.block_of);
        let slots = slots.map(|(&size, &block)| (size, scales[block] / self.units[block]));
        Ok(Wanted {
            grid: self.grid,
            scales: scales.to_vec(),
            units: self.units.clone(),
            slots: slots.collect(),
        })
    }

    /// Ends the step: `(Σ clipped + noise) / batch` for each slot, and an empty sum. `scales` are
    /// as in [`ClippedSum::wanted`], `batch` is the expected, public one.
    ///
    /// # Errors
    /// As [`ClippedSum::wanted`], [`Wanted::draw`] and [`ClippedSum::release_drawn`].
    pub fn release(
        &mut self,
        spent: Spent,
        noise: &Noise,
        scales: &[f64],
        batch: f64,
    ) -> Result<Vec<Vec<f32>>> {
        let drawn = self.wanted(scales)?.draw(noise, spent.stream())?;
        self.release_drawn(spent, drawn, batch)
    }

    /// The same with noise that has been drawn already.
    ///
    /// # Errors
    /// [`Error::Step`] when the noise is less than the ledger says, of another stream or for other
    /// thresholds; [`Error::Parameter`] when `batch` is not above 0. What the ledger holds stays
    /// spent.
    pub fn release_drawn(
        &mut self,
        spent: Spent,
        drawn: Drawn,
        batch: f64,
    ) -> Result<Vec<Vec<f32>>> {
        if !(batch.is_finite() && batch > 0.0) {
            let expected = "the expected batch is a public number above 0: rate times persons";
            return Err(Error::parameter("batch", batch, expected));
        }
        let Drawn { wanted, stream, noise } = drawn;
        if stream != spent.stream() || wanted.units != self.units || noise.len() != self.sums.len()
        {
            return Err(Error::Step("the noise was drawn for another step than this one".into()));
        }
        let sigma = noise::effective_sigma(&self.bounds, &wanted.scales);
        // Another order of the same sum may fall short by some roundings; NaN is not enough.
        let enough = sigma * (1.0 + 1e-12) >= spent.sigma();
        if !enough {
            return Err(Error::Step(format!(
                "the noise multiplier is {sigma}, but the ledger says {}",
                spent.sigma()
            )));
        }
        let released = noise.into_par_iter().enumerate().map(|(slot, noise)| {
            let factor = self.units[self.blocks.block_of[slot]] / batch;
            let sums = noise.into_iter().zip(&self.sums[slot]);
            sums.map(|(noise, sum)| ((sum + noise) as f64 * factor) as f32).collect()
        });
        let released = released.collect();
        self.clear();
        Ok(released)
    }
}
