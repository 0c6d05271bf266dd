//! Zero-concentrated DP (Bun & Steinke 2016): one number, ρ, that adds up.
//!
//! A Gaussian release is 1/(2σ²)-zCDP. Poisson sampling only helps, but by how much one ρ cannot
//! say (the sampled Gaussian's Rényi divergence is not linear in the order), so the rate is ignored
//! here: the bound holds and is loose unless the rate is 1.

use super::{Phase, check_delta, merged};
use crate::Result;

/// ρ of the composition, `Σ T_i/(2σ_i²)`, whatever the rates.
///
/// # Errors
/// [`crate::Error::TooManySteps`].
pub fn rho(phases: &[Phase]) -> Result<f64> {
    Ok(merged(phases)?.iter().map(|p| p.steps() as f64 / (2.0 * p.sigma() * p.sigma())).sum())
}

/// An upper bound on ε: `ρ + 2·sqrt(ρ·log(1/δ))` (Bun & Steinke 2016, Proposition 1.3).
///
/// # Errors
/// [`crate::Error::Parameter`] for a δ out of range, [`crate::Error::TooManySteps`].
pub fn epsilon(phases: &[Phase], delta: f64) -> Result<f64> {
    check_delta(delta)?;
    let rho = rho(phases)?;
    Ok(rho + 2.0 * libm::sqrt(-rho * libm::log(delta)))
}
