//! Where the rows of experts go, on a device.

use tercet_cuda::{Buffer, Gpu};

use super::at;
use super::sort::sort;
use crate::{Device, Result, Tensor};

/// The lists of an expert plan, i32.
pub(crate) struct PlanOnCuda {
    gpu: Gpu,
    /// Chosen experts `[T, k]`.
    experts: Tensor,
    rows: Buffer,
    starts: Buffer,
}

impl PlanOnCuda {
    /// Sorts the chosen experts, each in `0..count`.
    pub(crate) fn new(gpu: &Gpu, experts: Tensor, count: usize) -> Result<Self> {
        let rows = gpu.alloc(experts.len() * size_of::<i32>())?;
        let sorted = sort(gpu, at(&experts)?, experts.len(), count, rows.ptr())?;
        Ok(PlanOnCuda { gpu: gpu.clone(), experts, rows, starts: sorted.starts })
    }

    /// The E+1 offsets, read back: the products of experts are launched by their sizes.
    pub(crate) fn offsets(&self) -> Result<Vec<usize>> {
        let mut starts = vec![0i32; self.starts.bytes() / size_of::<i32>()];
        self.starts.download(&mut starts)?;
        Ok(starts.into_iter().map(|at| at as usize).collect())
    }

    pub(crate) fn experts(&self) -> &Tensor {
        &self.experts
    }

    /// Address of the row of each pair t·k + j.
    pub(super) fn rows(&self) -> u64 {
        self.rows.ptr()
    }

    /// Address of the first row of each expert, and the number of rows.
    pub(super) fn starts(&self) -> u64 {
        self.starts.ptr()
    }

    pub(crate) fn device(&self) -> Device {
        Device::Cuda(self.gpu.clone())
    }
}

impl std::fmt::Debug for PlanOnCuda {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "a plan of {:?} on {}", self.experts, self.device())
    }
}
