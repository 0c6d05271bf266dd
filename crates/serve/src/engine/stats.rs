//! What the engine counts, for metrics.

/// Counts of durations, by upper bounds in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Upper bounds, ascending; one more bucket is unbounded.
    pub bounds: &'static [f64],
    /// How many fell into each bucket, one more than `bounds`; not cumulative.
    pub counts: Vec<u64>,
    /// Sum of all, in seconds.
    pub sum: f64,
}

impl Histogram {
    /// An empty one.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Counts one duration.
    pub fn add(&mut self, seconds: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < seconds);
        self.counts[bucket] += 1;
        self.sum += seconds;
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Seconds until something happens once a request: vLLM's buckets of the time to first token, and
/// two for hours of queueing.
const ONCE: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];

/// Seconds between two tokens: vLLM's buckets, with two below for small models.
const EACH: &[f64] = &[
    0.001, 0.0025, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0,
];

/// Failed steps in a row after which the engine, and no request, is to blame: a sequence that fails
/// with others is computed once more by itself, and then no more.
pub const FAILING_STEPS: u64 = 4;

/// A look at the engine. Counters only grow, but for [`Stats::failed_steps`].
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// Sequences that are computed.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Pages there are; a page holds [`Stats::page_tokens`] tokens.
    pub pages_total: usize,
    /// Pages that running sequences hold.
    pub pages_used: usize,
    /// Pages that the prefix cache holds; given up when they are needed.
    pub pages_cached: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Bytes of keys and values that one more token costs in the long run.
    pub bytes_per_token: f64,
    /// Bytes beside the pages: what a GPU holds for each place whatever is in it.
    pub reserved_bytes: usize,
    /// Requests that were taken.
    pub accepted: u64,
    /// Requests that were refused because the queue was full.
    pub refused_full: u64,
    /// Ended with [`super::Finish::Length`].
    pub finished_length: u64,
    /// Ended by an end of text, a stop token or a constraint.
    pub finished_stop: u64,
    /// The receiver was dropped.
    pub cancelled: u64,
    /// Ended with [`super::Event::Failed`].
    pub failed: u64,
    /// Sequences that gave their pages up to be computed again.
    pub preempted: u64,
    /// Tokens of prompts that were answered or begun, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub generated_tokens: u64,
    /// Tokens of prompts that were looked for in the prefix cache.
    pub prefix_queries: u64,
    /// Those that were found.
    pub prefix_hits: u64,
    /// Steps of the engine.
    pub steps: u64,
    /// Steps in a row, up to the last one that computed anything, in which all that was computed
    /// failed; see [`Stats::is_failing`].
    pub failed_steps: u64,
    /// Seconds from submission until a sequence was first computed.
    pub queue_time: Histogram,
    /// Seconds from submission to the first token.
    pub first_token: Histogram,
    /// Seconds between a sequence's tokens.
    pub inter_token: Histogram,
    /// Seconds from submission to the end, of those that were not cancelled.
    pub whole: Histogram,
}

impl Stats {
    /// Whether the engine cannot compute any more, so far as can be told: every step of the last
    /// [`FAILING_STEPS`] failed. One that does not fail ends it.
    pub fn is_failing(&self) -> bool {
        self.failed_steps >= FAILING_STEPS
    }
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            running: 0,
            waiting: 0,
            pages_total: 0,
            pages_used: 0,
            pages_cached: 0,
            page_tokens: 0,
            page_bytes: 0,
            bytes_per_token: 0.0,
            reserved_bytes: 0,
            accepted: 0,
            refused_full: 0,
            finished_length: 0,
            finished_stop: 0,
            cancelled: 0,
            failed: 0,
            preempted: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            steps: 0,
            failed_steps: 0,
            queue_time: Histogram::new(ONCE),
            first_token: Histogram::new(ONCE),
            inter_token: Histogram::new(EACH),
            whole: Histogram::new(ONCE),
        }
    }
}
