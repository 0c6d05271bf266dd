//! Descriptors for the tensor memory accelerator (TMA) of compute capability 9.0 and newer.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Fill,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion,
    CUtensorMapSwizzle as Pattern,
};

use crate::error::check;
use crate::library::{Library, look_for};
use crate::{Error, Number, Result};

/// How a box's rows of 32, 64 or 128 bytes are permuted in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// Rows of 32 bytes.
    B32,
    /// Rows of 64 bytes.
    B64,
    /// Rows of 128 bytes, as wgmma likes them.
    B128,
}

/// A tensor in device memory seen as boxes; passed to a kernel by value
/// (`const __grid_constant__ CUtensorMap`-sized struct of 128 bytes, aligned to 64).
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(pub(crate) sys::CUtensorMap);

impl TensorMap {
    /// A tensor of 1 to 5 dimensions, inner first: `dims` elements, `strides` bytes for all but
    /// the innermost (multiples of 16), `box_dims` elements a copy moves. Reads outside give 0,
    /// writes outside are dropped. `base` is aligned to 16 bytes.
    pub fn tiled(
        number: Number,
        base: u64,
        dims: &[u64],
        strides: &[u64],
        box_dims: &[u32],
        swizzle: Swizzle,
    ) -> Result<TensorMap> {
        let rank = dims.len();
        let fits = (1..=5).contains(&rank) && strides.len() + 1 == rank && box_dims.len() == rank;
        let aligned =
            base != 0 && base.is_multiple_of(16) && strides.iter().all(|s| s.is_multiple_of(16));
        if !fits || !aligned {
            return Err(Error::Value(format!(
                "a tensor map needs 1 to 5 dims, one stride fewer, a box of as many dims, a base and strides that are multiples of 16 bytes; got dims {dims:?}, strides {strides:?}, box {box_dims:?}, base {base:#x}"
            )));
        }
        look_for(Library::Cuda)?;
        let kind = match number {
            Number::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Number::BF16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Number::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let pattern = match swizzle {
            Swizzle::None => Pattern::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => Pattern::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => Pattern::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => Pattern::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let steps = [1u32; 5];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have `rank` entries (`strides` one fewer, as the call wants); the
        // base is not read here.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                kind,
                rank as u32,
                base as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                pattern,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", result).map_err(|e| {
            Error::Value(format!(
                "{e}: dims {dims:?}, strides {strides:?}, box {box_dims:?}, swizzle {swizzle:?}"
            ))
        })?;
        Ok(TensorMap(map))
    }
}
