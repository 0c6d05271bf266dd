//! The door: what a request has to be, and how many may be inside.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::handle::Limits;
use super::prefix::Keys;
use super::request::{Event, MOST_LOG_PROBS, Refused, Request};
use super::scheduler::Id;
use super::stats::Stats;

/// A request that was let in.
pub(super) struct Arrival {
    pub id: Id,
    pub request: Request,
    /// Which model answers: 0 is the base, then the adapters in their order.
    pub model: usize,
    /// Names of the prompt's beginnings, when they may be shared.
    pub keys: Option<Keys>,
    pub events: UnboundedSender<Event>,
    pub at: Instant,
}

/// What the handles and the engine's thread both see.
pub(super) struct Door {
    pub limits: Limits,
    pub vocab: usize,
    /// Tokens that prompt and answer may have.
    pub context: usize,
    pub adapters: Vec<String>,
    /// Sequences inside: waiting or running.
    live: AtomicUsize,
    draining: AtomicBool,
    next: AtomicU64,
    stats: Mutex<Stats>,
}

impl Door {
    pub fn new(
        limits: Limits,
        vocab: usize,
        context: usize,
        adapters: Vec<String>,
        stats: Stats,
    ) -> Self {
        let (live, draining, next) =
            (AtomicUsize::new(0), AtomicBool::new(false), AtomicU64::new(0));
        Self { limits, vocab, context, adapters, live, draining, next, stats: Mutex::new(stats) }
    }

    pub fn stats(&self) -> MutexGuard<'_, Stats> {
        // Counters are whole whoever panicked.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn live(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Lets a request in, or says why not.
    pub fn enter(
        &self,
        mut request: Request,
        events: UnboundedSender<Event>,
    ) -> Result<Arrival, Refused> {
        // Those two fields are not read here, whatever they say.
        (request.sampling.max_tokens, request.sampling.stop) = (1, Vec::new());
        let model = self.check(&request)?;
        if self.is_draining() {
            return Err(Refused::Draining);
        }
        let most = self.limits.running + self.limits.waiting;
        let add = |live: usize| (live < most).then_some(live + 1);
        let before = self.live.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add);
        let Ok(before) = before else {
            let mut stats = self.stats();
            stats.refused_full += 1;
            return Err(Refused::Full { retry_after_s: retry_after(&stats, most) });
        };
        // Again, after it was counted: the thread ends when it drains and nobody is inside.
        if self.is_draining() {
            self.leave();
            return Err(Refused::Draining);
        }
        let keys = self.keys(&request);
        let ahead = {
            let mut stats = self.stats();
            stats.accepted += 1;
            before.saturating_sub(stats.running)
        };
        // The caller holds the receiver.
        let _ = events.send(Event::Queued { ahead });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        Ok(Arrival { id, request, model, keys, events, at: Instant::now() })
    }

    /// A sequence ended.
    pub fn leave(&self) {
        self.live.fetch_sub(1, Ordering::SeqCst);
    }

    fn keys(&self, request: &Request) -> Option<Keys> {
        // Every position's logits are wanted: there is nothing to skip.
        if !self.limits.prefix_cache || request.prompt_log_probs.is_some() {
            return None;
        }
        let Request { namespace, adapter, prompt, .. } = request;
        Some(Keys::new(namespace, adapter.as_deref(), prompt, self.limits.chunk))
    }

    /// Refuses what can never be answered; the place of the model that answers.
    fn check(&self, request: &Request) -> Result<usize, Refused> {
        let invalid = |text: &str| Err(Refused::Invalid(text.into()));
        if request.prompt.is_empty() {
            return invalid("the prompt has no tokens; give at least one");
        }
        let most = self.context - usize::from(request.max_tokens > 0);
        if request.prompt.len() > most {
            return Err(Refused::TooLong { tokens: request.prompt.len(), most });
        }
        let vocab = self.vocab;
        let ids = request.prompt.iter().chain(&request.stop_tokens);
        let biased = request.sampling.logit_bias.iter().map(|(id, _)| id);
        if let Some(&id) = ids.chain(biased).find(|&&id| id as usize >= vocab) {
            return Err(Refused::Token { id, vocab });
        }
        if request.min_tokens > request.max_tokens {
            return Err(Refused::Invalid(format!(
                "min_tokens = {} is more than max_tokens = {}",
                request.min_tokens, request.max_tokens
            )));
        }
        let asked =
            [("log_probs", request.log_probs), ("prompt_log_probs", request.prompt_log_probs)];
        for (name, top) in asked {
            if top.is_some_and(|top| top > MOST_LOG_PROBS) {
                return Err(Refused::Invalid(format!(
                    "{name} = {} is outside 0..={MOST_LOG_PROBS}",
                    top.unwrap_or(0)
                )));
            }
        }
        request.sampling.validate().map_err(|error| Refused::Invalid(error.to_string()))?;
        match &request.adapter {
            None => Ok(0),
            Some(name) => match self.adapters.iter().position(|held| held == name) {
                Some(at) => Ok(at + 1),
                None => Err(Refused::Adapter(name.clone())),
            },
        }
    }
}

/// Seconds until one of the sequences inside is likely to end: what one took so far, shared by as
/// many as are inside.
fn retry_after(stats: &Stats, inside: usize) -> u64 {
    let each = stats.whole.sum / stats.whole.count().max(1) as f64;
    (each / inside.max(1) as f64).ceil().clamp(1.0, 60.0) as u64
}
