//! One private step: who is in it, how much each may say, and the noise on top.
//!
//! | room | what it does |
//! |---|---|
//! | [`people`] | rows become persons, each with at most so many rows |
//! | [`sampling`] | every person is in a step or not by a coin of its own |
//! | [`clip`] | gradients of persons are clipped and summed |
//! | [`noise`] | standard deviations for thresholds; Gaussian noise, discrete where hardened |
//! | [`statistics`] | a noisy mean loss and counts, released with the gradient |
//! | [`ledger`] | what was spent, on disk before the noise is used |
//! | [`key`] | the secret from which coins and noise come |
//!
//! The order of a step: [`ledger::Ledger::next_stream`], [`sampling::Sampler::draw`], gradients by
//! person, [`clip::ClippedSum::add`], then [`ledger::Ledger::spend`], whose receipt alone opens
//! [`clip::ClippedSum::release`]. Noise may be drawn beside the sum ([`clip::Wanted`]) and leaves by
//! the same door. An empty draw goes the same way: it releases noise and costs as much as any other.
//!
//! The result is `(Σ clipped + noise) / B` with the *expected* batch B, which is public: neither the
//! number of persons drawn nor anything else that depends on a person leaves but through the noise.
//! A person's gradient must be a function of that person alone, to the last bit: no dropout, no
//! load-balance loss, and batches that all have the same number of rows, since products choose the
//! order of their sums by it (`Batch::fill_up` of the model crate).
//! What does not hide is time: how long a step takes says something of how many were drawn.

pub mod clip;
mod discrete;
pub mod key;
pub mod ledger;
pub mod noise;
pub mod people;
pub mod sampling;
pub mod statistics;
