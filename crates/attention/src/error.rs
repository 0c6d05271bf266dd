//! What can be wrong with a call of the operator.

use crate::SpecError;

/// Errors of the operator. On the CPU all are the caller's: the arithmetic itself cannot fail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The specification breaks a rule.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Head counts or dimensions the operator does not take.
    #[error("attention dims: {0}")]
    Dims(String),
    /// `cu_seqlens` is not a list of offsets from 0 to T that never decrease.
    #[error("cu_seqlens: {0}")]
    CuSeqlens(String),
    /// A slice whose length does not fit its layout.
    #[error("{name} has {got} elements, expected {expected} = {layout}")]
    Length {
        /// The tensor's name.
        name: &'static str,
        /// Elements it has.
        got: usize,
        /// Elements it should have.
        expected: usize,
        /// The layout with its numbers, such as `[T 5, H 4, D 16]`.
        layout: String,
    },
    /// A parameter of the compressor is missing, or given where none belongs.
    #[error("compressor: {0}")]
    Phi(String),
    /// A list of selected blocks that no selection could have made.
    #[error("selected blocks: {0}")]
    Indices(String),
    /// A cache's pages: none is left, or a sequence that has none was to be written to.
    #[error("pages: {0}")]
    Pages(String),
    /// A device that is missing, out of memory, or failed.
    #[error(transparent)]
    Device(#[from] tercet_cuda::Error),
}
