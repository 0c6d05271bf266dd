//! Where storage lives.

use std::fmt;

use tercet_cuda::Gpu;

/// Where a tensor's storage lives. Tensors of one op are all on one device.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// Main memory.
    Cpu,
    /// The memory of an NVIDIA GPU; everything happens on the handle's stream.
    Cuda(Gpu),
}

impl Device {
    /// Waits until everything asked of the device has happened; errors of kernels that are
    /// still on their way show up here.
    pub fn synchronize(&self) -> crate::Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(gpu) => Ok(gpu.synchronize()?),
        }
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu, Device::Cpu) => true,
            (Device::Cuda(a), Device::Cuda(b)) => a.same(b),
            _ => false,
        }
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(gpu) => write!(f, "cuda:{}", gpu.info().ordinal),
        }
    }
}
