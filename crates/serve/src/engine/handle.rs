//! The engine from outside.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use tercet_model::Model;
use tercet_tensor::{DType, Device, FEW_ROWS};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::admission::Door;
use super::pages::{Division, PAGE};
use super::request::{Event, Refused, Request};
use super::scheduler::{Rules, Scheduler};
use super::stats::Stats;
use super::worker::{Message, Worker};

/// A base model and its adapters by name; all share the base's tensors.
pub struct Models {
    /// Without an adapter.
    base: Model,
    /// Each with its adapter active.
    adapted: Vec<(String, Model)>,
    end_of_text: Vec<u32>,
}

impl Models {
    /// The model alone, and once with each adapter that is attached to it.
    pub fn new(mut model: Model) -> tercet_model::Result<Self> {
        let names: Vec<String> = model.adapters().map(str::to_owned).collect();
        let mut adapted = Vec::with_capacity(names.len());
        for name in names {
            let mut with = model.clone();
            with.activate(Some(&name))?;
            adapted.push((name, with));
        }
        model.activate(None)?;
        let end_of_text = model.config().eos_token_ids.clone();
        Ok(Self { base: model, adapted, end_of_text })
    }

    /// With these ends of text in place of those of the model's configuration, see
    /// [`tercet_model::GenerationConfig`].
    pub fn with_ends(self, end_of_text: Vec<u32>) -> Self {
        Self { end_of_text, ..self }
    }
}

/// What the engine may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Sequences computed side by side, 1..=1024; on a GPU no more than half of `cache_bytes` holds
    /// the rings of.
    pub running: usize,
    /// Sequences that may wait beside those; more are refused with [`Refused::Full`].
    pub waiting: usize,
    /// Tokens of prompts read in one step, at least `chunk`. Between two steps every running
    /// answer grows by a token: fewer keep answers flowing, more read prompts faster.
    pub prefill_tokens: usize,
    /// Tokens of a prompt read at once, a multiple of 64. Prompts are cut at its multiples and
    /// kept up to one of them, so that what was read before changes no bit.
    pub chunk: usize,
    /// Bytes for keys and values, prefix cache included.
    pub cache_bytes: usize,
    /// Tokens of prompt and answer together; `None` is what the model was made for.
    pub context: Option<usize>,
    /// Whether prompts are kept for the next request that begins with them.
    pub prefix_cache: bool,
    /// Whether an answer has the same bits in any company on a GPU, too: every step then computes
    /// `running` rows, or one sequence after the other where tokens are dealt to experts.
    pub batch_invariant: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            running: 64,
            waiting: 128,
            prefill_tokens: 512,
            chunk: 256,
            cache_bytes: 4 << 30,
            context: None,
            prefix_cache: true,
            batch_invariant: false,
        }
    }
}

impl Limits {
    fn check(&self) -> Result<(), StartError> {
        let limits = |text: String| Err(StartError::Limits(text));
        let Self { running, waiting, prefill_tokens, chunk, .. } = *self;
        if !(1..=1024).contains(&running) {
            return limits(format!("running = {running} is outside 1..=1024"));
        }
        if waiting > 1 << 20 {
            return limits(format!("waiting = {waiting} is more than 2^20"));
        }
        if chunk == 0 || !chunk.is_multiple_of(PAGE) || chunk > 1 << 20 {
            return limits(format!("chunk = {chunk} is not a multiple of {PAGE} up to 2^20"));
        }
        if prefill_tokens < chunk {
            return limits(format!(
                "prefill_tokens = {prefill_tokens} is less than a chunk of {chunk}"
            ));
        }
        Ok(())
    }
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A limit is outside its range, or the memory does not hold a single short sequence.
    #[error("limits: {0}")]
    Limits(String),
    /// The model gave no places for sequences: a GPU has not the memory.
    #[error(transparent)]
    Model(#[from] tercet_model::Error),
    /// The system gave no thread.
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

impl StartError {
    /// Whether the user's input is at fault (exit code 2) and not this program (1).
    pub fn is_users(&self) -> bool {
        matches!(self, Self::Limits(_))
    }
}

/// The engine's side of the conversation; clones speak to the same engine.
#[derive(Clone)]
pub struct Handle {
    door: Arc<Door>,
    outbox: mpsc::Sender<Message>,
}

impl Handle {
    /// Hands a request in; its events come through the receiver, and dropping that cancels it:
    /// everything of it is free before the next step. Never waits; hashes the prompt (about a
    /// millisecond for 64k tokens).
    pub fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, Refused> {
        let (sender, receiver) = unbounded_channel();
        let arrival = self.door.enter(request, sender)?;
        match self.outbox.send(Message::New(Box::new(arrival))) {
            Ok(()) => Ok(receiver),
            Err(_) => {
                self.door.leave();
                Err(Refused::Draining)
            }
        }
    }

    /// What the engine does now, and did so far.
    pub fn stats(&self) -> Stats {
        let mut stats = self.door.stats().clone();
        stats.waiting = self.door.live().saturating_sub(stats.running);
        stats
    }

    /// Names of the adapters.
    pub fn adapters(&self) -> Vec<String> {
        self.door.adapters.clone()
    }

    /// Tokens that prompt and answer may have together: the least of the model's context, that of
    /// the limits, and what the memory holds.
    pub fn context(&self) -> usize {
        self.door.context
    }

    /// Sequences that may be inside at once: those that are computed and those that wait.
    pub fn places(&self) -> usize {
        self.door.limits.running + self.door.limits.waiting
    }

    /// Finishes what runs and waits, refuses what comes; the engine's thread ends then.
    pub fn drain(&self) {
        self.door.drain();
        // A thread that is gone has drained.
        let _ = self.outbox.send(Message::Wake);
    }
}

/// The engine.
pub struct Engine;

impl Engine {
    /// Starts the engine's thread. It ends when it was drained, or every handle was dropped, and
    /// all is answered.
    pub fn start(models: Models, limits: Limits) -> Result<(Handle, JoinHandle<()>), StartError> {
        let (handle, worker) = assemble(models, limits)?;
        let thread = std::thread::Builder::new().name("engine".into());
        Ok((handle, thread.spawn(|| worker.run())?))
    }
}

/// An engine that does not run yet.
pub(super) fn assemble(models: Models, limits: Limits) -> Result<(Handle, Worker), StartError> {
    limits.check()?;
    let Models { base, adapted, end_of_text } = models;
    let config = base.config();
    let on_cpu = base.device() == Device::Cpu;
    // Whatever the weights are, a CPU's caches hold f32.
    let stored = if on_cpu { DType::F32 } else { base.params().dtype() };
    let divide = if on_cpu { Division::as_filled } else { Division::reserved };
    let Division { costs, pages, running, kept, context, reserved } =
        divide(config, stored, &limits);
    if context < 2 {
        return Err(StartError::Limits(format!(
            "a context of {context} tokens holds no prompt and answer: of cache_bytes = {} a place \
             takes {reserved} bytes, and {pages} pages of {} bytes are left, of which a sequence \
             needs {}",
            limits.cache_bytes,
            costs.page_bytes,
            costs.pages(2)
        )));
    }
    let rules = Rules {
        running,
        prefill_tokens: limits.prefill_tokens,
        chunk: limits.chunk,
        replay: match on_cpu {
            _ if limits.batch_invariant => 0,
            // So few rows have the bits of single steps.
            true => FEW_ROWS.min(limits.chunk),
            false => limits.chunk,
        },
    };
    let stats = Stats {
        pages_total: pages,
        page_tokens: PAGE,
        page_bytes: costs.page_bytes,
        bytes_per_token: costs.bytes_per_token,
        reserved_bytes: reserved,
        ..Stats::default()
    };
    let mut slots = base.slots_within(running + kept, context, pages)?;
    let apart = limits.batch_invariant && !on_cpu && config.moe.is_some();
    if limits.batch_invariant {
        slots.fix_rows(if apart { 1 } else { running })?;
    }
    let scheduler = Scheduler::new(rules, costs, pages, kept);
    let vocab = config.vocab_size;
    let (names, with): (Vec<String>, Vec<Model>) = adapted.into_iter().unzip();
    let limits = Limits { running, ..limits };
    let door = Arc::new(Door::new(limits, vocab, context, names, stats));
    let models = std::iter::once(base).chain(with).collect();
    let (outbox, inbox) = mpsc::channel();
    let worker = Worker::new((models, end_of_text), (slots, apart), scheduler, door.clone(), inbox);
    Ok((Handle { door, outbox }, worker))
}
