//! Training: from text on disk to a checkpoint that can be resumed bit for bit.
//!
//! [`RunConfig`] declares a run, [`pretrain()`] does it and tells an observer what happens,
//! [`dry_run()`] says what it would do. Data flow one way: [`data`] makes batches, the trainer turns
//! them into updates that the [`guard`] has let through, a checkpoint commits what came of it.
//! The crate knows neither preference nor privacy objectives, and draws no progress bar.

mod checkpoint;
pub mod config;
mod curve;
pub mod data;
mod dry_run;
mod error;
mod event;
pub mod files;
pub mod guard;
mod lock;
pub mod metrics;
mod pace;
mod prepare;
mod pretrain;
pub mod run;
pub mod schedule;
pub mod tensorboard;
mod tokenizer;
pub mod tokenizer_train;
mod trainer;
pub mod tune;

pub use config::RunConfig;
pub use dry_run::{DryRun, dry_run};
pub use error::{Error, Result};
pub use event::{Control, Event, Progress, Report, Summary};
pub use pretrain::pretrain;
pub use run::newest_checkpoint;
pub use tokenizer::Vocabulary;
