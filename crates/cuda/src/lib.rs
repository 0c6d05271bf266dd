//! NVIDIA GPUs, found at run time.
//!
//! Nothing here is linked: the driver, NVRTC and cuBLASLt are looked for when they are first
//! needed, so one binary runs with and without them. [`probe`] lists the devices,
//! [`Gpu::open`] takes one with one stream, [`Gpu::kernel`] compiles CUDA C for its exact
//! constants (and keeps the result in memory and on disk), [`Gpu::alloc`] hands out
//! stream-ordered memory that is kept for the next request, [`Gpu::matmul`] calls cuBLASLt.
//!
//! Everything that a [`Gpu`] is asked to do happens in order on its one stream; only reads by
//! the host wait. The crate knows no op and no tensor, and never prints.

mod arena;
mod buffer;
mod compile;
mod device;
mod disk_cache;
mod error;
mod fork;
mod gpu;
mod graph;
mod inspect;
mod kernel;
mod library;
mod matmul;
mod memory;
mod pinned;
mod profile;
mod tensor_map;
mod timing;

pub use buffer::{Buffer, Pod};
pub use compile::{HEADERS, Source, compile_for};
pub use device::{DeviceInfo, probe};
pub use error::Error;
pub use fork::Fork;
pub use gpu::Gpu;
pub use graph::Graph;
pub use inspect::{Build, Resources, resources};
pub use kernel::{Args, Kernel};
pub use library::{Library, look_for};
pub use matmul::{Matmul, Number};
pub use memory::{Label, MemoryUse};
pub use pinned::Pinned;
pub use profile::KernelTime;
pub use tensor_map::{Swizzle, TensorMap};

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;
