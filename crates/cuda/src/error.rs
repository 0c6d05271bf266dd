//! What can go wrong on a device.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

use crate::Result;

/// Errors of devices, kernels and memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A shared library that is not on this machine.
    #[error("{name} was not found{}; looked for {looked}", what_it_is(name))]
    Missing {
        /// The library.
        name: &'static str,
        /// File names and folders that were tried.
        looked: String,
    },
    /// A driver from before the calls that are used here.
    #[error(
        "the NVIDIA driver supports CUDA {major}.{minor}; CUDA 12.0 (driver 525) or newer is needed"
    )]
    DriverTooOld {
        /// What the driver supports.
        major: i32,
        /// See `major`.
        minor: i32,
    },
    /// No usable device, or none of that number.
    #[error("{0}")]
    NoDevice(String),
    /// A device from before the instructions that the kernels use.
    #[error("{name} has compute capability {}.{}; 8.0 or newer is needed", arch.0, arch.1)]
    TooOld {
        /// The device.
        name: String,
        /// Its compute capability.
        arch: (u32, u32),
    },
    /// The device's memory does not hold what was asked.
    #[error("{0}")]
    OutOfMemory(Box<OutOfMemory>),
    /// A kernel that NVRTC refused.
    #[error("kernel {name} does not compile ({options}):\n{log}")]
    Compile {
        /// The source's name.
        name: String,
        /// The options it was compiled with.
        options: String,
        /// What the compiler said.
        log: String,
    },
    /// A call of a library that failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// The library's name for the error and its description.
        reason: String,
    },
    /// Arguments that do not fit.
    #[error("{0}")]
    Value(String),
}

/// The numbers of a request that could not be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub asked: u64,
    /// What for.
    pub what: String,
    /// Bytes free on the device.
    pub free: u64,
    /// Bytes of the device.
    pub total: u64,
    /// Bytes in use by this process through this `Gpu`.
    pub used: u64,
    /// The largest allocations in use: what for, and bytes.
    pub largest: Vec<(String, u64)>,
}

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let gib = |bytes: u64| {
            if bytes < 1 << 28 {
                format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
            } else {
                format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
            }
        };
        write!(
            f,
            "out of memory on the device: {} asked for {}, {} of {} free, {} in use here",
            gib(self.asked),
            self.what,
            gib(self.free),
            gib(self.total),
            gib(self.used)
        )?;
        if !self.largest.is_empty() {
            let list: Vec<_> = self
                .largest
                .iter()
                .map(|(what, bytes)| format!("{what} ({})", gib(*bytes)))
                .collect();
            write!(f, "; the largest are {}", list.join(", "))?;
        }
        Ok(())
    }
}

fn what_it_is(name: &str) -> &'static str {
    match name {
        "libcuda" => " (it comes with the NVIDIA driver)",
        "libnvrtc" => " (it comes with the CUDA toolkit, or `pip install nvidia-cuda-nvrtc`)",
        "libcublasLt" => " (it comes with the CUDA toolkit, or `pip install nvidia-cublas`)",
        _ => "",
    }
}

impl Error {
    /// Whether the machine or the request is the reason rather than this program.
    pub fn is_users(&self) -> bool {
        !matches!(self, Error::Compile { .. } | Error::Call { .. })
    }
}

/// Turns the driver's answer into a result.
pub(crate) fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver is loaded, since it gave `result`; it fills in a static string or
        // leaves null.
        unsafe {
            get(result, &mut text);
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy()) }
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_default();
    let meaning = text(sys::cuGetErrorString).unwrap_or_default();
    Err(Error::Call { call, reason: format!("{name} ({meaning})") })
}
