//! The engine from outside.

use std::thread::JoinHandle;

use tercet_model::{Model, Result};
use tokio::sync::mpsc::UnboundedReceiver;

use super::request::{Event, Refused, Request};
use super::stats::Stats;

/// A base model and its adapters by name; all share the base's tensors.
pub struct Models {
    /// Without an adapter.
    pub(super) base: Model,
    /// Each with its adapter active.
    pub(super) adapted: Vec<(String, Model)>,
}

impl Models {
    /// The model alone, and once with each adapter that is attached to it.
    pub fn new(mut model: Model) -> Result<Self> {
        let names: Vec<String> = model.adapters().map(str::to_owned).collect();
        let mut adapted = Vec::with_capacity(names.len());
        for name in names {
            let mut with = model.clone();
            with.activate(Some(&name))?;
            adapted.push((name, with));
        }
        model.activate(None)?;
        Ok(Self { base: model, adapted })
    }
}

/// What the engine may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Sequences computed side by side, 1..=1024.
    pub running: usize,
    /// Sequences that may wait; more are refused with [`Refused::Full`].
    pub waiting: usize,
    /// Tokens of prompts read in one step, at least 64. Between two steps every running answer
    /// grows by a token: fewer keep answers flowing, more read prompts faster.
    pub prefill_tokens: usize,
    /// Bytes for keys and values, prefix cache included.
    pub cache_bytes: usize,
    /// Tokens of prompt and answer together; `None` is what the model was made for.
    pub context: Option<usize>,
    /// Whether prompts are kept for the next request that begins with them.
    pub prefix_cache: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            running: 64,
            waiting: 128,
            prefill_tokens: 512,
            cache_bytes: 4 << 30,
            context: None,
            prefix_cache: true,
        }
    }
}

/// The engine's side of the conversation; clones speak to the same engine.
#[derive(Clone)]
pub struct Handle;

impl Handle {
    /// Hands a request in; its events come through the receiver, and dropping that cancels it.
    /// Never waits.
    pub fn submit(
        &self,
        request: Request,
    ) -> std::result::Result<UnboundedReceiver<Event>, Refused> {
        let _ = request;
        Err(Refused::Draining)
    }

    /// What the engine does now, and did so far.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Names of the adapters.
    pub fn adapters(&self) -> Vec<String> {
        Vec::new()
    }

    /// Tokens that prompt and answer may have together: the least of the model's context, that of
    /// the limits, and what the memory holds.
    pub fn context(&self) -> usize {
        0
    }

    /// Finishes what runs and waits, refuses what comes; the engine's thread ends then.
    pub fn drain(&self) {}
}

/// The engine.
pub struct Engine;

impl Engine {
    /// Starts the engine's thread. It ends when it was drained, or every handle was dropped and
    /// all is answered.
    pub fn start(models: Models, limits: Limits) -> Result<(Handle, JoinHandle<()>)> {
        let _ = (models, limits);
        Ok((Handle, std::thread::spawn(|| ())))
    }
}
