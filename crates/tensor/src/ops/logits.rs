//! `z = x·Wᵀ` in f32 whatever the storage type: logits that are drawn from or compared. At their size
//! bf16 would round them by a sixteenth or more, and a token's probability with them.

use super::check;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::project::project;
use crate::{Device, Error, Result, Tensor, cuda};

const OP: &str = "logits";

/// x `[T, I]` and weight `[O, I]` of one storage type to f32 `[T, O]`. Never recorded: training goes
/// through [`super::linear_cross_entropy`] and [`super::token_log_probs`].
pub fn logits(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let [rows, inner] = check::dims(OP, "x", x, "[T, I]")?;
    let [outer, weight_inner] = check::dims(OP, "the weight", weight, "[O, I]")?;
    if weight_inner != inner {
        let expected = format!("[O, {inner}] to fit x of shape {:?}", x.shape());
        return Err(Error::shape(OP, "the weight", expected, weight.shape()));
    }
    if x.dtype() != weight.dtype() {
        let (expected, got) = ("that of x", weight.dtype());
        return Err(Error::DType { op: OP, what: "the weight", expected, got });
    }
    let sizes = [rows, outer, inner];
    match check::device(OP, &[("x", x), ("the weight", weight)])? {
        Device::Cpu => float_dispatch!(OP, x.dtype(), forward(x, weight, sizes)),
        Device::Cuda(gpu) => cuda::linear::wide(&gpu, x, weight, sizes),
    }
}

fn forward<E: Float>(x: &Tensor, weight: &Tensor, sizes: [usize; 3]) -> Result<Tensor> {
    let [rows, outer, _] = sizes;
    let wide = E::widen(x.view(OP, "x")?);
    let weight: &[E] = weight.view(OP, "the weight")?;
    let mut out = Buffer::<f32>::stale(rows * outer);
    project(&mut out, &wide, weight, sizes, false);
    Ok(Tensor::from_buffer(out, &[rows, outer]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Tape, ops};

    #[test]
    fn bf16_inputs_give_what_their_f32_copies_give() {
        let numbers = |count: usize, seed: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * 37 + seed) % 101) as f32 / 50.0 - 1.0).collect()
        };
        let x = Tensor::from_f32(numbers(5 * 24, 1), &[5, 24]).unwrap();
        let weight = Tensor::from_f32(numbers(70 * 24, 2), &[70, 24]).unwrap();
        let narrow = [&x, &weight].map(|t| t.to_dtype(DType::BF16).unwrap());
        let copies = narrow.each_ref().map(|t| t.to_dtype(DType::F32).unwrap());
        let tape = &mut Tape::inference();
        let [a, b] = copies.each_ref().map(|t| tape.leaf(t.clone()));
        let want = ops::linear(tape, &a, &b, None).unwrap().value().to_vec_f32().unwrap();
        let got = logits(&narrow[0], &narrow[1]).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        for (got, want) in got.to_vec_f32().unwrap().iter().zip(&want) {
            // Sums of 24 products of numbers up to 1, in whatever order.
            assert!((got - want).abs() < 24.0 * 24.0 * f32::EPSILON, "{got} {want}");
        }
        assert!(logits(&x, &narrow[1]).is_err());
    }
}
