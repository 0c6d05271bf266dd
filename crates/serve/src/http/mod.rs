//! The front: OpenAI's API over HTTP/1.1, and a page to talk on.
//!
//! A [`Front`] answers from the first moment, with 503 until a model is [`Front::ready`]. It knows
//! text and HTTP and hands token ids to an engine. What a client sends is checked field by field
//! ([`limits`] has every bound); nothing it can send is more than an error to itself.

mod answer;
mod ask;
mod auth;
mod backend;
mod body;
mod chat;
mod completions;
mod connections;
mod constraint;
mod error;
mod fields;
mod follow;
mod guard;
pub mod limits;
mod log_probs;
mod metrics;
mod models;
mod openapi;
mod router;
mod text;
mod tokenize;
mod tools;

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

pub use auth::Keys;
pub use backend::Backend;
pub use text::{Served, Text};

use error::{ApiError, ApiResult};
use metrics::Counts;

/// What the front is told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Who is let in.
    pub keys: Keys,
    /// Whether only this machine's own names are answered to. For a server that listens on a
    /// loopback address: a page anywhere can have its own name point there (DNS rebinding).
    pub loopback: bool,
}

/// The front of a server.
pub struct Front {
    options: Options,
    served: OnceLock<Arc<Served>>,
    draining: AtomicBool,
    counts: Counts,
    places: Arc<Semaphore>,
    compiling: Arc<Semaphore>,
}

impl Front {
    /// A front whose model is not there yet.
    pub fn new(options: Options) -> Arc<Self> {
        Arc::new(Self {
            options,
            served: OnceLock::new(),
            draining: AtomicBool::new(false),
            counts: Counts::default(),
            places: Arc::new(Semaphore::new(limits::IN_FLIGHT)),
            compiling: Arc::new(Semaphore::new(limits::COMPILING)),
        })
    }

    /// Serves a model from now on; the first one stays.
    pub fn ready(&self, served: Served) {
        let _ = self.served.set(Arc::new(served));
    }

    /// Answers until `stop`; then refuses what comes, finishes what runs, at most
    /// [`limits::DRAIN_TIME`], and returns. Needs a tokio runtime with time and I/O.
    pub async fn serve(self: &Arc<Self>, listener: TcpListener, stop: impl Future<Output = ()>) {
        connections::serve(self.clone(), listener, stop).await;
    }

    /// The model, loaded, whether or not it still takes requests.
    fn loaded(&self) -> ApiResult<Arc<Served>> {
        self.served.get().cloned().ok_or_else(ApiError::loading)
    }

    /// The model, ready for requests.
    fn served(&self) -> ApiResult<Arc<Served>> {
        if self.draining.load(Ordering::SeqCst) {
            let message = "the server is shutting down; try again elsewhere";
            return Err(ApiError::unavailable(message, limits::LOADING_RETRY_S));
        }
        self.loaded()
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        if let Some(served) = self.served.get() {
            served.engine.drain();
        }
    }

    /// Returns once no request with a body is being answered.
    async fn idle(&self) {
        let _ = self.places.acquire_many(limits::IN_FLIGHT as u32).await;
    }

    fn place(&self) -> ApiResult<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().map_err(|_| ApiError::busy(1))
    }

    fn body_bytes(&self) -> usize {
        let context = self.served.get().map_or(0, |served| served.engine.context());
        limits::BODY_BYTES.max(context.saturating_mul(limits::BODY_BYTES_PER_TOKEN))
    }

    /// Does what may take a while off the threads that answer, for a bounded time.
    async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let place = timeout(limits::COMPILE_TIME, self.compiling.clone().acquire_owned()).await;
        let Ok(Ok(place)) = place else { return Err(ApiError::busy(1)) };
        let task = tokio::task::spawn_blocking(move || {
            // Held by the work and not by who waits for it.
            let _place = place;
            work()
        });
        match timeout(limits::COMPILE_TIME, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ApiError::ours("a fault of this server; please report it")),
            Err(_) => {
                let seconds = limits::COMPILE_TIME.as_secs();
                let message = format!(
                    "preparing the request or its answer took longer than {seconds} s; ask for less"
                );
                Err(ApiError::invalid(message))
            }
        }
    }
}

/// Who may share a prompt's cache: requests with one key and one salt.
fn namespace(key: usize, salt: &str) -> String {
    format!("{key} {salt}")
}

#[cfg(test)]
mod tests;
