//! A decoder with its parameters, and its Hugging Face folder.

use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;
use tercet_tensor::{DType, Device, Llama3Scaling, RopeTable, Tensor, YarnScaling};

use crate::config::{ModelConfig, RopeScaling};
use crate::folder::write_text;
use crate::hf_config;
use crate::init::fresh;
use crate::layout::{DecoderSlots, layout};
use crate::lora::Adapters;
use crate::params::Params;
use crate::weights_read::WeightFiles;
use crate::weights_write::{self, SHARD_BYTES};
use crate::{Error, Result};

/// A decoder: its shape, its parameters, and LoRA adapters of which one may be active. Clones share
/// the tensors until one side writes, so a frozen copy costs nothing.
#[derive(Clone)]
pub struct Model {
    config: ModelConfig,
    pub(crate) params: Params,
    pub(crate) adapters: Adapters,
    /// Another number whenever other weights come into force: caches of the old ones are refused.
    pub(crate) stamp: u64,
    pub(crate) slots: DecoderSlots,
    pub(crate) rope: Option<RopeTable>,
    /// The text of the `config.json` the model was loaded from: written back as it was, since
    /// other programs read fields that we do not.
    source: Option<String>,
}

impl Model {
    /// A fresh model, stored as `dtype` (f32 or bf16). The same seed gives the same bits.
    pub fn new(config: ModelConfig, seed: u64, dtype: DType) -> Result<Self> {
        config.validate()?;
        let (slots, specs) = layout(&config);
        let tensors: Result<Vec<Tensor>> =
            specs.par_iter().map(|spec| fresh(spec, seed, dtype)).collect();
        Self::assemble(config, slots, Params::new(specs, tensors?), None)
    }

    /// Loads a Hugging Face folder; bf16 files stay bf16, others become f32, both exactly.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_with(dir, None)
    }

    /// As [`Model::load`], stored as `dtype`.
    pub fn load_as(dir: &Path, dtype: DType) -> Result<Self> {
        Self::load_with(dir, Some(dtype))
    }

    fn load_with(dir: &Path, dtype: Option<DType>) -> Result<Self> {
        let (config, text) = load_config(dir)?;
        let files = WeightFiles::open(dir)?;
        let (slots, specs) = layout(&config);
        let dtype = dtype.unwrap_or_else(|| files.natural_dtype());
        let tensors = files.read(&config, &specs, dtype)?;
        Self::assemble(config, slots, Params::new(specs, tensors), Some(text))
    }

    /// A model of given tensors, in slot order and with the shapes of [`crate::parameters`].
    pub(crate) fn from_tensors(config: ModelConfig, tensors: Vec<Tensor>) -> Result<Self> {
        let (slots, specs) = layout(&config);
        Self::assemble(config, slots, Params::new(specs, tensors), None)
    }

    fn assemble(
        config: ModelConfig,
        slots: DecoderSlots,
        params: Params,
        source: Option<String>,
    ) -> Result<Self> {
        let rope = match config.learned_positions() {
            true => None,
            false => Some(rope_table(&config)?),
        };
        Ok(Self { config, params, adapters: Adapters::default(), stamp: 0, slots, rope, source })
    }

    /// Writes `config.json` and the weights, without adapters, into an existing folder. Each file is written beside
    /// and renamed; a caller who needs the folder to change as one writes into a new one and
    /// renames that.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_sharded(dir, SHARD_BYTES)
    }

    /// As [`Model::save`], with shards of at most `shard_bytes` (a larger tensor has its own).
    pub fn save_sharded(&self, dir: &Path, shard_bytes: u64) -> Result<()> {
        write_text(&dir.join("config.json"), &self.config_json())?;
        let mut params = self.params.clone();
        params.move_to(&Device::Cpu)?;
        weights_write::write(dir, &self.config, &params, shard_bytes)
    }

    fn config_json(&self) -> String {
        let dtype = dtype_name(self.params.dtype());
        let Some(source) = &self.source else { return hf_config::to_json(&self.config, dtype) };
        let Ok(value) = serde_json::from_str::<Value>(source) else {
            return hf_config::to_json(&self.config, dtype);
        };
        let stored = value.get("dtype").or_else(|| value.get("torch_dtype"));
        if stored.and_then(Value::as_str) == Some(dtype) {
            return source.clone();
        }
        format!("{:#}\n", hf_config::with_dtype(value, dtype))
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Moves the parameters, adapters included; what is computed with them is computed there. Caches made before
    /// stay where they are and no longer fit.
    pub fn to_device(&mut self, device: &Device) -> Result<()> {
        self.params.move_to(device)?;
        self.adapters.move_to(device)
    }

    /// Where the parameters live.
    pub fn device(&self) -> Device {
        self.params.device()
    }

    /// The base's parameters, without adapters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The base's parameters, to be changed; an optimizer takes [`Model::trained_mut`].
    pub fn params_mut(&mut self) -> &mut Params {
        &mut self.params
    }
}

/// Reads and checks the `config.json` of a folder.
pub fn load_config(dir: &Path) -> Result<(ModelConfig, String)> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let config = hf_config::from_json(&text).map_err(|e| match e {
        Error::Config(reason) => Error::file(&path, reason),
        other => other,
    })?;
    Ok((config, text))
}

fn dtype_name(dtype: DType) -> &'static str {
    if dtype == DType::BF16 { "bfloat16" } else { "float32" }
}

fn rope_table(config: &ModelConfig) -> Result<RopeTable> {
    let (dim, theta) = (config.head_dim, config.rope_theta);
    let table = match config.rope_scaling.clone() {
        None => RopeTable::plain(dim, theta),
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => RopeTable::llama3(
            dim,
            theta,
            &Llama3Scaling {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            },
        ),
        Some(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        }) => RopeTable::yarn(
            dim,
            theta,
            &YarnScaling {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale: None,
                mscale_all_dim: None,
                truncate,
            },
        ),
    };
    Ok(table?)
}
