//! From a checked request to its answer, whole or in pieces, for completions and chats alike.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use hyper::body::Bytes;
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::timeout;

use super::ask::Ask;
use super::body::{Response, events, json_response};
use super::constraint::Grammar;
use super::error::{ApiError, ApiResult};
use super::follow::{End, Manner, Piece, StoppedBy, Token, follow};
use super::log_probs::{Scored, Writing};
use super::text::Served;
use super::tools::{CallFilter, Tools};
use super::{Front, limits};
use crate::engine::{LogProbs, Request, Usage};

/// A prompt, as text where it came as text.
pub struct Prompt {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Its text, to be given back with `echo`.
    pub text: Option<String>,
}

/// Everything that an answer needs.
pub struct Job {
    /// Whose threads compute what may take a while.
    pub front: Arc<Front>,
    /// The model.
    pub served: Arc<Served>,
    /// The adapter that answers.
    pub adapter: Option<String>,
    /// Whose prefixes are shared.
    pub namespace: String,
    /// The settings.
    pub ask: Ask,
    /// One for completions at least, exactly one for a chat.
    pub prompts: Vec<Prompt>,
    /// The shape of the answer.
    pub grammar: Option<Grammar>,
    /// Log-probabilities of so many tokens beside the written one.
    pub log_probs: Option<usize>,
    /// What is particular to completions or chats.
    pub form: Form,
    /// Held until the answer is given.
    pub _place: OwnedSemaphorePermit,
}

/// Which of the two an answer is.
pub enum Form {
    /// `/v1/completions`; true gives the prompt back, too.
    Completion(bool),
    /// `/v1/chat/completions`, with the tools that may be called.
    Chat(Option<Tools>),
}

/// One answer as far as it is written.
struct Choice<'j> {
    number: usize,
    prompt: &'j Prompt,
    /// Where the next token begins, in characters.
    offset: usize,
    calls: Option<CallFilter<'j>>,
    /// Whether anything of it was sent.
    begun: bool,
    end: Option<End>,
}

/// What a piece adds to an answer.
#[derive(Default)]
struct Added {
    text: String,
    log_probs: Option<Value>,
    ids: Vec<u32>,
    reads: Vec<Value>,
    calls: Vec<Value>,
}

impl Job {
    /// Hands all answers to the engine. Nothing is sent before all are taken, so that a refusal
    /// is a status and not the end of a stream.
    fn submit(&self) -> ApiResult<mpsc::Receiver<(usize, Piece)>> {
        let (out, pieces) = mpsc::channel(limits::PIECES_WAITING);
        let (wanted, places) = (self.prompts.len() * self.ask.n, self.served.engine.places());
        if wanted > places {
            return Err(ApiError::field(
                "n",
                format!(
                    "asks for {wanted} answers over all prompts; this server computes and keeps \
                     waiting {places} at most, so they can never be taken"
                ),
            ));
        }
        let mut taken = Vec::new();
        for number in 0..wanted {
            taken.push(self.served.engine.submit(self.request(number))?);
        }
        for (number, events) in taken.into_iter().enumerate() {
            let manner = Manner {
                stop: self.ask.stop.clone(),
                include_stop: self.ask.include_stop,
                skip_special: self.ask.skip_special,
            };
            tokio::spawn(follow(self.served.clone(), manner, events, number, out.clone()));
        }
        Ok(pieces)
    }

    fn request(&self, number: usize) -> Request {
        let ask = &self.ask;
        let prompt = &self.prompts[number / ask.n];
        let mut sampling = ask.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add((number % ask.n) as u64);
        let echo = self.echoes();
        let context = self.served.engine.context();
        let max_tokens = ask.max_tokens.unwrap_or(context).min(context);
        Request {
            prompt: prompt.ids.clone(),
            adapter: self.adapter.clone(),
            sampling,
            max_tokens,
            min_tokens: ask.min_tokens,
            stop_tokens: ask.stop_tokens.clone(),
            // Who scores a text counts on one token after it, whichever that is.
            ignore_eos: ask.ignore_eos || (echo && self.log_probs.is_some() && max_tokens == 1),
            log_probs: self.log_probs,
            prompt_log_probs: self.log_probs.filter(|_| echo),
            namespace: self.namespace.clone(),
            reads: ask.return_reads,
            constraint: self.grammar.as_ref().map(Grammar::begin),
        }
    }

    /// Answers, as the request asked.
    pub async fn answer(self) -> ApiResult<Response> {
        let pieces = self.submit()?;
        let job = Arc::new(self);
        if job.ask.stream {
            let (out, receiver) = mpsc::channel(limits::PIECES_WAITING);
            tokio::spawn(job.stream(pieces, out));
            return Ok(events(receiver));
        }
        job.collect(pieces).await
    }

    fn choices(&self) -> Vec<Choice<'_>> {
        (0..self.prompts.len() * self.ask.n).map(|number| self.choice(number)).collect()
    }

    /// An answer of which nothing is written.
    fn choice(&self, number: usize) -> Choice<'_> {
        let calls = match &self.form {
            Form::Chat(Some(tools)) => Some(CallFilter::new(tools)),
            _ => None,
        };
        let prompt = &self.prompts[number / self.ask.n];
        Choice { number, prompt, offset: 0, calls, begun: false, end: None }
    }

    fn echoes(&self) -> bool {
        matches!(self.form, Form::Completion(true))
    }

    /// What a piece of text and tokens adds.
    fn added(&self, choice: &mut Choice, text: &str, tokens: &[Token]) -> Added {
        let text = match &mut choice.calls {
            Some(filter) => filter.push(text),
            None => text.to_owned(),
        };
        let mut added = Added { text, ..Added::default() };
        if self.log_probs.is_some() && !tokens.is_empty() {
            let scored =
                tokens.iter().map(|t| Scored { id: t.id, scores: Some((t.log_prob, &t.top)) });
            added.log_probs = Some(self.scores(&scored.collect::<Vec<_>>(), &mut choice.offset));
        }
        if self.ask.return_ids {
            added.ids = tokens.iter().map(|t| t.id).collect();
        }
        if self.ask.return_reads {
            added.reads = tokens.iter().filter_map(|t| reads(&self.served, t)).collect();
        }
        added
    }

    /// The prompt given back, with its log-probabilities if those were asked for.
    fn echoed(&self, choice: &mut Choice, scores: Option<&[Option<LogProbs>]>) -> ApiResult<Added> {
        let ids = &choice.prompt.ids;
        let text = match &choice.prompt.text {
            Some(text) => text.clone(),
            None => self.served.text.tokenizer.decode_all(ids)?,
        };
        let log_probs = scores.map(|all| {
            let of = |(at, &id): (usize, &u32)| {
                let own = all.get(at).and_then(Option::as_ref);
                Scored { id, scores: own.map(|s| (s.log_prob, s.top.as_slice())) }
            };
            self.scores(&ids.iter().enumerate().map(of).collect::<Vec<_>>(), &mut choice.offset)
        });
        Ok(Added { text, log_probs, ..Added::default() })
    }

    fn scores(&self, tokens: &[Scored], offset: &mut usize) -> Value {
        let writing = Writing {
            text: &self.served.text,
            ids: self.ask.ids_as_tokens,
            skip_special: self.ask.skip_special,
        };
        match self.form {
            Form::Completion(_) => writing.completion(tokens, offset),
            Form::Chat(_) => writing.chat(tokens),
        }
    }

    /// The prompt with its log-probabilities, of which there may be [`limits::ECHO_SCORES`]: made
    /// off the threads that answer.
    async fn scored(
        self: &Arc<Self>,
        choice: &mut Choice<'_>,
        scores: Vec<Option<LogProbs>>,
    ) -> ApiResult<Added> {
        let (job, number) = (self.clone(), choice.number);
        let work = move || {
            // It comes first, so nothing is written before it.
            let mut choice = job.choice(number);
            let added = job.echoed(&mut choice, Some(&scores))?;
            Ok((added, choice.offset))
        };
        let added;
        (added, choice.offset) = self.front.compute(work).await?;
        Ok(added)
    }

    /// What a piece adds to its answer, if anything that is shown; ends are noted.
    async fn take(
        self: &Arc<Self>,
        choice: &mut Choice<'_>,
        piece: Piece,
    ) -> ApiResult<Option<Added>> {
        let mut added = match piece {
            Piece::Queued(_) | Piece::Prefill(..) => return Ok(None),
            Piece::Prompt(all) => self.scored(choice, all).await?,
            Piece::Text(text, tokens) => self.added(choice, &text, &tokens),
            Piece::Failed(error) => return Err(error),
            Piece::End(end) => {
                choice.end = Some(end);
                let rest = choice.calls.as_mut().map(CallFilter::finish);
                let (text, calls) = rest.unwrap_or_default();
                let number = choice.number;
                let call = |(at, c): (usize, super::tools::Call)| {
                    json!({
                        "index": at,
                        "id": format!("call_{}_{number}_{at}", nonce()),
                        "type": "function",
                        "function": { "name": c.name, "arguments": c.arguments },
                    })
                };
                let calls = calls.into_iter().enumerate().map(call).collect();
                Added { text, calls, ..Added::default() }
            }
        };
        // Without log-probabilities the engine says nothing of the prompt.
        if self.echoes() && !choice.begun && self.log_probs.is_none() {
            added.text.insert_str(0, &self.echoed(choice, None)?.text);
        }
        choice.begun = true;
        Ok(Some(added))
    }

    async fn collect(
        self: Arc<Self>,
        mut pieces: mpsc::Receiver<(usize, Piece)>,
    ) -> ApiResult<Response> {
        let mut choices = self.choices();
        let mut wholes: Vec<Added> = choices.iter().map(|_| Added::default()).collect();
        while choices.iter().any(|c| c.end.is_none()) {
            let (number, piece) = pieces.recv().await.ok_or_else(lost)?;
            if let Some(added) = self.take(&mut choices[number], piece).await? {
                wholes[number].append(added);
            }
        }
        let ends = choices.into_iter().map(|choice| choice.end).collect();
        if !self.echoes() || self.log_probs.is_none() {
            return Ok(self.written(ends, wholes));
        }
        let job = self.clone();
        self.front.compute(move || Ok(job.written(ends, wholes))).await
    }

    /// All answers, given whole.
    fn written(&self, ends: Vec<Option<End>>, wholes: Vec<Added>) -> Response {
        let ended = |(number, end)| Choice { end, ..self.choice(number) };
        let choices: Vec<Choice> = ends.into_iter().enumerate().map(ended).collect();
        let usage = usage(&choices, self.ask.n);
        let written = choices.iter().zip(wholes).map(|(c, whole)| self.whole(c, whole));
        let written: Vec<Value> = written.collect();
        let mut body = self.head(&nonce(), false);
        body.insert("choices".into(), written.into());
        body.insert("usage".into(), usage);
        json_response(StatusCode::OK, &Value::Object(body))
    }

    /// A choice of an answer that is given whole.
    fn whole(&self, choice: &Choice, whole: Added) -> Value {
        let finish = finish(choice, !whole.calls.is_empty());
        let log_probs = whole.log_probs.unwrap_or(Value::Null);
        let mut body = match self.form {
            Form::Completion(_) => json!({ "index": choice.number, "text": whole.text }),
            Form::Chat(_) => {
                let mut message =
                    json!({ "role": "assistant", "content": whole.text, "refusal": null });
                if !whole.calls.is_empty() {
                    if whole.text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    let calls = whole.calls.into_iter().map(|mut call| {
                        if let Some(call) = call.as_object_mut() {
                            call.shift_remove("index");
                        }
                        call
                    });
                    message["tool_calls"] = calls.collect();
                }
                json!({ "index": choice.number, "message": message })
            }
        };
        body["logprobs"] = log_probs;
        body["finish_reason"] = finish;
        body["stop_reason"] = stop_reason(choice);
        if self.ask.return_ids {
            body["token_ids"] = whole.ids.into();
            body["prompt_token_ids"] = choice.prompt.ids.clone().into();
        }
        if self.ask.return_reads {
            body["reads"] = whole.reads.into();
            body["prompt_tokens"] = self.prompt_texts(choice);
        }
        body
    }

    fn prompt_texts(&self, choice: &Choice) -> Value {
        let of = |id: &u32| {
            let token = self.served.text.bytes.get(*id as usize);
            token.map(|t| String::from_utf8_lossy(&t.bytes).into_owned()).unwrap_or_default()
        };
        choice.prompt.ids.iter().map(of).collect()
    }

    fn head(&self, id: &str, chunk: bool) -> Map<String, Value> {
        let (prefix, object) = match (&self.form, chunk) {
            (Form::Completion(_), _) => ("cmpl", "text_completion"),
            (Form::Chat(_), false) => ("chatcmpl", "chat.completion"),
            (Form::Chat(_), true) => ("chatcmpl", "chat.completion.chunk"),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let model = self.adapter.as_ref().unwrap_or(&self.served.name);
        let mut map = Map::new();
        map.insert("id".into(), format!("{prefix}-{id}").into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), now.into());
        map.insert("model".into(), model.as_str().into());
        map
    }

    /// Sends the answer as server-sent events. Ends, and so cancels what runs, when nobody reads.
    async fn stream(
        self: Arc<Self>,
        mut pieces: mpsc::Receiver<(usize, Piece)>,
        out: mpsc::Sender<Bytes>,
    ) {
        let mut sender = Sender { id: nonce(), out, usage: self.ask.include_usage };
        let mut choices = self.choices();
        let ended = self.send_all(&mut choices, &mut pieces, &sender).await;
        let last = match ended {
            Ok(()) if sender.usage => {
                sender.usage = false;
                let mut body = self.head(&sender.id, true);
                body.insert("choices".into(), json!([]));
                body.insert("usage".into(), usage(&choices, self.ask.n));
                sender.event(&Value::Object(body)).await
            }
            Ok(()) => Ok(()),
            Err(Ended::Gone) => return,
            Err(Ended::Failed(error)) => sender.event(&error.json()).await,
        };
        if last.is_ok() {
            let _ = sender.bytes("data: [DONE]\n\n".into()).await;
        }
    }

    async fn send_all(
        self: &Arc<Self>,
        choices: &mut [Choice<'_>],
        pieces: &mut mpsc::Receiver<(usize, Piece)>,
        sender: &Sender,
    ) -> Result<(), Ended> {
        if matches!(self.form, Form::Chat(_)) {
            for number in 0..choices.len() {
                let delta = json!({ "role": "assistant", "content": "" });
                let body = self.chunk(sender, json!({ "index": number, "delta": delta }));
                sender.event(&body).await?;
            }
        }
        while choices.iter().any(|c| c.end.is_none()) {
            let next = tokio::select! {
                next = timeout(limits::KEEP_ALIVE, pieces.recv()) => next,
                () = sender.out.closed() => return Err(Ended::Gone),
            };
            let Ok(next) = next else {
                sender.bytes(": waiting\n\n".into()).await?;
                continue;
            };
            let (number, piece) = next.ok_or_else(|| Ended::Failed(lost()))?;
            // Comments: every client that reads events by the book passes over them.
            match &piece {
                Piece::Queued(ahead) => {
                    sender.bytes(format!(": queued {ahead}\n\n").into()).await?
                }
                Piece::Prefill(done, total) => {
                    sender.bytes(format!(": prefill {done}/{total}\n\n").into()).await?;
                }
                _ => {}
            }
            let choice = &mut choices[number];
            let (first, scores) = (!choice.begun, matches!(piece, Piece::Prompt(_)));
            let Some(added) = self.take(choice, piece).await.map_err(Ended::Failed)? else {
                continue;
            };
            for body in self.chunks(choice, added, first) {
                let body = self.chunk(sender, body);
                let bytes = match scores {
                    false => Ok(event(&body)),
                    true => self.front.compute(move || Ok(event(&body))).await,
                };
                sender.bytes(bytes.map_err(Ended::Failed)?).await?;
            }
        }
        Ok(())
    }

    /// The choices of chunks that send what was added; one more where the answer ends.
    fn chunks(&self, choice: &Choice, added: Added, first: bool) -> Vec<Value> {
        let index = choice.number;
        let called = !added.calls.is_empty();
        let chat = matches!(self.form, Form::Chat(_));
        let told = first && (self.ask.return_ids || self.ask.return_reads);
        let something = !added.text.is_empty()
            || called
            || added.log_probs.is_some()
            || !added.ids.is_empty()
            || !added.reads.is_empty();
        let mut bodies = Vec::new();
        if something || told {
            let mut body = if chat {
                let mut delta = json!({});
                if !added.text.is_empty() || !called {
                    delta["content"] = added.text.into();
                }
                if called {
                    delta["tool_calls"] = added.calls.into();
                }
                json!({ "index": index, "delta": delta })
            } else {
                json!({ "index": index, "text": added.text })
            };
            body["logprobs"] = added.log_probs.unwrap_or(Value::Null);
            body["finish_reason"] = Value::Null;
            if self.ask.return_ids {
                body["token_ids"] = added.ids.into();
                if first {
                    body["prompt_token_ids"] = choice.prompt.ids.clone().into();
                }
            }
            if self.ask.return_reads {
                body["reads"] = added.reads.into();
                if first {
                    body["prompt_tokens"] = self.prompt_texts(choice);
                }
            }
            bodies.push(body);
        }
        if choice.end.is_some() {
            let mut body = if chat {
                json!({ "index": index, "delta": {} })
            } else {
                json!({ "index": index, "text": "" })
            };
            body["logprobs"] = Value::Null;
            body["finish_reason"] = finish(choice, called);
            body["stop_reason"] = stop_reason(choice);
            bodies.push(body);
        }
        bodies
    }

    fn chunk(&self, sender: &Sender, choice: Value) -> Value {
        let mut body = self.head(&sender.id, true);
        body.insert("choices".into(), json!([choice]));
        if sender.usage {
            body.insert("usage".into(), Value::Null);
        }
        Value::Object(body)
    }
}

impl Added {
    fn append(&mut self, more: Self) {
        self.text.push_str(&more.text);
        self.ids.extend(more.ids);
        self.reads.extend(more.reads);
        self.calls.extend(more.calls);
        match (&mut self.log_probs, more.log_probs) {
            (Some(all), Some(more)) => append(all, more),
            (all @ None, more) => *all = more,
            (_, None) => {}
        }
    }
}

/// Appends the lists of an object to those of another.
fn append(all: &mut Value, more: Value) {
    let Value::Object(more) = more else { return };
    for (name, list) in more {
        if let (Some(Value::Array(all)), Value::Array(list)) = (all.get_mut(&name), list) {
            all.extend(list);
        }
    }
}

/// Why a stream ends before its answers do.
enum Ended {
    /// Nobody reads.
    Gone,
    /// An answer cannot be completed.
    Failed(ApiError),
}

struct Sender {
    id: String,
    out: mpsc::Sender<Bytes>,
    /// Whether chunks say that what it took comes at the end.
    usage: bool,
}

impl Sender {
    async fn event(&self, body: &Value) -> Result<(), Ended> {
        self.bytes(event(body)).await
    }

    async fn bytes(&self, bytes: Bytes) -> Result<(), Ended> {
        match timeout(limits::SLOW_READER, self.out.send(bytes)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Ended::Gone),
        }
    }
}

/// A server-sent event.
fn event(body: &Value) -> Bytes {
    format!("data: {body}\n\n").into()
}

fn lost() -> ApiError {
    ApiError::ours("an answer was lost; please report it")
}

fn finish(choice: &Choice, called: bool) -> Value {
    match &choice.end {
        None => Value::Null,
        Some(_) if called => "tool_calls".into(),
        Some(end) if end.stopped => "stop".into(),
        Some(_) => "length".into(),
    }
}

fn stop_reason(choice: &Choice) -> Value {
    match choice.end.as_ref().and_then(|end| end.by.as_ref()) {
        None => Value::Null,
        Some(StoppedBy::Text(text)) => text.as_str().into(),
        Some(StoppedBy::Token(id)) => (*id).into(),
    }
}

/// What was read for a token, with the token's own text beside it.
fn reads(served: &Served, token: &Token) -> Option<Value> {
    let reads = token.reads.as_ref()?;
    let bytes = served.text.bytes.get(token.id as usize).map(|t| t.bytes.as_slice());
    Some(json!({
        "token": String::from_utf8_lossy(bytes.unwrap_or_default()),
        "position": reads.position,
        "block": reads.block,
        "layers": reads.layers,
    }))
}

/// Tokens of all answers; a prompt counts once, however many answers it has.
fn usage(choices: &[Choice], n: usize) -> Value {
    let of = |choice: &Choice| choice.end.as_ref().map_or(Usage::default(), |end| end.usage);
    let firsts = choices.iter().step_by(n);
    let prompt: usize = firsts.clone().map(|c| c.prompt.ids.len()).sum();
    let cached: usize = firsts.map(|c| of(c).cached).sum();
    let completion: usize = choices.iter().map(|c| of(c).completion).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

/// A name for an answer that no other has.
fn nonce() -> String {
    use std::hash::{BuildHasher, Hasher};
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u64(COUNT.fetch_add(1, Ordering::Relaxed));
    format!("{:016x}", hasher.finish())
}
