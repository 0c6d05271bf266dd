//! LoRA adapters (Hu et al., arXiv 2106.09685): beside a frozen `W [out, in]` stand a thin
//! `A [r, in]` and `B [out, r]`, and `y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ` with `s = α/r`, or `α/√r`
//! (rank-stabilized, arXiv 2312.03732).
//!
//! A [`Model`] holds adapters by name, of which one may be active. While one is, every loss, logit
//! and decoded token is computed with it, its parameters are what is trained ([`Model::trained`]),
//! and the base enters the tape as constants. Folders are PEFT's, both ways.

mod adapter;
mod config;
mod merge;
mod modules;
mod peft;

use std::sync::atomic::{AtomicU64, Ordering};

pub use adapter::Adapter;
pub use config::LoraConfig;

use crate::params::Params;
use crate::{Error, Model, Result};
use adapter::Place;
use tercet_tensor::Device;

/// A model's adapters by name, and which of them is active.
#[derive(Clone, Default)]
pub(crate) struct Adapters {
    held: Vec<(String, Adapter)>,
    active: Option<usize>,
}

impl Adapters {
    /// The active adapter.
    pub fn active(&self) -> Option<&Adapter> {
        self.active.map(|at| &self.held[at].1)
    }

    /// The active adapter, where it has something to add to the product with a weight of the base.
    pub fn at(&self, weight: usize) -> Option<(&Adapter, Place)> {
        let adapter = self.active()?;
        Some((adapter, adapter.place(weight)?))
    }

    pub fn move_to(&mut self, device: &Device) -> Result<()> {
        self.held.iter_mut().try_for_each(|(_, adapter)| adapter.params.move_to(device))
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.held.iter().position(|(held, _)| held == name)
    }

    fn unknown(&self, name: &str) -> Error {
        let held: Vec<&str> = self.held.iter().map(|(name, _)| name.as_str()).collect();
        Error::Adapter(match held.is_empty() {
            true => format!("there is none called {name:?}; the model has no adapter"),
            false => format!("there is none called {name:?}; there are {}", held.join(", ")),
        })
    }
}

/// A stamp that no model has had.
fn fresh_stamp() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Model {
    /// Takes an adapter in, without activating it; it moves to the model's device and storage type.
    /// Refuses a name that is taken, and an adapter of another base: the error names the first
    /// tensors that do not fit, with the shapes expected and found.
    pub fn attach(&mut self, name: &str, mut adapter: Adapter) -> Result<()> {
        if self.adapters.find(name).is_some() {
            let text = format!("{name:?} is attached already; detach it first, or choose a name");
            return Err(Error::Adapter(text));
        }
        adapter.seat(self)?;
        self.adapters.held.push((name.to_owned(), adapter));
        Ok(())
    }

    /// Makes an attached adapter the active one; `None` leaves the base alone. Caches that were
    /// filled before are refused afterwards.
    pub fn activate(&mut self, name: Option<&str>) -> Result<()> {
        let active = match name {
            None => None,
            Some(name) => {
                Some(self.adapters.find(name).ok_or_else(|| self.adapters.unknown(name))?)
            }
        };
        if active != self.adapters.active {
            self.adapters.active = active;
            self.stamp = fresh_stamp();
        }
        Ok(())
    }

    /// Gives an adapter back; the base is left alone if it was the active one. `None` when there is
    /// none of this name.
    pub fn detach(&mut self, name: &str) -> Option<Adapter> {
        let at = self.adapters.find(name)?;
        let (_, adapter) = self.adapters.held.remove(at);
        self.adapters.active = match self.adapters.active {
            Some(active) if active == at => {
                self.stamp = fresh_stamp();
                None
            }
            Some(active) if active > at => Some(active - 1),
            active => active,
        };
        Some(adapter)
    }

    /// Names of the attached adapters, in the order they came.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.held.iter().map(|(name, _)| name.as_str())
    }

    /// An attached adapter.
    pub fn adapter(&self, name: &str) -> Option<&Adapter> {
        self.adapters.find(name).map(|at| &self.adapters.held[at].1)
    }

    /// The name of the active adapter; `None` when the base stands alone.
    pub fn active_adapter(&self) -> Option<&str> {
        self.adapters.active.map(|at| self.adapters.held[at].0.as_str())
    }

    /// What is trained, and whose slots gradients have: the active adapter's parameters, or the
    /// base's when none is active.
    pub fn trained(&self) -> &Params {
        self.adapters.active().map_or(&self.params, |adapter| &adapter.params)
    }

    /// See [`Model::trained`]; for an optimizer.
    pub fn trained_mut(&mut self) -> &mut Params {
        match self.adapters.active {
            Some(at) => &mut self.adapters.held[at].1.params,
            None => &mut self.params,
        }
    }
}
