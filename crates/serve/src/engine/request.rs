//! What goes into the engine and what comes out of it.

use tercet_model::Sampling;

/// One sequence to be written.
///
/// A caller who wants `n` answers to a prompt submits n requests with seeds of their own; the
/// prompt is read once where the prefix cache may be used.
pub struct Request {
    /// Token ids, at least one, each in the vocabulary.
    pub prompt: Vec<u32>,
    /// The adapter to answer with, by name; `None` is the base model.
    pub adapter: Option<String>,
    /// How tokens are chosen. Its `max_tokens` and `stop` are not read: the fields below count
    /// tokens, and stop texts are the business of whoever knows text.
    pub sampling: Sampling,
    /// Tokens to write at most. 0 reads the prompt alone, for its log-probabilities. The context
    /// and the memory bound it too ([`Handle::context`](super::Handle::context)).
    pub max_tokens: usize,
    /// No ending token is chosen before this many tokens are written.
    pub min_tokens: usize,
    /// Tokens that end the answer, beside the model's own ends of text.
    pub stop_tokens: Vec<u32>,
    /// Go on after the model's ends of text; they are tokens like others then.
    pub ignore_eos: bool,
    /// With each written token, the log-probabilities of this many most probable tokens (0: of
    /// the written one alone). At most [`MOST_LOG_PROBS`].
    pub log_probs: Option<usize>,
    /// The same for the tokens of the prompt; nothing is taken from the prefix cache then. At most
    /// [`MOST_LOG_PROBS`].
    pub prompt_log_probs: Option<usize>,
    /// Whose prefixes may be shared: only requests with the same text here (a key and a salt) see
    /// each other's, in time as in content.
    pub namespace: String,
    /// Report which blocks each layer and group selected; nothing on dense models.
    pub reads: bool,
    /// What tokens are allowed, one after the other.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// Most tokens that log-probabilities are given of at one position: OpenAI's bound.
pub const MOST_LOG_PROBS: usize = 20;

/// A grammar that an answer keeps to. Called from the engine's thread, between the steps of all
/// sequences: each call has to be short.
pub trait Constraint: Send {
    /// The tokens allowed next as a bit mask of the vocabulary: token t is bit t % 32 of word
    /// t / 32, and words that are missing allow nothing. `None` allows all. Ends of text must be
    /// in it where the answer may end. An error ends the sequence with
    /// [`EngineError::Constraint`].
    fn mask(&mut self) -> Result<Option<Vec<u32>>, String>;
    /// Notes the token that was chosen, never one that ended the answer.
    fn take(&mut self, token: u32) -> Result<(), String>;
    /// Whether nothing may follow; ends the answer with [`Finish::Constraint`]. Asked after each
    /// [`Constraint::take`].
    fn is_done(&self) -> bool;
}

/// What happens to a sequence, in this order: `Queued`, any number of `Prefill`, `PromptLogProbs`
/// if asked for, `Token`s, and one of `Done` and `Failed`, after which nothing comes. A channel
/// that closes without either means that the engine is gone.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It waits behind `ahead` others. Sent once.
    Queued {
        /// Sequences that were waiting when it came.
        ahead: usize,
    },
    /// A part of the prompt was read. Sent after each chunk; again from the start after a
    /// preemption before the first token, never once a token was sent.
    Prefill {
        /// Tokens of the prompt that are read, `cached` among them.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
        /// Tokens that came from the prefix cache.
        cached: usize,
    },
    /// For each token of the prompt, `ln p` of it given those before it; `None` for the first.
    PromptLogProbs(Vec<Option<LogProbs>>),
    /// A token was chosen that does not end the answer.
    Token {
        /// Its id.
        id: u32,
        /// `ln p` under the model's own distribution: no temperature, filter, penalty, bias or
        /// constraint. NaN when [`Request::log_probs`] is `None`.
        log_prob: f32,
        /// The most probable tokens and their `ln p`, most probable first; as many as
        /// [`Request::log_probs`] says.
        top: Vec<(u32, f32)>,
        /// What the model read to choose it, when [`Request::reads`].
        reads: Option<Reads>,
    },
    /// The answer is complete.
    Done {
        /// Why.
        finish: Finish,
        /// What it took.
        usage: Usage,
    },
    /// The sequence ended without an answer; all others go on.
    Failed(EngineError),
}

/// A token's `ln p`, and those of the most probable ones.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// The token.
    pub token: u32,
    /// Its `ln p`.
    pub log_prob: f32,
    /// The most probable tokens, most probable first.
    pub top: Vec<(u32, f32)>,
}

/// Blocks of the prompt and answer that one query selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reads {
    /// Position of the query, that of the token before the chosen one; 0 is the first of the
    /// prompt.
    pub position: usize,
    /// Tokens of a block: block i holds positions `i·block..(i+1)·block`.
    pub block: usize,
    /// By layer, then by group of query heads: block numbers, ascending.
    pub layers: Vec<Vec<Vec<u32>>>,
}

/// Why an answer ended. A stop text ends it from outside: whoever knows text drops the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `max_tokens` were written, or the context is full.
    Length,
    /// The model chose one of its ends of text; it is neither sent nor counted.
    EndOfText,
    /// It chose one of [`Request::stop_tokens`]; it is neither sent nor counted.
    StopToken(u32),
    /// The constraint allows nothing more.
    Constraint,
}

/// Tokens of a finished sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of the prompt, those that came from the prefix cache.
    pub cached: usize,
    /// Written: the number of [`Event::Token`]s.
    pub completion: usize,
}

/// What ended a sequence that could not be finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The model failed; ours to explain.
    #[error("the model failed: {0}")]
    Model(String),
    /// The constraint failed or left no token to choose; whoever gave it is at fault.
    #[error("the constraint cannot be met: {0}")]
    Constraint(String),
}

/// Why a request was not taken; nothing of it is kept.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refused {
    /// As many wait as may (HTTP 429).
    #[error("the server is full; try again in {retry_after_s} s")]
    Full {
        /// Seconds after which a place is likely, at least 1.
        retry_after_s: u64,
    },
    /// The engine finishes what runs and takes nothing new (503).
    #[error("the server is shutting down; try again elsewhere")]
    Draining,
    /// The prompt, and one token when any is asked for, can never fit (400).
    #[error("the prompt has {tokens} tokens, and at most {most} fit; shorten it")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens a prompt may have.
        most: usize,
    },
    /// A token id that the model does not have, in the prompt, the stop tokens or the bias (400).
    #[error("token id {id} is outside the model's vocabulary of {vocab}")]
    Token {
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab: usize,
    },
    /// No adapter has this name (404).
    #[error("there is no adapter called {0:?}")]
    Adapter(String),
    /// A setting outside its range; the text names it (400).
    #[error("{0}")]
    Invalid(String),
}
