//! GGUF import: a quantised llama.cpp file becomes a Hugging Face folder.
//!
//! Our own reader: the published crates either do not dequantise or allocate what the file asks
//! for. Here every count is limited, every sum is checked, and nothing is allocated beyond what
//! the file's size can fill.

mod convert;
mod dequant;
mod read;
mod rope_factors;
mod tokens;

pub use convert::{Imported, import};
