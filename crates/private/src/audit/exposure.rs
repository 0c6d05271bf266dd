//! Exposure (Carlini et al. 2019, arXiv 1802.08232): how far up a canary ranks.

use super::check_scores;
use crate::{Error, Result};

/// `log2 |candidates| − log2 rank` in bits: the canary's rank by loss among itself and the
/// `others`, sequences that could have been planted in its stead. 0 to `log2(others + 1)`; a model
/// that never saw it gives on average 1.44 (log2 e), whatever their number.
///
/// Of equal losses half count as lower, so that a model that knows nothing gets about 1 bit, not
/// all of them.
///
/// # Errors
/// [`Error::Audit`] without others, or for a loss that is not finite.
pub fn exposure(canary: f64, others: &[f64]) -> Result<f64> {
    check_scores("candidates", others)?;
    check_scores("canaries", &[canary])?;
    if others.is_empty() {
        return Err(Error::Audit(
            "a canary without candidates has no exposure; give what could have been planted in \
             its stead"
                .into(),
        ));
    }
    let lower = others.iter().filter(|&&other| other < canary).count() as f64;
    let equal = others.iter().filter(|&&other| other == canary).count() as f64;
    let rank = 1.0 + lower + 0.5 * equal;
    Ok(libm::log2((others.len() + 1) as f64) - libm::log2(rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_1024_has_ten_bits_and_the_last_none() {
        let others: Vec<f64> = (1..1024).map(f64::from).collect();
        assert_eq!(exposure(0.5, &others).unwrap(), 10.0);
        assert_eq!(exposure(2000.0, &others).unwrap(), 0.0);
        assert_eq!(exposure(3.5, &others).unwrap(), 8.0);
        // Rank 1 + 2 + ½.
        assert!((exposure(3.0, &others).unwrap() - (10.0 - 3.5f64.log2())).abs() < 1e-12);
    }

    #[test]
    fn equal_losses_expose_nothing() {
        let bits = exposure(1.0, &[1.0; 1023]).unwrap();
        assert!((bits - (10.0 - 512.5f64.log2())).abs() < 1e-12 && bits < 1.0, "{bits}");
        assert!(exposure(1.0, &[]).is_err() && exposure(f64::NAN, &[1.0]).is_err());
        assert!(exposure(1.0, &[f64::INFINITY]).is_err());
    }
}
