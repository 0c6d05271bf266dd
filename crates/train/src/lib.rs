//! Training: from text on disk to a checkpoint that can be resumed bit for bit.

pub mod config;
pub mod curve;
pub mod data;
mod error;
pub mod files;
pub mod guard;
pub mod lock;
pub mod metrics;
pub mod schedule;
pub mod tensorboard;
pub mod tokenizer;
pub mod tokenizer_train;

pub use config::RunConfig;
pub use error::{Error, Result};
