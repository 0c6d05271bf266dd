//! Differential privacy for training: what a run of noisy steps gives away, as a bound that holds.
//!
//! [`accounting`] answers how large (ε, δ) is for given noise, and how much noise a given (ε, δ)
//! needs; [`mechanism`] makes the noisy steps that it speaks of; [`method`] decides from step to
//! step how they clip; [`tune`] is the run, and alone knows models, tensors and the training loop:
//! to the rooms before it gradients are plain numbers. [`rldp`] steers thresholds from released
//! values alone, [`audit`] sets attacks beside the proof, [`clinic`] makes text about people who do
//! not exist. The crate knows nothing of preferences.

pub mod accounting;
pub mod audit;
pub mod clinic;
mod error;
pub mod mechanism;
pub mod method;
pub mod rldp;
pub mod tune;

pub use error::{Error, Result};
