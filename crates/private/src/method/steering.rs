//! The public side of a run: thresholds, coordinates and noise of the next step, from what earlier
//! steps released.

use rayon::prelude::*;

use super::adaclip::Adaclip;
use super::balance::Balance;
use super::controller::Controller;
use super::geoclip::Geoclip;
use super::quantile::QuantileConfig;
use super::random_action::RandomAction;
use super::schedule::ScheduleConfig;
use super::state::{Reader, State};
use super::tangent::Tangent;
use super::watch::{Public, Watch};
use super::{Layout, Method, auto_s, dp_sgd, per_layer};
use crate::Result;
use crate::mechanism::clip::{Blocks, Rule};
use crate::mechanism::noise::Split;
use crate::mechanism::statistics::{Noisy, Statistics};
use crate::rldp::state::Released;
use crate::rldp::{self, Agent};

/// Everything that decides a method, fixed before the run.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Which method.
    pub method: Method,
    /// A threshold for each adapter, and not one for all.
    pub by_adapter: bool,
    /// C: of everything together.
    pub threshold: f64,
    /// How the gradient's noise is divided among blocks; by a controller's shares when `None`.
    pub split: Option<Split>,
    /// Clip and add noise as if A and B had equal norms.
    pub balance: bool,
    /// Clip and add noise in the tangent space of each product BA.
    pub tangent: bool,
    /// What is released beside the gradient; counts are of these blocks.
    pub statistics: Statistics,
    /// Nominal σ of everything a step releases.
    pub sigma: f64,
    /// Whether a controller may move σ.
    pub moves_sigma: bool,
    /// Steps between a controller's decisions.
    pub every: u64,
    /// Steps of the run.
    pub steps: u64,
    /// The expected batch.
    pub batch: f64,
    /// A controller's seed; public.
    pub seed: u64,
    /// What `rldp`'s rewards add to the cost, in units of it: that of steps between two decisions.
    pub eta: f64,
    /// `quantile`'s numbers.
    pub quantile: QuantileConfig,
    /// `schedule`'s numbers.
    pub schedule: ScheduleConfig,
}

/// What a step cost, for a controller.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Its Rényi divergence at one order fixed before the run.
    pub rho: f64,
    /// Share of the budget that is spent, this step included.
    pub spent: f64,
}

/// In which coordinates gradients are clipped.
#[derive(Clone, Debug)]
enum Coordinates {
    Own,
    Balanced(Balance),
    Tangent(Tangent),
    Adaclip(Adaclip),
    Geoclip(Geoclip),
}

/// A controller and what it will be shown.
#[derive(Clone, Debug)]
struct Control {
    controller: Controller,
    watch: Watch,
}

/// Thresholds, coordinates and noise of the next step.
#[derive(Clone, Debug)]
pub struct Steering {
    recipe: Recipe,
    layout: Layout,
    blocks: Blocks,
    bounds: Vec<f64>,
    /// Of the gradient's noise, where a controller moves them.
    shares: Vec<f64>,
    sigma: f64,
    coordinates: Coordinates,
    control: Option<Control>,
}

impl Steering {
    /// As the run begins.
    ///
    /// # Errors
    /// [`crate::Error::Step`] for a layout that has no blocks; [`crate::Error::Controller`] for one with more
    /// than a controller can be shown.
    pub fn new(recipe: Recipe, layout: Layout) -> Result<Self> {
        let blocks = blocks(recipe.by_adapter, &layout)?;
        let bounds = per_layer::bounds(recipe.threshold, blocks.len());
        let coordinates = match recipe.method {
            Method::Adaclip => Coordinates::Adaclip(Adaclip::new(&layout.sizes)),
            Method::Geoclip => Coordinates::Geoclip(Geoclip::new(&layout)),
            _ if recipe.tangent => Coordinates::Tangent(Tangent::default()),
            _ if recipe.balance => Coordinates::Balanced(Balance::none(layout.sizes.len())),
            _ => Coordinates::Own,
        };
        let controller = match recipe.method {
            Method::RandomAction => Some(Controller::Random(RandomAction::new(recipe.seed))),
            Method::Rldp => {
                let each = if recipe.split.is_some() { 1 } else { 2 };
                let actions = each * blocks.len() + usize::from(recipe.moves_sigma);
                let agent = Agent::new(Released::width(blocks.len()), actions, recipe.seed)?;
                Some(Controller::Rldp { agent: Box::new(agent), eta: recipe.eta })
            }
            _ => None,
        };
        let watch = Watch::new(&blocks);
        let control = controller.map(|controller| Control { controller, watch });
        let sigma = recipe.sigma;
        let shares = match recipe.split {
            Some(_) => Vec::new(),
            None => vec![1.0 / blocks.len() as f64; blocks.len()],
        };
        Ok(Self { recipe, layout, blocks, bounds, shares, sigma, coordinates, control })
    }

    /// The blocks that have a threshold each.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// The thresholds of the next step.
    pub fn bounds(&self) -> &[f64] {
        &self.bounds
    }

    /// How each block is shortened.
    pub fn rules(&self) -> Vec<Rule> {
        let rule = if self.recipe.method == Method::AutoS { auto_s::RULE } else { Rule::Clip };
        vec![rule; self.blocks.len()]
    }

    /// What is released beside the gradient.
    pub fn statistics(&self) -> &Statistics {
        &self.recipe.statistics
    }

    /// Effective noise multiplier of everything that `step` releases: what the ledger holds.
    pub fn sigma(&self, step: u64) -> f64 {
        match self.recipe.method {
            Method::Schedule => self.sigma * self.recipe.schedule.sigma(step, self.recipe.steps),
            _ => self.sigma,
        }
    }

    /// A σ that no step from `step` on is planned to be below.
    pub fn least_sigma(&self, step: u64) -> f64 {
        self.sigma(step).min(self.sigma(self.recipe.steps.saturating_sub(1)))
    }

    /// Standard deviations on the sums of `step`, by block, without those of the statistics.
    ///
    /// # Errors
    /// As [`Split::scales`].
    pub fn scales(&self, step: u64) -> Result<Vec<f64>> {
        let sigma = self.recipe.statistics.gradient_sigma(self.sigma(step));
        let dims = self.blocks.dims();
        match &self.recipe.split {
            Some(split) => split.scales(sigma, &self.bounds, &dims),
            None => Split::Weights(self.shares.clone()).scales(sigma, &self.bounds, &dims),
        }
    }

    /// Whether [`Steering::prepare`] wants the weights.
    pub fn wants_weights(&self) -> bool {
        matches!(self.coordinates, Coordinates::Balanced(_) | Coordinates::Tangent(_))
    }

    /// Makes ready for `step`; `weights` are those of the slots, where they are wanted.
    pub fn prepare(&mut self, step: u64, weights: &[Vec<f32>]) {
        if self.recipe.method == Method::Schedule {
            let factor = self.recipe.schedule.threshold(step, self.recipe.steps);
            self.bounds = per_layer::bounds(self.recipe.threshold * factor, self.blocks.len());
        }
        match &mut self.coordinates {
            Coordinates::Balanced(balance) => {
                let square = |own: &Vec<f32>| own.iter().map(|&x| f64::from(x).powi(2)).sum();
                let squares: Vec<f64> = weights.iter().map(square).collect();
                *balance = Balance::of(&self.layout, &squares);
            }
            Coordinates::Tangent(tangent) => *tangent = Tangent::at(&self.layout, weights),
            Coordinates::Own | Coordinates::Adaclip(_) | Coordinates::Geoclip(_) => {}
        }
    }

    /// Whether gradients are clipped in other coordinates than their own.
    pub fn changes_coordinates(&self) -> bool {
        !matches!(self.coordinates, Coordinates::Own)
    }

    /// Persons' gradients, `[persons, elements]` for each slot, into the coordinates in which they
    /// are clipped: each person's by itself.
    pub fn forward(&self, gradients: &mut [Vec<f32>]) {
        let sizes = &self.layout.sizes;
        match &self.coordinates {
            Coordinates::Own => {}
            Coordinates::Balanced(balance) => {
                for (slot, values) in gradients.iter_mut().enumerate() {
                    values.par_chunks_mut(sizes[slot]).for_each(|own| balance.forward(slot, own));
                }
            }
            Coordinates::Adaclip(adaclip) => {
                for (slot, values) in gradients.iter_mut().enumerate() {
                    values.par_chunks_mut(sizes[slot]).for_each(|own| adaclip.forward(slot, own));
                }
            }
            Coordinates::Tangent(tangent) => {
                each_person(gradients, sizes, |gradient| tangent.forward(gradient));
            }
            Coordinates::Geoclip(geoclip) => {
                each_person(gradients, sizes, |gradient| geoclip.forward(gradient));
            }
        }
    }

    /// Learns from what `step` released, which is all it is ever told, and returns the gradient
    /// for the optimizer, in its own coordinates. `scales` are the standard deviations by block
    /// that went into the sum.
    ///
    /// # Errors
    /// [`crate::Error::Step`] when a controller's answer makes no sense.
    pub fn learn(
        &mut self,
        step: u64,
        scales: &[f64],
        mut released: Vec<Vec<f32>>,
        noisy: &Noisy,
        cost: Cost,
    ) -> Result<Vec<Vec<f32>>> {
        let noise: Vec<f64> = scales.iter().map(|scale| scale / self.recipe.batch).collect();
        if let Some(Control { watch, .. }) = &mut self.control {
            watch.take(&self.blocks, &released, &noise, (&self.bounds, noisy), cost.rho);
        }
        let slots = 0..released.len();
        let by_slot: Vec<f64> = slots.map(|slot| noise[self.blocks.block_of(slot)]).collect();
        match &mut self.coordinates {
            Coordinates::Own => {}
            Coordinates::Balanced(balance) => {
                let slots = released.iter_mut().enumerate();
                slots.for_each(|(slot, values)| balance.back(slot, values));
            }
            Coordinates::Tangent(tangent) => tangent.back(&mut released),
            Coordinates::Adaclip(adaclip) => {
                adaclip.learn(&mut released, &by_slot, self.recipe.batch);
            }
            Coordinates::Geoclip(geoclip) => {
                geoclip.learn(&mut released, &by_slot, self.recipe.batch);
            }
        }
        if let (Method::Quantile, Some(below)) = (self.recipe.method, &noisy.below) {
            self.bounds = self.recipe.quantile.next(&self.bounds, below);
        }
        if (step + 1).is_multiple_of(self.recipe.every) {
            self.decide(step, cost.spent)?;
        }
        Ok(released)
    }

    fn decide(&mut self, step: u64, spent: f64) -> Result<()> {
        let Some(Control { controller, watch }) = &mut self.control else { return Ok(()) };
        let seen = watch.close(&Public {
            bounds: &self.bounds,
            // A control without noise has the ratio of one with all of it.
            sigma_ratio: if self.recipe.sigma > 0.0 { self.sigma / self.recipe.sigma } else { 1.0 },
            progress: (step + 1) as f64 / self.recipe.steps as f64,
            spent,
        });
        let (bounds, shares) = (self.bounds.len(), self.shares.len());
        let actions = bounds + shares + usize::from(self.recipe.moves_sigma);
        let action = controller.decide(&seen, actions)?;
        let (for_bounds, rest) = action.split_at(bounds);
        let (for_shares, for_sigma) = rest.split_at(shares);
        self.bounds = rldp::thresholds(&self.bounds, for_bounds)?;
        if shares > 0 {
            self.shares = rldp::shares(&self.shares, for_shares)?;
        }
        // A control without noise has none to move.
        if self.recipe.moves_sigma && self.recipe.sigma > 0.0 {
            self.sigma = rldp::sigma(self.recipe.sigma, for_sigma[0])?;
        }
        Ok(())
    }

    /// Everything that a checkpoint must hold of it.
    ///
    /// # Errors
    /// As [`Agent::to_bytes`].
    pub fn state(&self) -> Result<State> {
        let mut state = State { numbers: self.bounds.clone(), ..State::default() };
        state.numbers.push(self.sigma);
        state.numbers.extend(&self.shares);
        match &self.coordinates {
            // Made anew from the weights at every step.
            Coordinates::Own | Coordinates::Balanced(_) | Coordinates::Tangent(_) => {}
            Coordinates::Adaclip(adaclip) => adaclip.write(&mut state),
            Coordinates::Geoclip(geoclip) => geoclip.write(&mut state),
        }
        if let Some(Control { controller, watch }) = &self.control {
            controller.write(&mut state)?;
            watch.write(&mut state);
        }
        Ok(state)
    }

    /// Goes on from a checkpoint's state.
    ///
    /// # Errors
    /// [`crate::Error::State`] when it is of another method or other tensors.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        let mut reader = Reader::new(state);
        self.bounds = reader.numbers(self.bounds.len())?;
        self.sigma = reader.number()?;
        self.shares = reader.numbers(self.shares.len())?;
        match &mut self.coordinates {
            Coordinates::Own | Coordinates::Balanced(_) | Coordinates::Tangent(_) => {}
            Coordinates::Adaclip(adaclip) => adaclip.read(&mut reader)?,
            Coordinates::Geoclip(geoclip) => geoclip.read(&mut reader)?,
        }
        if let Some(Control { controller, watch }) = &mut self.control {
            controller.read(&mut reader)?;
            watch.read(&mut reader)?;
        }
        reader.end()
    }
}

/// Persons' gradients, `[persons, elements]` for each slot, each by itself.
fn each_person(
    gradients: &mut [Vec<f32>],
    sizes: &[usize],
    change: impl Fn(&mut [&mut [f32]]) + Sync,
) {
    let mut people: Vec<Vec<&mut [f32]>> = Vec::new();
    for (values, &size) in gradients.iter_mut().zip(sizes) {
        for (person, own) in values.chunks_mut(size).enumerate() {
            if person == people.len() {
                people.push(Vec::new());
            }
            people[person].push(own);
        }
    }
    people.par_iter_mut().for_each(|gradient| change(gradient));
}

/// One block, or one for each adapter.
///
/// # Errors
/// As [`Blocks::by_pair`].
pub fn blocks(by_adapter: bool, layout: &Layout) -> Result<Blocks> {
    if by_adapter { per_layer::blocks(layout) } else { dp_sgd::blocks(layout) }
}

impl Method {
    /// The threshold of everything together when none is given.
    pub fn threshold(self) -> f64 {
        match self {
            Self::AutoS => auto_s::THRESHOLD,
            _ => dp_sgd::THRESHOLD,
        }
    }
}
