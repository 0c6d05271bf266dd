//! Alignment: where the rewards of sampled answers come from.

pub mod reward;
