//! What the front asks of an engine. The tests have one of their own, which writes what they say.

use tokio::sync::mpsc::UnboundedReceiver;

use crate::engine::{Event, Handle, Refused, Request, Stats};

/// An engine, seen from the front; see [`Handle`] for what each call means.
pub trait Backend: Send + Sync {
    /// Hands a request in.
    fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, Refused>;
    /// What the engine counts.
    fn stats(&self) -> Stats;
    /// Names of the adapters.
    fn adapters(&self) -> Vec<String>;
    /// Tokens that prompt and answer may have together.
    fn context(&self) -> usize;
    /// Sequences that are computed and wait, at most.
    fn places(&self) -> usize;
    /// Refuses what comes from now on.
    fn drain(&self);
}

impl Backend for Handle {
    fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, Refused> {
        Handle::submit(self, request)
    }

    fn stats(&self) -> Stats {
        Handle::stats(self)
    }

    fn adapters(&self) -> Vec<String> {
        Handle::adapters(self)
    }

    fn context(&self) -> usize {
        Handle::context(self)
    }

    fn places(&self) -> usize {
        Handle::places(self)
    }

    fn drain(&self) {
        Handle::drain(self);
    }
}
