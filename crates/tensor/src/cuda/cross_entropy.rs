//! `ops/linear_cross_entropy.rs` on a device: logits of a chunk of tokens by cuBLASLt, their
//! losses and gradients by `cross_entropy.cu`, and two products back.

use tercet_cuda::{Args, Gpu, Label, Matmul, Number, Source};

use super::linear::weight_gradient;
use super::{PIECES, at, kernel, number, stale};
use crate::ops::{HeadGrads, Wants};
use crate::{DType, Result, Tensor};

const SOURCE: Source =
    Source { name: "cross_entropy", text: include_str!("cross_entropy.cu"), headers: &[PIECES] };

/// Logits held at once, in elements: few enough to leave room, rows enough that the products
/// run at full speed and adding to the weight's gradient costs little.
const LOGITS_AT_ONCE: usize = 1 << 27;

/// Tokens of one chunk; a function of the vocabulary alone.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS_AT_ONCE / vocab.max(1)).clamp(128, 8192).next_multiple_of(128)
}

/// Threads that share a row.
pub(super) const THREADS: u32 = 512;

/// Mean loss (f32 `[]`), and the gradients of x and of the weight (f32) for a loss gradient of 1
/// as far as they are wanted. `targets` are on the device, `list` the same on the host, checked.
pub(crate) fn run(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    list: &[i32],
    wants: Wants,
) -> Result<(Tensor, Option<HeadGrads>)> {
    let Wants { grads, of_weight } = wants;
    let [tokens, width] = [x.shape()[0], x.shape()[1]];
    let vocab = weight.shape()[0];
    let dtype = x.dtype();
    let counted = list.iter().filter(|&&t| t >= 0).count();
    let factor = 1.0 / counted as f32;
    let rows = chunk_rows(vocab);
    let held = rows.min(tokens) * vocab;
    let losses = gpu.alloc_for(tokens * 4, Label::new("losses"))?;
    losses.fill(0)?;
    let logits = gpu.alloc_for(held * 4, Label::shaped("logits", &[rows.min(tokens), vocab]))?;
    // The products take the gradient in the storage type; f32 turns in place.
    let beside = grads && dtype != DType::F32;
    let slopes =
        gpu.alloc_for(if beside { held * 2 } else { 0 }, Label::new("logits' gradient"))?;
    let dz = match (grads, beside) {
        (false, _) => 0,
        (true, true) => slopes.ptr(),
        (true, false) => logits.ptr(),
    };
    let outputs = match grads {
        true => {
            let d_weight = match of_weight {
                true => Some(stale(gpu, DType::F32, &[vocab, width])?),
                false => None,
            };
            Some((stale(gpu, dtype, x.shape())?, d_weight))
        }
        false => None,
    };
    let vector = if vocab.is_multiple_of(4) { "4" } else { "1" };
    let turn = kernel(gpu, &SOURCE, "cross_entropy", dtype, &[("VECTOR", vector.into())])?;
    let mut filled = false;
    for (i, chunk) in list.chunks(rows).enumerate() {
        let (first, count) = (i * rows, chunk.len());
        let row_bytes = width * dtype.bytes();
        let xs = at(x)? + (first * row_bytes) as u64;
        if chunk.iter().all(|&t| t < 0) {
            if let Some((d_x, _)) = &outputs {
                // SAFETY: the rows of this chunk lie inside d_x.
                unsafe {
                    gpu.fill_at(at(d_x)? + (first * row_bytes) as u64, 0, count * row_bytes)?
                };
            }
            continue;
        }
        let sizes = [count, vocab, width];
        let mut product = Matmul::new(sizes, number(dtype), xs, at(weight)?, logits.ptr());
        product.trans_b = true;
        product.output = Number::F32;
        let args = Args::new()
            .ptr(logits.ptr())
            .ptr(at(targets)? + first as u64 * 4)
            .ptr(losses.ptr() + first as u64 * 4)
            .ptr(dz)
            .f32(factor)
            .len(vocab);
        // SAFETY: `logits` and `dz` hold `count` rows; targets and losses one number a token;
        // targets are checked against the vocabulary.
        unsafe {
            gpu.matmul(&product)?;
            turn.launch([count as u32, 1, 1], [THREADS, 1, 1], 0, args)?;
        }
        if let Some((d_x, d_weight)) = &outputs {
            if let Some(d_weight) = d_weight {
                weight_gradient(gpu, dtype, dz, xs, at(d_weight)?, sizes, filled)?;
            }
            let to = at(d_x)? + (first * row_bytes) as u64;
            let back = Matmul::new([count, width, vocab], number(dtype), dz, at(weight)?, to);
            // SAFETY: dz is [count, vocab], the weight [vocab, width], d_x's rows [count, width].
            unsafe { gpu.matmul(&back)? };
            filled = true;
        }
    }
    if let (Some((_, Some(d_weight))), false) = (&outputs, filled) {
        // SAFETY: the whole of d_weight.
        unsafe { gpu.fill_at(at(d_weight)?, 0, d_weight.len() * 4)? };
    }
    let loss = stale(gpu, DType::F32, &[])?;
    let mean = kernel(gpu, &SOURCE, "mean_loss", dtype, &[("VECTOR", vector.into())])?;
    let args = Args::new().ptr(losses.ptr()).ptr(at(&loss)?).len(tokens).f64(counted as f64);
    // SAFETY: `losses` holds one number a token, `loss` one.
    unsafe { mean.launch([1, 1, 1], [1024, 1, 1], 0, args)? };
    Ok((loss, outputs))
}
