//! Decoder models: configuration, Hugging Face folders, tokenizer, generation, planning.
//!
//! A [`Model`] is a [`ModelConfig`] and its [`Params`]. It computes losses on a tape
//! ([`Model::forward_loss`]), extends caches token by token ([`Model::extend`]) and writes text
//! ([`generate`]). The crate knows neither optimizers nor HTTP.

mod attention;
mod batch;
mod cache;
mod config;
mod config_rules;
mod decoder;
mod error;
pub mod hf_config;
mod init;
mod layout;
mod model;
mod params;
mod stored;
mod weights_read;
mod weights_write;

pub use batch::{Batch, IGNORE};
pub use cache::Cache;
pub use config::{Activation, Family, LayerType, ModelConfig, MoeConfig, RopeScaling};
pub use decoder::{ForwardOptions, LossParts};
pub use error::{Error, Result};
pub use layout::{Init, ParamSpec, parameters};
pub use model::{Model, load_config};
pub use params::Params;
pub use weights_write::SHARD_BYTES;
