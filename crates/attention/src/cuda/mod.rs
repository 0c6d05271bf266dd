//! The operator on an NVIDIA GPU: the functions, layouts, checks and errors of [`crate::cpu`], on
//! device memory.
//!
//! A [`Plan`] says which device, dims and storage type, and which kernels serve them; a [`Batch`]
//! (an [`NsaBatch`] for the sparse operator) holds the sequences' offsets on the device. Both are
//! made once and serve any number of calls. Everything is enqueued on the device's one stream and
//! nothing waits. Log-sum-exps are f32 here.
//!
//! Two sets of kernels. `plain/` is correct for every head dimension, group, spec, storage type
//! and device from sm_80 on; it is the fallback, and on the device the oracle of the others.
//! `hopper/` serves 16-bit types and usual dims on sm_90. Which one runs is decided in one place a
//! piece: the function of that name in `attend, select, selected, gate`.
//!
//! No kernel adds floats atomically: the same bits on every run.

mod attend;
mod batch;
pub mod decode;
mod finite;
mod gate;
mod hopper;
mod inverse;
mod nsa;
pub mod pieces;
mod plain;
mod plan;
mod select;
mod selected;
mod slice;

pub use attend::{AttendGrads, AttendInput, attend_backward, attend_forward};
pub use batch::{Batch, NsaBatch};
use nsa::nsa_forward_choosing;
pub use nsa::{
    NsaGrads, NsaInput, NsaSaved, NsaState, nsa_backward, nsa_forward, nsa_forward_into,
};
pub use plan::Plan;
pub use slice::Slice;
pub use tercet_cuda::{Gpu, Number};
