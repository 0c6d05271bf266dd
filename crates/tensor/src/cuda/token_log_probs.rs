//! `ops/token_log_probs.rs` on a device: logits of a chunk of tokens by cuBLASLt, what is read
//! of them and their gradients by `token_log_probs.cu`, and two products back.

use tercet_cuda::{Args, Gpu, Kernel, Label, Matmul, Number, Source};

use super::cross_entropy::{THREADS, chunk_rows};
use super::linear::weight_gradient;
use super::{PIECES, at, kernel, number, stale};
use crate::backward::Backward;
use crate::ops::{Call, Found};
use crate::{DType, Device, Result, Tensor, tape};

const SOURCE: Source = Source {
    name: "token_log_probs",
    text: include_str!("token_log_probs.cu"),
    headers: &[PIECES],
};

fn entry(gpu: &Gpu, name: &str, dtype: DType, vocab: usize) -> Result<Kernel> {
    let vector = if vocab.is_multiple_of(4) { "4" } else { "1" };
    kernel(gpu, &SOURCE, name, dtype, &[("VECTOR", vector.into())])
}

/// Whatever the op gives of each token. `targets` are on the device, `list` the same on the
/// host, checked.
pub(crate) fn forward(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    list: &[i32],
) -> Result<Found> {
    let [tokens, width] = [x.shape()[0], x.shape()[1]];
    let vocab = weight.shape()[0];
    let dtype = x.dtype();
    let rows = chunk_rows(tokens, vocab);
    let shape = [rows.min(tokens), vocab];
    let logits = gpu.alloc_for(shape[0] * vocab * 4, Label::shaped("logits", &shape))?;
    let column = || Tensor::zeros_on(&Device::Cuda(gpu.clone()), DType::F32, &[tokens]);
    let found = Found {
        log_probs: column()?,
        best: column()?,
        entropy: column()?,
        hits: column()?,
        highest: column()?,
    };
    let read = entry(gpu, "token_rows", dtype, vocab)?;
    for (i, chunk) in list.chunks(rows).enumerate() {
        if chunk.iter().all(|&t| t < 0) {
            continue;
        }
        let (first, count) = (i * rows, chunk.len());
        let xs = at(x)? + (first * width * dtype.bytes()) as u64;
        let of = |column: &Tensor| -> Result<u64> { Ok(at(column)? + first as u64 * 4) };
        let args = Args::new()
            .ptr(logits.ptr())
            .ptr(of(targets)?)
            .ptr(of(&found.log_probs)?)
            .ptr(of(&found.best)?)
            .ptr(of(&found.entropy)?)
            .ptr(of(&found.hits)?)
            .ptr(of(&found.highest)?)
            .len(vocab);
        // SAFETY: `logits` holds `count` rows, the rest one number a token; targets are checked
        // against the vocabulary.
        unsafe {
            gpu.matmul(&product([count, vocab, width], dtype, xs, at(weight)?, logits.ptr()))?;
            read.launch([count as u32, 1, 1], [THREADS, 1, 1], 0, args)?;
        }
    }
    Ok(found)
}

/// Logits of rows of x in f32.
fn product(sizes: [usize; 3], dtype: DType, x: u64, weight: u64, logits: u64) -> Matmul {
    let mut product = Matmul::new(sizes, number(dtype), x, weight, logits);
    product.trans_b = true;
    product.output = Number::F32;
    product
}

/// Gives x and the weight their gradients; chunks of which nothing is asked are skipped, for
/// which the gradient comes to the host.
pub(crate) fn backward(gpu: &Gpu, call: &Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let asked = call.asked(&grad.to_vec_f32()?)?;
    let d_x = match call.to_x {
        tape::Source::Constant => None,
        _ => Some(stale(gpu, call.x.dtype(), call.x.shape())?),
    };
    if call.to_weight.wants_grad() {
        walk.accumulate_f32_cuda(gpu, &call.to_weight, |sum, add| {
            run(gpu, call, grad, &asked, d_x.as_ref(), Some((sum, add)))
        })?;
    } else {
        run(gpu, call, grad, &asked, d_x.as_ref(), None)?;
    }
    d_x.map_or(Ok(()), |d_x| walk.give(call.to_x, d_x))
}

/// Writes dx, and dW (an address) on top of what is there when its flag says so.
fn run(
    gpu: &Gpu,
    call: &Call,
    grad: &Tensor,
    asked: &[i32],
    d_x: Option<&Tensor>,
    mut d_weight: Option<(u64, bool)>,
) -> Result<()> {
    let [tokens, width] = [call.x.shape()[0], call.x.shape()[1]];
    let vocab = call.weight.shape()[0];
    let dtype = call.x.dtype();
    let rows = chunk_rows(tokens, vocab);
    let held = rows.min(tokens) * vocab;
    let logits = gpu.alloc_for(held * 4, Label::shaped("logits", &[rows.min(tokens), vocab]))?;
    // The products take the gradient in the storage type; f32 turns in place.
    let beside = dtype != DType::F32;
    let slopes =
        gpu.alloc_for(if beside { held * 2 } else { 0 }, Label::new("logits' gradient"))?;
    let dz = if beside { slopes.ptr() } else { logits.ptr() };
    let turn = entry(gpu, "token_slopes", dtype, vocab)?;
    for (i, chunk) in asked.chunks(rows).enumerate() {
        let (first, count) = (i * rows, chunk.len());
        let row_bytes = width * dtype.bytes();
        let from = (first * row_bytes) as u64;
        if chunk.iter().all(|&t| t < 0) {
            if let Some(d_x) = d_x {
                // SAFETY: the rows of this chunk lie inside d_x.
                unsafe { gpu.fill_at(at(d_x)? + from, 0, count * row_bytes)? };
            }
            continue;
        }
        let sizes = [count, vocab, width];
        let (xs, weight) = (at(&call.x)? + from, at(&call.weight)?);
        let of = |column: &Tensor| -> Result<u64> { Ok(at(column)? + first as u64 * 4) };
        let args = Args::new()
            .ptr(logits.ptr())
            .ptr(of(&call.targets)?)
            .ptr(of(grad)?)
            .ptr(of(&call.highest)?)
            .ptr(of(&call.best)?)
            .ptr(dz)
            .len(vocab);
        // SAFETY: `logits` and `dz` hold `count` rows, the rest one number a token.
        unsafe {
            gpu.matmul(&product(sizes, dtype, xs, weight, logits.ptr()))?;
            turn.launch([count as u32, 1, 1], [THREADS, 1, 1], 0, args)?;
        }
        if let Some((sum, add)) = &mut d_weight {
            weight_gradient(gpu, dtype, dz, xs, *sum, sizes, *add)?;
            *add = true;
        }
        if let Some(d_x) = d_x {
            let to = at(d_x)? + from;
            let back = Matmul::new([count, width, vocab], number(dtype), dz, weight, to);
            // SAFETY: dz is [count, vocab], the weight [vocab, width], d_x's rows [count, width].
            unsafe { gpu.matmul(&back)? };
        }
    }
    if let Some((sum, false)) = d_weight {
        // SAFETY: the weight's gradient is f32 [vocab, width].
        unsafe { gpu.fill_at(sum, 0, vocab * width * 4)? };
    }
    Ok(())
}
