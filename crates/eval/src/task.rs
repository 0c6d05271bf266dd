//! A task file: the part of lm-eval's YAML that tasks over local JSON files use.
//!
//! What cannot change a number is passed over and listed; what could, and is not done here, is
//! refused by its name.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::yaml;

/// Longer task files are none.
const LONGEST: u64 = 1 << 20;

/// Tokens an answer may have when the task does not say (lm-eval's own default).
const MAX_TOKENS: usize = 256;

/// Keys that change nothing that is computed here.
const IGNORED: [&str; 11] = [
    "task_alias",
    "tag",
    "metadata",
    "training_split",
    "fewshot_split",
    "fewshot_config",
    "doc_to_decontamination_query",
    "should_decontaminate",
    "unsafe_code",
    "dataset_name",
    "group_alias",
];

/// What a task asks a model for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Which of some continuations is the most probable.
    MultipleChoice,
    /// How probable a continuation is.
    Loglikelihood,
    /// A text, written with the most probable token each time.
    GenerateUntil,
}

impl Output {
    /// As lm-eval writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::MultipleChoice => "multiple_choice",
            Self::Loglikelihood => "loglikelihood",
            Self::GenerateUntil => "generate_until",
        }
    }
}

/// What is measured of each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The right choice is the most probable; of a single continuation, that each of its tokens is
    /// the most probable one.
    Acc,
    /// As `acc`, log-probabilities divided by the choices' lengths in characters.
    AccNorm,
    /// As `acc_norm`, in bytes of UTF-8.
    AccBytes,
    /// The text is the target; of choices, that each token of the right one is the most probable.
    ExactMatch {
        /// Capital letters are small ones.
        ignore_case: bool,
        /// ASCII punctuation is not there.
        ignore_punctuation: bool,
        /// ASCII digits are not there.
        ignore_numbers: bool,
    },
    /// `exp` of the mean negative log-likelihood of a row.
    Perplexity,
}

impl Metric {
    const EXACT: Self =
        Self::ExactMatch { ignore_case: false, ignore_punctuation: false, ignore_numbers: false };

    /// As lm-eval writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::AccBytes => "acc_bytes",
            Self::ExactMatch { .. } => "exact_match",
            Self::Perplexity => "perplexity",
        }
    }

    /// Whether more is better.
    pub fn higher_is_better(self) -> bool {
        self != Self::Perplexity
    }
}

/// Where the choices of a row come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Choices {
    /// A column, or a template that gives a list.
    Text(String),
    /// The same for every row.
    Fixed(Vec<String>),
}

/// A task, as its file says.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name.
    pub name: String,
    /// What it asks for.
    pub output: Output,
    /// What is measured.
    pub metrics: Vec<Metric>,
    /// Keys of the file that change nothing here.
    pub ignored: Vec<String>,
    pub(crate) data: Vec<PathBuf>,
    pub(crate) description: Option<String>,
    pub(crate) text: String,
    pub(crate) choices: Option<Choices>,
    /// A column or template, or a number.
    pub(crate) target: Value,
    pub(crate) delimiter: String,
    pub(crate) until: Vec<String>,
    pub(crate) max_tokens: usize,
}

impl Task {
    /// Reads a task file. Paths of its data are taken from the current folder, as lm-eval does.
    pub fn load(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > LONGEST {
            return Err(Error::file(path, format!("is {size} bytes long; no task file is")));
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        let file = match yaml::parse(&text) {
            Ok(Value::Object(file)) => file,
            Ok(_) => return Err(Error::file(path, "is not a task file: expected `key: value`")),
            Err(reason) => return Err(Error::file(path, reason)),
        };
        Reader { file, ignored: Vec::new() }.task().map_err(|reason| Error::file(path, reason))
    }
}

type Said<T> = std::result::Result<T, String>;

/// Takes keys out of a file; what is left has not been understood.
struct Reader {
    file: Map<String, Value>,
    ignored: Vec<String>,
}

impl Reader {
    fn task(mut self) -> Said<Task> {
        let name = self.text("task")?.ok_or("has no `task:` with a name")?;
        let output = match self.text("output_type")?.as_deref() {
            Some("multiple_choice") => Output::MultipleChoice,
            Some("loglikelihood") => Output::Loglikelihood,
            Some("generate_until") | None => Output::GenerateUntil,
            Some(other) => {
                return Err(format!(
                    "output_type {other} is not supported; there are multiple_choice, \
                     loglikelihood and generate_until"
                ));
            }
        };
        let data = self.data()?;
        let text = self.text("doc_to_text")?.ok_or("has no `doc_to_text:`")?;
        let target = self.take("doc_to_target").ok_or("has no `doc_to_target:`")?;
        if !(target.is_string() || target.is_i64()) {
            return Err(format!("doc_to_target is {target}; expected a text or a number"));
        }
        let choices = self.choices()?;
        match (output, &choices) {
            (Output::MultipleChoice, None) => return Err("has no `doc_to_choice:`".into()),
            (Output::Loglikelihood, Some(_)) => {
                return Err("doc_to_choice has no place in a task of loglikelihood".into());
            }
            _ => {}
        }
        let description = self.text("description")?.filter(|text| !text.is_empty());
        let delimiter = self.text("target_delimiter")?.unwrap_or_else(|| " ".into());
        let between = self.text("fewshot_delimiter")?.unwrap_or_else(|| "\n\n".into());
        let (until, max_tokens) = self.generation(output, between)?;
        let metrics = self.metrics(output)?;
        for (key, only) in [("num_fewshot", 0), ("repeats", 1)] {
            match self.take(key) {
                None => {}
                Some(value) if value == only => {}
                Some(value) => {
                    return Err(format!("{key}: {value} is not supported; expected {only}"));
                }
            }
        }
        for (key, value) in std::mem::take(&mut self.file) {
            if value.is_null() || value == false {
                continue;
            }
            if !IGNORED.contains(&key.as_str()) {
                return Err(format!("`{key}` is not supported by tercet eval"));
            }
            self.ignored.push(key);
        }
        self.ignored.sort_unstable();
        Ok(Task {
            name,
            output,
            metrics,
            ignored: self.ignored,
            data,
            description,
            text,
            choices,
            target,
            delimiter,
            until,
            max_tokens,
        })
    }

    /// A key's value; null is no value.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.file.shift_remove(key).filter(|value| !value.is_null())
    }

    fn text(&mut self, key: &str) -> Said<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!("{key} is {other}; expected a text")),
        }
    }

    /// The files of the split that is measured: the test split, else the one for validation.
    fn data(&mut self) -> Said<Vec<PathBuf>> {
        match self.text("dataset_path")?.as_deref() {
            Some("json") => {}
            Some(other) => {
                return Err(format!(
                    "dataset_path {other} is not supported: only local files are read; expected \
                     `dataset_path: json` and dataset_kwargs with data_files"
                ));
            }
            None => return Err("has no `dataset_path: json`".into()),
        }
        let Some(Value::Object(mut kwargs)) = self.take("dataset_kwargs") else {
            return Err("has no `dataset_kwargs:` with data_files".into());
        };
        let files = kwargs.shift_remove("data_files");
        kwargs.shift_remove("trust_remote_code");
        if let Some(key) = kwargs.keys().next() {
            return Err(format!("dataset_kwargs.{key} is not supported; only data_files is"));
        }
        let (test, other) = (self.text("test_split")?, self.text("validation_split")?);
        let split = match (test, other) {
            (Some(test), other) => {
                self.ignored.extend(other.map(|_| "validation_split".to_owned()));
                test
            }
            (None, Some(other)) => other,
            (None, None) => return Err("has neither a test_split nor a validation_split".into()),
        };
        let files = match files {
            Some(Value::Object(mut splits)) => splits.shift_remove(&split).ok_or_else(|| {
                let known: Vec<&String> = splits.keys().collect();
                format!("the split {split} has no data_files; there are {known:?}")
            })?,
            Some(files) if split == "train" => files,
            Some(_) => {
                return Err(format!(
                    "data_files without splits is the split train, and {split} is measured; write \
                     `data_files: {{ {split}: … }}`"
                ));
            }
            None => return Err("dataset_kwargs has no data_files".into()),
        };
        let files = match files {
            Value::Array(files) => files,
            one => vec![one],
        };
        if files.is_empty() {
            return Err(format!("the split {split} has an empty list of data_files"));
        }
        files.into_iter().map(local_file).collect()
    }

    fn choices(&mut self) -> Said<Option<Choices>> {
        let texts = |values: Vec<Value>| -> Said<Choices> {
            let text = |value: Value| match value {
                Value::String(text) => Ok(text),
                other => Err(format!("doc_to_choice has {other}; choices are texts, in quotes")),
            };
            values.into_iter().map(text).collect::<Said<_>>().map(Choices::Fixed)
        };
        Ok(Some(match self.take("doc_to_choice") {
            None => return Ok(None),
            Some(Value::String(text)) => Choices::Text(text),
            Some(Value::Array(values)) => texts(values)?,
            Some(Value::Object(map)) => texts(map.into_iter().map(|(_, value)| value).collect())?,
            Some(other) => {
                return Err(format!("doc_to_choice is {other}; expected a list or text"));
            }
        }))
    }

    /// Texts that end an answer, and how long it may be.
    fn generation(&mut self, output: Output, between: String) -> Said<(Vec<String>, usize)> {
        let kwargs = match self.take("generation_kwargs") {
            None => Map::new(),
            Some(Value::Object(kwargs)) => kwargs,
            Some(other) => return Err(format!("generation_kwargs is {other}; expected keys")),
        };
        if output != Output::GenerateUntil {
            self.ignored.extend((!kwargs.is_empty()).then(|| "generation_kwargs".to_owned()));
            return Ok((Vec::new(), MAX_TOKENS));
        }
        let (mut until, mut max_tokens) = (vec![between], MAX_TOKENS);
        for (key, value) in kwargs {
            match (key.as_str(), value) {
                ("until", Value::Null) => until = Vec::new(),
                ("until", Value::String(text)) => until = vec![text],
                ("until", Value::Array(texts)) => {
                    let text = |value: Value| match value {
                        Value::String(text) => Ok(text),
                        other => Err(format!("generation_kwargs.until has {other}, not a text")),
                    };
                    until = texts.into_iter().map(text).collect::<Said<_>>()?;
                }
                ("max_gen_toks", value) => {
                    let tokens = value.as_u64().filter(|&n| (1..=1 << 20).contains(&n));
                    max_tokens = tokens.ok_or_else(|| {
                        format!("generation_kwargs.max_gen_toks is {value}; expected 1 or more")
                    })? as usize;
                }
                ("temperature", value) if value.as_f64() == Some(0.0) => {}
                // Without sampling the temperature changes nothing; lm-eval's files often have both.
                ("do_sample", Value::Bool(false)) => {}
                (key, value) => {
                    return Err(format!(
                        "generation_kwargs.{key}: {value} is not supported; there are until, \
                         max_gen_toks, temperature: 0 and do_sample: false"
                    ));
                }
            }
        }
        if until.iter().any(String::is_empty) {
            return Err("generation_kwargs.until has an empty text, which ends at once".into());
        }
        Ok((until, max_tokens))
    }

    fn metrics(&mut self, output: Output) -> Said<Vec<Metric>> {
        let list = match self.take("metric_list") {
            None => {
                return Ok(match output {
                    Output::MultipleChoice => vec![Metric::Acc, Metric::AccNorm],
                    Output::Loglikelihood => vec![Metric::Perplexity, Metric::Acc],
                    Output::GenerateUntil => vec![Metric::EXACT],
                });
            }
            Some(Value::Array(list)) if !list.is_empty() => list,
            Some(other) => return Err(format!("metric_list is {other}; expected a list")),
        };
        let mut metrics: Vec<Metric> = Vec::new();
        for entry in list {
            let Value::Object(mut entry) = entry else {
                return Err(format!("metric_list has {entry}; expected `metric: name`"));
            };
            let metric = metric(&mut entry, output)?;
            if metrics.iter().any(|other| other.name() == metric.name()) {
                return Err(format!("metric_list has {} twice", metric.name()));
            }
            metrics.push(metric);
        }
        Ok(metrics)
    }
}

fn local_file(value: Value) -> Said<PathBuf> {
    let Value::String(path) = value else {
        return Err(format!("data_files has {value}; expected a path"));
    };
    if path.contains("://") {
        return Err(format!("data_files has {path}: only local files are read"));
    }
    if path.contains('*') {
        return Err(format!("data_files has the pattern {path}; name each file"));
    }
    let kind = Path::new(&path).extension().and_then(|kind| kind.to_str());
    if !matches!(kind, Some("json" | "jsonl")) {
        return Err(format!("data_files has {path}; expected a .json or .jsonl file"));
    }
    Ok(path.into())
}

/// One entry of `metric_list`.
fn metric(entry: &mut Map<String, Value>, output: Output) -> Said<Metric> {
    let Some(Value::String(name)) = entry.shift_remove("metric") else {
        return Err("metric_list has an entry without `metric: name`".into());
    };
    let mut flag = |key: &str| match entry.shift_remove(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(flag),
        Some(other) => Err(format!("metric {name}: {key} is {other}; expected true or false")),
    };
    let metric = match (name.as_str(), output) {
        ("acc", Output::MultipleChoice | Output::Loglikelihood) => Metric::Acc,
        ("acc_norm", Output::MultipleChoice) => Metric::AccNorm,
        ("acc_bytes", Output::MultipleChoice) => Metric::AccBytes,
        ("perplexity", Output::Loglikelihood) => Metric::Perplexity,
        ("exact_match", Output::MultipleChoice) => Metric::EXACT,
        ("exact_match", Output::GenerateUntil) => Metric::ExactMatch {
            ignore_case: flag("ignore_case")?,
            ignore_punctuation: flag("ignore_punctuation")?,
            ignore_numbers: flag("ignore_numbers")?,
        },
        _ => {
            let known = match output {
                Output::MultipleChoice => "acc, acc_norm, acc_bytes and exact_match",
                Output::Loglikelihood => "acc and perplexity",
                Output::GenerateUntil => "exact_match",
            };
            return Err(format!(
                "metric {name} is not supported for {}; there are {known}",
                output.name()
            ));
        }
    };
    let own = if metric == Metric::Perplexity { "perplexity" } else { "mean" };
    for (key, value) in std::mem::take(entry) {
        let fine = match key.as_str() {
            "aggregation" => value == own,
            // What counts as better changes no number.
            "higher_is_better" => value.is_boolean(),
            _ => value.is_null() || value == false,
        };
        if !fine {
            return Err(format!("metric {name}: {key}: {value} is not supported"));
        }
    }
    Ok(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "task: t\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: \
                        a.jsonl\ntest_split: test\ndoc_to_text: \"{{q}}\"\ndoc_to_target: gold\n";

    fn load(more: &str) -> Result<Task> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.yaml");
        std::fs::write(&path, format!("{BASE}{more}")).unwrap();
        Task::load(&path)
    }

    #[test]
    fn defaults_are_lm_evals() {
        let task = load("").unwrap();
        assert_eq!(task.output, Output::GenerateUntil);
        assert_eq!((task.until, task.max_tokens), (vec!["\n\n".to_owned()], 256));
        assert_eq!((task.metrics, task.delimiter.as_str()), (vec![Metric::EXACT], " "));
        let task = load("output_type: multiple_choice\ndoc_to_choice: [a, b]\n").unwrap();
        assert_eq!(task.metrics, [Metric::Acc, Metric::AccNorm]);
        assert_eq!(task.choices, Some(Choices::Fixed(vec!["a".into(), "b".into()])));
        let task = load("output_type: loglikelihood\n").unwrap();
        assert_eq!(task.metrics, [Metric::Perplexity, Metric::Acc]);
    }

    #[test]
    fn what_changes_nothing_is_listed() {
        let task = load("metadata: {version: 1}\ntag: [x]\nprocess_docs: null\n").unwrap();
        assert_eq!(task.ignored, ["metadata", "tag"]);
    }

    #[test]
    fn what_would_change_a_number_is_refused_by_name() {
        for (more, part) in [
            ("process_docs: !function utils.f\n", "!function"),
            ("num_fewshot: 5\n", "num_fewshot: 5"),
            ("repeats: 3\n", "repeats: 3"),
            ("filter_list: [x]\n", "`filter_list`"),
            ("include: other.yaml\n", "`include`"),
            ("gen_prefix: x\n", "`gen_prefix`"),
            ("nonsense: 1\n", "`nonsense`"),
            ("output_type: loglikelihood_rolling\n", "loglikelihood_rolling"),
            ("output_type: multiple_choice\n", "doc_to_choice"),
            ("generation_kwargs: {temperature: 0.7}\n", "temperature: 0.7"),
            ("generation_kwargs: {do_sample: true}\n", "do_sample: true"),
            ("generation_kwargs: {max_gen_toks: 0}\n", "max_gen_toks is 0"),
            ("generation_kwargs: {until: ['']}\n", "empty text"),
            ("metric_list: [{metric: bleu}]\n", "metric bleu"),
            ("metric_list: [{metric: acc}]\n", "metric acc is not supported for generate_until"),
            ("metric_list: [{metric: exact_match, aggregation: median}]\n", "aggregation"),
            ("metric_list: [{metric: exact_match, regexes_to_ignore: [x]}]\n", "regexes_to_ignore"),
            ("metric_list: [{metric: exact_match}, {metric: exact_match}]\n", "twice"),
            ("metric_list: []\n", "metric_list"),
        ] {
            let error = load(more).unwrap_err();
            assert!(error.to_string().contains(part) && error.is_users(), "{more}: {error}");
        }
    }

    #[test]
    fn only_local_json_files_are_data() {
        for (from, to, part) in [
            ("a.jsonl", "https://x/a.jsonl", "only local files"),
            ("a.jsonl", "'*.jsonl'", "pattern"),
            ("a.jsonl", "a.parquet", ".json or .jsonl"),
            ("test: a", "train: a", "the split test has no data_files"),
            ("dataset_path: json", "dataset_path: super_glue", "super_glue"),
            ("test_split: test\n", "", "neither a test_split"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("t.yaml");
            std::fs::write(&path, BASE.replace(from, to)).unwrap();
            let error = Task::load(&path).unwrap_err().to_string();
            assert!(error.contains(part), "{to}: {error}");
        }
        assert!(Task::load(Path::new("no-such.yaml")).unwrap_err().is_users());
    }
}
