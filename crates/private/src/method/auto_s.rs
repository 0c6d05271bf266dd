//! AUTO-S (Bu et al., arXiv 2206.07136): every gradient is brought to nearly the length C by
//! `C/(n + γ)`, so that C only scales the update and needs no search.

use crate::mechanism::clip::Rule;

/// γ of the paper.
pub const GAMMA: f64 = 0.01;
/// The paper's C.
pub const THRESHOLD: f64 = 1.0;
/// How gradients are shortened.
pub const RULE: Rule = Rule::AutoS { gamma: GAMMA };
