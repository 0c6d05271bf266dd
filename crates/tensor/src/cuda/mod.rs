//! The ops on NVIDIA GPUs: kernels in `<op>.cu`, their launches in `<op>.rs`.
//!
//! How an op gets here (`add` is the model; `ops/add.rs` shows the other side):
//! 1. `ops/<op>.rs` checks shapes and storage types as ever, then asks
//!    `check::device(OP, &[("x", x.value()), …])?` where all its tensors live and matches:
//!    `Device::Cpu => float_dispatch!(…)`, `Device::Cuda(gpu) => cuda::<op>::forward(&gpu, …)`.
//!    The backward closure does the same with `grad.device()`.
//! 2. `cuda/<op>.rs` holds `const SOURCE: Source` with the text and the headers it includes,
//!    makes its output with [`stale`], and launches:
//!    `kernel(gpu, &SOURCE, "entry", dtype, &[defines])?` then
//!    `unsafe { k.launch(grid, block, shared, Args::new().ptr(at(x)?)…) }?`; [`pieces`] gives
//!    the grid of an elementwise loop over 16-byte vectors (`pieces.cuh`).
//! 3. Gradients go through `walk.accumulate_cuda(gpu, to_x, dtype, shape, |sum, add| …)` (the
//!    value's type, `sum` an address) and `walk.accumulate_f32_cuda(gpu, &to_weight, |sum, add|
//!    …)`; whole tensors through `walk.give` and `walk.give_f32`, as on the CPU.
//! 4. Sums have one order: no float atomics; partial sums go to scratch and `sum_parts` adds them.
//!    i32 tensors (ids, positions, targets) keep their host numbers: `view_i32` works on both
//!    sides, so checks stay on the host; the device reads its copy at `at(ids)?`.
//! 5. `selftest.rs` gets a case.

use tercet_cuda::{Gpu, Kernel, Source};

use crate::tensor::Storage;
use crate::{DType, Error, Result, Tensor};

pub(crate) mod adamw;
pub(crate) mod add;
pub(crate) mod attention;
pub(crate) mod caches;
pub(crate) mod compress;
pub(crate) mod compress_phi;
mod convert;
pub(crate) mod cross_entropy;
mod cut;
pub(crate) mod draw;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod expert_linear;
pub(crate) mod expert_plan;
pub(crate) mod expert_rows;
mod group_product;
pub(crate) mod group_sum;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod moe_route;
pub(crate) mod norm;
pub(crate) mod pointwise;
pub(crate) mod rms_norm;
pub(crate) mod rope;
mod rows;
pub(crate) mod scale;
mod sort;
mod storage;
mod sum_parts;
pub(crate) mod token_log_probs;

pub(crate) use convert::convert;
pub(crate) use rows::{append_rows, rows};
pub(crate) use storage::{OnCuda, number};

/// Header of elementwise loops.
pub(crate) const PIECES: (&str, &str) = ("pieces.cuh", include_str!("pieces.cuh"));

/// Header of kernels whose groups of threads hold rows.
const ROWS: (&str, &str) = ("rows.cuh", include_str!("rows.cuh"));

/// Header of loops over rows that an index picks.
const GATHERS: (&str, &str) = ("gathers.cuh", include_str!("gathers.cuh"));

/// Header of launches over many tensors.
const SLOTS: (&str, &str) = ("slots.cuh", include_str!("slots.cuh"));

/// Numbers that a block of such a launch takes; SPAN in `slots.cuh`.
const SPAN: usize = 256 * 4 * 4;

/// Threads of a block in elementwise loops.
const THREADS: u32 = 256;

/// The kernel `entry` for numbers stored as `dtype`, with further constants.
pub(crate) fn kernel(
    gpu: &Gpu,
    source: &Source,
    entry: &str,
    dtype: DType,
    defines: &[(&str, String)],
) -> Result<Kernel> {
    let real = match dtype {
        DType::BF16 => "REAL_BF16",
        DType::F32 => "REAL_F32",
        got => {
            let (what, expected) = ("the input", "f32 or bf16");
            return Err(Error::DType { op: source.name, what, expected, got });
        }
    };
    let mut all = Vec::with_capacity(1 + defines.len());
    all.push((real, "1".to_owned()));
    all.extend_from_slice(defines);
    Ok(gpu.kernel(source, entry, &all)?)
}

/// Grid and block of a loop over `len` numbers of `dtype` in vectors of 16 bytes.
pub(crate) fn pieces(len: usize, dtype: DType) -> ([u32; 3], [u32; 3]) {
    let per = THREADS as usize * (16 / dtype.bytes());
    ([len.div_ceil(per) as u32, 1, 1], [THREADS, 1, 1])
}

/// A tensor with unspecified numbers, to be overwritten wholly.
pub(crate) fn stale(gpu: &Gpu, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_storage(Storage::Cuda(OnCuda::stale(gpu, dtype, shape)?), shape))
}

/// The address of a tensor that is on a device.
pub(crate) fn at(tensor: &Tensor) -> Result<u64> {
    match tensor.storage() {
        Storage::Cuda(x) => Ok(x.ptr()),
        _ => Err(off_device()),
    }
}

/// The address of a tensor that is to be changed; copies first when its storage is shared.
pub(crate) fn at_mut(tensor: &mut Tensor) -> Result<u64> {
    match tensor.storage_mut()? {
        Storage::Cuda(x) => Ok(x.ptr()),
        _ => Err(off_device()),
    }
}

fn off_device() -> Error {
    Error::Device {
        op: "cuda",
        what: "a tensor",
        expected: "a CUDA device".into(),
        got: "cpu".into(),
    }
}
