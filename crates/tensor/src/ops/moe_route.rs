//! Router: each token picks its experts.

use std::sync::Arc;

use crate::{Result, Tape, Var};

/// Which rows go to which expert. Rows are the T·k (token, choice) pairs sorted by expert, then
/// token. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExpertPlan(Arc<Plan>);

#[derive(Debug)]
struct Plan {}

impl ExpertPlan {
    /// Chosen experts `[T, k]`, best first.
    pub fn experts(&self) -> &[i32] {
        todo!()
    }

    /// Rows of expert e: `offsets()[e]..offsets()[e + 1]`.
    pub fn offsets(&self) -> &[usize] {
        let _ = &self.0;
        todo!()
    }
}

/// What the router decides.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Weights of the chosen experts `[T, k]`.
    pub weights: Var,
    /// Load-balance loss, a scalar f32: `Σ_e f_e · P_e` with `f_e = E/(k·T) · (times e was
    /// chosen)` and `P_e` the mean probability of e; 1 when all is even. To be scaled by the model.
    pub balance: Var,
    /// Where each row goes.
    pub plan: ExpertPlan,
}

/// Softmax over the logits `[T, E]`, then the `top_k` most probable experts of each token
/// (lower index on ties). Weights are the probabilities, divided by their sum when `normalise`.
pub fn moe_route(tape: &mut Tape, logits: &Var, top_k: usize, normalise: bool) -> Result<Routing> {
    let _ = (tape, logits, top_k, normalise);
    todo!()
}
