//! Differential privacy for training: what a run of noisy steps gives away, as a bound that holds.
//!
//! [`accounting`] answers how large (ε, δ) is for given noise, and how much noise a given (ε, δ)
//! needs; [`mechanism`] makes the noisy steps that it speaks of. The crate knows nothing of
//! preferences, models or tensors: gradients come as plain numbers.

pub mod accounting;
pub mod audit;
pub mod clinic;
mod error;
pub mod mechanism;
pub mod rldp;

pub use error::{Error, Result};
