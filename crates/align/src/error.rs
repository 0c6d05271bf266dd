//! What can be wrong with a configuration or with numbers.

/// Errors of this crate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A key of a configuration.
    #[error("config: `{key}` {problem}")]
    Config {
        /// The key, with the term it belongs to.
        key: String,
        /// What is wrong with it, worded to follow the key.
        problem: String,
    },
    /// Numbers that cannot be worked with, such as a score that is not finite.
    #[error("{what}: {problem}")]
    Value {
        /// What they are of.
        what: &'static str,
        /// What is wrong and what was expected.
        problem: String,
    },
}

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for tercet_train::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Config { key, problem } => Self::Config { key, problem },
            Error::Value { what, problem } => Self::Data(format!("{what}: {problem}")),
        }
    }
}

impl Error {
    pub(crate) fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Config { key: key.into(), problem: problem.into() }
    }

    pub(crate) fn value(what: &'static str, problem: impl Into<String>) -> Self {
        Error::Value { what, problem: problem.into() }
    }
}

/// Refuses a number that `fits` refuses; `range` says in words what was expected.
pub(crate) fn in_range(
    key: impl Into<String>,
    value: f64,
    range: &str,
    fits: impl Fn(f64) -> bool,
) -> Result<f64> {
    if value.is_finite() && fits(value) {
        return Ok(value);
    }
    Err(Error::config(key, format!("is {value}, expected {range}")))
}
