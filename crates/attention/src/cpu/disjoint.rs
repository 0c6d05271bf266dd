//! One slice written by many threads, each its own rows.

use std::marker::PhantomData;

/// A mutable slice that tasks write in parallel without locks.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: handing out overlapping rows is what `row`'s contract forbids; sending `T`s to other
// threads needs `T: Send`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Takes the slice for as long as rows of it are handed out.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No two live rows may overlap.
    #[allow(clippy::mut_from_ref)] // the whole point; the contract keeps rows apart
    pub unsafe fn row(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "a row past the end");
        // SAFETY: inside the slice; not aliased, by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
