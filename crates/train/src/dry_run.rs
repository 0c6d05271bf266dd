//! `--dry-run`: everything is checked, nothing is written.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use tercet_model::{Model, ModelConfig, Workload};
use tercet_tensor::Device;

use crate::config::{FromData, ModelSource, RunConfig};
use crate::data::{Corpus, Skipped};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::lock::FolderLock;
use crate::prepare::{check_prompt, marks, model_config, named_tokenizer};
use crate::pretrain::dtype;
use crate::run::starting_point;
use crate::tokenizer::Vocabulary;

/// What a run would do.
#[derive(Clone, Debug)]
pub struct DryRun {
    /// Files it would read.
    pub files: usize,
    /// Documents in them; long files count once a section.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// What it would pass over.
    pub skipped: Skipped,
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
    /// The architecture.
    pub model: ModelConfig,
    /// What memory and time depend on.
    pub workload: Workload,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of these steps.
    pub tokens: u64,
    /// The checkpoint it would go on from.
    pub resume_from: Option<PathBuf>,
    /// Newer checkpoints that are damaged, and how.
    pub damaged: Vec<String>,
}

/// Checks configuration, output folder, checkpoints, text, tokenizer and model as a run would, and
/// says what it would do. Only a tokenizer that would be trained is not.
pub fn dry_run(
    config: &RunConfig,
    resume: bool,
    device: &Device,
    stop: &AtomicBool,
) -> Result<DryRun> {
    FolderLock::check(&config.output)?;
    check_writable(&config.output)?;
    let mut damaged = Vec::new();
    let resume_from = starting_point(&config.output, &config.to_toml(), resume, &mut |event| {
        if let Event::Damaged(text) = event {
            damaged.push(text.to_owned());
        }
    })?;
    let corpus = Corpus::scan(&config.data, stop)?;
    let (vocab_size, model) = match config.data.vocab_size {
        Some(size) => (
            size,
            config.model.config(&FromData {
                vocab_size: size,
                context: config.data.context,
                // The end-of-text token comes first in a tokenizer that is trained here.
                bos: 0,
                eos: 0,
            })?,
        ),
        None => {
            let vocabulary = Vocabulary::load(named_tokenizer(config)?, marks(config)?)?;
            check_prompt(config, &vocabulary)?;
            (vocabulary.size(), model_config(config, &vocabulary)?)
        }
    };
    if let ModelSource::Folder(folder) = &config.model {
        Model::load_as(folder, dtype(config))?;
    }
    Ok(DryRun {
        files: corpus.files(),
        documents: corpus.documents,
        bytes: corpus.bytes,
        skipped: corpus.skipped,
        vocab_size,
        model,
        workload: Workload {
            context: config.data.context,
            tokens_at_once: config.micro_tokens(),
            dtype: dtype(config),
            recompute: config.train.recompute,
            cuda: *device != Device::Cpu,
        },
        steps: config.steps(),
        tokens: config.steps() * config.train.batch_tokens as u64,
        resume_from,
        damaged,
    })
}

/// Looks at the nearest folder that exists, without touching it.
fn check_writable(output: &Path) -> Result<()> {
    let here = Path::new(".");
    let existing = output.ancestors().find(|path| path.exists()).unwrap_or(here);
    let metadata = std::fs::metadata(existing).map_err(Error::io("read", existing))?;
    let refused = match (metadata.is_dir(), metadata.permissions().readonly()) {
        (false, _) => std::io::ErrorKind::NotADirectory,
        (true, true) => std::io::ErrorKind::PermissionDenied,
        (true, false) => return Ok(()),
    };
    Err(Error::io("write", existing)(refused.into()))
}
