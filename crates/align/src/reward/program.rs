//! Rewards from an external program that speaks JSON lines.
//!
//! Three threads stand between the program and the caller, so that no full pipe can stop both
//! sides: one writes its standard input, one reads its standard output, one keeps the end of its
//! standard error. All tell the caller through one channel. None is joined: when the program is
//! killed its pipes close, and if a child of its own holds them open, a thread that waits for it
//! must not make the caller wait too.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::{Error, Result, excerpt};
use super::{Answer, Scored};

/// Longest line the program may write, in bytes.
const LONGEST_LINE: usize = 1 << 20;

/// Bytes of questions handed to the writing thread at once.
const CHUNK: usize = 1 << 16;

/// Chunks on their way to the program: one being written, one waiting.
const CHUNKS: usize = 2;

/// Lines read ahead of the caller.
const LINES: usize = 1024;

/// Lines of standard error kept, and bytes kept of each.
const STDERR_LINES: usize = 20;
const STDERR_BYTES: u64 = 1000;

/// How often the stop flag is looked at.
const GLANCE: Duration = Duration::from_millis(100);

/// How long a program that closed a pipe is given to say why and to exit, for the message.
const LAST_MOMENT: Duration = Duration::from_millis(500);

/// What the threads tell.
enum Event {
    /// A line of standard output, without its end.
    Line(Vec<u8>),
    /// A line that is longer than [`LONGEST_LINE`].
    TooLong,
    /// Standard output was closed.
    Closed,
    /// A chunk was written.
    Written,
    /// The program does not read.
    Deaf,
}

/// A running program that scores answers.
///
/// It is started once and kept. For each answer it reads one line on standard input,
/// `{"id": 3, "prompt": "…", "answer": "…", "row": {…}}`, and writes one line on standard output,
/// `{"id": 3, "score": 0.5}`, with an optional `"parts": {"name": 0.5, …}`; other keys are
/// ignored. Lines may be answered in any order, but each without waiting for later ones, and
/// standard output has to be flushed. Scores are finite numbers. What it writes on standard error
/// is shown when it fails. It inherits environment and folder, and is killed when this is dropped.
pub struct Program {
    name: String,
    timeout: Duration,
    child: Child,
    chunks: SyncSender<Vec<u8>>,
    events: Receiver<Event>,
    /// Chunks handed over and not yet written.
    in_flight: usize,
    stderr: Arc<Mutex<VecDeque<String>>>,
    /// Set by the first error, after which nothing is in step any more.
    spent: bool,
}

impl Program {
    /// Starts `argv[0]` with the other arguments; no shell is involved. Without an answer read or
    /// a question taken for `timeout`, it is ended.
    pub fn start(argv: &[String], timeout: Duration) -> Result<Self> {
        let Some((name, arguments)) = argv.split_first().filter(|(name, _)| !name.is_empty())
        else {
            return Err(Error::config(
                "reward.program",
                "names no program; expected a list such as [\"python3\", \"score.py\"]",
            ));
        };
        let failed =
            |problem: String| Error::Program { name: name.clone(), problem, stderr: Vec::new() };
        let mut child = Command::new(name)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| {
                failed(format!(
                    "cannot be started: {e}; reward.program is a list of the program (by path, or \
                     found in PATH) and its arguments"
                ))
            })?;
        let (tell, events) = sync_channel(LINES);
        let (chunks, to_write) = sync_channel(CHUNKS);
        let stderr = Arc::default();
        let started = listen(&mut child, tell, to_write, Arc::clone(&stderr));
        let program = Self {
            name: name.clone(),
            timeout,
            child,
            chunks,
            events,
            in_flight: 0,
            stderr,
            spent: false,
        };
        match started {
            Ok(()) => Ok(program),
            Err(e) => Err(failed(format!("cannot be listened to: {e}"))),
        }
    }

    /// Scores of the answers in their order; `parts` as the program gave them.
    pub fn score(&mut self, answers: &[Answer], stop: &AtomicBool) -> Result<Vec<Scored>> {
        if self.spent {
            return Err(self.error("has failed before and was ended; start again".into()));
        }
        let scored = self.exchange(answers, stop);
        if scored.is_err() {
            self.spent = true;
            self.end();
        }
        scored
    }

    fn exchange(&mut self, answers: &[Answer], stop: &AtomicBool) -> Result<Vec<Scored>> {
        let mut index = HashMap::with_capacity(answers.len());
        for (i, answer) in answers.iter().enumerate() {
            if index.insert(answer.id, i).is_some() {
                let problem = "has the id of another answer; ids name answers".to_owned();
                return Err(Error::Answer { id: answer.id, problem });
            }
        }
        let mut scored: Vec<Option<Scored>> = vec![None; answers.len()];
        let (mut asked, mut got, mut deaf) = (0, 0, false);
        let mut progress = Instant::now();
        while got < answers.len() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            while asked < answers.len() && self.in_flight < CHUNKS {
                let (chunk, next) = chunk(answers, asked);
                // The channel has room for all that are in flight, so this never waits; a writer
                // that is gone has said so in an event.
                if self.chunks.send(chunk).is_err() {
                    break;
                }
                self.in_flight += 1;
                asked = next;
            }
            let patience = if deaf { LAST_MOMENT } else { self.timeout };
            let left = patience.saturating_sub(progress.elapsed());
            match self.events.recv_timeout(left.min(GLANCE)) {
                Ok(Event::Written) => self.in_flight -= 1,
                Ok(Event::Line(line)) => {
                    let (id, score) = parse(&line).map_err(|p| self.error(p))?;
                    let place = index.get(&id).copied().filter(|&i| i < asked);
                    let Some(place) = place else {
                        return Err(self.error(format!(
                            "scored id {id}, which it was not asked for; it must echo the ids of \
                             the lines it reads, each once"
                        )));
                    };
                    if scored[place].replace(score).is_some() {
                        let problem = format!("scored id {id} twice; each id once");
                        return Err(self.error(problem));
                    }
                    got += 1;
                }
                Ok(Event::TooLong) => {
                    return Err(self.error(format!(
                        "wrote a line of more than {LONGEST_LINE} bytes; expected one short line \
                         of JSON for each answer"
                    )));
                }
                Ok(Event::Closed) => return Err(self.gone("its output", stop, got, answers.len())),
                // What it wrote before may say why.
                Ok(Event::Deaf) => deaf = true,
                Err(RecvTimeoutError::Timeout) if progress.elapsed() < patience => continue,
                Err(_) if deaf => return Err(self.gone("its input", stop, got, answers.len())),
                Err(_) => {
                    return Err(self.error(format!(
                        "did nothing for {} seconds, with {got} of {} answers scored, and was \
                         ended. It must answer each line without waiting for later ones and \
                         flush its output; if it is slow, raise reward.timeout",
                        self.timeout.as_secs_f64(),
                        answers.len()
                    )));
                }
            }
            progress = Instant::now();
        }
        Ok(scored.into_iter().flatten().collect())
    }

    /// The error of a program that closed a pipe: with its status if it exited.
    fn gone(&mut self, pipe: &str, stop: &AtomicBool, got: usize, all: usize) -> Error {
        let deadline = Instant::now() + LAST_MOMENT;
        let status = loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => thread::sleep(LAST_MOMENT / 50),
                Ok(status) => break status,
                Err(_) => break None,
            }
        };
        // Ctrl-C in a terminal ends the program as well.
        if stop.load(Ordering::Relaxed) {
            return Error::Interrupted;
        }
        let what = match status {
            Some(status) => format!("ended ({status})"),
            None => format!("closed {pipe} and went on running"),
        };
        self.error(format!(
            "{what} with {got} of {all} answers scored; it must run until its input ends"
        ))
    }

    /// An error with the last lines of standard error.
    fn error(&mut self, problem: String) -> Error {
        // A program that has ended has its last words still in the pipe.
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            let deadline = Instant::now() + LAST_MOMENT;
            while Arc::strong_count(&self.stderr) > 1 && Instant::now() < deadline {
                thread::sleep(LAST_MOMENT / 50);
            }
        }
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        Error::Program {
            name: self.name.clone(),
            problem,
            stderr: stderr.iter().cloned().collect(),
        }
    }

    fn end(&mut self) {
        // It may have ended by itself; there is nothing to do about either failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// The lines of the answers from `first` on, until they fill a chunk; and the first left out.
fn chunk(answers: &[Answer], first: usize) -> (Vec<u8>, usize) {
    let (mut bytes, mut next) = (Vec::new(), first);
    while next < answers.len() && bytes.len() < CHUNK {
        let Answer { id, prompt, answer, row, .. } = answers[next];
        let line = json!({ "id": id, "prompt": prompt, "answer": answer, "row": row });
        bytes.extend_from_slice(line.to_string().as_bytes());
        bytes.push(b'\n');
        next += 1;
    }
    (bytes, next)
}

/// Id and score of a line, or what is wrong with it.
fn parse(line: &[u8]) -> std::result::Result<(u64, Scored), String> {
    let text = String::from_utf8_lossy(line);
    let wrong = |problem: &str| format!("wrote \"{}\", {problem}", excerpt(text.trim_end()));
    let value: Value = serde_json::from_slice(line).map_err(|e| {
        let hint = match text.contains("NaN") || text.contains("Infinity") {
            true => "; scores have to be finite numbers",
            false => "; messages belong on standard error",
        };
        wrong(&format!("which is not a line of JSON ({e}){hint}"))
    })?;
    let id = value.get("id").and_then(Value::as_u64);
    let id = id.ok_or_else(|| wrong("which has no \"id\" that is a whole number"))?;
    let score = value.get("score").and_then(Value::as_f64);
    let total = score.ok_or_else(|| wrong("which has no \"score\" that is a finite number"))?;
    let parts = match value.get("parts") {
        None => Vec::new(),
        Some(parts) => {
            let number = |(name, value): (&String, &Value)| Some((name.clone(), value.as_f64()?));
            parts
                .as_object()
                .and_then(|parts| parts.iter().map(number).collect())
                .ok_or_else(|| wrong("whose \"parts\" is not an object of finite numbers"))?
        }
    };
    Ok((id, Scored { total, parts }))
}

/// Starts the three threads.
fn listen(
    child: &mut Child,
    tell: SyncSender<Event>,
    to_write: Receiver<Vec<u8>>,
    stderr: Arc<Mutex<VecDeque<String>>>,
) -> std::io::Result<()> {
    let (stdin, stdout, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(format!("reward-{name}")).spawn(work).map(|_| ())
    };
    // All three were asked for, so all three are there.
    if let Some(stdin) = stdin {
        let tell = tell.clone();
        spawn("writer", Box::new(move || write(stdin, &to_write, &tell)))?;
    }
    if let Some(stdout) = stdout {
        spawn("reader", Box::new(move || read(BufReader::new(stdout), &tell)))?;
    }
    if let Some(errors) = errors {
        spawn("stderr", Box::new(move || keep_last(BufReader::new(errors), &stderr)))?;
    }
    Ok(())
}

/// Writes chunks until there are no more; then the program's input ends.
fn write(mut stdin: ChildStdin, chunks: &Receiver<Vec<u8>>, tell: &SyncSender<Event>) {
    for chunk in chunks {
        let written = stdin.write_all(&chunk).and_then(|()| stdin.flush());
        let event = if written.is_ok() { Event::Written } else { Event::Deaf };
        if tell.send(event).is_err() || written.is_err() {
            return;
        }
    }
}

/// Reads lines until there are no more.
fn read(mut stdout: impl BufRead, tell: &SyncSender<Event>) {
    loop {
        let mut line = Vec::new();
        let limit = LONGEST_LINE as u64 + 1;
        let read = stdout.by_ref().take(limit).read_until(b'\n', &mut line);
        let complete = line.pop_if(|last| *last == b'\n').is_some();
        let event = match read {
            Err(_) | Ok(0) => Event::Closed,
            Ok(_) if !complete && line.len() > LONGEST_LINE => Event::TooLong,
            Ok(_) => Event::Line(line),
        };
        let last = !matches!(event, Event::Line(_));
        if tell.send(event).is_err() || last {
            return;
        }
    }
}

/// Keeps the last lines, each cut where it is too long.
fn keep_last(mut errors: impl BufRead, last: &Mutex<VecDeque<String>>) {
    loop {
        let mut line = Vec::new();
        match errors.by_ref().take(STDERR_BYTES).read_until(b'\n', &mut line) {
            Err(_) | Ok(0) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text: String = text.trim_end().chars().filter(|c| !c.is_control()).collect();
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.len() == STDERR_LINES {
                    last.pop_front();
                }
                last.push_back(text);
            }
        }
    }
}
