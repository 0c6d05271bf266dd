//! A private tuning run: from a configuration to an adapter and what it gives away.
//!
//! | room | what it does |
//! |---|---|
//! | [`config`] | the file: unknown keys refused, every number in its range |
//! | [`budget`] | noise, rate and ε of the whole run, before it starts |
//! | [`rows`] | rows to persons to examples |
//! | [`task`] | one private step of the training loop |
//! | `joint` | gradient and statistics of a step as one release |
//! | [`account`] | what is spent so far, and whether one more step fits |
//! | [`report`] | `privacy.json`: what is promised, beside the adapter |
//! | [`run`](mod@run) | a whole run |
//! | [`planted`] | canaries that a run plants itself |
//! | [`attack`] | how well a run's adapter knows canaries and rows: for the audit |

pub mod account;
pub mod attack;
pub mod budget;
pub mod config;
mod joint;
mod kept;
pub mod planted;
pub mod report;
pub mod rows;
pub mod run;
pub mod task;

pub use budget::{Budget, Mode};
pub use config::{PrivateConfig, PrivateSection};
pub use run::{LEDGER, tune};

impl From<crate::Error> for tercet_train::Error {
    fn from(error: crate::Error) -> Self {
        use crate::Error as Private;
        let text = error.to_string();
        match error {
            Private::Parameter { .. }
            | Private::TooManySteps { .. }
            | Private::TooManyPhases { .. }
            | Private::Unreachable { .. } => Self::config("private", format!("cannot be: {text}")),
            Private::People(_) | Private::Audit(_) | Private::Records(_) => Self::Data(text),
            Private::State(_) | Private::Controller(_) | Private::Ledger { .. } => {
                Self::Checkpoint(text)
            }
            Private::Io { action, path, reason } => {
                Self::Io { action, path, source: std::io::Error::other(reason) }
            }
            Private::Step(_) | Private::Entropy(_) => Self::Fault(text),
        }
    }
}
