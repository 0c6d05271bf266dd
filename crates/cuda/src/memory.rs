//! Stream-ordered memory: allocated and freed in the stream's order, kept for the next request,
//! with books that name the largest allocations when there is no more.

use std::collections::HashMap;

use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute, CUresult};

use crate::buffer::{Buffer, Home};
use crate::error::{OutOfMemory, check};
use crate::gpu::lock;
use crate::{Error, Gpu, Result};

/// What an allocation is for: shown when memory runs out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    what: &'static str,
    shape: [usize; 4],
    rank: usize,
}

impl Label {
    /// Something without a shape.
    pub const fn new(what: &'static str) -> Self {
        Label { what, shape: [0; 4], rank: 0 }
    }

    /// Something of that shape, of which the outermost dimensions beyond four are folded.
    pub fn shaped(what: &'static str, shape: &[usize]) -> Self {
        let mut label = Label { what, shape: [1; 4], rank: shape.len().min(4) };
        let fold = shape.len() - label.rank;
        label.shape[..label.rank].copy_from_slice(&shape[fold..]);
        if let Some(first) = label.shape.first_mut() {
            *first *= shape[..fold].iter().product::<usize>();
        }
        label
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.what)?;
        if self.rank > 0 { write!(f, " {:?}", &self.shape[..self.rank]) } else { Ok(()) }
    }
}

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// In buffers now.
    pub used: u64,
    /// The most that was ever in buffers at once, since the last [`Gpu::reset_peak`].
    pub peak: u64,
    /// Taken from the device by this handle, in use or kept.
    pub reserved: u64,
}

#[derive(Default)]
pub(crate) struct Books {
    live: HashMap<u64, (u64, Label)>,
    used: u64,
    peak: u64,
}

impl Books {
    pub(crate) fn enter(&mut self, ptr: u64, bytes: u64, label: Label) {
        self.live.insert(ptr, (bytes, label));
        self.used += bytes;
        self.peak = self.peak.max(self.used);
    }

    pub(crate) fn strike(&mut self, ptr: u64) {
        if let Some((bytes, _)) = self.live.remove(&ptr) {
            self.used -= bytes;
        }
    }
}

/// A pool of the device's memory that never gives memory back by itself.
///
/// # Safety
/// The device's context is current.
pub(crate) unsafe fn create_pool(ordinal: usize) -> Result<sys::CUmemoryPool> {
    let mut pool = std::ptr::null_mut();
    let mut keep = u64::MAX;
    // SAFETY: all zeros is a valid value of this plain struct, and the call's defaults.
    let mut wanted: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
    wanted.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    wanted.location.id = ordinal as i32;
    // SAFETY: the structs are filled in; the attribute is a 64-bit number.
    unsafe {
        check("cuMemPoolCreate", sys::cuMemPoolCreate(&mut pool, &wanted))?;
        let threshold = Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let result = sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast());
        check("cuMemPoolSetAttribute", result)?;
    }
    Ok(pool)
}

impl Gpu {
    /// Takes `bytes` with unspecified contents, aligned to 256 bytes at least.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.alloc_for(bytes, Label::new("a buffer"))
    }

    /// As [`Gpu::alloc`], with a name for the case that memory runs out.
    pub fn alloc_for(&self, bytes: usize, label: Label) -> Result<Buffer> {
        if bytes == 0 {
            return Ok(Buffer::new(self.clone(), 0, 0, Home::Nowhere));
        }
        self.bind()?;
        let arena = lock(&self.0.arena).clone();
        let (ptr, home) = match arena {
            Some(arena) => (arena.take(bytes, label)?, Home::Arena(arena)),
            None => (self.take_from_pool(bytes, self.0.stream, label)?, Home::Pool),
        };
        lock(&self.0.books).enter(ptr, bytes as u64, label);
        Ok(Buffer::new(self.clone(), ptr, bytes, home))
    }

    /// Takes `bytes` zeros.
    pub fn alloc_zeroed(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.alloc(bytes)?;
        buffer.fill(0)?;
        Ok(buffer)
    }

    pub(crate) fn take_from_pool(
        &self,
        bytes: usize,
        stream: sys::CUstream,
        label: Label,
    ) -> Result<u64> {
        let attempt = || {
            let mut ptr = 0;
            // SAFETY: the context is current, the pool and the stream are alive.
            let result =
                unsafe { sys::cuMemAllocFromPoolAsync(&mut ptr, bytes, self.0.pool, stream) };
            (ptr, result)
        };
        let (mut ptr, mut result) = attempt();
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            // Frees that the stream has not reached yet, and pieces of the wrong size, count
            // as taken: wait, give the pieces back, and ask again.
            // SAFETY: as above; a stream that is being captured refuses to wait, which is fine.
            unsafe {
                sys::cuStreamSynchronize(self.0.stream);
                sys::cuMemPoolTrimTo(self.0.pool, 0);
            }
            (ptr, result) = attempt();
        }
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(self.out_of_memory(bytes, label));
        }
        check("cuMemAllocFromPoolAsync", result)?;
        Ok(ptr)
    }

    fn out_of_memory(&self, asked: usize, label: Label) -> Error {
        let (free, total) = self.memory().unwrap_or((0, self.info().total_memory));
        let books = lock(&self.0.books);
        let mut live: Vec<_> =
            books.live.iter().map(|(ptr, (bytes, l))| (*bytes, *ptr, *l)).collect();
        live.sort_unstable_by_key(|&(bytes, ptr, _)| (std::cmp::Reverse(bytes), ptr));
        let largest = live.iter().take(3).map(|(bytes, _, l)| (l.to_string(), *bytes)).collect();
        Error::OutOfMemory(Box::new(OutOfMemory {
            asked: asked as u64,
            what: label.to_string(),
            free,
            total,
            used: books.used,
            largest,
        }))
    }

    /// Bytes that can still be allocated (what is kept counts as free), and bytes of the device.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        let use_ = self.memory_use()?;
        Ok((free as u64 + use_.reserved.saturating_sub(use_.used), total as u64))
    }

    /// How much of the device's memory this handle uses.
    pub fn memory_use(&self) -> Result<MemoryUse> {
        self.bind()?;
        let mut reserved = 0u64;
        let current = Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        // SAFETY: the attribute is a 64-bit number.
        let result =
            unsafe { sys::cuMemPoolGetAttribute(self.0.pool, current, (&raw mut reserved).cast()) };
        check("cuMemPoolGetAttribute", result)?;
        let books = lock(&self.0.books);
        Ok(MemoryUse { used: books.used, peak: books.peak, reserved })
    }

    /// Starts the peak of [`Gpu::memory_use`] anew.
    pub fn reset_peak(&self) {
        let mut books = lock(&self.0.books);
        books.peak = books.used;
    }

    /// Gives the memory that is kept but not in use back to the device; waits.
    pub fn trim(&self) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the pool is alive as long as `self`.
        check("cuMemPoolTrimTo", unsafe { sys::cuMemPoolTrimTo(self.0.pool, 0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_shows_its_shape_and_folds_what_does_not_fit() {
        assert_eq!(Label::new("the workspace").to_string(), "the workspace");
        assert_eq!(Label::shaped("bf16", &[8192, 64, 128]).to_string(), "bf16 [8192, 64, 128]");
        assert_eq!(Label::shaped("f32", &[2, 3, 4, 5, 6]).to_string(), "f32 [6, 4, 5, 6]");
        assert_eq!(Label::shaped("f32", &[]).to_string(), "f32");
    }

    #[test]
    fn the_books_follow_what_is_live_and_its_peak() {
        let mut books = Books::default();
        books.enter(1, 100, Label::new("a"));
        books.enter(2, 50, Label::new("b"));
        books.strike(1);
        books.strike(1);
        books.enter(3, 20, Label::new("c"));
        assert_eq!((books.used, books.peak), (70, 150));
    }
}
