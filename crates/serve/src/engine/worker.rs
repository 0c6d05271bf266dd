//! The engine's thread: takes requests in, computes step after step, hands tokens out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use tercet_model::Model;
use tercet_model::slots::{Slots, Stepped};
use tercet_tensor::{Draw, Drawn};
use tokio::sync::mpsc::UnboundedSender;

use super::admission::{Arrival, Door};
use super::request::{EngineError, Event, Finish, LogProbs, Reads, Usage};
use super::sampler::{Chooser, Chosen, log_probs, no_logits};
use super::scheduler::{Id, Op, Plan, Scheduler};

/// How often an engine without work looks whether it should end.
const LOOK: Duration = Duration::from_millis(50);

/// What the handles send.
pub(super) enum Message {
    New(Box<Arrival>),
    /// Look at the door: it may be draining.
    Wake,
}

/// A sequence inside.
struct Sequence {
    events: UnboundedSender<Event>,
    model: usize,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt: usize,
    chooser: Chooser,
    /// Tokens to write at most.
    most: usize,
    /// How many log-probabilities of the prompt's tokens are still to be sent.
    prompt_top: Option<usize>,
    /// Those there are, from the first token on.
    prompt_log_probs: Vec<Option<LogProbs>>,
    reads: bool,
    /// Tokens of the prompt that were not computed, once it was admitted.
    cached: Option<usize>,
    /// Its neighbours in a step failed once: it is computed by itself.
    alone: bool,
    at: Instant,
    last: Option<Instant>,
}

impl Sequence {
    fn written(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    fn send(&self, event: Event) {
        // Whoever dropped the receiver is noticed before the next step.
        let _ = self.events.send(event);
    }
}

pub(super) struct Worker {
    /// The base, then one for each adapter.
    models: Vec<Model>,
    end_of_text: Vec<u32>,
    slots: Slots,
    /// Whether each sequence is computed by itself: in a step together, which experts the others'
    /// tokens go to would change its bits.
    apart: bool,
    scheduler: Scheduler,
    door: Arc<Door>,
    inbox: Receiver<Message>,
    sequences: BTreeMap<Id, Sequence>,
    /// Whether anything that this step computed did not fail; `None`: nothing was computed.
    worked: Option<bool>,
}

impl Worker {
    pub fn new(
        (models, end_of_text): (Vec<Model>, Vec<u32>),
        (slots, apart): (Slots, bool),
        scheduler: Scheduler,
        door: Arc<Door>,
        inbox: Receiver<Message>,
    ) -> Self {
        let (sequences, worked) = (BTreeMap::new(), None);
        Self { models, end_of_text, slots, apart, scheduler, door, inbox, sequences, worked }
    }

    /// Until the door drains, or every handle is gone, and nobody is inside.
    pub fn run(mut self) {
        while self.take_in() {
            self.step();
        }
    }

    fn step(&mut self) {
        self.drop_cancelled();
        let plan = self.scheduler.step();
        let (decode, reads) = self.prepare(plan);
        self.decode(&decode);
        for (id, range) in reads {
            self.read(id, range);
        }
        self.gauge();
        let mut stats = self.door.stats();
        stats.steps += 1;
        match self.worked.take() {
            Some(true) => stats.failed_steps = 0,
            Some(false) => stats.failed_steps += 1,
            None => {}
        }
    }

    /// Takes in what came; waits when there is nothing to do. Whether to go on.
    fn take_in(&mut self) -> bool {
        loop {
            let message = if !self.scheduler.is_idle() {
                match self.inbox.try_recv() {
                    Ok(message) => message,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
                }
            } else if !self.door.is_draining() {
                match self.inbox.recv() {
                    Ok(message) => message,
                    Err(_) => return false,
                }
            } else if self.door.live() == 0 {
                return false;
            } else {
                match self.inbox.recv_timeout(LOOK) {
                    Ok(message) => message,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            };
            if let Message::New(arrival) = message {
                self.add(*arrival);
            }
        }
    }

    fn add(&mut self, arrival: Arrival) {
        let Arrival { id, mut request, model, keys, events, at } = arrival;
        let prompt = request.prompt.len();
        let most = request.max_tokens.min(self.door.context - prompt);
        let chooser = match Chooser::new(&mut request, &self.end_of_text, most) {
            Ok(chooser) => chooser,
            Err(error) => {
                let _ = events.send(Event::Failed(EngineError::Model(error.to_string())));
                self.door.leave();
                return;
            }
        };
        let sequence = Sequence {
            events,
            model,
            tokens: request.prompt,
            prompt,
            chooser,
            most,
            prompt_top: request.prompt_log_probs,
            prompt_log_probs: Vec::new(),
            reads: request.reads,
            cached: None,
            alone: false,
            at,
            last: None,
        };
        self.sequences.insert(id, sequence);
        self.scheduler.add(id, prompt, keys);
    }

    fn drop_cancelled(&mut self) {
        let gone = |(&id, sequence): (&Id, &Sequence)| sequence.events.is_closed().then_some(id);
        let gone: Vec<Id> = self.sequences.iter().filter_map(gone).collect();
        for id in gone {
            self.door.stats().cancelled += 1;
            self.end(id);
        }
    }

    /// Frees everything of a sequence.
    fn end(&mut self, id: Id) -> Option<Sequence> {
        if let Some(op) = self.scheduler.remove(id) {
            self.apply(op);
        }
        let sequence = self.sequences.remove(&id)?;
        self.door.leave();
        // Whoever is told of the end finds the pages free.
        self.gauge();
        Some(sequence)
    }

    fn fail(&mut self, id: Id, error: EngineError) {
        let Some(sequence) = self.end(id) else { return };
        let mut stats = self.door.stats();
        stats.failed += 1;
        stats.whole.add(sequence.at.elapsed().as_secs_f64());
        drop(stats);
        sequence.send(Event::Failed(error));
    }

    fn done(&mut self, id: Id, finish: Finish) {
        let Some(sequence) = self.end(id) else { return };
        let mut stats = self.door.stats();
        match finish {
            Finish::Length => stats.finished_length += 1,
            _ => stats.finished_stop += 1,
        }
        stats.whole.add(sequence.at.elapsed().as_secs_f64());
        drop(stats);
        let usage = Usage {
            prompt: sequence.prompt,
            cached: sequence.cached.unwrap_or(0),
            completion: sequence.written(),
        };
        sequence.send(Event::Done { finish, usage });
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Clear(slot) => self.clear(slot),
            Op::Copy { from, to, id } => {
                if self.slots.copy(from, to).is_err() {
                    self.clear(to);
                    self.scheduler.not_copied(id);
                }
            }
        }
    }

    fn clear(&mut self, slot: usize) {
        // A place that cannot be cleared refuses whoever reads into it next, who is told and whose
        // end clears it again.
        let _ = self.slots.clear(slot);
    }

    /// Does what comes before the computing of a step.
    fn prepare(&mut self, plan: Plan) -> (Vec<Id>, Vec<(Id, Range<usize>)>) {
        let Plan { ops, admitted, preempted, decode, reads } = plan;
        ops.into_iter().for_each(|op| self.apply(op));
        let mut stats = self.door.stats();
        stats.preempted += preempted.len() as u64;
        for id in admitted {
            let held = self.scheduler.held(id);
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            if sequence.cached.is_some() {
                continue;
            }
            sequence.cached = Some(held);
            stats.queue_time.add(sequence.at.elapsed().as_secs_f64());
            stats.prompt_tokens += sequence.prompt as u64;
            if self.door.limits.prefix_cache && sequence.prompt_top.is_none() {
                stats.prefix_queries += sequence.prompt as u64;
                stats.prefix_hits += held as u64;
            }
        }
        drop(stats);
        (decode, reads)
    }

    /// A token more for each, those of one model together.
    fn decode(&mut self, ids: &[Id]) {
        let mut groups: BTreeMap<(usize, Option<Id>), Vec<Id>> = BTreeMap::new();
        for &id in ids {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            let alone = sequence.alone || self.apart;
            groups.entry((sequence.model, alone.then_some(id))).or_default().push(id);
        }
        for ((model, _), ids) in groups {
            let token = |&id: &Id| {
                let next = self.sequences.get(&id)?.tokens.get(self.scheduler.held(id))?;
                Some((self.scheduler.slot(id)?, *next as i32))
            };
            let tokens: Vec<(usize, i32)> = ids.iter().filter_map(token).collect();
            let (draws, wanted) = self.draws(&ids);
            match self.slots.step_drawing(&self.models[model], &tokens, &draws, wanted) {
                Ok(Stepped { drawn, logits }) => {
                    self.worked = Some(true);
                    for &id in &ids {
                        self.scheduler.holds(id, self.scheduler.held(id) + 1);
                    }
                    let row = |(row, &id): (usize, &Id)| {
                        let held = self.scheduler.held(id);
                        let own = self.sequences.get(&id)?;
                        let vocab = self.door.vocab;
                        (own.tokens.len() == held).then(|| Row {
                            id,
                            drawn: drawn.get(row).copied().flatten(),
                            logits: logits.get(row * vocab..(row + 1) * vocab),
                        })
                    };
                    let rows: Vec<Row> = ids.iter().enumerate().filter_map(row).collect();
                    let chosen = choose(&mut self.sequences, &rows);
                    let ids: Vec<Id> = rows.into_iter().map(|row| row.id).collect();
                    ids.into_iter().zip(chosen).for_each(|(id, chosen)| self.take(id, chosen));
                }
                Err(error) => {
                    self.worked.get_or_insert(false);
                    self.failed_together(&ids, &error.to_string());
                }
            }
        }
    }

    /// The draws of a step of these sequences, none where it does not draw, and whether its logits
    /// are needed. Those whose next token was chosen before a preemption need neither.
    fn draws(&mut self, ids: &[Id]) -> (Vec<Option<Draw>>, bool) {
        if !self.slots.draws() {
            return (Vec::new(), true);
        }
        let mut wanted = false;
        let draw = |id: &Id| {
            let held = self.scheduler.held(*id);
            let own = self.sequences.get_mut(id).filter(|own| own.tokens.len() == held + 1)?;
            let draw = own.chooser.ahead();
            wanted |= draw.is_none() || own.chooser.tells();
            draw
        };
        (ids.iter().map(draw).collect(), wanted)
    }

    /// One of them may be to blame: each is computed again by itself, and fails by itself.
    fn failed_together(&mut self, ids: &[Id], error: &str) {
        if let &[id] = ids {
            return self.fail(id, EngineError::Model(error.to_owned()));
        }
        for &id in ids {
            if let Some(op) = self.scheduler.again(id) {
                self.apply(op);
            }
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.alone = true;
            }
        }
        self.door.stats().preempted += ids.len() as u64;
    }

    /// Hands a choice out.
    fn take(&mut self, id: Id, chosen: Result<Chosen, EngineError>) {
        let Chosen { token, finish } = match chosen {
            Ok(chosen) => chosen,
            Err(error) => return self.fail(id, error),
        };
        let reads = self.selected(id);
        if let Some(LogProbs { token, log_prob, top }) = token
            && let Some(sequence) = self.sequences.get_mut(&id)
        {
            sequence.send(Event::Token { id: token, log_prob, top, reads });
            sequence.tokens.push(token);
            self.scheduler.wrote(id);
            let (now, mut stats) = (Instant::now(), self.door.stats());
            stats.generated_tokens += 1;
            match sequence.last.replace(now) {
                None => stats.first_token.add((now - sequence.at).as_secs_f64()),
                Some(last) => stats.inter_token.add((now - last).as_secs_f64()),
            }
        }
        if let Some(finish) = finish {
            self.done(id, finish);
        }
    }

    /// The blocks that the last token in a sequence's place selected, when they are asked for.
    fn selected(&self, id: Id) -> Option<Reads> {
        let sequence = self.sequences.get(&id).filter(|sequence| sequence.reads)?;
        let spec = self.models[sequence.model].config().nsa.as_ref()?;
        // A device that failed says so at the next step.
        let layers = self.slots.selected(self.scheduler.slot(id)?).ok().flatten()?;
        let group = |blocks: &[i32]| blocks.iter().filter_map(|&b| u32::try_from(b).ok()).collect();
        let layer = |chosen: Vec<i32>| chosen.chunks(spec.select_count).map(group).collect();
        Some(Reads {
            position: self.scheduler.held(id).saturating_sub(1),
            block: spec.select_block,
            layers: layers.into_iter().map(layer).collect(),
        })
    }

    /// Reads a part of a prompt, or of what was written before a preemption.
    fn read(&mut self, id: Id, range: Range<usize>) {
        let (Some(sequence), Some(slot)) = (self.sequences.get_mut(&id), self.scheduler.slot(id))
        else {
            return;
        };
        // A part before this one failed, or could not be copied.
        if self.scheduler.held(id) != range.start {
            return;
        }
        let tokens: Vec<i32> = sequence.tokens[range.clone()].iter().map(|&t| t as i32).collect();
        let model = &self.models[sequence.model];
        let logits = match sequence.prompt_top {
            None => self.slots.read(model, slot, &tokens),
            Some(top) => {
                if range.start == 0 {
                    sequence.prompt_log_probs = vec![None];
                }
                let prompt = &sequence.tokens[..sequence.prompt];
                let known = &mut sequence.prompt_log_probs;
                let mut last = Vec::new();
                let vocab = self.door.vocab;
                let each = &mut |at: usize, logits: &[f32]| {
                    // What follows the last token of the prompt is not known yet.
                    let next = prompt.get(range.start + at + 1..).unwrap_or_default();
                    let rows = logits.par_chunks_exact(vocab).zip(next);
                    known.par_extend(rows.map(|(row, &next)| Some(log_probs(row, next, top))));
                    last.clear();
                    last.extend_from_slice(&logits[logits.len() - vocab..]);
                };
                self.slots.read_each(model, slot, &tokens, each).map(|()| last)
            }
        };
        match logits {
            Err(error) => {
                self.worked.get_or_insert(false);
                self.fail(id, EngineError::Model(error.to_string()));
            }
            Ok(logits) => {
                self.worked = Some(true);
                self.was_read(id, slot, range.end, &logits);
            }
        }
    }

    /// A sequence's place holds `held` tokens now, and these logits come after them.
    fn was_read(&mut self, id: Id, slot: usize, held: usize, logits: &[f32]) {
        self.scheduler.holds(id, held);
        self.keep(id, slot);
        let Some(sequence) = self.sequences.get(&id) else { return };
        if sequence.written() > 0 {
            return;
        }
        let (done, total) = (held, sequence.prompt);
        sequence.send(Event::Prefill { done, total, cached: sequence.cached.unwrap_or(0) });
        if done < total {
            return;
        }
        for other in self.scheduler.followers(id) {
            let (Some(to), Some(sequence)) =
                (self.scheduler.slot(other), self.sequences.get_mut(&other))
            else {
                continue;
            };
            if self.slots.copy(slot, to).is_err() {
                self.clear(to);
                self.scheduler.not_copied(other);
                continue;
            }
            self.scheduler.holds(other, held);
            sequence.cached = Some(total);
            sequence.send(Event::Prefill { done, total, cached: total });
            self.first(other, logits);
        }
        self.first(id, logits);
    }

    /// The prompt was read: what was asked about it, and the first token.
    fn first(&mut self, id: Id, logits: &[f32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.prompt_top.take().is_some() {
            let known = std::mem::take(&mut sequence.prompt_log_probs);
            sequence.send(Event::PromptLogProbs(known));
        }
        if sequence.most == 0 {
            return self.done(id, Finish::Length);
        }
        let chosen = sequence.chooser.choose(logits);
        self.take(id, chosen);
    }

    /// Copies what a sequence holds to where prefixes are kept, when it should be.
    fn keep(&mut self, id: Id, slot: usize) {
        let mut ops = Vec::new();
        let kept = self.scheduler.keep(id, &mut ops);
        ops.into_iter().for_each(|op| self.apply(op));
        if let Some((key, to)) = kept
            && self.slots.copy(slot, to).is_err()
            && let Some(op) = self.scheduler.not_kept(&key)
        {
            self.apply(op);
        }
    }

    /// Publishes what is held now.
    fn gauge(&self) {
        let mut stats = self.door.stats();
        let pages = self.scheduler.pages();
        stats.running = self.scheduler.running();
        stats.pages_used = pages.used();
        stats.pages_cached = pages.cached();
    }
}

/// What a step gave of a sequence.
struct Row<'s> {
    id: Id,
    drawn: Option<Drawn>,
    /// `[vocab]`; `None` where tokens were drawn and nothing else is asked.
    logits: Option<&'s [f32]>,
}

/// Chooses a token for each sequence, ascending.
fn choose(
    sequences: &mut BTreeMap<Id, Sequence>,
    rows: &[Row],
) -> Vec<Result<Chosen, EngineError>> {
    let row = |id: &Id| rows.binary_search_by_key(id, |row| row.id).ok().map(|at| &rows[at]);
    let mut work: Vec<(&mut Sequence, &Row)> =
        sequences.iter_mut().filter_map(|(id, sequence)| Some((sequence, row(id)?))).collect();
    let choose = |(sequence, row): &mut (&mut Sequence, &Row)| match row.drawn {
        Some(drawn) => sequence.chooser.take(drawn.token, row.logits),
        None => sequence.chooser.choose(row.logits.ok_or_else(no_logits)?),
    };
    if work.len() == 1 || rows.iter().all(|row| row.logits.is_none()) {
        return work.iter_mut().map(choose).collect();
    }
    work.par_iter_mut().map(choose).collect()
}

#[cfg(test)]
mod tests {
    use tercet_model::{ModelConfig, Sampling};
    use tercet_tensor::DType;

    use super::*;
    use crate::engine::handle::{Handle, Limits, Models, assemble};
    use crate::engine::request::Request;
    use crate::engine::stats::{FAILING_STEPS, Stats};

    fn model(vocab: usize) -> Model {
        let config: ModelConfig = serde_json::from_value(serde_json::json!({
            "model_type": "tercet", "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.25,
            "nsa": { "compress_block": 8, "compress_stride": 4, "select_block": 8,
                     "select_count": 4, "window": 12 },
        }))
        .unwrap();
        Model::new(config, 7, DType::F32).unwrap()
    }

    fn ask(seed: u32) -> Request {
        Request {
            prompt: (0..50 + seed).map(|i| (i * 7 + seed) % 96).collect(),
            adapter: None,
            sampling: Sampling::greedy(1),
            max_tokens: 20,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            ignore_eos: true,
            log_probs: Some(0),
            prompt_log_probs: None,
            namespace: String::new(),
            reads: false,
            constraint: None,
        }
    }

    fn engine() -> (Handle, Worker) {
        let limits = Limits { chunk: 64, prefill_tokens: 256, ..Limits::default() };
        assemble(Models::new(model(96)).unwrap(), limits).unwrap()
    }

    /// Three sequences, with `meddle` called before each step; what each of them got, and counts.
    fn world(mut meddle: impl FnMut(usize, &mut Worker)) -> (Vec<Vec<Event>>, Stats) {
        let (handle, mut worker) = engine();
        let receivers: Vec<_> = (0..3).map(|seed| handle.submit(ask(seed)).unwrap()).collect();
        handle.drain();
        for step in 0.. {
            if !worker.take_in() {
                break;
            }
            assert!(step < 1000, "a standstill");
            meddle(step, &mut worker);
            worker.step();
        }
        let all = |mut receiver: tokio::sync::mpsc::UnboundedReceiver<Event>| {
            std::iter::from_fn(move || receiver.try_recv().ok()).collect()
        };
        (receivers.into_iter().map(all).collect(), handle.stats())
    }

    #[test]
    fn an_engine_that_fails_at_every_step_says_so_until_one_succeeds() {
        let (handle, mut worker) = engine();
        // A request whose prompt is read, or is not; its caller leaves.
        let one = |worker: &mut Worker, seed| {
            let _receiver = handle.submit(ask(seed)).unwrap();
            worker.take_in();
            worker.step();
            handle.stats()
        };
        assert!(!one(&mut worker, 0).is_failing());
        // Tokens that this one does not know: whatever it is asked, it fails.
        let good = std::mem::replace(&mut worker.models[0], model(8));
        for failed in 1..=FAILING_STEPS {
            let stats = one(&mut worker, failed as u32);
            assert_eq!((stats.failed_steps, stats.failed), (failed, failed));
            assert_eq!(stats.is_failing(), failed == FAILING_STEPS);
        }
        worker.models[0] = good;
        let stats = one(&mut worker, 0);
        assert_eq!((stats.failed_steps, stats.is_failing()), (0, false));
    }

    #[test]
    fn a_step_that_fails_for_all_fails_for_the_one_to_blame() {
        let (want, _) = world(|_, _| ());
        // One place loses what it holds, once: all go on, each by itself, as if nothing happened.
        let (found, stats) = world(|step, worker| {
            if step == 5 {
                let slot = worker.scheduler.slot(1).unwrap();
                worker.slots.clear(slot).unwrap();
            }
        });
        assert_eq!((stats.preempted, stats.failed, stats.finished_length), (3, 0, 3));
        for (found, want) in found.iter().zip(&want) {
            assert_eq!(found, want);
        }
        // Again and again: that one fails, the others do not.
        let (found, stats) = world(|step, worker| {
            if step >= 5
                && let Some(slot) = worker.scheduler.slot(1)
                && worker.scheduler.held(1) > 50
            {
                worker.slots.clear(slot).unwrap();
            }
        });
        assert_eq!((stats.failed, stats.finished_length, stats.pages_used), (1, 2, 0));
        assert!(matches!(found[1].last(), Some(Event::Failed(EngineError::Model(_)))));
        assert_eq!((&found[0], &found[2]), (&want[0], &want[2]));
    }
}
