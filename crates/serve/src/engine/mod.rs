//! The engine: prompts of token ids in, tokens out, many sequences side by side.
//!
//! One thread computes. [`Engine::start`] begins it and gives a [`Handle`], whose calls never
//! wait for it. Dropping the receiver of a sequence cancels it.

mod admission;
mod handle;
mod pages;
mod prefix;
mod request;
mod sampler;
mod scheduler;
mod slots;
mod stats;
mod worker;

pub use handle::{Engine, Handle, Limits, Models, StartError};
pub use request::{
    Constraint, EngineError, Event, Finish, LogProbs, MOST_LOG_PROBS, Reads, Refused, Request,
    Usage,
};
pub use stats::{Histogram, Stats};
