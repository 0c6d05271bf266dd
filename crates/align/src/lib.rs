//! Alignment with preferences: what is learnt from pairs of answers of which one is better.
//!
//! [`align()`] does a run that an [`AlignConfig`] declares. On its way:
//!
//! * [`pairs`] turns rows into tokenized pairs, [`delta`] makes the Δ of MaPPO from prior rewards;
//! * [`sums`] goes from log-probabilities of tokens to sums of answers and back, [`reference`]
//!   holds what they are measured against;
//! * [`objective`] holds the preference objectives as functions of these sums; it touches no
//!   tensors;
//! * [`reward`] scores answers, [`select`] picks the best and the worst of n scored answers,
//!   [`iterate`] does both round after round.
//!
//! The crate knows nothing of privacy.

pub mod chart;
pub mod config;
pub mod delta;
mod error;
pub mod iterate;
mod maths;
pub mod objective;
pub mod pairs;
pub mod reference;
pub mod reward;
mod run;
pub mod select;
pub mod sums;
pub mod task;

pub use config::AlignConfig;
pub use error::{Error, Result};
pub use run::align;
