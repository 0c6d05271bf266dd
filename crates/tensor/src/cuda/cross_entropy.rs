//! `ops/linear_cross_entropy.rs` on a device: logits of a chunk of tokens by cuBLASLt, their
//! losses and gradients by `cross_entropy.cu`, and two products back.

use tercet_cuda::{Args, Gpu, Label, Matmul, Number, Source};

use super::linear::weight_gradient;
use super::{PIECES, at, kernel, number, stale};
use crate::ops::{HeadGrads, Wants};
use crate::{DType, Device, Result, Tensor};

const SOURCE: Source =
    Source { name: "cross_entropy", text: include_str!("cross_entropy.cu"), headers: &[PIECES] };

/// Logits held at once, in elements: few enough to leave room, rows enough that the products
/// run at full speed and adding to the weight's gradient costs little.
const LOGITS_AT_ONCE: usize = 1 << 27;

/// Tokens of one chunk; a function of shapes alone. A batch of a multiple of 128 tokens is cut into
/// equal chunks where that takes no more than twice as many: a product of another size may sum in
/// another order, and a token's bits would depend on its place.
pub(super) fn chunk_rows(tokens: usize, vocab: usize) -> usize {
    let most = (LOGITS_AT_ONCE / vocab.max(1)).clamp(128, 8192).next_multiple_of(128);
    let least = tokens.div_ceil(most).max(1);
    let equal = (least..=2 * least).find(|count| tokens.is_multiple_of(128 * count));
    equal.map_or(most, |count| tokens / count).max(1)
}

/// Threads that share a row.
pub(super) const THREADS: u32 = 512;

/// The sum of the losses over `over` (f32 `[]`), each token's loss (f32 `[T]`), and the gradients of
/// x and of the weight (f32) for a loss gradient of 1 as far as they are wanted. `targets` are on
/// the device, `list` the same on the host, checked.
pub(crate) fn run(
    gpu: &Gpu,
    (x, weight, targets, list): (&Tensor, &Tensor, &Tensor, &[i32]),
    over: usize,
    wants: Wants,
) -> Result<(Tensor, Tensor, Option<HeadGrads>)> {
    let Wants { grads, of_weight } = wants;
    let [tokens, width] = [x.shape()[0], x.shape()[1]];
    let vocab = weight.shape()[0];
    let dtype = x.dtype();
    let factor = 1.0 / over as f32;
    let rows = chunk_rows(tokens, vocab);
    let held = rows.min(tokens) * vocab;
    let losses = Tensor::zeros_on(&Device::Cuda(gpu.clone()), DType::F32, &[tokens])?;
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
            .ptr(at(&losses)? + first as u64 * 4)
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
    let args = Args::new().ptr(at(&losses)?).ptr(at(&loss)?).len(tokens).f64(over as f64);
    // SAFETY: `losses` holds one number a token, `loss` one.
    unsafe { mean.launch([1, 1, 1], [1024, 1, 1], 0, args)? };
    Ok((loss, losses, outputs))
}

#[cfg(test)]
mod tests {
    use super::chunk_rows;

    #[test]
    fn chunks_are_equal_where_they_can_be_and_never_too_large() {
        // SmolLM2's vocabulary: 2816 rows at most.
        assert_eq!(chunk_rows(4096, 49152), 2048);
        assert_eq!(chunk_rows(2816, 49152), 2816);
        assert_eq!(chunk_rows(128 * 23, 49152), 2816);
        assert_eq!((chunk_rows(100, 5), chunk_rows(0, 5)), (8192, 1));
        for tokens in 0..200 {
            let (tokens, most) = (tokens * 128, 2816);
            let rows = chunk_rows(tokens, 49152);
            assert!(rows > 0 && rows <= most, "{tokens}: {rows}");
        }
    }
}
