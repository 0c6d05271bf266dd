//! What a run tells whoever watches it. Drawing bars and lines is the watcher's work.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use tercet_tensor::Device;

use crate::data::Corpus;
use crate::metrics::StepRecord;

/// What the caller of a run decides besides its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Control<'a> {
    /// Raised by Ctrl-C or SIGTERM: the run saves and returns.
    pub stop: &'a AtomicBool,
    /// Whether to go on from the newest complete checkpoint; a folder without one is begun.
    pub resume: bool,
    /// FLOP/s of this machine's matrix product, for [`Progress::gemm_share`].
    pub gemm_flops: Option<f64>,
    /// Where the model computes.
    pub device: &'a Device,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A newer checkpoint, or the tokenized text, is damaged and not used; says which and why.
    Damaged(&'a str),
    /// The run goes on from a checkpoint.
    Resumed {
        /// Steps done.
        step: u64,
        /// The checkpoint.
        path: &'a Path,
    },
    /// The text is being read for the first time.
    Reading,
    /// The text was read.
    Corpus(&'a Corpus),
    /// A tokenizer is being trained on it.
    TrainingTokenizer {
        /// Tokens it will have.
        vocab_size: usize,
    },
    /// Another run is tokenizing into the same folder.
    WaitingForTokens,
    /// The text is being tokenized.
    Tokenising {
        /// Bytes of text done.
        done: u64,
        /// Bytes of text in all.
        total: u64,
    },
    /// What will be pretrained on what.
    Ready(&'a Summary),
    /// Something worth a line: what was counted, dropped, checked.
    Note(&'a str),
    /// The steps begin.
    Begin {
        /// Steps of the whole run.
        steps: u64,
        /// Steps done already.
        done: u64,
    },
    /// A step is done.
    Step(&'a Progress),
    /// The held-out batches were looked at.
    Evaluated {
        /// Steps done.
        step: u64,
        /// What the task descends, of the held-out examples.
        loss: f64,
        /// Its unit, or nothing.
        unit: &'static str,
    },
    /// The model wrote something.
    Sample {
        /// Steps done.
        step: u64,
        /// What it was given.
        prompt: &'a str,
        /// What it wrote.
        text: &'a str,
    },
    /// A checkpoint is committed.
    Saved {
        /// Steps done.
        step: u64,
        /// The checkpoint.
        path: &'a Path,
    },
}

/// What is about to be trained on what.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Parameters of the model.
    pub parameters: usize,
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
    /// Documents trained on.
    pub train_documents: usize,
    /// Their tokens: one epoch.
    pub train_tokens: u64,
    /// Documents held out.
    pub validation_documents: usize,
    /// Tokens of the evaluation batches.
    pub validation_tokens: u64,
    /// Entropy in nats of the distribution of the evaluation's own targets: the loss of the best
    /// model without context. `None` when nothing is held out.
    pub unigram_entropy: Option<f64>,
    /// Whether tokens of an earlier run were used.
    pub tokens_cached: bool,
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps done already.
    pub done: u64,
    /// Floating-point operations of the model per trained token, backward included.
    pub flops_per_token: f64,
}

/// Where a run stands after a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The step's line in `metrics.jsonl`.
    pub record: StepRecord,
    /// Steps of the whole run.
    pub steps: u64,
    /// Tokens per second, over the last steps.
    pub tokens_per_second: f64,
    /// Model FLOP/s, over the last steps.
    pub flops_per_second: f64,
    /// Share of the machine's matrix-product rate, when that is known.
    pub gemm_share: Option<f64>,
    /// Seconds to the end of the run, at the pace so far.
    pub seconds_left: f64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Whether all steps are done; otherwise the run was interrupted and can be resumed.
    pub finished: bool,
    /// Steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Mean training loss of the last tenth of the steps (at least one).
    pub train_loss: Option<f64>,
    /// Loss on the held-out examples at the end.
    pub validation_loss: Option<f64>,
    /// See [`Summary::unigram_entropy`].
    pub unigram_entropy: Option<f64>,
    /// Unit of the losses; empty for those that have none.
    pub loss_unit: &'static str,
    /// Steps skipped because something was not finite.
    pub skipped: u64,
    /// Tokens per second over the steps of this process: evaluation and saving left out.
    pub tokens_per_second: f64,
    /// Model FLOP/s over the same time.
    pub flops_per_second: f64,
    /// Share of the machine's matrix-product rate, when that is known.
    pub gemm_share: Option<f64>,
    /// The newest checkpoint: a Hugging Face folder.
    pub checkpoint: Option<PathBuf>,
    /// The loss curve.
    pub curve: PathBuf,
}
