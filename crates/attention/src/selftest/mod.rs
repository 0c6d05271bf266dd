//! The operator's own tests, as a table: whoever has a machine can ask whether it computes right.
//!
//! A [`Way`] is a way to compute a [`Case`]: the float64 reference, the CPU kernels in f32 and bf16,
//! and whatever a device adds. Every suite runs on every way and gives one [`Row`] a case:
//!
//! * `golden`: the stored float64 results, and the 2× rule on their inputs;
//! * `property`: the 2× rule on random specs, shapes and lengths, and facts that hold whatever the
//!   numbers are;
//! * `bitwise`: the same bits on a repeat, for any threads, and whatever comes after or beside;
//! * `hostile`: NaN, huge and tiny magnitudes, inputs that lie.
//!
//! The crate's integration tests call the same functions.

mod bounds;
mod case;
pub mod cuda;
mod cuda_suite;
mod exact;
mod fast;
mod golden;
mod magnitude;
pub mod oracles;
mod plain;
mod plain_compress;
mod rule;
mod suite;
mod tally;
mod visible;
mod ways;

pub use bounds::*;
pub use case::*;
pub use cuda_suite::{Part, cuda_parts, run_cuda};
pub use exact::*;
pub use fast::*;
pub use golden::Golden;
pub use plain::{plain, plain_attend};
pub use rule::*;
pub use suite::*;
pub use tally::{Check, Fault, Row, Tally, ensure};
pub use visible::{Rows, visible, visible_to};
pub use ways::*;
