//! `tercet eval`: lm-eval's local tasks, in process.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};
use tercet_eval::{Answer, Options, Outcome, Progress, Ready, Sample, Score, Task, evaluate};
use tercet_model::{Adapter, GenerationConfig, Model, Tokenizer};
use tercet_train::files;

use crate::device::DeviceArg;
use crate::error::user;
use crate::generate::model_folder;
use crate::human;

/// Least time between two lines of progress where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(10);

/// Measure a model on lm-eval's local tasks, without Python.
///
/// MODEL is a Hugging Face folder or the output folder of a run, whose newest checkpoint is taken.
/// TASKS are lm-eval task files over local JSON: multiple_choice, loglikelihood or generate_until,
/// with acc, acc_norm, acc_bytes, exact_match and perplexity. What a file asks for beyond that and
/// would change a number is refused by name. Numbers are lm-eval's own; docs/eval.md says how.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet eval ./SmolLM2-135M my_task.yaml\n  \
    tercet eval run/sft capitals.yaml poems.yaml --limit 100 --json scores.json")]
pub struct Args {
    /// Model folder, or the output folder of a run
    model: PathBuf,
    /// Task files, as lm-eval reads them
    #[arg(required = true, value_name = "TASKS")]
    tasks: Vec<PathBuf>,
    /// A LoRA adapter to use: a folder as PEFT writes it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Ask only the first N rows of each task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Tokens the model reads at most; longer rows lose their beginning [default: its context]
    #[arg(long, value_name = "TOKENS", value_parser = human::parse_length)]
    max_length: Option<usize>,
    /// Let the tokenizer put its first token before each text (lm-eval's add_bos_token)
    #[arg(long)]
    add_bos_token: bool,
    /// Where the results go as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where each row goes with its answer and scores, one JSON object a line
    #[arg(long, value_name = "FILE.jsonl")]
    log_samples: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
}

/// Loads the model, asks, and says what came of it.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let tasks: Vec<Task> =
        args.tasks.iter().map(|path| Task::load(path)).collect::<tercet_eval::Result<_>>()?;
    check(args, &tasks)?;
    let folder = model_folder(&args.model)?;
    let options = Options {
        limit: args.limit.map(|limit| limit as usize),
        max_length: args.max_length,
        special: args.add_bos_token,
        end_of_text: GenerationConfig::load(&folder)?.eos_token_ids,
    };
    let tokenizer = Tokenizer::load(&folder)?;
    let device = args.device.choose()?;
    let mut model = Model::load(&folder)?;
    if let Some(dir) = &args.adapter {
        let adapter = Adapter::load(dir, &model)?;
        model.attach("adapter", adapter)?;
        model.activate(Some("adapter"))?;
    }
    let ready: Vec<Ready> = tasks
        .iter()
        .map(|task| Ready::new(task, &model, &tokenizer, &options))
        .collect::<tercet_eval::Result<_>>()?;
    model.to_device(&device.tensors())?;
    let adapter = args.adapter.as_ref().map(|dir| format!(" with {}", dir.display()));
    eprintln!("{}{} · {device}", folder.display(), adapter.unwrap_or_default());
    for task in tasks.iter().filter(|task| !task.ignored.is_empty()) {
        eprintln!("{}: no number depends on {}", task.name, task.ignored.join(", "));
    }
    let mut watcher = Watcher::new(ready.iter().map(Ready::requests).sum());
    let outcomes =
        evaluate(&model, &tokenizer, &ready, &options, &mut |progress| watcher.show(progress))?;
    watcher.finish();
    if let Some(path) = &args.log_samples {
        let lines: String = outcomes.iter().flat_map(sample_lines).collect();
        write(path, &lines)?;
    }
    if let Some(path) = &args.json {
        write(path, &format!("{:#}\n", results(args, &folder, &outcomes)))?;
    }
    let _ = write!(std::io::stdout(), "{}", table(&outcomes));
    Ok(())
}

/// What would go wrong only after the model has answered.
fn check(args: &Args, tasks: &[Task]) -> anyhow::Result<()> {
    for (at, task) in tasks.iter().enumerate() {
        if tasks[..at].iter().any(|other| other.name == task.name) {
            return Err(user(format!("two tasks are called {}; names must differ", task.name)));
        }
    }
    for path in args.json.iter().chain(&args.log_samples) {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            return Err(user(format!("{}: {} is no folder", path.display(), folder.display())));
        }
        if path.is_dir() {
            return Err(user(format!("{} is a folder; name a file in it", path.display())));
        }
    }
    if args.json.is_some() && args.json == args.log_samples {
        return Err(user("--json and --log-samples name the same file"));
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    Ok(files::write_atomic(path, text.as_bytes())?)
}

/// A bar on a terminal, a line now and then elsewhere.
struct Watcher {
    bar: Option<ProgressBar>,
    start: Instant,
    last: Instant,
}

impl Watcher {
    fn new(total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{pos}/{len} {wide_bar:.cyan/238} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("━╸─");
            let target = ProgressDrawTarget::stderr_with_hz(8);
            ProgressBar::with_draw_target(Some(total as u64), target).with_style(style)
        });
        let start = Instant::now();
        Self { bar, start, last: start }
    }

    fn show(&mut self, progress: Progress) {
        let pace = pace(progress, self.start.elapsed());
        match &self.bar {
            Some(bar) => {
                bar.set_message(pace);
                bar.set_position(progress.done as u64);
            }
            None if self.last.elapsed() >= INTERVAL || progress.done == progress.total => {
                self.last = Instant::now();
                eprintln!("{}/{} requests · {pace}", progress.done, progress.total);
            }
            None => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn pace(progress: Progress, taken: Duration) -> String {
    let seconds = taken.as_secs_f64().max(1e-9);
    let left = seconds * (progress.total - progress.done) as f64 / progress.done.max(1) as f64;
    format!(
        "{} tok/s · eta {}",
        human::grouped((progress.tokens as f64 / seconds) as u64),
        human::duration(Duration::from_secs_f64(left.clamp(0.0, 1e9)))
    )
}

/// One line for each metric of each task.
fn table(outcomes: &[Outcome]) -> String {
    let width = outcomes.iter().map(|o| o.task.chars().count()).max().unwrap_or(0).max(4);
    let mut out = format!("{:width$}  {:>6}  {:<11}  {:>10}\n", "task", "rows", "metric", "value");
    for outcome in outcomes {
        for Score { metric, value, stderr } in &outcome.scores {
            let (task, rows) = (&outcome.task, outcome.samples.len());
            let error = stderr.map_or_else(String::new, |stderr| format!(" ± {}", short(stderr)));
            let (name, value) = (metric.name(), short(*value));
            out.push_str(&format!("{task:width$}  {rows:>6}  {name:<11}  {value:>10}{error}\n"));
        }
    }
    out
}

/// Four decimals, or an exponent where there would be too many digits before them.
fn short(number: f64) -> String {
    if number.abs() < 1e5 { format!("{number:.4}") } else { format!("{number:.4e}") }
}

/// The results under lm-eval's keys, so that what reads its files reads this one. A perplexity past
/// what a number holds is null.
fn results(args: &Args, folder: &Path, outcomes: &[Outcome]) -> Value {
    let (mut results, mut counts, mut better) = (Map::new(), Map::new(), Map::new());
    for outcome in outcomes {
        let mut own = Map::from_iter([("alias".to_owned(), json!(outcome.task))]);
        let mut higher = Map::new();
        for Score { metric, value, stderr } in &outcome.scores {
            let name = metric.name();
            own.insert(format!("{name},none"), json!(value));
            let stderr = stderr.map_or_else(|| json!("N/A"), |stderr| json!(stderr));
            own.insert(format!("{name}_stderr,none"), stderr);
            higher.insert(name.to_owned(), json!(metric.higher_is_better()));
        }
        let task = &outcome.task;
        let asked = outcome.samples.len();
        results.insert(task.clone(), own.into());
        counts.insert(task.clone(), json!({ "original": outcome.rows, "effective": asked }));
        better.insert(task.clone(), higher.into());
    }
    json!({
        "results": results,
        "higher_is_better": better,
        "n-samples": counts,
        "config": {
            "model": "tercet",
            "model_args": { "pretrained": folder, "peft": args.adapter },
            "limit": args.limit,
            "max_length": args.max_length,
            "add_bos_token": args.add_bos_token,
        },
        "tercet_version": env!("CARGO_PKG_VERSION"),
    })
}

/// A task's rows under the keys of lm-eval's sample files, and the task's name.
fn sample_lines(outcome: &Outcome) -> impl Iterator<Item = String> {
    outcome.samples.iter().map(|sample| {
        let Sample { row, doc, context, continuations, target, answer, values } = sample;
        let arguments = match continuations.is_empty() {
            true => vec![json!([context])],
            false => continuations.iter().map(|rest| json!([context, rest])).collect(),
        };
        let answers = match answer {
            Answer::Text(text) => vec![json!(text)],
            Answer::Likelihoods(all) => {
                all.iter().map(|own| json!([own.log_prob, own.greedy])).collect()
            }
        };
        let target = match target.as_slice() {
            [one] => one.clone(),
            many => json!(many),
        };
        let mut line = Map::from_iter([
            ("task".to_owned(), json!(outcome.task)),
            ("doc_id".to_owned(), json!(row)),
            ("doc".to_owned(), json!(doc)),
            ("target".to_owned(), target),
            ("arguments".to_owned(), arguments.into()),
            ("filtered_resps".to_owned(), answers.into()),
        ]);
        for (score, value) in outcome.scores.iter().zip(values) {
            line.insert(score.metric.name().to_owned(), json!(value));
        }
        format!("{}\n", Value::from(line))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexities_of_any_size_fit_the_table() {
        assert_eq!(
            [short(0.325), short(99_999.0), short(3e38)],
            ["0.3250", "99999.0000", "3.0000e38"]
        );
    }

    #[test]
    fn progress_says_speed_and_time_left() {
        let progress = Progress { done: 25, total: 100, tokens: 50_000 };
        assert_eq!(pace(progress, Duration::from_secs(10)), "5,000 tok/s · eta 30s");
        assert!(pace(Progress { done: 0, ..progress }, Duration::ZERO).contains("eta"));
    }
}
