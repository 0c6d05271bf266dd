//! Means of released values between two decisions of a controller.

use super::state::{Reader, State};
use crate::Result;
use crate::mechanism::clip::Blocks;
use crate::mechanism::statistics::Noisy;
use crate::rldp::state::{Adapter, Released};

/// Average of released gradients, with which a new one is compared.
const BETA: f32 = 0.9;

/// What was released since the last decision.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    steps: u64,
    loss: f64,
    cosine: f64,
    below: Vec<f64>,
    signal: Vec<f64>,
    cost: f64,
    last_loss: Option<f64>,
    momentum: Vec<Vec<f32>>,
}

/// What a run knows besides what it released.
pub(super) struct Public<'a> {
    pub bounds: &'a [f64],
    pub sigma_ratio: f64,
    pub progress: f64,
    pub spent: f64,
}

impl Watch {
    pub fn new(blocks: &Blocks) -> Self {
        let zeros = vec![0.0; blocks.len()];
        Self {
            steps: 0,
            loss: 0.0,
            cosine: 0.0,
            below: zeros.clone(),
            signal: zeros,
            cost: 0.0,
            last_loss: None,
            momentum: blocks.sizes().iter().map(|&size| vec![0.0; size]).collect(),
        }
    }

    /// Takes in a step: the released mean gradient by slot, the noise on each number of a block,
    /// thresholds, statistics, and the Rényi divergence it cost.
    pub fn take(
        &mut self,
        blocks: &Blocks,
        gradient: &[Vec<f32>],
        noise: &[f64],
        (bounds, noisy): (&[f64], &Noisy),
        cost: f64,
    ) {
        self.steps += 1;
        self.loss += noisy.loss.unwrap_or(0.0);
        self.cost += cost;
        if let Some(below) = &noisy.below {
            self.below.iter_mut().zip(below).for_each(|(sum, below)| *sum += below);
        }
        let (mut product, mut own, mut mean) = (0.0, 0.0, 0.0);
        let mut energy = vec![0.0; blocks.len()];
        for (slot, (x, m)) in gradient.iter().zip(&mut self.momentum).enumerate() {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let slot_energy: f64 = x.iter().map(|&x| square(x)).sum();
            energy[blocks.block_of(slot)] += slot_energy;
            own += slot_energy;
            mean += m.iter().map(|&m| square(m)).sum::<f64>();
            product += x.iter().zip(&*m).map(|(x, m)| f64::from(*x) * f64::from(*m)).sum::<f64>();
            m.iter_mut().zip(x).for_each(|(m, x)| *m = BETA * *m + (1.0 - BETA) * x);
        }
        if own > 0.0 && mean > 0.0 {
            self.cosine += product / (own * mean).sqrt();
        }
        for (block, (energy, dim)) in energy.into_iter().zip(blocks.dims()).enumerate() {
            let clean = energy - dim as f64 * noise[block].powi(2);
            self.signal[block] += clean / bounds[block].powi(2);
        }
    }

    /// The means, and a new beginning.
    pub fn close(&mut self, public: &Public) -> Released {
        let steps = self.steps.max(1) as f64;
        let loss = self.loss / steps;
        let blocks = self.below.iter().zip(&self.signal).zip(public.bounds);
        let adapters = blocks.map(|((below, signal), &threshold)| Adapter {
            below: below / steps,
            signal: signal / steps,
            threshold,
        });
        let seen = Released {
            loss,
            loss_change: loss - self.last_loss.unwrap_or(loss),
            cosine: self.cosine / steps,
            sigma_ratio: public.sigma_ratio,
            progress: public.progress,
            spent: public.spent,
            cost: self.cost,
            adapters: adapters.collect(),
        };
        (self.steps, self.loss, self.cosine, self.cost) = (0, 0.0, 0.0, 0.0);
        self.below.fill(0.0);
        self.signal.fill(0.0);
        self.last_loss = Some(loss);
        seen
    }

    pub fn write(&self, state: &mut State) {
        let last = [f64::from(u8::from(self.last_loss.is_some())), self.last_loss.unwrap_or(0.0)];
        let numbers = [self.steps as f64, self.loss, self.cosine, self.cost];
        state.numbers.extend(numbers.iter().chain(&last).chain(&self.below).chain(&self.signal));
        state.arrays.extend(self.momentum.iter().cloned());
    }

    pub fn read(&mut self, reader: &mut Reader) -> Result<()> {
        self.steps = reader.number()? as u64;
        (self.loss, self.cosine, self.cost) =
            (reader.number()?, reader.number()?, reader.number()?);
        let (is_there, last) = (reader.number()?, reader.number()?);
        self.last_loss = (is_there > 0.0).then_some(last);
        self.below = reader.numbers(self.below.len())?;
        self.signal = reader.numbers(self.signal.len())?;
        for array in &mut self.momentum {
            *array = reader.array(array.len())?;
        }
        Ok(())
    }
}
