//! What the suites share: cases, the three ways to compute them, and measures of error.
#![allow(dead_code, unused_imports, reason = "each suite uses its own part")]

mod bounds;
mod case;
mod magnitude;
mod paths;
mod plain;
mod plain_compress;
mod rule;
mod visible;

pub use bounds::*;
pub use case::*;
pub use magnitude::{attend_magnitudes, magnitudes};
pub use paths::*;
pub use plain::{plain, plain_attend};
pub use rule::*;
pub use visible::{visible, visible_to};
