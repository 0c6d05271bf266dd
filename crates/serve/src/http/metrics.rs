//! `/metrics`: what the engine and the front count, in Prometheus' text format; under our own
//! names, and under those of vLLM that dashboards already know.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use hyper::StatusCode;

use super::body::{Response, whole};
use super::text::Served;
use crate::engine::{Histogram, Stats};

/// Answers by route and status.
#[derive(Default)]
pub struct Counts {
    answers: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

impl Counts {
    /// Counts an answer.
    pub fn count(&self, route: &'static str, status: StatusCode) {
        let mut answers = self.answers.lock().unwrap_or_else(|e| e.into_inner());
        *answers.entry((route, status.as_u16())).or_default() += 1;
    }
}

struct Page {
    text: String,
    /// `model_name="…"`, on every line.
    label: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn one(&mut self, names: &[&str], kind: &str, help: &str, value: f64) {
        for name in names {
            self.head(name, kind, help);
            let _ = writeln!(self.text, "{name}{{{}}} {value}", self.label);
        }
    }

    fn gauge(&mut self, names: &[&str], help: &str, value: f64) {
        self.one(names, "gauge", help, value);
    }

    fn counter(&mut self, names: &[&str], help: &str, value: u64) {
        self.one(names, "counter", help, value as f64);
    }

    fn histogram(&mut self, names: &[&str], help: &str, histogram: &Histogram) {
        for name in names {
            self.head(name, "histogram", help);
            let mut below = 0;
            let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".into()]);
            for (bound, count) in bounds.zip(&histogram.counts) {
                below += count;
                let label = &self.label;
                let _ = writeln!(self.text, "{name}_bucket{{{label},le=\"{bound}\"}} {below}");
            }
            let _ = writeln!(self.text, "{name}_sum{{{}}} {}", self.label, histogram.sum);
            let _ = writeln!(self.text, "{name}_count{{{}}} {below}", self.label);
        }
    }
}

/// The page.
pub fn page(served: &Served, counts: &Counts) -> Response {
    let name: String = served.name.chars().flat_map(char::escape_default).collect();
    let mut page = Page { text: String::new(), label: format!("model_name=\"{name}\"") };
    let mut stats = served.engine.stats();
    // A moment may pass before the engine notices that nobody listens any more.
    let by_text = served.ended_by_text.load(Ordering::Relaxed);
    stats.finished_stop += by_text;
    stats.cancelled = stats.cancelled.saturating_sub(by_text);
    engine(&mut page, &stats);
    let name = "tercet_http_responses_total";
    page.head(name, "counter", "Answers by route and status.");
    let answers = counts.answers.lock().unwrap_or_else(|e| e.into_inner());
    for ((route, status), count) in answers.iter() {
        let _ = writeln!(page.text, "{name}{{route=\"{route}\",code=\"{status}\"}} {count}");
    }
    whole(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", page.text)
}

fn engine(page: &mut Page, stats: &Stats) {
    let running = ["tercet_requests_running", "vllm:num_requests_running"];
    page.gauge(&running, "Sequences that are computed.", stats.running as f64);
    let waiting = ["tercet_requests_waiting", "vllm:num_requests_waiting"];
    page.gauge(&waiting, "Sequences that wait.", stats.waiting as f64);
    let share = stats.pages_used as f64 / stats.pages_total.max(1) as f64;
    let usage = ["tercet_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"];
    page.gauge(&usage, "Share of the cache's pages that sequences hold; 1 is all.", share);
    let pages = stats.pages_total as f64;
    page.gauge(&["tercet_kv_pages_total"], "Pages of the cache.", pages);
    let used = stats.pages_used as f64;
    page.gauge(&["tercet_kv_pages_used"], "Pages that running sequences hold.", used);
    let cached = stats.pages_cached as f64;
    page.gauge(&["tercet_kv_pages_cached"], "Pages that the prefix cache holds.", cached);
    let bytes = stats.page_bytes as f64;
    page.gauge(&["tercet_kv_page_bytes"], "Bytes of a page.", bytes);
    let per_token = stats.bytes_per_token;
    page.gauge(&["tercet_kv_bytes_per_token"], "Bytes that one more token costs.", per_token);

    let accepted = stats.accepted;
    page.counter(&["tercet_requests_accepted_total"], "Sequences that were taken.", accepted);
    let refused = stats.refused_full;
    page.counter(&["tercet_requests_refused_total"], "Refused, the queue being full.", refused);
    let cancelled = stats.cancelled;
    page.counter(
        &["tercet_requests_cancelled_total"],
        "Left by their clients, or withdrawn with a request that was refused in part.",
        cancelled,
    );
    page.counter(&["tercet_requests_failed_total"], "Ended without an answer.", stats.failed);
    let preempted = ["tercet_preemptions_total", "vllm:num_preemptions_total"];
    page.counter(&preempted, "Sequences that gave their pages up.", stats.preempted);
    for name in ["tercet_requests_finished_total", "vllm:request_success_total"] {
        page.head(name, "counter", "Answers by why they ended.");
        let label = page.label.clone();
        for (reason, count) in [("stop", stats.finished_stop), ("length", stats.finished_length)] {
            let _ = writeln!(page.text, "{name}{{{label},finished_reason=\"{reason}\"}} {count}");
        }
    }
    let prompt = ["tercet_prompt_tokens_total", "vllm:prompt_tokens_total"];
    page.counter(&prompt, "Tokens of prompts, cached ones included.", stats.prompt_tokens);
    let written = ["tercet_generation_tokens_total", "vllm:generation_tokens_total"];
    page.counter(&written, "Tokens written.", stats.generated_tokens);
    let queries = ["tercet_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"];
    page.counter(&queries, "Prompt tokens looked for in the prefix cache.", stats.prefix_queries);
    let hits = ["tercet_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"];
    page.counter(&hits, "Prompt tokens found there.", stats.prefix_hits);
    page.counter(&["tercet_engine_steps_total"], "Steps of the engine.", stats.steps);

    let queue = ["tercet_queue_seconds", "vllm:request_queue_time_seconds"];
    page.histogram(&queue, "Seconds until a sequence is first computed.", &stats.queue_time);
    let first = ["tercet_first_token_seconds", "vllm:time_to_first_token_seconds"];
    page.histogram(&first, "Seconds to the first token.", &stats.first_token);
    let each = ["tercet_inter_token_seconds", "vllm:inter_token_latency_seconds"];
    page.histogram(&each, "Seconds between a sequence's tokens.", &stats.inter_token);
    let whole = ["tercet_request_seconds", "vllm:e2e_request_latency_seconds"];
    page.histogram(&whole, "Seconds from a request to its end.", &stats.whole);
}
