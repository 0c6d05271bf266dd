//! Mean cross-entropy of `softmax(x·Wᵀ)`, without ever holding the logits of all tokens.
//!
//! `loss = (1/M) Σ_t (ln Σ_v e^{z_tv} − z_t,target)` over the M tokens that have a target. The
//! logits z of a chunk of tokens are made, turned into their gradient
//! `dz = (softmax(z) − onehot)/M` on the spot, and multiplied into `dx = dz·W` and
//! `dW += dzᵀ·x`, so the backward pass only scales. Keeps dx `[T, C]` and dW `[vocab, C]`.

use super::check::{self, IGNORED};
use crate::backward::Weight;
use crate::dtype::{Float, float_dispatch};
use crate::matmul::{Mat, matmul};
use crate::pool::Buffer;
use crate::project::project;
use crate::simd::multiversion;
use crate::{DType, Device, Result, Tape, Tensor, Var, cuda, math, parallel};
use rayon::prelude::*;

const OP: &str = "linear_cross_entropy";

/// Logits held at once, in elements: enough rows for a fast product, few enough to stay small.
const LOGITS_AT_ONCE: usize = 1 << 22;

/// Tokens of one chunk; a function of the vocabulary alone. A multiple of 128, so that batches of
/// such a multiple have no short chunk, whose products would sum in another order.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS_AT_ONCE / vocab.max(1)).clamp(128, 1024) / 128 * 128
}

/// Mean loss of x `[T, C]` against `targets` (i32 `[T]`, −100 ignored, else in `0..vocab`),
/// weight `[vocab, C]`: an f32 of shape `[]`. It is 0 when no target is counted.
pub fn linear_cross_entropy(
    tape: &mut Tape,
    x: &Var,
    weight: &Var,
    targets: &Tensor,
) -> Result<Var> {
    Ok(reduced(tape, x, weight, targets, true)?.0)
}

/// As [`linear_cross_entropy`], the sum of the losses instead of their mean, and with it each
/// token's loss, f32 `[T]`, 0 where none counts, where x is.
pub fn linear_cross_entropy_sum(
    tape: &mut Tape,
    x: &Var,
    weight: &Var,
    targets: &Tensor,
) -> Result<(Var, Tensor)> {
    reduced(tape, x, weight, targets, false)
}

fn reduced(
    tape: &mut Tape,
    x: &Var,
    weight: &Var,
    targets: &Tensor,
    mean: bool,
) -> Result<(Var, Tensor)> {
    let [tokens, _, vocab] = check::head(OP, x, weight)?;
    let list = check::targets(OP, targets, tokens, vocab)?;
    let counted = list.iter().filter(|&&target| target != IGNORED).count();
    let over = if mean { counted } else { 1 };
    let inputs = [x, weight];
    let wants = Wants { grads: tape.keeps(&inputs), of_weight: tape.keeps(&[weight]) };
    let places = [("x", x.value()), ("the weight", weight.value()), ("targets", targets)];
    let (to_x, to_weight) = (x.source(), Weight::of(OP, weight));
    if let Device::Cuda(gpu) = check::device(OP, &places)? {
        let call = (x.value(), weight.value(), targets, list);
        let (loss, losses, grads) = cuda::cross_entropy::run(&gpu, call, over, wants)?;
        let loss = tape.record(loss, &inputs, move |seed, walk| {
            if let Some((mut d_x, d_weight)) = grads {
                cuda::scale::in_place_by(&gpu, &mut d_x, &seed)?;
                if let Some(mut d_weight) = d_weight {
                    cuda::scale::in_place_by(&gpu, &mut d_weight, &seed)?;
                    walk.give_f32(&to_weight, d_weight)?;
                }
                walk.give(to_x, d_x)?;
            }
            Ok(())
        })?;
        return Ok((loss, losses));
    }
    let run = float_dispatch!(OP, x.dtype(), run(x.value(), weight.value(), list, over, wants))?;
    let Outcome { loss, losses, grads } = run;
    let loss = tape.record(Tensor::scalar(loss), &inputs, move |grad, walk| {
        let seed = grad.item()?;
        if let Some((mut d_x, d_weight)) = grads {
            if seed != 1.0 {
                float_dispatch!(OP, d_x.dtype(), scale(&mut d_x, seed))?;
            }
            if let Some(mut d_weight) = d_weight {
                if seed != 1.0 {
                    scale::<f32>(&mut d_weight, seed)?;
                }
                walk.give_f32(&to_weight, d_weight)?;
            }
            walk.give(to_x, d_x)?;
        }
        Ok(())
    })?;
    Ok((loss, losses))
}

fn scale<E: Float>(grad: &mut Tensor, factor: f32) -> Result<()> {
    super::scale_in_place(grad.view_mut::<E>(OP, "the gradient")?, factor);
    Ok(())
}

/// What a call has to leave for the walk back. A constant weight, as beside an adapter, costs
/// neither its product nor the memory of its gradient.
#[derive(Clone, Copy)]
pub(crate) struct Wants {
    /// Any gradient at all.
    pub(crate) grads: bool,
    /// That of the weight too.
    pub(crate) of_weight: bool,
}

/// Gradients of x and, where it is wanted, of the weight (f32), for a loss gradient of 1.
pub(crate) type HeadGrads = (Tensor, Option<Tensor>);

struct Outcome {
    loss: f32,
    /// Of each token, f32 `[T]`.
    losses: Tensor,
    /// Of x and of the weight (f32), for a loss gradient of 1.
    grads: Option<HeadGrads>,
}

/// The sum of the losses over `over`.
fn run<E: Float>(
    x: &Tensor,
    weight: &Tensor,
    targets: &[i32],
    over: usize,
    wants: Wants,
) -> Result<Outcome> {
    let Wants { grads, of_weight } = wants;
    let (tokens, width) = (x.shape()[0], x.shape()[1]);
    let vocab = weight.shape()[0];
    let xs: &[E] = x.view(OP, "x")?;
    let narrow: &[E] = weight.view(OP, "the weight")?;
    let wide = E::widen(narrow);
    let rows = chunk_rows(vocab);
    let mut losses = Buffer::<f32>::zeroed(tokens);
    let mut logits = Buffer::<f32>::stale(rows.min(tokens) * vocab);
    let mut outputs = grads.then(|| {
        let d_x = Buffer::<E>::stale(tokens * width);
        (d_x, of_weight.then(|| Tensor::stale(DType::F32, &[vocab, width])))
    });
    let mut weight_filled = false;
    for (i, targets) in targets.chunks(rows).enumerate() {
        let first = i * rows;
        let count = targets.len();
        let at = first * width..(first + count) * width;
        if targets.iter().all(|&t| t == IGNORED) {
            if let Some((d_x, _)) = &mut outputs {
                d_x[at].fill(E::default());
            }
            continue;
        }
        let x = E::widen(&xs[at.clone()]);
        let z = &mut logits[..count * vocab];
        project(z, &x, &wide, [count, vocab, width], false);
        let factor = 1.0 / over as f32;
        let per = parallel::rows_per_chunk(vocab);
        z.par_chunks_mut(per * vocab)
            .zip(losses[first..first + count].par_chunks_mut(per))
            .zip(targets.par_chunks(per))
            .for_each(|((z, losses), targets)| loss_rows(z, losses, targets, factor, grads));
        if let Some((d_x, d_weight)) = &mut outputs {
            let dz = Mat::new(z, count, vocab);
            if let Some(d_weight) = d_weight {
                let sum = d_weight.view_mut(OP, "the gradient")?;
                matmul(sum, dz.t(), Mat::new(&x, count, width), weight_filled);
            }
            E::write(&mut d_x[at], false, |d_x| {
                matmul(d_x, dz, Mat::new(&wide, vocab, width), false);
            });
            weight_filled = true;
        }
    }
    if let (Some((_, Some(d_weight))), false) = (&mut outputs, weight_filled) {
        d_weight.as_f32_mut()?.fill(0.0);
    }
    let total: f64 = losses.iter().map(|&l| f64::from(l)).sum();
    let loss = (total / over.max(1) as f64) as f32;
    let grads = outputs.map(|(d_x, d_weight)| (Tensor::from_buffer(d_x, x.shape()), d_weight));
    Ok(Outcome { loss, losses: Tensor::from_buffer(losses, &[tokens]), grads })
}

multiversion! {
    /// Writes each row's loss and, when `grads`, turns its logits into their gradient.
    fn loss_rows(z: &mut [f32], losses: &mut [f32], targets: &[i32], factor: f32, grads: bool) {
        let vocab = z.len() / targets.len();
        for ((z, loss), &target) in z.chunks_exact_mut(vocab).zip(losses).zip(targets) {
            if target == IGNORED {
                *loss = 0.0;
                if grads {
                    z.fill(0.0);
                }
                continue;
            }
            let target = target as usize;
            let highest = math::max(z);
            let score = z[target] - highest;
            for z in z.iter_mut() {
                *z = math::exp(*z - highest);
            }
            let sum = math::sum(z, |e| e);
            *loss = libm::logf(sum) - score;
            if grads {
                let scale = factor / sum;
                for z in z.iter_mut() {
                    *z *= scale;
                }
                z[target] -= factor;
            }
        }
    }
}
