//! Device memory of a tensor, and the ways between it and main memory.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use tercet_cuda::{Buffer, Gpu, Label, Number, Pinned};

use crate::pool;
use crate::tensor::Storage;
use crate::{DType, Device, Result, Tensor};

/// The numbers of a tensor on a device.
pub(crate) struct OnCuda {
    dtype: DType,
    len: usize,
    buffer: Buffer,
    /// The same numbers in main memory: integers are few, and checked and counted there.
    host: Option<pool::Buffer<i32>>,
}

impl OnCuda {
    pub(super) fn stale(gpu: &Gpu, dtype: DType, shape: &[usize]) -> Result<Self> {
        let len = shape.iter().product();
        let buffer = gpu.alloc_for(len * dtype.bytes(), Label::shaped(dtype.name(), shape))?;
        Ok(OnCuda { dtype, len, buffer, host: None })
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        self.buffer.gpu()
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.buffer.ptr()
    }

    pub(crate) fn host_i32(&self) -> Option<&[i32]> {
        self.host.as_deref()
    }

    /// A copy on the same device.
    pub(crate) fn copy(&self) -> Result<Self> {
        let to = Self::stale(self.gpu(), self.dtype, &[self.len])?;
        // SAFETY: both buffers hold as many bytes, and the new one overlaps nothing.
        unsafe { self.gpu().copy(to.ptr(), self.ptr(), self.buffer.bytes())? };
        Ok(OnCuda { host: self.host.clone(), ..to })
    }

    fn download(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(match self.dtype {
            DType::F32 => {
                let mut host = pool::Buffer::<f32>::stale(self.len);
                self.buffer.download(&mut host[..])?;
                Tensor::from_buffer(host, shape)
            }
            DType::BF16 => {
                let mut host = pool::Buffer::<bf16>::stale(self.len);
                self.buffer.download(bits_mut(&mut host))?;
                Tensor::from_buffer(host, shape)
            }
            DType::I32 => {
                let mut host = pool::Buffer::<i32>::stale(self.len);
                self.buffer.download(&mut host[..])?;
                Tensor::from_storage(Storage::I32(host), shape)
            }
        })
    }
}

fn bits(x: &[bf16]) -> &[u16] {
    x.reinterpret_cast()
}

fn bits_mut(x: &mut [bf16]) -> &mut [u16] {
    x.reinterpret_cast_mut()
}

impl Tensor {
    /// The same numbers on another device; shares storage when they are there already. Waits
    /// when the way leads to main memory. Integers on a device are also kept where they were.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        let Device::Cuda(gpu) = device else {
            return match self.storage() {
                Storage::Cuda(x) => x.download(self.shape()),
                _ => Ok(self.clone()),
            };
        };
        let mut to = OnCuda::stale(gpu, self.dtype(), self.shape())?;
        match self.storage() {
            Storage::F32(x) => to.buffer.write(0, &x[..])?,
            Storage::BF16(x) => to.buffer.write(0, bits(x))?,
            Storage::I32(x) => {
                to.buffer.write(0, &x[..])?;
                to.host = Some(x.clone());
            }
            Storage::Cuda(x) if x.gpu().same(gpu) => return Ok(self.clone()),
            Storage::Cuda(x) => return x.download(self.shape())?.to_device(device),
        }
        Ok(Tensor::from_storage(Storage::Cuda(to), self.shape()))
    }

    /// Zeros of `shape` on a device.
    pub fn zeros_on(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let Device::Cuda(gpu) = device else { return Ok(Tensor::zeros(dtype, shape)) };
        let zeros = OnCuda::stale(gpu, dtype, shape)?;
        zeros.buffer.fill(0)?;
        Ok(Tensor::from_storage(Storage::Cuda(zeros), shape))
    }

    /// Unspecified numbers on a device, to be overwritten wholly.
    pub(crate) fn stale_on(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        match device {
            Device::Cpu => Ok(Tensor::stale(dtype, shape)),
            Device::Cuda(gpu) => super::stale(gpu, dtype, shape),
        }
    }

    /// One f32 of shape `[]` on a device; can be part of a captured graph.
    pub(crate) fn scalar_on(device: &Device, value: f32) -> Result<Tensor> {
        let Device::Cuda(gpu) = device else { return Ok(Tensor::scalar(value)) };
        let scalar = OnCuda::stale(gpu, DType::F32, &[])?;
        scalar.buffer.fill_words(value.to_bits())?;
        Ok(Tensor::from_storage(Storage::Cuda(scalar), &[]))
    }

    /// The device and the address of the numbers there, for kernels of other crates; `None` on
    /// the CPU. The address is valid as long as the tensor or a clone lives.
    pub fn on_cuda(&self) -> Option<(&Gpu, u64)> {
        match self.storage() {
            Storage::Cuda(x) => Some((x.gpu(), x.ptr())),
            _ => None,
        }
    }

    /// Reads the first `count` numbers of an f32 tensor on a device through page-locked memory,
    /// which is several times as fast as [`Tensor::to_vec_f32`].
    pub fn read_first<'p>(&self, count: usize, through: &'p mut Pinned) -> Result<&'p [f32]> {
        match self.storage() {
            Storage::Cuda(x) if x.dtype == DType::F32 => Ok(through.read(&x.buffer, count)?),
            _ => Err(super::off_device()),
        }
    }

    /// Overwrites a tensor on a device with the numbers of `from`, a tensor of the same shape and
    /// type in main memory, in place: its address stays, so a captured graph reads the new
    /// numbers. Everybody who shares the storage sees them. Integers must have been made by
    /// [`Tensor::zeros_on`]: those that keep host numbers do not change.
    pub fn overwrite(&self, from: &Tensor) -> Result<()> {
        if self.shape() != from.shape() {
            let expected = format!("{:?}", self.shape());
            return Err(crate::Error::shape("overwrite", "the source", expected, from.shape()));
        }
        let Storage::Cuda(to) = self.storage() else {
            return Err(super::off_device());
        };
        match to.dtype {
            DType::F32 => to.buffer.write(0, from.view::<f32>("overwrite", "the source")?)?,
            DType::BF16 => to.buffer.write(0, bits(from.view("overwrite", "the source")?))?,
            DType::I32 if to.host.is_some() => {
                let text = "integers that were moved to a device do not change";
                return Err(crate::Error::value("overwrite", text));
            }
            DType::I32 => to.buffer.write(0, from.view_i32("overwrite", "the source")?)?,
        }
        Ok(())
    }
}

/// Storage types as the matrix products name them.
pub(crate) fn number(dtype: DType) -> Number {
    match dtype {
        DType::BF16 => Number::BF16,
        _ => Number::F32,
    }
}
