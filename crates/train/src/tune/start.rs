//! The model a tuning run starts from, and the adapter it trains.

use std::path::Path;

use tercet_model::{Adapter, ForwardOptions, GenerationConfig, LoraConfig, Model, Tokenizer};

use crate::config::{TuneModel, TuneTrain};
use crate::error::{Error, Result};
use crate::prepare::sidecars;

/// The name of the adapter that is trained.
pub const ADAPTER: &str = "default";

/// The model at a run's first step: the folder's weights, with the adapter to go on with, or a
/// new one when `lora` asks for it.
pub fn first(model: &TuneModel, lora: Option<&LoraConfig>, train: &TuneTrain) -> Result<Model> {
    let mut tuned = Model::load_as(&model.path, train.dtype.dtype())?;
    let adapter = match (&model.adapter, lora) {
        (None, None) => return Ok(tuned),
        (Some(_), Some(_)) => {
            return Err(Error::config(
                "lora",
                "asks for a new adapter, but model.adapter names one to go on with; keep one of \
                 the two",
            ));
        }
        (Some(folder), None) => Adapter::load(folder, &tuned)?,
        (None, Some(lora)) => Adapter::new(&tuned, lora.clone(), train.seed)?,
    };
    tuned.attach(ADAPTER, adapter)?;
    tuned.activate(Some(ADAPTER))?;
    Ok(tuned)
}

/// The same model with the weights, or the adapter, of a checkpoint of the run.
pub fn resumed(first: &Model, checkpoint: &Path, train: &TuneTrain) -> Result<Model> {
    if first.active_adapter().is_none() {
        return Ok(Model::load_as(checkpoint, train.dtype.dtype())?);
    }
    let mut tuned = first.clone();
    tuned.detach(ADAPTER);
    let adapter = Adapter::load(checkpoint, &tuned)?;
    tuned.attach(ADAPTER, adapter)?;
    tuned.activate(Some(ADAPTER))?;
    Ok(tuned)
}

/// How portion `portion` of step `step` goes through the model: each has its own dropout.
pub fn options(train: &TuneTrain, step: u64, portion: usize) -> ForwardOptions {
    // Odd constants keep seeds of neighbouring steps and portions apart.
    let dropout = train
        .seed
        .wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15))
        .wrapping_add((portion as u64).wrapping_mul(0xD1B5_4A32_D192_ED03));
    ForwardOptions { recompute: train.recompute, dropout: Some(dropout) }
}

/// What stands beside the weights of a model folder.
pub struct Beside {
    /// With its chat template, if there is one.
    pub tokenizer: Tokenizer,
    /// What ends a text, among others.
    pub generation: GenerationConfig,
    /// Files for every checkpoint: name and content.
    pub sidecars: Vec<(String, Vec<u8>)>,
}

impl Beside {
    /// Reads a model folder.
    pub fn load(folder: &Path) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::load(folder)?,
            generation: GenerationConfig::load(folder)?,
            sidecars: sidecars(folder)?,
        })
    }
}

/// Refuses a context that the model does not have.
pub fn check_context(context: usize, model: &Model) -> Result<()> {
    let most = model.config().max_position_embeddings;
    if context <= most {
        return Ok(());
    }
    Err(Error::config(
        "data.context",
        format!("= {context} is more than the model's context of {most}"),
    ))
}

/// Floating-point operations per token of a training step over sequences of `len` tokens: with an
/// adapter the gradients of the weights themselves are not made, a third of the work.
pub fn flops_per_token(model: &Model, len: usize) -> f64 {
    let all = model.config().flops(len.max(1)).training();
    if model.active_adapter().is_none() { all } else { all * 2.0 / 3.0 }
}
