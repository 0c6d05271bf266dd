//! Native Sparse Attention (NSA, arXiv 2502.11089) on plain slices.
//!
//! Every query reads three cheap things instead of all keys: *compressed* summaries of blocks,
//! the few *selected* blocks those summaries point to, and a sliding *window*, blended by gates.
//!
//! The same file names hold the same step everywhere: `compress, score, select, attend, gate,
//! decode`. [`reference`] is float64 and reads like the equations; [`cpu`] is the fast one, [`cuda`]
//! the same on NVIDIA GPUs. The crate knows slices and device memory, never tensors or models.
//!
//! Legend of shapes: T tokens of all sequences together, H query heads, K key/value heads,
//! G = H/K, D key dim, V value dim, N compressed blocks of all sequences together, S selected
//! blocks. A suffix says the layout: `q_thd` is `[T, H, D]`, contiguous.

pub mod cpu;
pub mod cuda;
mod element;
mod error;
pub mod reference;
pub mod selftest;
mod shape;
mod spec;

pub use element::Element;
pub use error::Error;
pub use shape::{Dims, MAX_HEAD_DIM, cu_compressed, sequences};
pub use spec::{Compressor, NsaSpec, SpecError};

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;
