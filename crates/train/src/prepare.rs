//! Everything before the first step: text, tokenizer, tokens, split.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use sha2::{Digest, Sha256};
use tercet_model::ModelConfig;

use crate::config::{FromData, ModelSource, RunConfig};
use crate::data::{self, Corpus, Shards, Split, SplitRule};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::files;
use crate::tokenizer::Vocabulary;
use crate::tokenizer_train;

/// Text files of a model folder larger than this are not carried from checkpoint to checkpoint.
const LARGEST_SIDECAR: u64 = 64 << 20;

/// Data and tokenizer, ready for training.
pub struct Prepared {
    /// Tokenizer and document marks.
    pub vocabulary: Vocabulary,
    /// The architecture.
    pub model: ModelConfig,
    /// Tokenizer and generation files for each checkpoint.
    pub sidecars: Vec<(String, Vec<u8>)>,
    /// All tokens.
    pub shards: Shards,
    /// Training stream and evaluation batches.
    pub split: Split,
    /// Key of the tokens.
    pub data_key: String,
    /// Whether tokens of an earlier run were used.
    pub cached: bool,
}

/// Reads, tokenizes and splits the data of a run. `checkpoint` is the one the run goes on from:
/// a tokenizer that the run trained itself is taken from there.
pub fn prepare(
    config: &RunConfig,
    checkpoint: Option<&Path>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(Event),
) -> Result<Prepared> {
    observe(Event::Reading);
    let corpus = Corpus::scan(&config.data, stop)?;
    observe(Event::Corpus(&corpus));
    let vocabulary = vocabulary(config, &corpus, checkpoint, observe)?;
    let model = model_config(config, &vocabulary)?;
    check_prompt(config, &vocabulary)?;

    let observe = std::cell::RefCell::new(observe);
    let total = corpus.bytes;
    let tokenised = data::tokenise(
        &corpus,
        &vocabulary,
        &config.cache(),
        stop,
        &mut |done| (observe.borrow_mut())(Event::Tokenising { done, total }),
        &mut || (observe.borrow_mut())(Event::WaitingForTokens),
    )?;
    if let Some(reason) = &tokenised.rebuilt {
        let text = format!("the tokens in {} were made again: {reason}", config.cache().display());
        (observe.borrow_mut())(Event::Damaged(&text));
    }
    let split = data::split(
        &tokenised.shards,
        &SplitRule {
            share: config.data.validation,
            context: config.data.context,
            seed: config.train.seed,
            batch: config.micro_tokens(),
            batches: config.train.eval_batches,
        },
    )?;
    let sidecars = match (checkpoint, &config.model) {
        (Some(folder), _) => sidecars(folder)?,
        (None, ModelSource::Folder(folder)) => sidecars(folder)?,
        (None, ModelSource::New(_)) => vocabulary.files(model.max_position_embeddings),
    };
    let (shards, data_key, cached) = (tokenised.shards, tokenised.key, tokenised.cached);
    Ok(Prepared { vocabulary, model, sidecars, shards, split, data_key, cached })
}

/// The run's tokenizer: the one named, the model folder's, or one trained on the text.
fn vocabulary(
    config: &RunConfig,
    corpus: &Corpus,
    checkpoint: Option<&Path>,
    observe: &mut dyn FnMut(Event),
) -> Result<Vocabulary> {
    let marks = marks(config)?;
    let Some(vocab_size) = config.data.vocab_size else {
        return Vocabulary::load(named_tokenizer(config)?, marks);
    };
    if let Some(folder) = checkpoint {
        return Vocabulary::load(folder, marks);
    }
    let special = &config.data.special_tokens;
    let sample = tokenizer_train::sample_bytes(vocab_size);
    let mut hasher = Sha256::new();
    hasher.update(corpus.digest);
    hasher.update(format!("{vocab_size} {special:?} {sample}"));
    let name = format!("tokenizer-{}.json", files::hex(&hasher.finalize()[..16]));
    let path = config.cache().join(name);
    if !path.exists() {
        observe(Event::TrainingTokenizer { vocab_size });
        let json = tokenizer_train::train(corpus, vocab_size, special, sample)?;
        files::create_folder(&config.cache())?;
        tokenizer_train::save(&json, &path)?;
    }
    Vocabulary::load(&path, marks)
}

/// Where the tokenizer of a run that trains none is.
pub fn named_tokenizer(config: &RunConfig) -> Result<&Path> {
    match (&config.data.tokenizer, &config.model) {
        (Some(path), _) | (None, ModelSource::Folder(path)) => Ok(path),
        (None, ModelSource::New(_)) => Err(Error::config(
            "data.tokenizer",
            "is missing: name a tokenizer.json, or set data.vocab_size to train one",
        )),
    }
}

/// Begin and end tokens that the model's configuration names.
pub fn marks(config: &RunConfig) -> Result<(Option<u32>, Option<u32>)> {
    match &config.model {
        ModelSource::Folder(folder) => {
            let model = tercet_model::load_config(folder)?.0;
            Ok((model.bos_token_id, model.eos_token_ids.first().copied()))
        }
        ModelSource::New(table) => {
            let id = |key| table.get(key)?.as_integer()?.try_into().ok();
            Ok((id("bos_token_id"), id("eos_token_id")))
        }
    }
}

/// The architecture, with what it takes over from the data.
pub fn model_config(config: &RunConfig, vocabulary: &Vocabulary) -> Result<ModelConfig> {
    config.model.config(&FromData {
        vocab_size: vocabulary.size(),
        context: config.data.context,
        bos: vocabulary.bos(),
        eos: vocabulary.eos(),
    })
}

/// Finds out before training, not at the first sample, that a prompt is too long.
pub fn check_prompt(config: &RunConfig, vocabulary: &Vocabulary) -> Result<()> {
    let tokens = vocabulary.encode_prompt(&config.train.sample_prompt)?.len();
    if tokens < config.data.context {
        return Ok(());
    }
    Err(Error::config(
        "train.sample_prompt",
        format!(
            "has {tokens} tokens, which leaves no room in data.context = {}",
            config.data.context
        ),
    ))
}

/// Tokenizer, chat and generation files beside the weights of a model folder.
pub fn sidecars(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for path in files::read_folder(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = [".json", ".jinja", ".txt", ".model"].iter().any(|end| name.ends_with(end));
        // An adapter's configuration would make the folder one of that adapter, and what was promised
        // of the weights that training starts from is not promised of those that it ends with.
        let ours = ["config.json", "manifest.json", "adapter_config.json"].contains(&&*name)
            || name.ends_with(".index.json")
            || (name.starts_with("privacy") && name.ends_with(".json"));
        let bytes = std::fs::metadata(&path).map_err(Error::io("read", &path))?;
        if text && !ours && bytes.is_file() && bytes.len() <= LARGEST_SIDECAR {
            found.push((name, std::fs::read(&path).map_err(Error::io("read", &path))?));
        }
    }
    Ok(found)
}
