//! Which devices there are.

use std::ffi::{CStr, c_char, c_int};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::error::check;
use crate::library::{Library, look_for};
use crate::{Error, Result};

/// The oldest driver interface that has all the calls used here.
const OLDEST_DRIVER: c_int = 12000;

/// The oldest compute capability for which the kernels are written.
const OLDEST_ARCH: (u32, u32) = (8, 0);

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, as in `cuda:N`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub arch: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub total_memory: u64,
    /// Bytes of shared memory a block may ask for.
    pub shared_per_block_optin: u32,
    /// Bytes of the level 2 cache.
    pub l2: u64,
    /// CUDA version the driver supports, such as (13, 0).
    pub driver: (u32, u32),
}

/// Lists the devices; an error says which library is missing and where it was looked for, that
/// the driver is too old, or that there is no device.
pub fn probe() -> Result<Vec<DeviceInfo>> {
    let count = count()?;
    (0..count).map(describe).collect()
}

/// Starts the driver and counts devices.
fn count() -> Result<usize> {
    look_for(Library::Cuda)?;
    let (mut version, mut count) = (0, 0);
    // SAFETY: the library is loaded; the calls write to the integers given.
    unsafe {
        check("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
        if version < OLDEST_DRIVER {
            return Err(Error::DriverTooOld { major: version / 1000, minor: version % 1000 / 10 });
        }
        check("cuInit", sys::cuInit(0)).map_err(|e| {
            Error::NoDevice(format!("the NVIDIA driver is installed but finds no device: {e}"))
        })?;
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
    }
    if count == 0 {
        let text = "there is no CUDA device (or CUDA_VISIBLE_DEVICES hides them all)";
        return Err(Error::NoDevice(text.into()));
    }
    Ok(count as usize)
}

/// The device of that number, refused when its arch is too old.
pub(crate) fn select(ordinal: usize) -> Result<DeviceInfo> {
    let count = count()?;
    if ordinal >= count {
        let text = format!("there is no device cuda:{ordinal}; there are {count}, numbered from 0");
        return Err(Error::NoDevice(text));
    }
    let info = describe(ordinal)?;
    if info.arch < OLDEST_ARCH {
        return Err(Error::TooOld { name: info.name, arch: info.arch });
    }
    Ok(info)
}

/// The driver's handle of a device.
pub(crate) fn handle(ordinal: usize) -> Result<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: the driver has been started by `select` or `probe`.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal as c_int) })?;
    Ok(device)
}

fn describe(ordinal: usize) -> Result<DeviceInfo> {
    let device = handle(ordinal)?;
    let attribute = |which: Attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: a valid device and an integer to write to.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
        check("cuDeviceGetAttribute", result)?;
        Ok(value.max(0) as u32)
    };
    let mut name = [0 as c_char; 256];
    let (mut memory, mut version) = (0usize, 0);
    // SAFETY: the buffers are as long as said and the name is terminated within them.
    let name = unsafe {
        check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), 255, device))?;
        check("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut memory, device))?;
        check("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    Ok(DeviceInfo {
        ordinal,
        name,
        arch: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        total_memory: memory as u64,
        shared_per_block_optin: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        l2: u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        driver: ((version / 1000) as u32, (version % 1000 / 10) as u32),
    })
}
