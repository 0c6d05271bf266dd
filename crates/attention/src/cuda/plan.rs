//! Which device, which dims, which kernels.

use tercet_cuda::{Gpu, Number};

use crate::{Dims, Result};

/// Head dims that the Hopper kernels are compiled for.
const HOPPER_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// What all calls of one model have in common.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The device.
    pub(super) gpu: Gpu,
    /// Heads and dimensions.
    pub(super) dims: Dims,
    /// How inputs and outputs are stored.
    pub(super) number: Number,
    hopper: bool,
}

impl Plan {
    /// Checks the dims and chooses kernels: Hopper's where device, storage type and dims allow,
    /// else the plain ones.
    pub fn new(gpu: &Gpu, dims: Dims, number: Number) -> Result<Self> {
        dims.validate()?;
        let known = |dim: usize| HOPPER_DIMS.contains(&dim);
        let hopper = gpu.arch() == (9, 0)
            && number != Number::F32
            && known(dims.key_dim)
            && known(dims.value_dim);
        Ok(Plan { gpu: gpu.clone(), dims, number, hopper })
    }

    /// The same with plain kernels only.
    pub fn plain(self) -> Self {
        Plan { hopper: false, ..self }
    }

    /// Heads and dimensions.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// How inputs and outputs are stored.
    pub fn number(&self) -> Number {
        self.number
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether Hopper's kernels serve the pieces that have one.
    pub fn hopper(&self) -> bool {
        self.hopper
    }
}
