//! Who is in a step: every person by a coin of its own (Poisson sampling).
//!
//! A person is in when a 64-bit word is below `⌊rate·2⁶⁴⌋`, an exact comparison of integers. The
//! product is exact, since a power of two only moves the exponent, so the probability is the rate
//! rounded down to a multiple of 2⁻⁶⁴: never above the rate, below it by less than 2⁻⁶⁴, and equal
//! to it from 2⁻¹¹ on, where a double has no finer digits. A smaller rate gives away less, so the
//! accountant's answer for `rate` holds.

use rand_chacha::rand_core::Rng;

use super::key::{Key, words};
use crate::Result;
use crate::accounting::Phase;

/// Draws persons.
#[derive(Clone)]
pub struct Sampler {
    key: [u8; 32],
    rate: f64,
    /// Words below this mean "in"; 2⁶⁴ at rate 1.
    threshold: u128,
}

impl Sampler {
    /// A sampler of `rate`, a probability from 10⁻¹² to 1: the expected batch over a public number
    /// of persons.
    ///
    /// # Errors
    /// [`crate::Error::Parameter`].
    pub fn new(key: &Key, rate: f64) -> Result<Self> {
        // The accountant's own rule for rates.
        Phase::new(1.0, rate, 0)?;
        let threshold = (rate * 2f64.powi(64)) as u128;
        Ok(Self { key: key.derived("coins"), rate, threshold })
    }

    /// The probability with which each person is drawn.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// The persons in the step of `stream` ([`super::ledger::Ledger::next_stream`]), ascending;
    /// often none. Person i's coin is the stream's i-th 64-bit word, whoever else there is.
    pub fn draw(&self, stream: u64, people: usize) -> Vec<usize> {
        let mut rng = words(&self.key, stream, 0);
        (0..people).filter(|_| u128::from(rng.next_u64()) < self.threshold).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(rate: f64) -> Sampler {
        Sampler::new(&Key::insecure(5), rate).unwrap()
    }

    #[test]
    fn the_threshold_is_the_rate_rounded_down() {
        assert_eq!(sampler(1.0).threshold, 1 << 64);
        assert_eq!(sampler(0.5).threshold, 1 << 63);
        let rate = 64.0 / 81412.0;
        let share = sampler(rate).threshold as f64 / 2f64.powi(64);
        assert!(share <= rate && rate - share < 2f64.powi(-63), "{share}");
        // 2⁶⁴·10⁻¹² = 18446744.07…
        assert_eq!(sampler(1e-12).threshold, 18_446_744);
    }

    #[test]
    fn rates_that_are_no_probabilities_are_refused() {
        for rate in [0.0, -0.1, 1.0 + f64::EPSILON, f64::NAN, f64::INFINITY, 1e-13] {
            assert!(Sampler::new(&Key::insecure(1), rate).is_err(), "{rate}");
        }
    }

    #[test]
    fn draws_depend_on_key_and_stream_alone_and_others_change_no_coin() {
        let sampler = sampler(0.3);
        let draw = sampler.draw(7, 1000);
        assert_eq!(draw, sampler.draw(7, 1000));
        assert_ne!(draw, sampler.draw(8, 1000));
        assert_ne!(draw, Sampler::new(&Key::insecure(6), 0.3).unwrap().draw(7, 1000));
        let fewer: Vec<usize> = draw.iter().copied().filter(|&person| person < 600).collect();
        assert_eq!(sampler.draw(7, 600), fewer);
    }

    #[test]
    fn everybody_and_nobody_are_legal_draws() {
        assert_eq!(sampler(1.0).draw(0, 5), [0, 1, 2, 3, 4]);
        assert!(sampler(1e-9).draw(0, 100).is_empty());
        assert!(sampler(0.5).draw(0, 0).is_empty());
    }

    /// Binomial: with n = 4·10⁶ coins five standard errors are 5·√(q(1−q)n). Pairs of persons, and
    /// one person in following steps, must be independent too.
    #[test]
    fn coins_fall_at_the_rate_and_independently() {
        let rate = 0.1;
        let sampler = sampler(rate);
        let (steps, people) = (4000u64, 1000usize);
        let draws: Vec<Vec<bool>> = (0..steps)
            .map(|stream| {
                let mut is_in = vec![false; people];
                sampler.draw(stream, people).into_iter().for_each(|i| is_in[i] = true);
                is_in
            })
            .collect();
        let n = (steps as usize * people) as f64;
        let close = |count: usize, rate: f64| {
            let off = (count as f64 - rate * n).abs();
            assert!(off < 5.0 * (rate * (1.0 - rate) * n).sqrt(), "{count} of {n} at {rate}");
        };
        close(draws.iter().flatten().filter(|&&is_in| is_in).count(), rate);
        let beside = |d: &Vec<bool>| (0..people).filter(|&i| d[i] && d[(i + 1) % people]).count();
        close(draws.iter().map(beside).sum(), rate * rate);
        let pairs = draws.iter().zip(draws.iter().cycle().skip(1));
        let both =
            |(a, b): (&Vec<bool>, &Vec<bool>)| a.iter().zip(b).filter(|(a, b)| **a && **b).count();
        close(pairs.map(both).sum(), rate * rate);
    }
}
