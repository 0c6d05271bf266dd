//! Device memory that is freed when dropped, and how numbers get there and back.

use std::sync::Arc;

use cudarc::driver::sys;

use crate::arena::Arena;
use crate::error::check;
use crate::gpu::lock;
use crate::{Error, Gpu, Result};

/// Types that are nothing but their bytes.
///
/// # Safety
/// No padding, and every bit pattern is a value.
pub unsafe trait Pod: Copy + Send + Sync + 'static {}
macro_rules! pod {
    ($($t:ty),*) => { $(
        // SAFETY: plain numbers.
        unsafe impl Pod for $t {}
    )* };
}
pod!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

pub(crate) enum Home {
    /// No bytes at all.
    Nowhere,
    Pool,
    Arena(Arc<Arena>),
}

/// Memory of a device, freed in the stream's order when dropped.
pub struct Buffer {
    gpu: Gpu,
    ptr: u64,
    bytes: usize,
    home: Home,
}

impl Buffer {
    pub(crate) fn new(gpu: Gpu, ptr: u64, bytes: usize, home: Home) -> Self {
        Buffer { gpu, ptr, bytes, home }
    }

    /// Its address on the device; 0 when there are no bytes.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whose memory it is.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        let stream = self.gpu.stream();
        // SAFETY: the range is this buffer.
        let result = unsafe { sys::cuMemsetD8Async(self.ptr, byte, self.bytes, stream) };
        check("cuMemsetD8Async", result)
    }

    /// Sets every 32-bit word (bytes beyond the last whole one stay).
    pub fn fill_words(&self, word: u32) -> Result<()> {
        if self.bytes < 4 {
            return Ok(());
        }
        self.gpu.bind()?;
        let stream = self.gpu.stream();
        // SAFETY: the range is this buffer.
        let result = unsafe { sys::cuMemsetD32Async(self.ptr, word, self.bytes / 4, stream) };
        check("cuMemsetD32Async", result)
    }

    /// Overwrites the buffer from byte `offset` on with host numbers.
    pub fn write<T: Pod>(&self, offset: usize, values: &[T]) -> Result<()> {
        let bytes = size_of_val(values);
        self.within(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.not_while_captured("written from the host")?;
        // SAFETY: both ranges hold `bytes`; the driver stages pageable memory before it returns.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.ptr + offset as u64,
                values.as_ptr().cast(),
                bytes,
                self.gpu.0.stream,
            )
        };
        check("cuMemcpyHtoDAsync", result)
    }

    /// Reads numbers from byte `offset` on into `values`; waits for them.
    pub fn read<T: Pod>(&self, offset: usize, values: &mut [T]) -> Result<()> {
        let bytes = size_of_val(values);
        self.within(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.not_while_captured("read by the host")?;
        // SAFETY: both ranges hold `bytes`, and the host's is not touched before the wait ends.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                values.as_mut_ptr().cast(),
                self.ptr + offset as u64,
                bytes,
                self.gpu.0.stream,
            )
        };
        check("cuMemcpyDtoHAsync", result)?;
        self.gpu.synchronize()
    }

    /// Reads the first numbers, as many as `values` has; waits for them.
    pub fn download<T: Pod>(&self, values: &mut [T]) -> Result<()> {
        self.read(0, values)
    }

    fn within(&self, offset: usize, bytes: usize) -> Result<()> {
        if offset.checked_add(bytes).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        let text = format!("{bytes} bytes at {offset} reach outside a buffer of {}", self.bytes);
        Err(Error::Value(text))
    }

    fn not_while_captured(&self, what: &str) -> Result<()> {
        self.gpu.bind()?;
        if lock(&self.gpu.0.arena).is_some() {
            let text = format!("device memory cannot be {what} while a graph is captured");
            return Err(Error::Value(text));
        }
        Ok(())
    }
}

impl Gpu {
    /// A buffer with these numbers.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.alloc(size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Copies between two places on the device.
    ///
    /// # Safety
    /// Both ranges are valid device memory and do not overlap.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: promised by the caller.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream()) };
        check("cuMemcpyDtoDAsync", result)
    }

    /// Sets `bytes` at an address.
    ///
    /// # Safety
    /// The range is valid device memory.
    pub unsafe fn fill_at(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: promised by the caller.
        let result = unsafe { sys::cuMemsetD8Async(to, byte, bytes, self.stream()) };
        check("cuMemsetD8Async", result)
    }

    /// Frees an allocation of the pool in the stream's order, or leaves it to the graph that is
    /// being captured.
    pub(crate) fn free(&self, ptr: u64) {
        if let Some(arena) = &*lock(&self.0.arena) {
            return arena.adopt(ptr);
        }
        // SAFETY: nothing enqueued later uses the allocation. An error has nowhere to go; the
        // next call reports it again.
        unsafe {
            sys::cuMemFreeAsync(ptr, self.0.stream);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.ptr == 0 || self.gpu.make_current().is_err() {
            return;
        }
        lock(&self.gpu.0.books).strike(self.ptr);
        match &self.home {
            Home::Nowhere => {}
            Home::Pool => self.gpu.free(self.ptr),
            Home::Arena(arena) => arena.give_back(self.ptr),
        }
    }
}
