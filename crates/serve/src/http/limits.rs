//! Every bound of the front in one place. What a client sends beyond one of them is refused with
//! a 4xx that names the bound; none of them is reached by a client that means well.

use std::time::Duration;

/// Bytes of a request's body at least allowed; TGI's figure. A model with a long context allows
/// [`BODY_BYTES_PER_TOKEN`] for each of its tokens instead.
pub const BODY_BYTES: usize = 2 << 20;

/// Bytes of a body for one token of context: an id is written with at most eight characters, a
/// text token has four on average and each may be escaped.
pub const BODY_BYTES_PER_TOKEN: usize = 16;

/// Bytes of all headers, and of the buffer that a connection reads into.
pub const HEADER_BYTES: usize = 16 << 10;

/// How many headers a request may have.
pub const HEADERS: usize = 100;

/// Arrays and objects inside each other in a body.
pub const JSON_DEPTH: usize = 64;

/// Connections open at once; the next are told 503 and closed. Below the 1,024 open files that
/// systems allow a process by default: beyond those a client would wait for nothing.
pub const CONNECTIONS: usize = 900;

/// Time for the headers of a request, which is also how long a connection may idle.
pub const HEADER_TIME: Duration = Duration::from_secs(30);

/// Time for the body of a request.
pub const BODY_TIME: Duration = Duration::from_secs(60);

/// How long a client may leave an answer unread before it is dropped and its request cancelled.
pub const SLOW_READER: Duration = Duration::from_secs(30);

/// Pieces of an answer that wait for a client to read them.
pub const PIECES_WAITING: usize = 64;

/// Silence in a stream after which a comment is sent, so that proxies keep it open.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Requests with a body that are read or answered at once; the next are told 429.
pub const IN_FLIGHT: usize = 512;

/// Answers to one prompt (`n`, `best_of`).
pub const N: i64 = 8;

/// Prompts in one request to `/v1/completions`.
pub const PROMPTS: usize = 64;

/// Answers of one request, over all its prompts.
pub const CHOICES: usize = 64;

/// Tokens whose log-probabilities are given at one position: OpenAI's bound.
pub const TOP_LOGPROBS: i64 = crate::engine::MOST_LOG_PROBS as i64;

/// Log-probabilities of prompts in one answer with `echo` and `logprobs`: tokens times one more
/// than `logprobs`, over all answers; all are held as JSON at once. Enough for [`PROMPTS`] prompts
/// of 4,096 tokens with the most probable one of each, which is what harnesses ask for.
pub const ECHO_SCORES: usize = PROMPTS * 4096 * 2;

/// Tokens of an answer with `return_reads`: a deep model reports kilobytes for each token, which
/// wait for a client that reads slowly.
pub const READS_TOKENS: usize = 4096;

/// Stop texts of a request, and characters of one. OpenAI allows 4, its open relatives 16.
pub const STOPS: usize = 16;

/// See [`STOPS`].
pub const STOP_CHARS: usize = 256;

/// Stop tokens of a request.
pub const STOP_TOKENS: usize = 128;

/// Entries of `logit_bias`.
pub const LOGIT_BIASES: usize = 1024;

/// Messages of a conversation.
pub const MESSAGES: usize = 4096;

/// Tools of a request, and calls in one message: OpenAI's bound.
pub const TOOLS: usize = 128;

/// Bytes of a JSON schema, all tools' parameters together included.
pub const SCHEMA_BYTES: usize = 64 << 10;

/// Bytes of a regular expression.
pub const REGEX_BYTES: usize = 4 << 10;

/// Texts of `guided_choice`, 256 characters each at most.
pub const GUIDED_CHOICES: usize = 256;

/// Characters of `cache_salt` and of other names.
pub const NAME_CHARS: usize = 256;

/// Time for a chat template to run, a prompt to be tokenised, a grammar to be compiled, scores of
/// prompts to be written.
pub const COMPILE_TIME: Duration = Duration::from_secs(30);

/// Chat templates, tokenisations, grammars and scores of prompts that are computed at once.
pub const COMPILING: usize = 8;

/// How long a drain may take before what runs is cut off.
pub const DRAIN_TIME: Duration = Duration::from_secs(90);

/// Seconds that a client is asked to wait while the model loads.
pub const LOADING_RETRY_S: u64 = 2;

/// The same while the engine fails at every step: it takes a restart, most likely.
pub const FAILING_RETRY_S: u64 = 30;
