//! What can be wrong with a question about privacy, or with a private step.

use std::path::{Path, PathBuf};

/// Errors of this crate. Messages say what was wrong, what was expected and what to do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A number outside its range.
    #[error("{name} = {value} is refused: {expected}")]
    Parameter {
        /// The parameter, such as `sigma`.
        name: &'static str,
        /// What was given.
        value: f64,
        /// What is allowed and why.
        expected: &'static str,
    },
    /// More steps than the accountants are made for.
    #[error(
        "{steps} steps are refused: at most {most} are accounted, past that rounding would spoil \
         the bounds"
    )]
    TooManySteps {
        /// Steps asked for, all phases together.
        steps: u128,
        /// The limit.
        most: u64,
    },
    /// More different noise levels than one composition may have.
    #[error(
        "{phases} different (sigma, rate) pairs are refused: at most {most} can be composed; round \
         sigma up to fewer values"
    )]
    TooManyPhases {
        /// Different pairs given.
        phases: usize,
        /// The limit.
        most: usize,
    },
    /// No noise within the searched range reaches the target.
    #[error(
        "epsilon = {target} cannot be reached with sigma up to {most_sigma}: the smallest epsilon \
         there is {reachable:.6}; take fewer steps, a smaller rate or a larger delta"
    )]
    Unreachable {
        /// The epsilon asked for.
        target: f64,
        /// The epsilon at the largest sigma searched.
        reachable: f64,
        /// The largest sigma searched.
        most_sigma: f64,
    },
    /// Rows that cannot be told apart by person.
    #[error("people: {0}")]
    People(String),
    /// Sizes or numbers of a private step that do not fit one another.
    #[error("private step: {0}")]
    Step(String),
    /// A controller that cannot be made or gone on from.
    #[error("the controller: {0}")]
    Controller(String),
    /// Scores or canaries that an audit cannot rest on.
    #[error("audit: {0}")]
    Audit(String),
    /// Records that cannot be generated as asked.
    #[error("records: {0}")]
    Records(String),
    /// A ledger that cannot be gone on from.
    #[error("the privacy ledger {} {problem}", path.display())]
    Ledger {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A file that could not be read or written.
    #[error("cannot {action} {}: {reason}", path.display())]
    Io {
        /// What was tried, such as `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers ({0}); noise that can be guessed protects nobody")]
    Entropy(String),
}

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the user's input is at fault (exit code 2) and not this program or the machine (1).
    pub fn is_users(&self) -> bool {
        !matches!(self, Self::Step(_) | Self::Entropy(_))
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { action, path, reason: error.to_string() }
    }

    pub(crate) fn parameter(name: &'static str, value: f64, expected: &'static str) -> Self {
        Self::Parameter { name, value, expected }
    }
}
