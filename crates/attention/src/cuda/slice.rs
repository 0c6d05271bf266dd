//! Numbers on the device, borrowed from whoever owns the memory.

use tercet_cuda::Buffer;

/// So many numbers at an address of the device; the storage type is the [`super::Plan`]'s, f32 for
/// log-sum-exps and Δ, i32 for indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    ptr: u64,
    len: usize,
}

impl Slice {
    /// `len` numbers at `ptr`.
    ///
    /// # Safety
    /// They are valid memory of the device for every call that gets the slice, until the work it
    /// enqueued is done, and nothing else writes there meanwhile.
    pub unsafe fn new(ptr: u64, len: usize) -> Self {
        Slice { ptr, len }
    }

    /// A buffer that outlives the calls made with the slice, as numbers of `bytes` each.
    pub(super) fn whole(buffer: &Buffer, bytes: usize) -> Self {
        Slice { ptr: buffer.ptr(), len: buffer.bytes() / bytes }
    }

    /// Where they are.
    pub fn ptr(self) -> u64 {
        self.ptr
    }

    /// How many.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}
