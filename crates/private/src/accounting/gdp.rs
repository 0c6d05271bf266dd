//! Gaussian DP by the central limit theorem (Bu, Dong, Long & Su 2019). **Information, not a
//! bound**: in the usual regimes of training the value lies *below* the truth, by a factor of up to
//! 14 at small noise.

use super::{Phase, gaussian, merged};
use crate::Result;

/// μ of the limit, `sqrt(Σ q_i²·T_i·(exp(1/σ_i²) − 1))`. Information, not a bound.
///
/// # Errors
/// [`crate::Error::TooManySteps`].
pub fn mu_clt(phases: &[Phase]) -> Result<f64> {
    let sum: f64 = merged(phases)?
        .iter()
        .map(|p| {
            p.rate() * p.rate() * p.steps() as f64 * libm::expm1(1.0 / (p.sigma() * p.sigma()))
        })
        .sum();
    Ok(libm::sqrt(sum))
}

/// ε that the limit suggests, infinite where μ is too large to be told. Information, **not a
/// bound**: nothing may be calibrated or stopped by it.
///
/// # Errors
/// [`crate::Error::Parameter`] for a δ out of range, [`crate::Error::TooManySteps`].
pub fn epsilon_clt(phases: &[Phase], delta: f64) -> Result<f64> {
    super::check_delta(delta)?;
    let mu = mu_clt(phases)?;
    if mu > 1e6 { Ok(f64::INFINITY) } else { gaussian::epsilon(mu, delta) }
}
