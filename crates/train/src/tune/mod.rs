//! Tuning a model that exists: rows of JSON lines become examples, examples become steps.
//!
//! `encode` turns rows into `example`s, `count` keeps the books of what was cut or dropped,
//! `order` says which examples a step sees, `start` loads the model and its adapter, `sft` is
//! supervised tuning. Alignment builds on the same rooms.

pub mod count;
pub mod encode;
pub mod example;
pub mod order;
pub mod sft;
pub mod start;

pub use count::{RowCount, bad_row};
pub use encode::{Encoder, Part};
pub use example::{Example, pack, portions};
pub use order::Order;
pub use sft::{SftConfig, sft};
