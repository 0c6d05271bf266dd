//! lm-eval's local tasks, in process: a task file, rows of JSON, a model, and what it scores.
//!
//! [`Task::load`] reads a task file, [`Ready::new`] makes its questions, [`evaluate`] asks them.
//! Numbers are those of lm-eval 0.4.13 for the same model; `docs/eval.md` says what equals what.

mod error;
mod evaluate;
mod item;
mod measure;
mod python;
mod request;
mod rows;
mod score;
mod task;
mod yaml;

pub use error::{Error, Result};
pub use evaluate::{Options, Outcome, Progress, Ready, Sample, evaluate};
pub use measure::{Answer, Score};
pub use score::Likelihood;
pub use task::{Metric, Output, Task};
