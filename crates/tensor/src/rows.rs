//! Rows of the outermost dimension, copied out of a tensor or put after those of another.

use std::ops::Range;

use crate::dtype::Float;
use crate::pool::Buffer;
use crate::tensor::Storage;
use crate::{DType, Device, Error, Result, Tensor, cuda};

const OP: &str = "rows";

impl Tensor {
    /// A copy of rows `range` of the outermost dimension, where the tensor lives.
    pub fn rows(&self, range: Range<usize>) -> Result<Tensor> {
        let Some((&count, inner)) = self.shape().split_first() else {
            return Err(Error::shape(OP, "the tensor", "at least one dimension", self.shape()));
        };
        if range.start > range.end || range.end > count {
            let expected = format!("at least {} rows", range.end);
            return Err(Error::shape(OP, "the tensor", expected, self.shape()));
        }
        let width: usize = inner.iter().product();
        let shape: Vec<usize> = std::iter::once(range.len()).chain(inner.iter().copied()).collect();
        let elements = range.start * width..range.end * width;
        match self.storage() {
            Storage::F32(x) => Ok(copy(&x[elements], &shape)),
            Storage::BF16(x) => Ok(copy(&x[elements], &shape)),
            Storage::I32(x) => Tensor::from_i32(x[elements].to_vec(), &shape),
            Storage::Cuda(x) => cuda::rows(x.gpu(), self, elements, &shape),
        }
    }

    /// The rows of this tensor and after them those of `other`, which has rows of the same shape,
    /// the same storage type and the same device. f32 or bf16.
    pub fn append_rows(&self, other: &Tensor) -> Result<Tensor> {
        let (Some((&a, inner)), Some((&b, inner_b))) =
            (self.shape().split_first(), other.shape().split_first())
        else {
            return Err(Error::shape(OP, "a tensor", "at least one dimension", self.shape()));
        };
        if inner != inner_b {
            return Err(Error::shape(OP, "the rows", format!("{inner:?}"), inner_b));
        }
        if self.device() != other.device() {
            return Err(Error::device(OP, "the rows", &self.device(), &other.device()));
        }
        let shape: Vec<usize> = std::iter::once(a + b).chain(inner.iter().copied()).collect();
        match (self.device(), self.dtype()) {
            (Device::Cuda(gpu), _) => cuda::append_rows(&gpu, self, other, &shape),
            (Device::Cpu, DType::F32) => append::<f32>(self, other, &shape),
            (Device::Cpu, DType::BF16) => append::<half::bf16>(self, other, &shape),
            (Device::Cpu, got) => {
                Err(Error::DType { op: OP, what: "the tensor", expected: "f32 or bf16", got })
            }
        }
    }
}

fn copy<E: Float>(x: &[E], shape: &[usize]) -> Tensor {
    Tensor::from_buffer(Buffer::copy_of(x), shape)
}

fn append<E: Float>(a: &Tensor, b: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (a, b) = (a.view::<E>(OP, "the tensor")?, b.view::<E>(OP, "the rows")?);
    let mut all = Buffer::<E>::stale(a.len() + b.len());
    all[..a.len()].copy_from_slice(a);
    all[a.len()..].copy_from_slice(b);
    Ok(Tensor::from_buffer(all, shape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_copied_and_put_together_again() {
        let all = Tensor::from_f32((0..12).map(|x| x as f32).collect(), &[3, 2, 2]).unwrap();
        let (first, rest) = (all.rows(0..1).unwrap(), all.rows(1..3).unwrap());
        assert_eq!((first.shape(), rest.shape()), (&[1, 2, 2][..], &[2, 2, 2][..]));
        assert_eq!(rest.as_f32().unwrap()[0], 4.0);
        let again = first.append_rows(&rest).unwrap();
        assert_eq!(again.as_f32().unwrap(), all.as_f32().unwrap());
        assert!(all.rows(2..4).is_err() && Tensor::scalar(1.0).rows(0..0).is_err());
        assert!(first.append_rows(&Tensor::zeros(DType::F32, &[1, 4])).is_err());
        let halves = all.to_dtype(DType::BF16).unwrap();
        assert!(first.append_rows(&halves).is_err(), "storage types must be the same");
    }
}
