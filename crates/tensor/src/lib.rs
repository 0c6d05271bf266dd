//! Just enough tensor for a decoder: contiguous storage, a tape, one file an op.
//!
//! * [`Tensor`] is contiguous, immutable while shared, and cheap to clone.
//! * [`Tape`] records ops on [`Var`]s and walks them back into [`Grads`]; it frees what an op
//!   saved as soon as the op's backward has run.
//! * [`ops`] holds the differentiable operations, each computing in f32 whatever the storage.
//! * [`AdamW`] and [`clip`] turn gradients into the next weights.
//!
//! Results carry the same bits on every run and for any number of threads: sums are cut at
//! places that depend on the shapes alone. The crate knows neither models nor text.

mod adamw;
mod backward;
pub mod clip;
mod cuda;
mod device;
mod draws;
mod dtype;
mod error;
mod exponentials;
mod grads;
mod group_sum;
mod inspect;
mod math;
mod matmul;
pub mod ops;
mod parallel;
pub mod pool;
mod project;
mod rope_table;
mod rows;
mod selftest;
mod simd;
mod tape;
mod tensor;

pub use adamw::{AdamW, AdamWConfig, AdamWState, SlotState};
pub use device::Device;
pub use draws::{Draw, Drawn, Draws};
pub use dtype::DType;
pub use error::Error;
pub use exponentials::{exp_quantile, exp_sum, log_sum_exp};
pub use grads::Grads;
pub use group_sum::GroupSum;
pub use inspect::{Chosen, choose};
pub use project::FEW_ROWS;
pub use rope_table::{Llama3Scaling, RopeTable, YarnScaling};
pub use selftest::selftest;
pub use tape::{Tape, Var};
pub use tensor::Tensor;
pub use tercet_attention::cpu::Mask;
pub use tercet_attention::{Compressor, NsaSpec};
pub use tercet_cuda::{Fork, Gpu, Graph, Pinned};

/// Caches for decoding on a device.
pub mod caches {
    pub use crate::cuda::caches::{DenseCache, NsaBlocks, NsaCache, NsaNew, Pages, Partial, Rows};
}

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;
