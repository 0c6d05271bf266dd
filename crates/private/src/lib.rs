//! Differential privacy for training: what a run of noisy steps gives away, as a bound that holds.
//!
//! [`accounting`] answers how large (ε, δ) is for given noise, and how much noise a given (ε, δ)
//! needs. The crate knows nothing of preferences, models or tensors.

pub mod accounting;
mod error;

pub use error::{Error, Result};
