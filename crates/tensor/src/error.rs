//! What can be wrong with a call.

use crate::{DType, Device};

/// Errors of tensors, ops and the tape. All are the caller's but some of [`Error::Cuda`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A tensor whose shape an op cannot take.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The op.
        op: &'static str,
        /// Which argument.
        what: &'static str,
        /// What it takes, with this call's numbers.
        expected: String,
        /// What it was given.
        got: Vec<usize>,
    },
    /// A tensor stored in a type an op cannot take.
    #[error("{op}: {what} is {got}, expected {expected}")]
    DType {
        /// The op.
        op: &'static str,
        /// Which argument.
        what: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What it was given.
        got: DType,
    },
    /// A value outside what an op can take: an index, a factor, a list of offsets.
    #[error("{op}: {text}")]
    Value {
        /// The op.
        op: &'static str,
        /// What was wrong and what was expected.
        text: String,
    },
    /// The attention operator refused its input.
    #[error("{op}: {source}")]
    Attention {
        /// The op.
        op: &'static str,
        /// Its reason.
        source: tercet_attention::Error,
    },
    /// A tensor that lives elsewhere than it must.
    #[error("{op}: {what} is on {got}, expected {expected}; `to_device` moves a tensor")]
    Device {
        /// The op.
        op: &'static str,
        /// Which argument.
        what: &'static str,
        /// Where it must be.
        expected: String,
        /// Where it is.
        got: String,
    },
    /// A device could not do what it was asked.
    #[error(transparent)]
    Cuda(#[from] tercet_cuda::Error),
    /// A variable used where it does not belong.
    #[error("tape: {0}")]
    Tape(&'static str),
}

impl Error {
    /// Whether the machine or the request is the reason rather than the program.
    pub fn is_users(&self) -> bool {
        matches!(self, Error::Cuda(error) if error.is_users())
    }

    /// Whether the memory of a device did not hold what was asked.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::Cuda(tercet_cuda::Error::OutOfMemory(_)))
    }

    pub(crate) fn shape(
        op: &'static str,
        what: &'static str,
        expected: impl Into<String>,
        got: &[usize],
    ) -> Self {
        Error::Shape { op, what, expected: expected.into(), got: got.to_vec() }
    }

    pub(crate) fn value(op: &'static str, text: impl Into<String>) -> Self {
        Error::Value { op, text: text.into() }
    }

    pub(crate) fn device(
        op: &'static str,
        what: &'static str,
        expected: &Device,
        got: &Device,
    ) -> Self {
        Error::Device { op, what, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn attention(op: &'static str) -> impl FnOnce(tercet_attention::Error) -> Self {
        move |source| match source {
            tercet_attention::Error::Device(source) => Error::Cuda(source),
            source => Error::Attention { op, source },
        }
    }
}
