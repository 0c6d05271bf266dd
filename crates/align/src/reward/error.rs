//! What can go wrong between an answer and its score.

/// Errors of rewards. Messages say what was wrong, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key of `[reward]`.
    #[error("config: `{key}` {problem}")]
    Config {
        /// The dotted key, such as `reward.rules[0].pattern`.
        key: String,
        /// What is wrong with it, worded to follow the key.
        problem: String,
    },
    /// A row of the prompts lacks what a rule or the reward model reads from it.
    #[error("the row of prompt {id}: {problem}")]
    Row {
        /// The id of the answer, or of the prompt.
        id: u64,
        /// What is wrong with the row and what was expected.
        problem: String,
    },
    /// The external program failed; it has been ended.
    #[error("reward program {name}: {problem}{}", last_words(stderr))]
    Program {
        /// The program's name, as configured.
        name: String,
        /// What it did and what was expected.
        problem: String,
        /// The last lines of its standard error.
        stderr: Vec<String>,
    },
    /// The reward model cannot be loaded or refused a text.
    #[error("reward model: {0}")]
    Model(#[from] tercet_model::Error),
    /// The reward model cannot score an answer.
    #[error("answer {id}: {problem}")]
    Answer {
        /// The id of the answer.
        id: u64,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The stop flag was raised; the answers were not all scored.
    #[error("interrupted while scoring answers")]
    Interrupted,
}

/// Result of every fallible call of this module.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for tercet_train::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Config { key, problem } => Self::Config { key, problem },
            Error::Interrupted => Self::Interrupted,
            other => Self::Data(other.to_string()),
        }
    }
}

impl Error {
    /// Whether the user's input or program is at fault (exit code 2) and not this program (1).
    pub fn is_users(&self) -> bool {
        match self {
            Self::Model(error) => error.is_users(),
            _ => true,
        }
    }

    pub(crate) fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }
}

/// The end of the standard error, if there was any, to follow a message.
fn last_words(stderr: &[String]) -> String {
    if stderr.is_empty() {
        return String::new();
    }
    format!(". The last lines of its standard error:\n  {}", stderr.join("\n  "))
}

/// The beginning of a text of others' making, for messages: one line, without control characters.
pub(super) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 160;
    let mut chars = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    let mut short: String = chars.by_ref().take(LONGEST).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    short
}
