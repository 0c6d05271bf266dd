//! Main memory that the device copies to directly: several times as fast as other memory.

use cudarc::driver::sys;

use crate::error::check;
use crate::{Buffer, Error, Gpu, Pod, Result};

/// Page-locked memory of a fixed size, zeros at first.
pub struct Pinned {
    gpu: Gpu,
    memory: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone, and freeing it binds the device's context first.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read.
unsafe impl Sync for Pinned {}

impl Gpu {
    /// Page-locked main memory.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        self.bind()?;
        let mut memory = std::ptr::null_mut();
        // SAFETY: the driver writes one pointer; 0 bytes are asked for as 1.
        let result = unsafe { sys::cuMemAllocHost_v2(&mut memory, bytes.max(1)) };
        check("cuMemAllocHost", result)?;
        let memory = memory.cast::<u8>();
        // SAFETY: the driver gave at least so many bytes.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Pinned { gpu: self.clone(), memory, bytes })
    }
}

impl Pinned {
    /// Copies the first numbers of a buffer, waits for them, and gives them out.
    pub fn read<T: Pod>(&mut self, from: &Buffer, count: usize) -> Result<&[T]> {
        let bytes = count * size_of::<T>();
        if bytes > self.bytes {
            let text = format!("{bytes} bytes for page-locked memory of {}", self.bytes);
            return Err(Error::Value(text));
        }
        // SAFETY: the memory holds `count` numbers, was written when it was made, is aligned to a
        // page, and any bits are a number.
        let numbers = unsafe { std::slice::from_raw_parts_mut(self.memory.cast::<T>(), count) };
        from.read(0, numbers)?;
        Ok(numbers)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: allocated above, and freed once. That it fails changes nothing here.
            let _ = unsafe { sys::cuMemFreeHost(self.memory.cast()) };
        }
    }
}
