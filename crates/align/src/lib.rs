//! Alignment with preferences: what is learnt from pairs of answers of which one is better.
//!
//! * [`objective`] holds the preference objectives as functions of a pair's log-probabilities;
//!   it touches no tensors.
//! * [`delta`] makes the Δ of MaPPO from prior rewards.
//! * [`select`] picks the best and the worst of n scored answers.
//!
//! The crate knows nothing of privacy.

pub mod delta;
mod error;
mod maths;
pub mod objective;
pub mod select;

pub use error::{Error, Result};
