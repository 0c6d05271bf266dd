//! The operator's errors as Python exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use tercet_attention::Error;

/// A `ValueError` whose message starts with the argument at fault; a `RuntimeError` when it is a
/// device's.
pub fn value_error(error: Error) -> PyErr {
    PyValueError::new_err(match &error {
        Error::Device(error) => return PyRuntimeError::new_err(error.to_string()),
        Error::Spec(rule) => format!("spec.{} = {} {}", rule.field, rule.value, rule.rule),
        Error::Dims(text) => format!("q: {text}"),
        Error::Phi(text) => format!("phi: {text}"),
        Error::Indices(text) => format!("indices: {text}"),
        Error::CuSeqlens(_) | Error::Length { .. } | Error::Pages(_) => error.to_string(),
    })
}
