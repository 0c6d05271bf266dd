//! Serving: many people's requests to one model, written side by side.
//!
//! [`engine`] turns prompts of token ids into tokens; it knows neither HTTP nor text. [`http`]
//! knows both, and nothing of caches.

pub mod engine;
pub mod http;
