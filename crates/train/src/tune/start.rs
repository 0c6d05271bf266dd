//! The model a tuning run starts from, and the adapter it trains.

use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tercet_model::{Adapter, ForwardOptions, GenerationConfig, LoraConfig, Model, Tokenizer};

use tercet_tensor::{DType, Device, Tensor};

use crate::config::{TuneModel, TuneTrain};
use crate::error::{Error, Result};
use crate::files;
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
        if !folder.join("config.json").is_file() {
            return Err(Error::config(
                "model.path",
                format!(
                    "= {} is not a model folder (it has no config.json); `tercet convert` makes one \
                     of a GGUF, and a run's checkpoints are below its output",
                    folder.display()
                ),
            ));
        }
        Ok(Self {
            tokenizer: Tokenizer::load(folder)?,
            generation: GenerationConfig::load(folder)?,
            sidecars: sidecars(folder)?,
        })
    }
}

/// SHA-256 in hexadecimal of everything that decides what a model computes: its configuration,
/// that of its active adapter, and every bit of their weights.
pub fn fingerprint(model: &Model) -> Result<String> {
    let adapter = model.active_adapter().and_then(|name| model.adapter(name));
    let shape = serde_json::to_vec(&(model.config(), adapter.map(|adapter| adapter.config())))
        .map_err(|error| Error::Data(format!("the model's configuration has no JSON: {error}")))?;
    let digest = |tensor: &Tensor| -> Result<[u8; 32]> {
        let tensor = tensor.to_device(&Device::Cpu)?;
        let mut hasher = Sha256::new();
        match tensor.dtype() {
            DType::BF16 => tensor.as_bf16()?.iter().for_each(|x| hasher.update(x.to_le_bytes())),
            _ => tensor.as_f32()?.iter().for_each(|x| hasher.update(x.to_le_bytes())),
        }
        Ok(hasher.finalize().into())
    };
    let mut hasher = Sha256::new();
    hasher.update(shape);
    // The weights, and the adapter's where one is active.
    let adapted = model.active_adapter().map(|_| model.trained());
    for params in std::iter::once(model.params()).chain(adapted) {
        let digests: Vec<Result<[u8; 32]>> = params.tensors().par_iter().map(digest).collect();
        for digest in digests {
            hasher.update(digest?);
        }
    }
    Ok(files::hex(&hasher.finalize()))
}

/// A key of examples and of the models that a resumed run reads anew: its checkpoints hold
/// neither.
pub fn key(examples: &str, models: &[&Model]) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(examples);
    for model in models {
        hasher.update(fingerprint(model)?);
    }
    Ok(files::hex(&hasher.finalize()))
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
