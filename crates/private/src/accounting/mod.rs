//! What a sequence of Gaussian releases on Poisson samples gives away.
//!
//! | room | answers | what the answer is |
//! |---|---|---|
//! | [`pld`] | ε(δ), δ(ε) | an upper **and** a lower bound, both adjacency directions |
//! | [`rdp`] | ε(δ) | an upper bound |
//! | [`gaussian`] | ε(δ), δ(ε) at rate 1 | exact |
//! | [`zcdp`] | ε(δ) | an upper bound that ignores the sampling |
//! | [`gdp`] | ε(δ) by a central limit theorem | information, **not** a bound |
//! | [`rdp_filter`] | may one more step be taken? | holds when noise was chosen from past outputs |
//! | [`calibrate`] | σ for (ε, δ) | never above the target |
//!
//! Adjacency is add-or-remove one person; the noise multiplier σ is standard deviation over L2
//! sensitivity; every step draws each person independently with probability `rate`. Fixed-size
//! batches or a shuffled loader are *not* covered (Chua et al. 2024): their loss is larger.

pub mod calibrate;
pub mod gaussian;
pub mod gdp;
mod normal;
mod phase;
pub mod pld;
pub mod rdp;
pub mod rdp_filter;
pub mod zcdp;

pub use phase::{MOST_STEPS, Phase};
pub(crate) use phase::{check_delta, check_epsilon, merged};
