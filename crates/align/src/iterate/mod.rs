//! The iterative loop (MaPPO, arXiv 2507.21183, algorithm 1 and section 4.1): the prompts are cut
//! into parts; on each the current policy answers, a reward scores, the best answer is set against
//! the worst, the policy is trained on these pairs, and the next part follows.
//!
//! `prompts` reads what is asked, `samples` has it answered and scored, `measure` says what a
//! policy is worth, `rounds` is the loop, `report` what one sees at the end. Everything a round
//! made is kept below `round-K`; a killed run goes on at the portion of samples, or the step of
//! training, where it was.

mod config;
mod measure;
mod prompts;
mod report;
mod rounds;
mod samples;
mod single;

pub use config::{IterativeConfig, IterativeSection, SampleConfig, SamplingSection};
pub use measure::Worth;
pub use rounds::{IterativeReport, iterate};
pub use samples::Sample;
pub use single::{SampleReport, sample};
