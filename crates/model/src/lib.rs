//! Decoder models: configuration, Hugging Face folders, tokenizer, generation, planning.
//!
//! A [`Model`] is a [`ModelConfig`] and its [`Params`]. It computes losses on a tape
//! ([`Model::forward_loss`]), extends caches token by token ([`Model::extend`]) and writes text
//! ([`Generator`]). The crate knows neither optimizers nor HTTP.

mod attention;
mod batch;
mod cache;
mod cache_cpu;
mod cache_cuda;
mod chat;
mod chat_json;
pub mod chat_methods;
mod chat_time;
mod classifier;
mod config;
mod config_rules;
mod decode_graph;
mod decoder;
mod error;
mod extend_many;
pub mod folder;
mod generate;
mod generation_config;
pub mod gguf;
pub mod hf_config;
mod init;
mod layout;
mod log_probs;
mod lora;
mod model;
mod params;
mod plan;
mod plan_cuda;
mod recent;
mod sample_many;
mod sampling;
mod selftest;
pub mod slots;
mod slots_cuda;
mod stop;
mod stored;
mod text_stream;
mod token_bytes;
mod tokenizer;
mod weights_read;
mod weights_write;
mod writer;

pub use batch::{Batch, IGNORE};
pub use cache::Cache;
pub use chat::{ChatTemplate, Message};
pub use classifier::SequenceClassifier;
pub use config::{Activation, Family, LayerType, ModelConfig, MoeConfig, RopeScaling};
pub use decoder::{ForwardOptions, LossParts};
pub use error::{Error, Result};
pub use generate::{Generation, Generator};
pub use generation_config::GenerationConfig;
pub use layout::{Init, ParamSpec, parameters};
pub use log_probs::TokenLogProbs;
pub use lora::{Adapter, LoraConfig};
pub use model::{Model, load_config};
pub use params::Params;
pub use plan::{Flops, Memory, Parameters, Workload};
pub use sample_many::{Ask, Together, Written, sample_many};
pub use sampling::{Sampler, Sampling};
pub use selftest::selftest;
pub use stop::StopFilter;
pub use text_stream::TextStream;
pub use token_bytes::TokenBytes;
pub use tokenizer::{Tokenizer, copy_companions};
pub use weights_write::SHARD_BYTES;
pub use writer::Finish;
