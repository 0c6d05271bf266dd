//! Contiguous storage with a shape.

use std::fmt;
use std::sync::Arc;

use half::bf16;
use tercet_attention::Element;

use crate::cuda::OnCuda;
use crate::dtype::Float;
use crate::pool::Buffer;
use crate::{DType, Device, Error, Result, parallel};

/// The numbers of a tensor.
pub(crate) enum Storage {
    F32(Buffer<f32>),
    BF16(Buffer<bf16>),
    I32(Buffer<i32>),
    Cuda(OnCuda),
}

impl Storage {
    /// A copy in the same memory.
    fn copy(&self) -> Result<Storage> {
        Ok(match self {
            Storage::F32(x) => Storage::F32(x.clone()),
            Storage::BF16(x) => Storage::BF16(x.clone()),
            Storage::I32(x) => Storage::I32(x.clone()),
            Storage::Cuda(x) => Storage::Cuda(x.copy()?),
        })
    }
}

/// A contiguous, row-major tensor. Clones share storage; storage that is shared is never
/// written. A scalar has the empty shape `[]`.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    shape: Vec<usize>,
}

impl Tensor {
    /// Zeros of `shape`.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        let storage = match dtype {
            DType::F32 => Storage::F32(Buffer::zeroed(len)),
            DType::BF16 => Storage::BF16(Buffer::zeroed(len)),
            DType::I32 => Storage::I32(Buffer::zeroed(len)),
        };
        Tensor { storage: Arc::new(storage), shape: shape.to_vec() }
    }

    /// Unspecified numbers, to be overwritten wholly.
    pub(crate) fn stale(dtype: DType, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        let storage = match dtype {
            DType::F32 => Storage::F32(Buffer::stale(len)),
            DType::BF16 => Storage::BF16(Buffer::stale(len)),
            DType::I32 => Storage::I32(Buffer::stale(len)),
        };
        Tensor { storage: Arc::new(storage), shape: shape.to_vec() }
    }

    /// Takes over `values`, whose length must be the product of `shape`.
    pub fn from_f32(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        let len = values.len();
        Self::sized(Storage::F32(Buffer::adopt(values)), len, shape)
    }

    /// See [`Tensor::from_f32`].
    pub fn from_bf16(values: Vec<bf16>, shape: &[usize]) -> Result<Tensor> {
        let len = values.len();
        Self::sized(Storage::BF16(Buffer::adopt(values)), len, shape)
    }

    /// See [`Tensor::from_f32`].
    pub fn from_i32(values: Vec<i32>, shape: &[usize]) -> Result<Tensor> {
        let len = values.len();
        Self::sized(Storage::I32(Buffer::adopt(values)), len, shape)
    }

    /// One f32 of shape `[]`.
    pub fn scalar(value: f32) -> Tensor {
        Self::from_buffer(Buffer::adopt(vec![value]), &[])
    }

    pub(crate) fn from_storage(storage: Storage, shape: &[usize]) -> Tensor {
        Tensor { storage: Arc::new(storage), shape: shape.to_vec() }
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The storage, to be changed; copies first when it is shared.
    pub(crate) fn storage_mut(&mut self) -> Result<&mut Storage> {
        if Arc::get_mut(&mut self.storage).is_none() {
            self.storage = Arc::new(self.storage.copy()?);
        }
        Arc::get_mut(&mut self.storage).ok_or(Error::Tape("storage is still shared"))
    }

    fn sized(storage: Storage, len: usize, shape: &[usize]) -> Result<Tensor> {
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(len) {
            return Err(Error::shape("tensor", "the new tensor", format!("{len} elements"), shape));
        }
        Ok(Tensor { storage: Arc::new(storage), shape: shape.to_vec() })
    }

    /// Wraps an op's output; the caller has sized the buffer.
    pub(crate) fn from_buffer<E: Float>(buffer: Buffer<E>, shape: &[usize]) -> Tensor {
        debug_assert_eq!(buffer.len(), shape.iter().product::<usize>());
        Tensor { storage: Arc::new(E::storage(buffer)), shape: shape.to_vec() }
    }

    /// How the numbers are stored.
    pub fn dtype(&self) -> DType {
        match &*self.storage {
            Storage::F32(_) => DType::F32,
            Storage::BF16(_) => DType::BF16,
            Storage::I32(_) => DType::I32,
            Storage::Cuda(x) => x.dtype(),
        }
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the storage lives.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Cuda(x) => Device::Cuda(x.gpu().clone()),
            _ => Device::Cpu,
        }
    }

    /// The same storage under another shape of as many elements.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(self.len()) {
            let expected = format!("the {} elements of {shape:?}", shape.iter().product::<usize>());
            return Err(Error::shape("reshape", "the tensor", expected, &self.shape));
        }
        Ok(Tensor { storage: self.storage.clone(), shape: shape.to_vec() })
    }

    /// The same numbers in another storage type (bf16 rounds to nearest even). Shares storage
    /// when nothing changes; integers do not convert.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        match (&*self.storage, dtype) {
            (Storage::F32(x), DType::BF16) => {
                Ok(Self::from_buffer(convert::<_, bf16>(x), &self.shape))
            }
            (Storage::BF16(x), DType::F32) => {
                Ok(Self::from_buffer(convert::<_, f32>(x), &self.shape))
            }
            _ if self.dtype() == dtype => Ok(self.clone()),
            (Storage::Cuda(x), DType::F32 | DType::BF16) if x.dtype() != DType::I32 => {
                crate::cuda::convert(self, dtype)
            }
            _ => {
                let (expected, got) = ("f32 or bf16 on both sides", self.dtype());
                Err(Error::DType { op: "to_dtype", what: "the tensor", expected, got })
            }
        }
    }

    /// The numbers of an f32 tensor.
    pub fn as_f32(&self) -> Result<&[f32]> {
        self.view("as_f32", "the tensor")
    }

    /// The numbers of a bf16 tensor.
    pub fn as_bf16(&self) -> Result<&[bf16]> {
        self.view("as_bf16", "the tensor")
    }

    /// The numbers of an i32 tensor.
    pub fn as_i32(&self) -> Result<&[i32]> {
        self.view_i32("as_i32", "the tensor")
    }

    /// The numbers of an f32 tensor, to be changed; copies first when the storage is shared.
    pub fn as_f32_mut(&mut self) -> Result<&mut [f32]> {
        self.view_mut("as_f32_mut", "the tensor")
    }

    /// See [`Tensor::as_f32_mut`].
    pub fn as_bf16_mut(&mut self) -> Result<&mut [bf16]> {
        self.view_mut("as_bf16_mut", "the tensor")
    }

    /// A copy as f32 of an f32 or bf16 tensor, wherever it lives.
    pub fn to_vec_f32(&self) -> Result<Vec<f32>> {
        match &*self.storage {
            Storage::F32(x) => Ok(x.to_vec()),
            Storage::BF16(x) => Ok(x.iter().map(|v| Element::to_f32(*v)).collect()),
            Storage::I32(_) => {
                let (expected, got) = ("f32 or bf16", DType::I32);
                Err(Error::DType { op: "to_vec_f32", what: "the tensor", expected, got })
            }
            Storage::Cuda(_) => self.to_device(&Device::Cpu)?.to_vec_f32(),
        }
    }

    /// The value of a tensor with one element, wherever it lives.
    pub fn item(&self) -> Result<f32> {
        match (&*self.storage, self.len()) {
            (Storage::F32(x), 1) => Ok(x[0]),
            (Storage::BF16(x), 1) => Ok(Element::to_f32(x[0])),
            (Storage::I32(x), 1) => Ok(x[0] as f32),
            (Storage::Cuda(_), 1) => self.to_device(&Device::Cpu)?.item(),
            _ => Err(Error::shape("item", "the tensor", "one element", &self.shape)),
        }
    }

    /// The numbers as `E`, or an error in the name of `op`.
    pub(crate) fn view<E: Float>(&self, op: &'static str, what: &'static str) -> Result<&[E]> {
        E::of(&self.storage).ok_or_else(|| self.refused(op, what, E::DTYPE))
    }

    /// See [`Tensor::view`]; copies first when the storage is shared.
    pub(crate) fn view_mut<E: Float>(
        &mut self,
        op: &'static str,
        what: &'static str,
    ) -> Result<&mut [E]> {
        if E::of(&self.storage).is_none() {
            return Err(self.refused(op, what, E::DTYPE));
        }
        let (expected, got) = (E::DTYPE.name(), self.dtype());
        E::of_mut(self.storage_mut()?).ok_or(Error::DType { op, what, expected, got })
    }

    /// See [`Tensor::view`]. Integers that were moved to a device left their numbers here, too.
    pub(crate) fn view_i32(&self, op: &'static str, what: &'static str) -> Result<&[i32]> {
        match &*self.storage {
            Storage::I32(x) => Ok(x),
            Storage::Cuda(x) => x.host_i32().ok_or_else(|| self.refused(op, what, DType::I32)),
            _ => Err(self.refused(op, what, DType::I32)),
        }
    }

    /// Why the numbers cannot be seen as `expected` by the CPU.
    fn refused(&self, op: &'static str, what: &'static str, expected: DType) -> Error {
        let got = self.dtype();
        if got == expected {
            return Error::device(op, what, &Device::Cpu, &self.device());
        }
        Error::DType { op, what, expected: expected.name(), got }
    }

    /// Whether nobody else shares the storage: writing then costs no copy.
    pub(crate) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }
}

/// Converts in parallel.
pub(crate) fn convert<A: Float, B: Float>(x: &[A]) -> Buffer<B> {
    let mut out = Buffer::stale(x.len());
    parallel::map(&mut out, x, |out: &mut [B], x: &[A]| convert_slice(out, x));
    out
}

crate::simd::multiversion! {
    /// `out = x`, rounded.
    pub(crate) fn convert_slice<A: Float, B: Float>(out: &mut [B], x: &[A]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = B::from_f32(x.to_f32());
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Tensor({}, {:?})", self.dtype(), self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_to_shared_storage_does_not_reach_the_other_owner() {
        let a = Tensor::from_f32(vec![1.0, 2.0], &[2]).unwrap();
        let mut b = a.clone();
        b.as_f32_mut().unwrap()[0] = 9.0;
        assert_eq!(a.as_f32().unwrap(), [1.0, 2.0]);
        assert_eq!(b.as_f32().unwrap(), [9.0, 2.0]);
    }

    #[test]
    fn wrong_lengths_and_types_are_named() {
        let text = Tensor::from_f32(vec![0.0; 5], &[2, 3]).unwrap_err().to_string();
        assert_eq!(text, "tensor: the new tensor has shape [2, 3], expected 5 elements");
        let huge = Tensor::from_f32(vec![], &[usize::MAX, 2]);
        assert!(huge.is_err(), "an overflowing shape must not wrap to a small product");
        let t = Tensor::zeros(DType::I32, &[2]);
        assert_eq!(t.as_f32().unwrap_err().to_string(), "as_f32: the tensor is i32, expected f32");
        assert!(t.to_dtype(DType::F32).is_err());
        assert!(t.reshape(&[3]).is_err());
    }

    #[test]
    fn bf16_round_trip_keeps_bf16_values() {
        let x: Vec<f32> = (0..3000).map(|i| (i as f32 - 1500.0) / 8.0).collect();
        let t = Tensor::from_f32(x, &[3, 1000]).unwrap().to_dtype(DType::BF16).unwrap();
        let back = t.to_dtype(DType::F32).unwrap().to_dtype(DType::BF16).unwrap();
        assert_eq!(t.as_bf16().unwrap(), back.as_bf16().unwrap());
    }
}
