//! Storage that is used again.
//!
//! Fresh memory costs a page fault every 4 KiB, which can double the time of a training step
//! that makes the same few hundred buffers each time. Buffers above `SMALL` elements are cut
//! to one of eight sizes an octave and, when dropped, kept for the next request of that size,
//! with their stale contents: an op that overwrites all of its output pays nothing for it.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;

/// Buffers up to this many elements are left to the allocator.
const SMALL: usize = 1024;

/// Bytes the pool may hold beyond half as much again as was ever in use at once.
const SLACK: usize = 64 << 20;

/// Element types the pool has a shelf for.
pub(crate) trait Pooled: Copy + Default + Send + Sync + 'static {
    fn shelf(pool: &mut Pool) -> &mut Shelf<Self>;
}

impl Pooled for f32 {
    fn shelf(pool: &mut Pool) -> &mut Shelf<f32> {
        &mut pool.f32
    }
}

impl Pooled for bf16 {
    fn shelf(pool: &mut Pool) -> &mut Shelf<bf16> {
        &mut pool.bf16
    }
}

impl Pooled for i32 {
    fn shelf(pool: &mut Pool) -> &mut Shelf<i32> {
        &mut pool.i32
    }
}

/// Idle buffers of one element type by length.
pub(crate) struct Shelf<T>(BTreeMap<usize, Vec<Vec<T>>>);

impl<T> Shelf<T> {
    const fn new() -> Self {
        Shelf(BTreeMap::new())
    }

    fn take(&mut self, length: usize) -> Option<Vec<T>> {
        self.0.get_mut(&length)?.pop()
    }

    fn put(&mut self, buffer: Vec<T>) {
        self.0.entry(buffer.len()).or_default().push(buffer);
    }
}

/// All shelves and their books, in bytes.
pub(crate) struct Pool {
    f32: Shelf<f32>,
    bf16: Shelf<bf16>,
    i32: Shelf<i32>,
    lent: usize,
    held: usize,
    peak: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    f32: Shelf::new(),
    bf16: Shelf::new(),
    i32: Shelf::new(),
    lent: 0,
    held: 0,
    peak: 0,
});

fn pool() -> MutexGuard<'static, Pool> {
    // The books are consistent between statements, so a panic elsewhere does not spoil them.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes in use, held idle, and the most ever in use at once (buffers of the pool only).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// In use now.
    pub lent: usize,
    /// Idle, kept for later.
    pub held: usize,
    /// The highest `lent` so far.
    pub peak: usize,
}

/// The pool's books.
pub fn usage() -> Usage {
    let pool = pool();
    Usage { lent: pool.lent, held: pool.held, peak: pool.peak }
}

/// Gives all idle buffers back to the system and forgets the peak; for a program that is
/// done with its largest phase.
pub fn trim() {
    let mut pool = pool();
    pool.drop_idle();
    pool.peak = pool.lent;
}

impl Pool {
    /// Bytes that may be in use and idle together.
    fn most(&self) -> usize {
        self.peak + self.peak / 2 + SLACK
    }

    fn drop_idle(&mut self) {
        (self.f32, self.bf16, self.i32) = (Shelf::new(), Shelf::new(), Shelf::new());
        self.held = 0;
    }
}

/// The length a request is cut to: eight steps an octave, so at most 1/8 is never touched.
fn class(length: usize) -> usize {
    if length <= SMALL {
        return length;
    }
    let step = 1usize << (length.ilog2() - 3);
    length.next_multiple_of(step)
}

/// A vector that returns to the pool when dropped.
pub(crate) struct Buffer<T: Pooled> {
    /// At least `len` initialised elements.
    elements: Vec<T>,
    len: usize,
    /// Made by the caller: goes back to the allocator. On the shelves, which nobody took it from,
    /// one more would lie after every step.
    adopted: bool,
}

impl<T: Pooled> Buffer<T> {
    /// Takes `len` elements with unspecified (but initialised) contents: for outputs that are
    /// overwritten wholly.
    pub(crate) fn stale(len: usize) -> Self {
        let size = class(len);
        if size <= SMALL {
            return Buffer { elements: vec![T::default(); size], len, adopted: false };
        }
        let bytes = size * size_of::<T>();
        let mut pool = pool();
        let reused = T::shelf(&mut pool).take(size);
        pool.lent += bytes;
        pool.peak = pool.peak.max(pool.lent);
        if reused.is_some() {
            pool.held -= bytes;
        } else if pool.lent + pool.held > pool.most() {
            // Idle buffers of sizes nobody asks for any more must not pile up.
            pool.drop_idle();
        }
        drop(pool);
        let elements = reused.unwrap_or_else(|| vec![T::default(); size]);
        Buffer { elements, len, adopted: false }
    }

    /// Takes `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut buffer = Self::stale(len);
        buffer.fill(T::default());
        buffer
    }

    /// Takes over a caller's vector.
    pub(crate) fn adopt(elements: Vec<T>) -> Self {
        let len = elements.len();
        if len > SMALL {
            let mut pool = pool();
            pool.lent += len * size_of::<T>();
            pool.peak = pool.peak.max(pool.lent);
        }
        Buffer { elements, len, adopted: true }
    }

    /// A copy of `elements`.
    pub(crate) fn copy_of(elements: &[T]) -> Self {
        let mut buffer = Self::stale(elements.len());
        buffer.copy_from_slice(elements);
        buffer
    }
}

impl<T: Pooled> Drop for Buffer<T> {
    fn drop(&mut self) {
        let elements = std::mem::take(&mut self.elements);
        let size = elements.len();
        if size <= SMALL {
            return;
        }
        let bytes = size * size_of::<T>();
        let mut pool = pool();
        pool.lent -= bytes;
        if !self.adopted && pool.lent + pool.held + bytes <= pool.most() {
            pool.held += bytes;
            T::shelf(&mut pool).put(elements);
        }
    }
}

impl<T: Pooled> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl<T: Pooled> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.elements[..self.len]
    }
}

impl<T: Pooled> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.elements[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_waste_at_most_an_eighth_and_are_their_own_class() {
        for len in (0..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let size = class(len);
            assert!(size >= len && size - len <= len / 8, "{len} -> {size}");
            assert_eq!(class(size), size);
        }
    }

    #[test]
    fn a_dropped_buffer_is_used_again_and_zeroed_on_request() {
        // A length no other test asks for, since the pool is shared.
        const LEN: usize = 777_777;
        let mut first = Buffer::<f32>::stale(LEN);
        first.fill(3.0);
        let at = first.as_ptr();
        drop(first);
        let again = Buffer::<f32>::stale(LEN);
        assert_eq!(again.as_ptr(), at);
        drop(again);
        let zeros = Buffer::<f32>::zeroed(LEN);
        assert!(zeros.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn a_callers_vector_is_not_kept() {
        // A length that is its own class, and that no other test asks for.
        const LEN: usize = 5 << 17;
        assert_eq!(class(LEN), LEN);
        for _ in 0..3 {
            drop(Buffer::adopt(vec![1.0f32; LEN]));
        }
        assert!(f32::shelf(&mut pool()).take(LEN).is_none());
    }
}
