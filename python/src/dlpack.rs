//! Reading DLPack capsules: tensors of any framework, borrowed in place.
//!
//! The producer's capsule owns the memory and keeps its destructor. It is looked at, never
//! consumed, so a tensor lives for as long as the capsule is referenced, which is the call's length.

use std::ffi::{CStr, c_void};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

/// `DLDevice` of dlpack.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawDevice {
    kind: i32,
    ordinal: i32,
}

/// `DLDataType` of dlpack.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor` of dlpack.h.
#[repr(C)]
struct RawTensor {
    data: *mut c_void,
    device: RawDevice,
    dims: i32,
    dtype: RawType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// The head of `DLManagedTensorVersioned` of dlpack.h 1.x.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: *const c_void,
    flags: u64,
    tensor: RawTensor,
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
const READ_ONLY: u64 = 1;

/// `DLManagedTensor` begins with its tensor.
const PLAIN: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";

/// Numbers that the operator knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float; saved sums of exponentials only.
    F64,
    /// 16-bit brain float.
    Bf16,
    /// 16-bit float.
    F16,
    /// 32-bit integer.
    I32,
}

impl DType {
    fn of(raw: RawType) -> Option<Self> {
        // Codes of dlpack.h: 0 signed integer, 2 float, 4 bfloat.
        match (raw.code, raw.bits, raw.lanes) {
            (2, 32, 1) => Some(Self::F32),
            (2, 64, 1) => Some(Self::F64),
            (2, 16, 1) => Some(Self::F16),
            (4, 16, 1) => Some(Self::Bf16),
            (0, 32, 1) => Some(Self::I32),
            _ => None,
        }
    }

    /// The name that PyTorch uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::I32 => "int32",
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Where a tensor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Ordinary memory.
    Cpu,
    /// A CUDA device's memory.
    Cuda(usize),
}

impl Device {
    fn of(raw: RawDevice) -> Option<Self> {
        // Codes of dlpack.h: 1 CPU, 2 CUDA, 3 CUDA-pinned CPU memory.
        match raw.kind {
            1 | 3 => Some(Self::Cpu),
            2 => usize::try_from(raw.ordinal).ok().map(Self::Cuda),
            _ => None,
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A contiguous tensor of a known type, borrowed from a capsule.
pub struct Tensor<'py> {
    name: &'static str,
    dtype: DType,
    device: Device,
    shape: Vec<usize>,
    address: usize,
    writable: bool,
    /// Keeps the memory alive.
    _capsule: Bound<'py, PyCapsule>,
}

/// A `ValueError` that starts with the argument's name.
pub fn refuse(name: &str, what: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("{name}: {what}"))
}

impl<'py> Tensor<'py> {
    /// Reads `object`, a DLPack capsule, as the argument `name`.
    pub fn read(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let Ok(capsule) = object.cast::<PyCapsule>() else {
            return Err(refuse(name, format!("expected a tensor, got {}", object.get_type())));
        };
        let label = capsule.name()?;
        // SAFETY: the name is compared at once, while the capsule is borrowed.
        let label = label.map(|label| unsafe { label.as_cstr() });
        let versioned = match label {
            Some(label) if label == PLAIN => false,
            Some(label) if label == VERSIONED => true,
            _ => {
                return Err(refuse(name, "the DLPack capsule is of no known kind or already used"));
            }
        };
        let pointer = capsule.pointer_checked(label)?;
        let (raw, writable): (&RawTensor, bool) = if versioned {
            // SAFETY: a capsule of this name holds a DLManagedTensorVersioned by the standard, and
            // version and flags precede what a later major version may change.
            let managed = unsafe { pointer.cast::<Versioned>().as_ref() };
            if managed.major != 1 {
                let major = managed.major;
                return Err(refuse(name, format!("DLPack {major}.x is not known, expected 1.x")));
            }
            (&managed.tensor, managed.flags & READ_ONLY == 0)
        } else {
            // SAFETY: a capsule of this name holds a DLManagedTensor, which begins with its tensor.
            (unsafe { pointer.cast::<RawTensor>().as_ref() }, true)
        };
        Self::check(name, raw, writable, capsule.clone())
    }

    fn check(
        name: &'static str,
        raw: &RawTensor,
        writable: bool,
        capsule: Bound<'py, PyCapsule>,
    ) -> PyResult<Self> {
        let RawType { code, bits, lanes } = raw.dtype;
        let dtype = DType::of(raw.dtype).ok_or_else(|| {
            refuse(
                name,
                format!(
                    "numbers of DLPack type ({code}, {bits} bits, {lanes} lanes), expected \
                     float32, bfloat16, float16 or int32"
                ),
            )
        })?;
        let device = Device::of(raw.device).ok_or_else(|| {
            refuse(name, format!("DLPack device {}, expected CPU or CUDA", raw.device.kind))
        })?;
        let dims = usize::try_from(raw.dims).unwrap_or(usize::MAX);
        if dims > 8 || (dims > 0 && raw.shape.is_null()) {
            return Err(refuse(name, format!("{} dimensions, expected 1 to 4", raw.dims)));
        }
        let list = |pointer: *const i64| -> &[i64] {
            if dims == 0 {
                return &[];
            }
            // SAFETY: not null, and by the standard as long as there are dimensions.
            unsafe { std::slice::from_raw_parts(pointer, dims) }
        };
        let sizes = list(raw.shape);
        let mut shape = Vec::with_capacity(dims);
        let mut bytes = dtype.bytes();
        for &size in sizes {
            let size = usize::try_from(size)
                .map_err(|_| refuse(name, format!("a dimension of {size} elements")))?;
            bytes = bytes
                .checked_mul(size)
                .filter(|&bytes| bytes <= isize::MAX as usize)
                .ok_or_else(|| refuse(name, format!("shape {sizes:?} is larger than memory")))?;
            shape.push(size);
        }
        let tensor = Self {
            name,
            dtype,
            device,
            shape,
            address: (raw.data as usize).wrapping_add(raw.byte_offset as usize),
            writable,
            _capsule: capsule,
        };
        if bytes == 0 {
            return Ok(tensor);
        }
        if !raw.strides.is_null() {
            let strides = list(raw.strides);
            let mut expected = 1;
            for (&size, &stride) in sizes.iter().zip(strides).rev() {
                if size != 1 && stride != expected {
                    return Err(refuse(
                        name,
                        format!(
                            "strides {strides:?} of shape {sizes:?} are not contiguous; pass \
                             {name}.contiguous()"
                        ),
                    ));
                }
                expected *= size;
            }
        }
        if raw.data.is_null() || !tensor.address.is_multiple_of(dtype.bytes()) {
            return Err(refuse(name, "the data pointer is null or not aligned"));
        }
        Ok(tensor)
    }

    /// The argument's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The type of its numbers.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Where its memory begins, on its device.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Refuses another number of dimensions; `layout` such as `[T, H, D]` is for the message.
    pub fn dims<const N: usize>(&self, layout: &str) -> PyResult<[usize; N]> {
        <[usize; N]>::try_from(&self.shape[..])
            .map_err(|_| refuse(self.name, format!("shape {:?}, expected {layout}", self.shape)))
    }

    /// Refuses another shape; `layout` such as `[T, H, D]` is for the message.
    pub fn expect_shape(&self, shape: &[usize], layout: &str) -> PyResult<()> {
        if self.shape == shape {
            return Ok(());
        }
        let got = &self.shape;
        Err(refuse(self.name, format!("shape {got:?}, expected {layout} = {shape:?}")))
    }

    /// Refuses another device or type than `like` has.
    pub fn expect_like(&self, like: &Tensor) -> PyResult<()> {
        self.expect(like.device, like.dtype, like.name)
    }

    /// Refuses another device or type; `why` names who asks for them.
    pub fn expect(&self, device: Device, dtype: DType, why: &str) -> PyResult<()> {
        if self.device != device {
            let message = format!("on {}, expected {device} like {why}", self.device);
            return Err(refuse(self.name, message));
        }
        if self.dtype != dtype {
            let (got, want) = (self.dtype.name(), dtype.name());
            return Err(refuse(self.name, format!("dtype {got}, expected {want} like {why}")));
        }
        Ok(())
    }

    /// Its numbers.
    pub fn slice<E: Number>(&self) -> PyResult<&[E]> {
        self.expect(Device::Cpu, E::DTYPE, "the call")?;
        if self.len() == 0 {
            return Ok(&[]);
        }
        // SAFETY: `check` saw a contiguous, aligned, non-null tensor of this type whose capsule we
        // hold. That nobody writes to it during the call is the caller's promise, as with every
        // operator of PyTorch.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const E, self.len()) })
    }

    /// Its numbers, to be overwritten.
    pub fn slice_mut<E: Number>(&mut self) -> PyResult<&mut [E]> {
        self.expect(Device::Cpu, E::DTYPE, "the call")?;
        if !self.writable {
            return Err(refuse(self.name, "read-only memory"));
        }
        if self.len() == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; the package's own Python allocates every output for this call
        // alone, so nothing else refers to this memory.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address as *mut E, self.len()) })
    }
}

/// A Rust type with its [`DType`].
pub trait Number: Copy + Send + Sync {
    /// The type in DLPack.
    const DTYPE: DType;
}

impl Number for f32 {
    const DTYPE: DType = DType::F32;
}
impl Number for f64 {
    const DTYPE: DType = DType::F64;
}
impl Number for half::bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Number for i32 {
    const DTYPE: DType = DType::I32;
}
