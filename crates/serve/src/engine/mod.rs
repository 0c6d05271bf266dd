//! The engine: prompts of token ids in, tokens out, many sequences side by side.
//!
//! One thread computes ([`Engine::start`], `worker.rs`); a [`Handle`] speaks to it and never waits
//! for it. Dropping the receiver of a sequence cancels it: its pages are free before the next step.
//!
//! A request passes the door (`admission.rs`), waits, is given pages (`pages.rs`) and a place among
//! [`tercet_model::slots::Slots`], begins with what is kept of its prompt (`prefix.rs`), is read in
//! chunks and written token by token, in the turns that `scheduler/` gives, and each token is
//! chosen by `sampler.rs`.
//!
//! **What an answer depends on.** On a CPU: on its prompt, settings, seed, constraint, the weights
//! and [`Limits::chunk`] alone, to the last bit: not on who else is served, what is kept, or how
//! often it had to give way. The price is that prompts are kept up to a multiple of the chunk only.
//! On a GPU products of other sizes round differently, unless [`Limits::batch_invariant`] makes
//! all steps of one size.

mod admission;
mod handle;
mod pages;
mod prefix;
mod request;
mod sampler;
mod scheduler;
mod stats;
mod worker;

pub use handle::{Engine, Handle, Limits, Models, StartError};
pub use request::{
    Constraint, EngineError, Event, Finish, LogProbs, MOST_LOG_PROBS, Reads, Refused, Request,
    Usage,
};
pub use stats::{FAILING_STEPS, Histogram, Stats};
