//! Storage types.

use std::fmt;

use half::bf16;
use tercet_attention::Element;

use crate::matmul::Widen;
use crate::pool::{Buffer, Pooled};
use crate::tensor::Storage;

/// How the numbers of a tensor are stored. Arithmetic is always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit brain float: the upper half of an f32.
    BF16,
    /// 32-bit signed integer: token ids, positions, targets.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::BF16 => 2,
        }
    }
}

impl DType {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Element types that carry gradients: f32 and bf16.
pub(crate) trait Float: Element + Pooled + Widen {
    const DTYPE: DType;
    fn of(storage: &Storage) -> Option<&[Self]>;
    fn of_mut(storage: &mut Storage) -> Option<&mut [Self]>;
    fn storage(buffer: Buffer<Self>) -> Storage;
}

impl Float for f32 {
    const DTYPE: DType = DType::F32;
    fn of(storage: &Storage) -> Option<&[f32]> {
        if let Storage::F32(b) = storage { Some(b) } else { None }
    }
    fn of_mut(storage: &mut Storage) -> Option<&mut [f32]> {
        if let Storage::F32(b) = storage { Some(b) } else { None }
    }
    fn storage(buffer: Buffer<f32>) -> Storage {
        Storage::F32(buffer)
    }
}

impl Float for bf16 {
    const DTYPE: DType = DType::BF16;
    fn of(storage: &Storage) -> Option<&[bf16]> {
        if let Storage::BF16(b) = storage { Some(b) } else { None }
    }
    fn of_mut(storage: &mut Storage) -> Option<&mut [bf16]> {
        if let Storage::BF16(b) = storage { Some(b) } else { None }
    }
    fn storage(buffer: Buffer<bf16>) -> Storage {
        Storage::BF16(buffer)
    }
}

/// Calls `$run::<f32>` or `$run::<bf16>` by dtype; integers are refused in the op's name.
macro_rules! float_dispatch {
    ($op:expr, $dtype:expr, $run:ident($($arg:expr),* $(,)?)) => {
        match $dtype {
            $crate::DType::F32 => $run::<f32>($($arg),*),
            $crate::DType::BF16 => $run::<half::bf16>($($arg),*),
            $crate::DType::I32 => Err($crate::Error::DType {
                op: $op,
                what: "the input",
                expected: "f32 or bf16",
                got: $crate::DType::I32,
            }),
        }
    };
}
pub(crate) use float_dispatch;
