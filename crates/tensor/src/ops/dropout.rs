//! Inverted dropout: `y = x·m/(1 − p)` with independent `m`, 0 with probability p, else 1 (Srivastava
//! et al., JMLR 15, 2014; scaled here rather than where nothing is dropped).
//!
//! Backward: `dx = dy·m/(1 − p)`, in place. Keeps nothing: whether element i stays is a pure
//! function of the seed and i, so the walk back finds the same mask, as does a recomputed layer, a
//! device, and any number of threads. The function is SplitMix64 (Steele, Lea and Flood, OOPSLA
//! 2014) started at a mixed seed, its output number i.

use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda, parallel};

const OP: &str = "dropout";

/// The odd number nearest 2⁶⁴ over the golden ratio: the step of SplitMix64.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Which elements are dropped, and what the others are multiplied by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    /// Where the counter starts.
    pub start: u64,
    /// Elements whose 32 hashed bits are below this are dropped.
    pub dropped_below: u32,
    /// `1/(1 − p)`.
    pub factor: f32,
}

/// Drops every element with probability `rate` (from 0, below 1) and scales the others by
/// `1/(1 − rate)`. The same seed drops the same places of a tensor of any shape.
pub fn dropout(tape: &mut Tape, x: &Var, rate: f64, seed: u64) -> Result<Var> {
    if !(0.0..1.0).contains(&rate) {
        let text = format!("the rate is {rate}, expected a number from 0 that is below 1");
        return Err(Error::value(OP, text));
    }
    if rate == 0.0 {
        return Ok(x.clone());
    }
    let dropped_below = (rate * (1u64 << 32) as f64) as u32;
    let mask = Mask { start: mix(seed), dropped_below, factor: (1.0 / (1.0 - rate)) as f32 };
    let value = match x.value().device() {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x.value(), mask))?,
        Device::Cuda(gpu) => cuda::dropout::forward(&gpu, x.value(), mask)?,
    };
    let (to_x, dtype) = (x.source(), x.dtype());
    tape.record(value, &[x], move |mut grad, walk| {
        match grad.device() {
            Device::Cpu => float_dispatch!(OP, dtype, backward(&mut grad, mask))?,
            Device::Cuda(gpu) => cuda::dropout::in_place(&gpu, &mut grad, mask)?,
        }
        walk.give(to_x, grad)
    })
}

fn forward<E: Float>(x: &Tensor, mask: Mask) -> Result<Tensor> {
    let from: &[E] = x.view(OP, "x")?;
    let mut out = Buffer::<E>::stale(x.len());
    parallel::rows(&mut out, 1, |first, out| {
        out.copy_from_slice(&from[first..first + out.len()]);
        drop_some(out, first as u64, mask);
    });
    Ok(Tensor::from_buffer(out, x.shape()))
}

fn backward<E: Float>(grad: &mut Tensor, mask: Mask) -> Result<()> {
    let grad = grad.view_mut::<E>(OP, "the gradient")?;
    parallel::rows(grad, 1, |first, grad| drop_some(grad, first as u64, mask));
    Ok(())
}

/// The finalizer of SplitMix64.
#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

multiversion! {
    /// Elements from number `first` on.
    fn drop_some<E: Float>(x: &mut [E], first: u64, mask: Mask) {
        for (i, x) in x.iter_mut().enumerate() {
            let number = (first + i as u64 + 1).wrapping_mul(STEP);
            let bits = (mix(mask.start.wrapping_add(number)) >> 32) as u32;
            let kept = x.to_f32() * mask.factor;
            *x = E::from_f32(if bits < mask.dropped_below { 0.0 } else { kept });
        }
    }
}
