//! Membership inference by a threshold on the loss (Yeom et al. 2018): rows with a lower one are
//! said to have been learnt from.

use serde::Serialize;

use super::binomial::{Interval, bisect, clopper_pearson};
use super::{check_error_rate, check_scores};
use crate::{Error, Result};

/// How well losses tell members from others.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Membership {
    /// Rows that were learnt from.
    pub members: u64,
    /// Rows that were not.
    pub nonmembers: u64,
    /// Probability that a member's loss is below a nonmember's, equal ones counting half.
    pub auc: f64,
    /// Around it (see [`infer`]).
    pub auc_interval: Interval,
    /// `(TPR + 1 − FPR)/2` at the best threshold, chosen in hindsight on these very rows: an attack
    /// has no such luck.
    pub balanced_accuracy: f64,
    /// Share of members found when at most 1 % of the nonmembers are taken for some.
    pub tpr_at_1_percent: f64,
    /// Clopper and Pearson's, for that threshold.
    pub tpr_interval: Interval,
    /// (FPR, TPR) by threshold, from (0, 0) to (1, 1).
    #[serde(skip)]
    pub roc: Vec<(f64, f64)>,
}

/// Judges the threshold attack; intervals hold with confidence 1 − `p`.
///
/// The AUC's interval is that of DeLong, DeLong & Clarke-Pearson (1988) within [0, 1]. Where losses
/// separate entirely its variance is 0 and says nothing; then it is Clopper and Pearson's for as many
/// independent pairs as the smaller group has.
///
/// # Errors
/// [`Error::Audit`] for fewer than two rows of either kind, or a loss that is not finite;
/// [`Error::Parameter`] for a `p` outside (0, 0.5].
pub fn infer(members: &[f64], nonmembers: &[f64], p: f64) -> Result<Membership> {
    check_error_rate(p)?;
    check_scores("members", members)?;
    check_scores("nonmembers", nonmembers)?;
    let (n_in, n_out) = (members.len(), nonmembers.len());
    if n_in < 2 || n_out < 2 {
        return Err(Error::Audit(format!(
            "{n_in} members and {n_out} nonmembers are too few to compare, expected two of each"
        )));
    }
    let (sorted_in, sorted_out) = (sorted(members), sorted(nonmembers));
    let (auc, variance) = delong(&sorted_in, &sorted_out);
    let pairs = n_in.min(n_out) as u64;
    let auc_interval = if variance > 0.0 {
        let reach = quantile(p) * variance.sqrt();
        Interval { low: (auc - reach).max(0.0), high: (auc + reach).min(1.0) }
    } else if auc == 0.0 || auc == 1.0 {
        clopper_pearson(if auc == 1.0 { pairs } else { 0 }, pairs, p)?
    } else {
        // All losses are equal.
        clopper_pearson(pairs / 2, pairs, p)?
    };
    let (mut roc, mut balanced, mut found) = (vec![(0.0, 0.0)], 0.5f64, 0);
    let (mut hits, mut alarms) = (0, 0);
    while hits < n_in || alarms < n_out {
        let next = |sorted: &[f64], at: usize| sorted.get(at).copied().unwrap_or(f64::INFINITY);
        let threshold = next(&sorted_in, hits).min(next(&sorted_out, alarms));
        hits += sorted_in[hits..].iter().take_while(|&&score| score == threshold).count();
        alarms += sorted_out[alarms..].iter().take_while(|&&score| score == threshold).count();
        let (fpr, tpr) = (alarms as f64 / n_out as f64, hits as f64 / n_in as f64);
        balanced = balanced.max(0.5 * (tpr + 1.0 - fpr));
        if alarms * 100 <= n_out {
            found = hits;
        }
        roc.push((fpr, tpr));
    }
    Ok(Membership {
        members: n_in as u64,
        nonmembers: n_out as u64,
        auc,
        auc_interval,
        balanced_accuracy: balanced,
        tpr_at_1_percent: found as f64 / n_in as f64,
        tpr_interval: clopper_pearson(found as u64, n_in as u64, p)?,
        roc,
    })
}

fn sorted(scores: &[f64]) -> Vec<f64> {
    let mut sorted = scores.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The AUC and its variance: of each row the share of the other kind that it wins against.
fn delong(members: &[f64], nonmembers: &[f64]) -> (f64, f64) {
    // Twice the number of `sorted` that are above, equal ones once.
    let above = |sorted: &[f64], score: f64| {
        let lower = sorted.partition_point(|&other| other < score);
        let not_above = sorted.partition_point(|&other| other <= score);
        2 * sorted.len() - lower - not_above
    };
    let wins_in: Vec<usize> = members.iter().map(|&score| above(nonmembers, score)).collect();
    let wins_out: Vec<usize> =
        nonmembers.iter().map(|&score| 2 * members.len() - above(members, score)).collect();
    // Whole numbers until here, so that equal shares are equal and their variance 0.
    let spread = |wins: &[usize], others: usize| {
        let n = wins.len() as f64;
        let sum: u64 = wins.iter().map(|&win| win as u64).sum();
        let square = |&win: &usize| (win as f64 - sum as f64 / n).powi(2);
        let all_equal = wins.iter().all(|win| *win == wins[0]);
        let squares: f64 = if all_equal { 0.0 } else { wins.iter().map(square).sum() };
        squares / (n - 1.0) / n / (2.0 * others as f64).powi(2)
    };
    let pairs = 2.0 * members.len() as f64 * nonmembers.len() as f64;
    let auc = wins_in.iter().map(|&win| win as u64).sum::<u64>() as f64 / pairs;
    (auc, spread(&wins_in, nonmembers.len()) + spread(&wins_out, members.len()))
}

/// z with Pr[|N(0,1)| > z] = p.
fn quantile(p: f64) -> f64 {
    bisect((0.0, 40.0), |z| libm::erfc(z * std::f64::consts::FRAC_1_SQRT_2) > p)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::tests::random;

    #[test]
    fn auc_is_the_count_of_pairs_with_ties_a_half() {
        // Pairs by hand: 1<2, 1<3, 1<4; 2=2 (½), 2<3, 2<4; 5 loses all: 5.5 of 9.
        let found = infer(&[1.0, 2.0, 5.0], &[2.0, 3.0, 4.0], 0.05).unwrap();
        assert!((found.auc - 5.5 / 9.0).abs() < 1e-15);
        // Shares of members: 1, 2.5/3, 0; of nonmembers: 1.5/3, 2/3, 2/3.
        let variance = |shares: [f64; 3]| {
            let mean = shares.iter().sum::<f64>() / 3.0;
            shares.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / 2.0 / 3.0
        };
        let sum = variance([1.0, 2.5 / 3.0, 0.0]) + variance([0.5, 2.0 / 3.0, 2.0 / 3.0]);
        let high = (found.auc + 1.959_963_984_540_054 * sum.sqrt()).min(1.0);
        assert!((found.auc_interval.high - high).abs() < 1e-9, "{found:?}");
        assert_eq!(found.roc.first(), Some(&(0.0, 0.0)));
        assert_eq!(found.roc.last(), Some(&(1.0, 1.0)));
        // At loss ≤ 2: two of three members, one of three others. At ≤ 1: ⅓ and none, the same.
        assert!((found.balanced_accuracy - 2.0 / 3.0).abs() < 1e-15);
        assert!((found.tpr_at_1_percent - 1.0 / 3.0).abs() < 1e-15);
        // The area under the points is the AUC.
        let area = |w: &[(f64, f64)]| (w[1].0 - w[0].0) * 0.5 * (w[0].1 + w[1].1);
        let area: f64 = found.roc.windows(2).map(area).sum();
        assert!((area - found.auc).abs() < 1e-15);
    }

    #[test]
    fn the_interval_holds_the_truth_as_often_as_it_says() {
        // Members uniform on [0, 1), others on [0.2, 1.2): AUC = 1 − 0.8²/2 = 0.68.
        // 400 runs at 90 %: 360 − 5 standard deviations = 330.
        let mut held = 0;
        for run in 0..400 {
            let mut words = random(run);
            let members: Vec<f64> = (0..80).map(|_| words()).collect();
            let others: Vec<f64> = (0..80).map(|_| 0.2 + words()).collect();
            let Interval { low, high } = infer(&members, &others, 0.1).unwrap().auc_interval;
            held += usize::from((low..=high).contains(&0.68));
        }
        assert!(held >= 330, "{held}");
    }

    #[test]
    fn losses_that_separate_or_are_equal_still_have_an_interval() {
        let apart = infer(&[0.0; 50], &[1.0; 200], 0.05).unwrap();
        assert_eq!((apart.auc, apart.auc_interval.high, apart.balanced_accuracy), (1.0, 1.0, 1.0));
        assert!((apart.auc_interval.low - 0.025f64.powf(1.0 / 50.0)).abs() < 1e-9);
        assert_eq!(apart.tpr_at_1_percent, 1.0);
        let same = infer(&[1.0; 50], &[1.0; 200], 0.05).unwrap();
        assert_eq!((same.auc, same.balanced_accuracy, same.tpr_at_1_percent), (0.5, 0.5, 0.0));
        assert!(same.auc_interval.low < 0.4 && same.auc_interval.high > 0.6);
        assert_eq!(infer(&[2.0; 2], &[1.0; 2], 0.05).unwrap().auc, 0.0);
        for (members, others) in [(vec![1.0], vec![1.0; 5]), (vec![], vec![])] {
            assert!(infer(&members, &others, 0.05).is_err());
        }
        assert!(infer(&[1.0, f64::NAN], &[1.0; 2], 0.05).is_err());
        assert!(infer(&[1.0; 2], &[1.0; 2], 0.0).is_err());
    }

    #[test]
    fn the_normal_quantile_is_the_tables() {
        // Abramowitz & Stegun, table 26.5.
        assert!((quantile(0.05) - 1.959_963_984_540_054).abs() < 1e-12);
        assert!((quantile(0.5) - 0.674_489_750_196_082).abs() < 1e-12);
    }
}
