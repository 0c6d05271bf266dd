//! An engine that writes what a test says.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tercet_model::{ChatTemplate, Tokenizer};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::engine::{Event, Finish, LogProbs, Reads, Refused, Request, Stats, Usage};
use crate::http::{Backend, Served, Text};

/// Rows of the tests' vocabulary: 256 bytes, a character and a half, an end, and two that no
/// token has.
pub const VOCAB: usize = 260;
pub const END: u32 = 257;

/// Writes `text`, one byte a token, however often it is asked.
pub struct Fake {
    pub text: Mutex<String>,
    /// Requests as they came.
    pub requests: Mutex<Vec<Request>>,
    /// Time between tokens.
    pub pace: Duration,
    /// Requests at once; more are refused.
    pub room: usize,
    pub running: Arc<AtomicUsize>,
    pub draining: AtomicBool,
    /// See [`Stats::failed_steps`].
    pub failed_steps: AtomicU64,
    pub tokenizer: Tokenizer,
}

impl Fake {
    pub fn new(text: &str) -> Self {
        Self {
            text: Mutex::new(text.to_owned()),
            requests: Mutex::new(Vec::new()),
            pace: Duration::ZERO,
            room: 100,
            running: Arc::new(AtomicUsize::new(0)),
            draining: AtomicBool::new(false),
            failed_steps: AtomicU64::new(0),
            tokenizer: tokenizer(),
        }
    }

    pub fn last(&self) -> std::sync::MutexGuard<'_, Vec<Request>> {
        self.requests.lock().unwrap()
    }
}

impl Backend for Fake {
    fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, Refused> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(Refused::Draining);
        }
        if self.running.load(Ordering::SeqCst) >= self.room {
            return Err(Refused::Full { retry_after_s: 7 });
        }
        if request.prompt.len() >= self.context() {
            let most = self.context() - 1;
            return Err(Refused::TooLong { tokens: request.prompt.len(), most });
        }
        let text = self.text.lock().unwrap().clone();
        let mut ids = self.tokenizer.encode(&text, false).unwrap();
        let finish =
            if ids.len() > request.max_tokens { Finish::Length } else { Finish::EndOfText };
        ids.truncate(request.max_tokens);
        let score = |id: u32, most: usize| {
            let top = (0..most as u32).map(|i| ((id + i) % 256, -0.5 - i as f32)).collect();
            LogProbs { token: id, log_prob: -0.5, top }
        };
        let (sender, receiver) = unbounded_channel();
        let (pace, running) = (self.pace, self.running.clone());
        let prompt = request.prompt.clone();
        let (log_probs, prompt_log_probs) = (request.log_probs, request.prompt_log_probs);
        let reads = request.reads;
        self.requests.lock().unwrap().push(request);
        running.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            let total = prompt.len();
            let _ = sender.send(Event::Queued { ahead: 0 });
            let _ = sender.send(Event::Prefill { done: total, total, cached: 1 });
            if let Some(most) = prompt_log_probs {
                let scored = prompt.iter().enumerate();
                let scored = scored.map(|(at, &id)| (at > 0).then(|| score(id, most)));
                let _ = sender.send(Event::PromptLogProbs(scored.collect()));
            }
            let mut written = 0;
            for id in ids {
                std::thread::sleep(pace);
                let LogProbs { log_prob, top, .. } = score(id, log_probs.unwrap_or(0));
                let reads = reads.then(|| Reads {
                    position: total + written,
                    block: 4,
                    layers: vec![vec![vec![0], vec![0, 1]]],
                });
                if sender.send(Event::Token { id, log_prob, top, reads }).is_err() {
                    break;
                }
                written += 1;
            }
            let usage = Usage { prompt: total, cached: 1, completion: written };
            let _ = sender.send(Event::Done { finish, usage });
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(receiver)
    }

    fn stats(&self) -> Stats {
        let running = self.running.load(Ordering::SeqCst);
        let failed_steps = self.failed_steps.load(Ordering::SeqCst);
        Stats { running, failed_steps, ..Stats::default() }
    }

    fn adapters(&self) -> Vec<String> {
        vec!["poems".into()]
    }

    fn context(&self) -> usize {
        4096
    }

    fn places(&self) -> usize {
        60
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }
}

/// The text of a byte-level `tokenizer.json`: one token a byte, then "x" with the first byte of
/// "日", then `<|end|>`.
pub fn tokenizer_json() -> Value {
    let letters: BTreeSet<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    let mut vocab: serde_json::Map<String, Value> =
        letters.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    vocab.insert("xæ".into(), json!(256));
    vocab.insert("<|end|>".into(), json!(257));
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 257, "content": "<|end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": ["x æ"],
        },
    })
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(tokenizer_json().to_string().as_bytes()).unwrap()
}

/// A template that shows all it was given.
pub const TEMPLATE: &str = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}\
    {% for m in messages %}<{{ m.role }}>{{ m.content }}\
    {% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}\
    {% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// The text side of a folder with that tokenizer and, if any, a chat template.
pub fn text(template: Option<&str>) -> Text {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    if let Some(template) = template {
        ChatTemplate::new(template.to_owned(), Vec::new()).unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    }
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    Text::new(tokenizer, vec![END], VOCAB)
}

/// A model that writes `text`.
pub fn served(fake: Fake) -> (Served, Arc<Fake>) {
    let fake = Arc::new(fake);
    (Served::new(fake.clone(), "base".into(), text(Some(TEMPLATE)), true), fake)
}
