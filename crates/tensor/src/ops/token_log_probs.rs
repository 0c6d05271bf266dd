//! Log-probabilities of given tokens under `softmax(x·Wᵀ)`, one by one, without ever holding the
//! logits of all tokens.
//!
//! `ln p_t = z_t,target − h_t − ln Σ_v e^{z_tv − h_t}` with the row's highest logit h. Backward,
//! for a gradient g of the log-probabilities: the logits of a chunk are made again, turned into
//! `dz_t = g_t·(onehot − softmax(z_t))` and multiplied into `dx = dz·W` and `dW += dzᵀ·x`; chunks
//! in which every token is ignored or has g = 0 are skipped. Keeps x and W, both shared, and two
//! numbers a token: h and ln p of the most probable token, which is `−ln Σ e^{z − h}`.
//!
//! Errors: a logit is an f32 sum of C products, and what is made of it is off by its error; on
//! top come a few roundings of 2⁻²⁴·(h_t − z_t,target + ln vocab). Large logits cost nothing, as
//! only differences from h enter.

use super::check::{self, IGNORED};
use super::linear_cross_entropy::chunk_rows;
use crate::backward::{Backward, Weight};
use crate::dtype::{Float, float_dispatch};
use crate::matmul::{Mat, matmul};
use crate::pool::Buffer;
use crate::project::project;
use crate::simd::multiversion;
use crate::tape::Source;
use crate::{Device, Result, Tape, Tensor, Var, cuda, math, parallel};
use rayon::prelude::*;

const OP: &str = "token_log_probs";

/// What [`token_log_probs`] finds of each token; all f32 `[T]`, 0 where there is no target.
pub struct TokenLogProbs {
    /// Natural logarithm of the target's probability; carries the gradient.
    pub log_probs: Var,
    /// That of the most probable token.
    pub best: Tensor,
    /// Entropy of the distribution, in nats.
    pub entropy: Tensor,
    /// 1 where the target is the most probable token (the first of equals), else 0.
    pub hits: Tensor,
}

/// Log-probability of each of `targets` (i32 `[T]`, −100 for none, else in `0..vocab`) given x
/// `[T, C]` and the head's weight `[vocab, C]`, f32 or bf16 alike.
///
/// A constant weight or x costs no product in the backward pass.
pub fn token_log_probs(
    tape: &mut Tape,
    x: &Var,
    weight: &Var,
    targets: &Tensor,
) -> Result<TokenLogProbs> {
    let [tokens, _, vocab] = check::head(OP, x, weight)?;
    let list = check::targets(OP, targets, tokens, vocab)?;
    let inputs = [x, weight];
    let places = [("x", x.value()), ("the weight", weight.value()), ("targets", targets)];
    let found = match check::device(OP, &places)? {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x.value(), weight.value(), list))?,
        Device::Cuda(gpu) => {
            cuda::token_log_probs::forward(&gpu, x.value(), weight.value(), targets, list)?
        }
    };
    let call = Call {
        x: x.value().clone(),
        weight: weight.value().clone(),
        targets: targets.clone(),
        highest: found.highest,
        best: found.best.clone(),
        to_x: x.source(),
        to_weight: Weight::of(OP, weight),
    };
    let log_probs = tape.record(found.log_probs, &inputs, move |grad, walk| {
        let dtype = call.x.dtype();
        match grad.device() {
            Device::Cpu => float_dispatch!(OP, dtype, backward(&call, &grad, walk)),
            Device::Cuda(gpu) => cuda::token_log_probs::backward(&gpu, &call, &grad, walk),
        }
    })?;
    Ok(TokenLogProbs { log_probs, best: found.best, entropy: found.entropy, hits: found.hits })
}

/// Results of the forward pass, f32 `[T]` each.
pub(crate) struct Found {
    pub(crate) log_probs: Tensor,
    pub(crate) best: Tensor,
    pub(crate) entropy: Tensor,
    pub(crate) hits: Tensor,
    /// The row's highest logit.
    pub(crate) highest: Tensor,
}

/// What the backward pass needs of one call.
pub(crate) struct Call {
    pub(crate) x: Tensor,
    pub(crate) weight: Tensor,
    pub(crate) targets: Tensor,
    pub(crate) highest: Tensor,
    pub(crate) best: Tensor,
    pub(crate) to_x: Source,
    pub(crate) to_weight: Weight,
}

impl Call {
    /// The targets of which a gradient asks something: [`IGNORED`] wherever g is 0.
    pub(crate) fn asked(&self, grad: &[f32]) -> Result<Vec<i32>> {
        let list = self.targets.view_i32(OP, "targets")?;
        Ok(list.iter().zip(grad).map(|(&t, &g)| if g == 0.0 { IGNORED } else { t }).collect())
    }
}

/// One token's numbers; see [`Found`].
#[derive(Clone, Copy, Default)]
struct Row {
    log_prob: f32,
    best: f32,
    entropy: f32,
    hit: f32,
    highest: f32,
}

fn forward<E: Float>(x: &Tensor, weight: &Tensor, targets: &[i32]) -> Result<Found> {
    let [tokens, width] = [x.shape()[0], x.shape()[1]];
    let vocab = weight.shape()[0];
    let xs: &[E] = x.view(OP, "x")?;
    let wide = E::widen(weight.view(OP, "the weight")?);
    let rows = chunk_rows(vocab);
    let mut found = vec![Row::default(); tokens];
    let mut logits = Buffer::<f32>::stale(rows.min(tokens) * vocab);
    for (i, (targets, found)) in targets.chunks(rows).zip(found.chunks_mut(rows)).enumerate() {
        if targets.iter().all(|&t| t == IGNORED) {
            continue;
        }
        let count = targets.len();
        let x = E::widen(&xs[i * rows * width..][..count * width]);
        let z = &mut logits[..count * vocab];
        project(z, &x, &wide, [count, vocab, width], false);
        let per = parallel::rows_per_chunk(vocab);
        z.par_chunks_mut(per * vocab)
            .zip(found.par_chunks_mut(per))
            .zip(targets.par_chunks(per))
            .for_each(|((z, found), targets)| read_rows(z, found, targets));
    }
    let column = |f: fn(&Row) -> f32| Tensor::from_f32(found.iter().map(f).collect(), &[tokens]);
    Ok(Found {
        log_probs: column(|row| row.log_prob)?,
        best: column(|row| row.best)?,
        entropy: column(|row| row.entropy)?,
        hits: column(|row| row.hit)?,
        highest: column(|row| row.highest)?,
    })
}

multiversion! {
    /// Fills each row's numbers; the logits become `z − h`.
    fn read_rows(z: &mut [f32], found: &mut [Row], targets: &[i32]) {
        let vocab = z.len() / targets.len();
        for ((z, row), &target) in z.chunks_exact_mut(vocab).zip(found).zip(targets) {
            if target == IGNORED {
                continue;
            }
            let target = target as usize;
            let highest = math::max(z);
            let hit = z[target] == highest && !z[..target].contains(&highest);
            for z in z.iter_mut() {
                *z -= highest;
            }
            let sum = math::sum(z, math::exp);
            let moment = math::sum(z, |d| math::exp(d) * d);
            let best = -libm::logf(sum);
            *row = Row {
                log_prob: z[target] + best,
                best,
                entropy: -best - moment / sum,
                hit: f32::from(hit),
                highest,
            };
        }
    }
}

fn backward<E: Float>(call: &Call, grad: &Tensor, walk: &mut Backward) -> Result<()> {
    let slopes = grad.as_f32()?;
    let asked = call.asked(slopes)?;
    let mut d_x = match call.to_x {
        Source::Constant => None,
        _ => Some(Buffer::<E>::stale(call.x.len())),
    };
    if call.to_weight.wants_grad() {
        walk.accumulate_f32(&call.to_weight, |sum, add| {
            run_back(call, slopes, &asked, d_x.as_deref_mut(), Some((sum, add)))
        })?;
    } else {
        run_back(call, slopes, &asked, d_x.as_deref_mut(), None)?;
    }
    match d_x {
        Some(d_x) => walk.give(call.to_x, Tensor::from_buffer(d_x, call.x.shape())),
        None => Ok(()),
    }
}

/// Writes dx, and dW on top of what is there when its flag says so; `asked` as by
/// [`Call::asked`].
fn run_back<E: Float>(
    call: &Call,
    slopes: &[f32],
    asked: &[i32],
    mut d_x: Option<&mut [E]>,
    mut d_weight: Option<(&mut [f32], bool)>,
) -> Result<()> {
    let [tokens, width] = [call.x.shape()[0], call.x.shape()[1]];
    let vocab = call.weight.shape()[0];
    let xs: &[E] = call.x.view(OP, "x")?;
    let wide = E::widen(call.weight.view(OP, "the weight")?);
    let (highest, best) = (call.highest.as_f32()?, call.best.as_f32()?);
    let rows = chunk_rows(vocab);
    let mut logits = Buffer::<f32>::stale(rows.min(tokens) * vocab);
    for (i, asked) in asked.chunks(rows).enumerate() {
        let (first, count) = (i * rows, asked.len());
        let at = first * width..(first + count) * width;
        if asked.iter().all(|&t| t == IGNORED) {
            if let Some(d_x) = &mut d_x {
                d_x[at].fill(E::default());
            }
            continue;
        }
        let x = E::widen(&xs[at.clone()]);
        let z = &mut logits[..count * vocab];
        project(z, &x, &wide, [count, vocab, width], false);
        let per = parallel::rows_per_chunk(vocab);
        z.par_chunks_mut(per * vocab).zip(asked.par_chunks(per)).enumerate().for_each(
            |(piece, (z, asked))| {
                let from = first + piece * per;
                turn_rows(z, asked, &slopes[from..], &highest[from..], &best[from..]);
            },
        );
        let dz = Mat::new(z, count, vocab);
        if let Some((sum, add)) = &mut d_weight {
            matmul(sum, dz.t(), Mat::new(&x, count, width), *add);
            *add = true;
        }
        if let Some(d_x) = &mut d_x {
            E::write(&mut d_x[at], false, |d_x| {
                matmul(d_x, dz, Mat::new(&wide, vocab, width), false);
            });
        }
    }
    if let Some((sum, false)) = d_weight {
        sum.fill(0.0);
    }
    Ok(())
}

multiversion! {
    /// Turns logits into `g·(onehot − softmax)`, zeros where nothing is asked.
    fn turn_rows(z: &mut [f32], asked: &[i32], slopes: &[f32], highest: &[f32], best: &[f32]) {
        let vocab = z.len() / asked.len();
        for (i, (z, &target)) in z.chunks_exact_mut(vocab).zip(asked).enumerate() {
            if target == IGNORED {
                z.fill(0.0);
                continue;
            }
            let (g, highest, best) = (slopes[i], highest[i], best[i]);
            for z in z.iter_mut() {
                *z = -g * math::exp((*z - highest) + best);
            }
            z[target as usize] += g;
        }
    }
}
