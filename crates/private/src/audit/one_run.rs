//! A lower bound on ε from a single run (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846).
//!
//! Each of m canaries was in the data or not by a fair coin of its own. Whoever sees the model
//! guesses r of the coins and v guesses are right. Under (ε, δ) differential privacy a guess is
//! right with probability `p₀ = 1/(1 + e^−ε)` at most, so that
//! `Pr[v or more] ≤ β + 2·m·δ·α`, `β = Pr[Bin(r, p₀) ≥ v]`, `α = max_i Pr[v > Bin(r, p₀) ≥ v−i]/i`
//! (their Appendix D). Each ε for which that is below 1 − confidence is refuted.

use super::binomial::{self, Binomial, bisect};
use super::{check_error_rate, check_scores};
use crate::{Error, Result};

/// No bound is larger: log-odds past it are beyond what counts can show.
const MOST_EPSILON: f64 = 64.0;

/// What was guessed and how much of it was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Guesses {
    /// Canaries m, each with its coin, guessed or not.
    pub canaries: u64,
    /// Guesses r.
    pub made: u64,
    /// Right ones v.
    pub right: u64,
}

/// How likely it is to be right `right` times or more under (ε, δ): a bound, at most 1.
///
/// # Errors
/// [`Error::Audit`] when there are more guesses than canaries, more right ones than guesses, or
/// more canaries than 2²⁴; [`Error::Parameter`] for an ε outside [0, 64] or a δ outside [0, 1).
pub fn p_value(guesses: Guesses, epsilon: f64, delta: f64) -> Result<f64> {
    let Guesses { canaries, made, right } = guesses;
    if !(right <= made && made <= canaries && canaries <= binomial::MOST) {
        return Err(Error::Audit(format!(
            "{right} right of {made} guesses about {canaries} canaries are refused; expected \
             right ones among the guesses, guesses among the canaries, and at most {} of them",
            binomial::MOST
        )));
    }
    if !(0.0..=MOST_EPSILON).contains(&epsilon) {
        return Err(Error::parameter("epsilon", epsilon, "it is a number from 0 to 64"));
    }
    if !(0.0..1.0).contains(&delta) {
        return Err(Error::parameter("delta", delta, "it is a number from 0 to below 1"));
    }
    let (chance, v) = (Binomial::new(made, libm::exp(epsilon)), right as usize);
    let mut alpha = 0.0f64;
    if delta > 0.0 {
        let mut sum = 0.0;
        for i in 1..=v {
            sum += chance.at(v - i);
            alpha = alpha.max(sum / i as f64);
        }
    }
    Ok((chance.from(v) + 2.0 * canaries as f64 * delta * alpha).min(1.0))
}

/// The largest ε that the guesses refute with confidence 1 − p; 0 when they refute none.
///
/// How many guesses are made, and which, must not depend on the coins.
///
/// # Errors
/// As [`p_value`]; [`Error::Parameter`] for a `p` outside (0, 0.5].
pub fn epsilon_lower_bound(guesses: Guesses, delta: f64, p: f64) -> Result<f64> {
    check_error_rate(p)?;
    p_value(guesses, 0.0, delta)?;
    let refuted = |epsilon| p_value(guesses, epsilon, delta).is_ok_and(|value| value < p);
    Ok(bisect((0.0, MOST_EPSILON), refuted))
}

/// Guesses from scores: of `made`, half say of the lowest scores that they were in, half of the
/// highest that they were not; nothing is said of the rest.
///
/// Scores that are equal go together: where not all of them would be guessed, none is. Which
/// guesses are made is a function of the scores alone, not of their order.
///
/// # Errors
/// [`Error::Audit`] for lists of different lengths, or a score that is not finite.
pub fn guess(scores: &[f64], included: &[bool], made: usize) -> Result<Guesses> {
    check_scores("canaries", scores)?;
    if scores.len() != included.len() {
        let (s, i) = (scores.len(), included.len());
        return Err(Error::Audit(format!("{s} canaries have scores, {i} have coins")));
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let half = (made / 2).min(order.len() / 2);
    let mut lowest = half;
    while lowest > 0 && scores[order[lowest - 1]] == scores[order[lowest]] {
        lowest -= 1;
    }
    let mut highest = order.len() - half;
    while highest < order.len() && scores[order[highest - 1]] == scores[order[highest]] {
        highest += 1;
    }
    let right = order[..lowest].iter().filter(|&&i| included[i]).count()
        + order[highest..].iter().filter(|&&i| !included[i]).count();
    let made = lowest + order.len() - highest;
    Ok(Guesses { canaries: scores.len() as u64, made: made as u64, right: right as u64 })
}

/// The best bound of several numbers of guesses: all canaries, a half, a quarter, … down to 16. Each
/// is given its share of `p`, so that trying them all costs no confidence (Bonferroni).
///
/// # Errors
/// As [`guess`] and [`epsilon_lower_bound`]; [`Error::Audit`] for no canaries, or coins that were
/// not fair: so uneven that fair ones do it once in 10⁹.
pub fn best(scores: &[f64], included: &[bool], delta: f64, p: f64) -> Result<(Guesses, f64)> {
    let canaries = scores.len();
    if canaries == 0 {
        return Err(Error::Audit("there are no canaries to guess".into()));
    }
    let mut tries = vec![guess(scores, included, canaries)?];
    let heads = included.iter().filter(|&&coin| coin).count();
    let fewer = heads.min(canaries - heads);
    let tail = Binomial::new(canaries as u64, 1.0).from(canaries - fewer);
    if 2.0 * tail < 1e-9 {
        return Err(Error::Audit(format!(
            "{heads} of {canaries} canaries were included, which fair coins do not do; the bound \
             rests on coins, so the canaries must be those of a plan, all of them, in or out"
        )));
    }
    let mut made = canaries / 2;
    while made >= 16 {
        tries.push(guess(scores, included, made)?);
        made /= 2;
    }
    let share = p / tries.len() as f64;
    check_error_rate(p)?;
    let mut best = (tries[0], 0.0);
    for guesses in tries {
        let bound = epsilon_lower_bound(guesses, delta, share)?;
        if bound > best.1 {
            best = (guesses, bound);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::tests::random;

    #[test]
    fn without_delta_and_with_all_right_the_bound_is_closed() {
        // p₀^r = 0.05.
        let guesses = Guesses { canaries: 100, made: 100, right: 100 };
        let p0 = 0.05f64.powf(0.01);
        let bound = epsilon_lower_bound(guesses, 0.0, 0.05).unwrap();
        assert!((bound - (p0 / (1.0 - p0)).ln()).abs() < 1e-10, "{bound}");
        assert!(epsilon_lower_bound(guesses, 1e-3, 0.05).unwrap() < bound);
        // δ = ½ allows anything.
        assert_eq!(epsilon_lower_bound(guesses, 0.5, 0.05).unwrap(), 0.0);
    }

    #[test]
    fn the_p_value_grows_with_epsilon_and_with_delta() {
        let guesses = Guesses { canaries: 500, made: 200, right: 150 };
        let mut last = 0.0;
        for step in 0..80 {
            let value = p_value(guesses, f64::from(step) * 0.05, 1e-5).unwrap();
            assert!(value >= last, "{step}");
            assert!(value >= p_value(guesses, f64::from(step) * 0.05, 0.0).unwrap());
            last = value;
        }
        assert_eq!(last, 1.0);
    }

    #[test]
    fn no_guess_rests_on_the_order_of_equal_scores() {
        // Included ones first: a rule by position would guess all right.
        let included: Vec<bool> = (0..100).map(|i| i < 50).collect();
        let none = guess(&[1.0; 100], &included, 100).unwrap();
        assert_eq!((none.made, none.right), (0, 0));
        // Two values: each half is whole.
        let two: Vec<f64> = (0..100).map(|i| f64::from(i / 50)).collect();
        let all = guess(&two, &included, 100).unwrap();
        assert_eq!((all.made, all.right), (100, 100));
        assert_eq!(guess(&two, &included, 40).unwrap().made, 0);
        assert_eq!(guess(&[], &[], 4).unwrap().made, 0);
        assert_eq!(guess(&[1.0], &[true], 1).unwrap().made, 0);
        assert_eq!(guess(&[1.0, 2.0], &[true, false], 2).unwrap().right, 2);
    }

    #[test]
    fn a_private_answer_is_not_refuted_more_often_than_said() {
        // Randomized response at ε = 1 is exactly as bad as ε = 1 allows: at p = 0.05 at most
        // 5 % of runs may show a bound above 1. 1000 runs: 50 + 5 standard deviations = 85.
        let mut above = 0;
        for run in 0..1000 {
            let mut words = random(run);
            let coins: Vec<bool> = (0..200).map(|_| words() < 0.5).collect();
            let told = 1.0 / (1.0 + (-1f64).exp());
            let scores = coins.iter().map(|&coin| {
                let says = coin == (words() < told);
                // Distinct, so that no guess is left out.
                if says { -1.0 - words() } else { 1.0 + words() }
            });
            let scores: Vec<f64> = scores.collect();
            above += usize::from(best(&scores, &coins, 0.0, 0.05).unwrap().1 > 1.0);
        }
        assert!(above <= 85, "{above}");
    }

    #[test]
    fn coins_that_are_not_fair_and_numbers_that_mean_nothing_are_refused() {
        let scores: Vec<f64> = (0..64).map(f64::from).collect();
        assert!(best(&scores, &[true; 64], 0.0, 0.05).is_err());
        assert!(best(&[], &[], 0.0, 0.05).is_err());
        assert!(best(&[f64::NAN, 1.0], &[true, false], 0.0, 0.05).is_err());
        assert!(best(&[1.0], &[true, false], 0.0, 0.05).is_err());
        let some = Guesses { canaries: 10, made: 5, right: 5 };
        for wrong in [Guesses { right: 6, ..some }, Guesses { canaries: 4, ..some }] {
            assert!(epsilon_lower_bound(wrong, 0.0, 0.05).is_err());
        }
        for (delta, p) in [(-1.0, 0.05), (1.0, 0.05), (f64::NAN, 0.05), (0.0, 0.0), (0.0, 0.9)] {
            assert!(epsilon_lower_bound(some, delta, p).is_err(), "{delta} {p}");
        }
        assert!(p_value(some, 65.0, 0.0).is_err() && p_value(some, f64::NAN, 0.0).is_err());
        let nothing = Guesses { canaries: 0, made: 0, right: 0 };
        assert_eq!(epsilon_lower_bound(nothing, 0.0, 0.05).unwrap(), 0.0);
    }
}
