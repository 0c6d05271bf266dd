//! What a training run looks like: a bar on a terminal, one line a step in a log.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tercet_private::tune::budget::shown;
use tercet_train::{Event, Progress, Summary};

use crate::human;

/// Shows the events of a run. A closed output is no reason to lose a run, so nothing here fails.
pub struct Watcher {
    terminal: bool,
    /// Least time between two step lines in a log.
    interval: Duration,
    last_line: Option<Instant>,
    bar: Option<ProgressBar>,
    tokenising: bool,
    /// What must stand on every line of the run, such as a warning; empty for nothing.
    stamp: String,
}

impl Watcher {
    /// A bar when standard error is a terminal, else lines at least `interval` apart; `stamp`
    /// stands on each of them.
    pub fn new(interval: Duration, stamp: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let stamp = if stamp.is_empty() { String::new() } else { format!(" · {stamp}") };
        Self { terminal, interval, last_line: None, bar: None, tokenising: false, stamp }
    }

    /// Shows one event.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Damaged(text) => self.line(&format!("WARNING: {text}")),
            Event::Resumed { step, path } => {
                self.line(&format!("going on from step {step}, {}", path.display()));
            }
            Event::Reading => self.line("reading the text"),
            Event::Corpus(corpus) => {
                let (documents, bytes) =
                    (human::grouped(corpus.documents), human::bytes(corpus.bytes));
                let skipped = corpus.skipped.to_string();
                let skipped =
                    if skipped.is_empty() { skipped } else { format!("; passed over: {skipped}") };
                self.line(&format!("found {documents} documents, {bytes}{skipped}"));
            }
            Event::TrainingTokenizer { vocab_size } => {
                let size = human::grouped(*vocab_size as u64);
                self.line(&format!("training a tokenizer of {size} tokens on it"));
            }
            Event::WaitingForTokens => self.line("waiting for another run to tokenize this text"),
            Event::Tokenising { done, total } => self.tokenising(*done, *total),
            Event::Ready(summary) => self.ready(summary),
            Event::Note(text) => self.line(text),
            Event::Begin { steps, .. } => {
                if self.terminal {
                    self.start_bar(*steps, "{prefix} {wide_bar:.cyan/238} {msg}");
                }
            }
            Event::Step(progress) => self.step(progress),
            Event::Evaluated { step, loss, unit } => {
                self.line(format!("step {step}: validation loss {loss:.4} {unit}").trim_end());
            }
            Event::Sample { step, prompt, text } => {
                self.line(&format!("sample at step {step}:\n{prompt}{text}\n"));
            }
            Event::Saved { step, path } => {
                self.line(&format!("step {step} saved: {}", path.display()));
            }
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Prints a line above the bar.
    pub fn line(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| print_line(text)),
            None => print_line(text),
        }
    }

    fn tokenising(&mut self, done: u64, total: u64) {
        if !self.terminal {
            if !self.tokenising {
                self.tokenising = true;
                self.line(&format!("turning {} of text into tokens", human::bytes(total)));
            }
            return;
        }
        if !self.tokenising {
            self.tokenising = true;
            self.start_bar(total, "tokenizing {wide_bar:.cyan/238} {percent} %  {eta}");
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    fn ready(&mut self, summary: &Summary) {
        self.finish();
        let cached = if summary.tokens_cached { " (tokenized by an earlier run)" } else { "" };
        let grouped = |n: u64| human::grouped(n);
        self.line(&format!(
            "{} parameters, {} tokens of vocabulary; {} training tokens in {} documents{cached}",
            human::count(summary.parameters as f64),
            grouped(summary.vocab_size as u64),
            grouped(summary.train_tokens),
            grouped(summary.train_documents as u64),
        ));
        if let Some(entropy) = summary.unigram_entropy {
            self.line(&format!(
                "{} validation tokens; their unigram entropy, the best loss without context, is \
                 {entropy:.3} nats",
                grouped(summary.validation_tokens),
            ));
        }
    }

    fn step(&mut self, progress: &Progress) {
        let record = &progress.record;
        if let Some(bar) = &self.bar {
            bar.set_prefix(format!("step {}/{}", record.step, progress.steps));
            bar.set_message(format!("{}{}", brief(progress), self.stamp));
            bar.set_position(record.step);
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= self.interval);
        if due || record.step == progress.steps {
            self.last_line = Some(Instant::now());
            print_line(&format!("{}{}", step_line(progress), self.stamp));
        }
    }

    fn start_bar(&mut self, length: u64, template: &str) {
        self.finish();
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━╸─");
        let target = ProgressDrawTarget::stderr_with_hz(8);
        self.bar = Some(ProgressBar::with_draw_target(Some(length), target).with_style(style));
    }
}

fn print_line(text: &str) {
    // A closed pipe must not end the run.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// `loss 5.2500 · `; nothing for a loss that may not be told. One that is not finite has made the
/// guard skip the step.
fn loss(progress: &Progress) -> String {
    match progress.record.loss {
        Some(loss) => format!("loss {loss:.4} · "),
        None if progress.record.skipped => "loss not finite · ".into(),
        None => String::new(),
    }
}

/// `epsilon 1.2345 · ` of a private run, rounded up.
fn epsilon(progress: &Progress) -> String {
    let epsilon = progress.record.measures.get("epsilon");
    epsilon.map_or_else(String::new, |epsilon| format!("epsilon {} · ", shown(*epsilon)))
}

fn pace(progress: &Progress) -> String {
    let left = Duration::from_secs_f64(progress.seconds_left.clamp(0.0, 1e9));
    let eta = format!("eta {}", human::duration(left));
    // Of a run that does not tell its tokens there is no rate.
    if progress.tokens_per_second == 0.0 {
        return eta;
    }
    let rate = human::grouped(progress.tokens_per_second.round() as u64);
    let share = progress.gemm_share.map(|s| format!(" · {:.0} % of gemm", 100.0 * s));
    format!("{rate} tok/s{} · {eta}", share.unwrap_or_default())
}

/// Beside the bar.
fn brief(progress: &Progress) -> String {
    format!("{}{}{}", loss(progress), epsilon(progress), pace(progress))
}

/// In a log: everything of a step on one line.
fn step_line(progress: &Progress) -> String {
    let record = &progress.record;
    let norm = record.grad_norm.map_or_else(|| "not finite".into(), |norm| format!("{norm:.3}"));
    let mut line = format!(
        "step {}/{} · {}lr {:.2e} · grad norm {norm} · {}{}",
        record.step,
        progress.steps,
        loss(progress),
        record.lr,
        epsilon(progress),
        pace(progress)
    );
    if record.skipped {
        line.push_str(" · SKIPPED: not finite");
    }
    for (name, z) in [("loss", record.loss_z), ("grad norm", record.grad_norm_z)] {
        if let Some(z) = z {
            line.push_str(&format!(" · OUTLIER: {name} {z:+.1} deviations"));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use tercet_train::metrics::StepRecord;

    use super::*;

    fn progress() -> Progress {
        Progress {
            record: StepRecord {
                step: 7,
                tokens: 14336,
                loss: Some(5.25),
                lr: 1e-3,
                grad_norm: Some(0.5),
                skipped: false,
                loss_z: None,
                grad_norm_z: None,
                validation_loss: None,
                seconds: 0.5,
                measures: Default::default(),
            },
            steps: 100,
            tokens_per_second: 4096.4,
            flops_per_second: 1e11,
            gemm_share: Some(0.41),
            seconds_left: 125.0,
        }
    }

    #[test]
    fn a_log_has_one_line_a_step_with_loss_pace_share_and_eta() {
        assert_eq!(
            step_line(&progress()),
            "step 7/100 · loss 5.2500 · lr 1.00e-3 · grad norm 0.500 · 4,096 tok/s · 41 % of gemm \
             · eta 2m05s"
        );
    }

    #[test]
    fn a_private_run_tells_its_epsilon_and_neither_tokens_nor_loss() {
        let mut private = progress();
        (private.record.loss, private.tokens_per_second, private.gemm_share) = (None, 0.0, None);
        private.record.measures.insert("epsilon".into(), 1.23401);
        let line = step_line(&private);
        assert_eq!(line, "step 7/100 · lr 1.00e-3 · grad norm 0.500 · epsilon 1.2341 · eta 2m05s");
        assert_eq!(brief(&private), "epsilon 1.2341 · eta 2m05s");
    }

    #[test]
    fn skipped_steps_and_outliers_are_loud() {
        let mut bad = progress();
        bad.record.loss = None;
        bad.record.skipped = true;
        bad.record.grad_norm_z = Some(7.25);
        bad.seconds_left = f64::INFINITY;
        let line = step_line(&bad);
        assert!(line.contains("loss not finite") && line.contains("SKIPPED"), "{line}");
        assert!(line.contains("OUTLIER: grad norm +7.2 deviations"), "{line}");
    }
}
