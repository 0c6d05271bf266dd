//! Gaussian noise: how much for which threshold, and the numbers themselves.
//!
//! # How much
//!
//! Blocks with L2 sensitivities C_g and standard deviations s_g are together one Gaussian mechanism
//! of noise multiplier `σ_eff = (Σ_g C_g²/s_g²)^(−1/2)`: divide every block by its s_g, and a person
//! moves the whole by `(Σ C_g²/s_g²)^(1/2)` under noise of variance 1. [`Split`] has the splits for
//! which it is σ. The tempting `s_g = σ·C_g` is not among them: it is σ/√G.
//!
//! # The numbers
//!
//! Box and Muller's: `√(−2 ln U)·(cos, sin)(2πV)`. U has all the digits a double has, however small
//! it is: the exponent is the number of zero bits before the first one in as many words as it
//! takes, the mantissa 52 more. So the radius is exact to a few 2⁻⁵² relative in every tail (a
//! fixed-point U would end the tail at 8.6 σ), down to where a double ends, at 37 σ. `ln`, `cos` and
//! `sin` are `libm`'s, with the same bits everywhere. What doubles cannot do is have every value of
//! the grid as their image, which in principle says something of the sum (Mironov 2012): the
//! hardened grid's discrete Gaussian has no such holes.
//!
//! Elements are drawn in pieces of 1024, and piece i of a stream begins at its word i·2³²: what an
//! element gets is a function of key, stream, slot and place alone. A piece takes some ten thousand
//! words; that it should need 2³² has a probability below 2⁻¹⁰⁰⁰.

use rand_chacha::rand_core::Rng;
use rayon::prelude::*;

use super::clip::Grid;
use super::discrete;
use super::key::{Key, words};
use crate::{Error, Result};

/// Elements that are drawn in one go; even.
const PIECE: usize = 1 << 10;
/// Raises every standard deviation a little, so that no rounding leaves it below what it stands
/// for.
const UP: f64 = 1.0 + 1.0 / (1u64 << 45) as f64;

/// How σ is divided among blocks with thresholds C_g and d_g elements.
#[derive(Clone, Debug, PartialEq)]
pub enum Split {
    /// The same for all: `s_g = σ·√(Σ C_h²)`.
    Flat,
    /// The same share of the budget for each block: `s_g = σ·C_g·√G`.
    Equal,
    /// Shares of the budget, above 0, summing to 1: `s_g = σ·C_g/√w_g`.
    Weights(Vec<f64>),
    /// The least `Σ d_g·s_g²`: `s_g² = σ²·(C_g/√d_g)·Σ C_h·√d_h`, from `w_g ∝ C_g·√d_g`.
    LeastEnergy,
}

impl Split {
    /// Standard deviation by block, for the noise multiplier `sigma` (0 is no noise, and no
    /// privacy), `bounds` C_g and `dims` d_g.
    ///
    /// # Errors
    /// [`Error::Parameter`] for numbers out of range, [`Error::Step`] when lists do not fit.
    pub fn scales(&self, sigma: f64, bounds: &[f64], dims: &[usize]) -> Result<Vec<f64>> {
        if !(0.0..=1e9).contains(&sigma) {
            let expected = "a noise multiplier is a number from 0 to 1e9";
            return Err(Error::parameter("sigma", sigma, expected));
        }
        if bounds.is_empty() || bounds.len() != dims.len() {
            let (c, d) = (bounds.len(), dims.len());
            return Err(Error::Step(format!("there are {c} thresholds and {d} sizes of blocks")));
        }
        if let Some(&bound) = bounds.iter().find(|c| !(1e-31..=1e31).contains(*c)) {
            let expected = "a clipping threshold is a number from 1e-31 to 1e31";
            return Err(Error::parameter("bound", bound, expected));
        }
        if dims.contains(&0) {
            return Err(Error::Step("a block is empty".into()));
        }
        let shares: Vec<f64> = match self {
            Self::Flat => {
                let norm = bounds.iter().map(|c| c * c).sum::<f64>().sqrt();
                return Ok(vec![sigma * norm * UP; bounds.len()]);
            }
            Self::Equal => vec![1.0 / bounds.len() as f64; bounds.len()],
            Self::Weights(shares) => {
                self.check_weights(shares, bounds.len())?;
                let sum: f64 = shares.iter().sum();
                shares.iter().map(|share| share / sum).collect()
            }
            Self::LeastEnergy => {
                let cost = |(c, &d): (&f64, &usize)| c * (d as f64).sqrt();
                let costs: Vec<f64> = bounds.iter().zip(dims).map(cost).collect();
                let sum: f64 = costs.iter().sum();
                costs.into_iter().map(|cost| cost / sum).collect()
            }
        };
        Ok(bounds.iter().zip(shares).map(|(c, share)| sigma * c / share.sqrt() * UP).collect())
    }

    fn check_weights(&self, shares: &[f64], blocks: usize) -> Result<()> {
        if shares.len() != blocks {
            let got = shares.len();
            return Err(Error::Step(format!(
                "there are {got} shares of the budget for {blocks} blocks"
            )));
        }
        if let Some(&share) = shares.iter().find(|w| !(1e-12..=1.0).contains(*w)) {
            let expected = "a share of the budget is a number from 1e-12 to 1";
            return Err(Error::parameter("weight", share, expected));
        }
        let sum: f64 = shares.iter().sum();
        if (sum - 1.0).abs() > 1e-9 {
            return Err(Error::parameter("weights", sum, "shares of the budget must sum to 1"));
        }
        Ok(())
    }
}

/// `(Σ C_g²/s_g²)^(−1/2)`: the noise multiplier of all blocks together; 0 when one has no noise,
/// NaN for nonsense.
pub fn effective_sigma(bounds: &[f64], scales: &[f64]) -> f64 {
    let squares = bounds.iter().zip(scales).map(|(c, s)| (c / s) * (c / s));
    1.0 / squares.sum::<f64>().sqrt()
}

/// How far, in total variation, the hardened noise of one step is from a rounded continuous
/// Gaussian: `Σ_g d_g/(40·σ_g²)` with σ_g the standard deviation in units of the grid (2⁴⁰ of them
/// are at least the threshold).
///
/// Rounding to the grid after adding real noise is the same as adding rounded noise to a sum on the
/// grid, so that mechanism is post-processing of the Gaussian one and has its (ε, δ). Let φ be the
/// density of N(0, σ²). The rounded Gaussian has `∫φ(k+u)du` over |u| ≤ ½ at k, the discrete one
/// φ(k) up to a normalizer within e^(−19σ²) of 1 (Poisson's summation). The two differ by at most
/// `sup|φ″|/24` about k, and `Σ_k sup|φ″| ≤ ∫|φ″| + ∫|φ‴| ≤ 0.97/σ² + 4/σ³`; half of a 24th of it is
/// below 1/(40σ²) from σ = 20 on. Distances add over elements and over steps; τ in all makes δ
/// at most `δ + (1 + e^ε)·τ`.
pub fn hardened_distance(bounds: &[f64], scales: &[f64], dims: &[usize]) -> f64 {
    let blocks = bounds.iter().zip(scales).zip(dims);
    let unit = 2f64.powi(-39);
    blocks.map(|((c, s), &d)| d as f64 / (40.0 * (s / (unit * c)).powi(2))).sum()
}

/// Draws noise.
#[derive(Clone)]
pub struct Noise {
    key: [u8; 32],
}

impl Noise {
    /// Noise of a key; its words are not those of the coins.
    pub fn new(key: &Key) -> Self {
        Self { key: key.derived("noise") }
    }

    /// For each slot its noise in units of the grid, given (elements, standard deviation in units).
    pub(super) fn draw(
        &self,
        grid: Grid,
        stream: u64,
        slots: &[(usize, f64)],
    ) -> Result<Vec<Vec<i128>>> {
        let mut drawn: Vec<Vec<i128>> = slots.iter().map(|&(size, _)| vec![0; size]).collect();
        // All pieces of all slots at once: a slot alone may have too few for all threads.
        let (mut pieces, mut first) = (Vec::new(), 0u128);
        for (&(size, sigma), noise) in slots.iter().zip(&mut drawn) {
            // The sum is below 2¹²⁰; 64 standard deviations are never seen.
            if !(0.0..=2f64.powi(110)).contains(&sigma) {
                return Err(Error::Step(format!(
                    "noise of {sigma:e} units of the grid cannot be drawn; it is out of all \
                     proportion to the threshold"
                )));
            }
            if sigma > 0.0 {
                let discrete = match grid {
                    Grid::Fine => None,
                    Grid::Hardened => Some(discrete::scale(sigma)?),
                };
                let own = noise.chunks_mut(PIECE).enumerate();
                pieces.extend(own.map(|(at, out)| (first + at as u128, sigma, discrete, out)));
            }
            first += size.div_ceil(PIECE) as u128;
        }
        pieces.into_par_iter().for_each(|(piece, sigma, discrete, out)| {
            let mut rng = words(&self.key, stream, piece << 32);
            match discrete {
                None => fill(&mut rng, sigma, out),
                Some(sigma) => out.fill_with(|| discrete::gaussian(&mut rng, sigma)),
            }
        });
        Ok(drawn)
    }
}

fn fill(rng: &mut impl Rng, sigma: f64, out: &mut [i128]) {
    for pair in out.chunks_mut(2) {
        let normals = two_normals(rng);
        for (out, normal) in pair.iter_mut().zip(normals) {
            *out = (sigma * normal).round_ties_even() as i128;
        }
    }
}

/// Two independent standard normal numbers.
pub(crate) fn two_normals(rng: &mut impl Rng) -> [f64; 2] {
    let radius = (-2.0 * libm::log(open_unit(rng))).sqrt();
    let turn = (rng.next_u64() >> 11) as f64 * 2f64.powi(-53);
    let (sin, cos) = libm::sincos(2.0 * std::f64::consts::PI * turn);
    [radius * cos, radius * sin]
}

/// A uniform number from (0, 1), rounded down to a double of full precision.
fn open_unit(rng: &mut impl Rng) -> f64 {
    let mut zeros = 0;
    loop {
        let word = rng.next_u64();
        zeros += word.leading_zeros() as i32;
        if word != 0 {
            break;
        }
        // Past this a double has no digits; its probability is 2⁻⁹⁶⁰.
        if zeros >= 960 {
            break;
        }
    }
    let mantissa = 1.0 + (rng.next_u64() >> 12) as f64 * 2f64.powi(-52);
    mantissa * 2f64.powi(-1 - zeros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers as the release gets them, from some slots, divided by their standard deviation.
    fn numbers(count: usize, stream: u64, grid: Grid) -> Vec<f64> {
        let noise = Noise::new(&Key::insecure(11));
        let sigma = 2f64.powi(45);
        let drawn = noise.draw(grid, stream, &[(count / 2, sigma), (count - count / 2, sigma)]);
        drawn.unwrap().concat().into_iter().map(|x| x as f64 / sigma).collect()
    }

    /// Moments, tails, Kolmogorov and Smirnov at 10⁻³.
    fn is_normal(mut x: Vec<f64>) {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| x * x).sum::<f64>() / n;
        // Five standard errors: 1/√n and √(2/n).
        assert!(mean.abs() < 5.0 / n.sqrt(), "mean {mean}");
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "variance {variance}");
        assert!((variance.sqrt() - 1.0).abs() < 0.01);
        let neighbours = x.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n;
        assert!(neighbours.abs() < 5.0 / n.sqrt(), "neighbours {neighbours}");
        let squares = x.windows(2).map(|w| (w[0] * w[0] - 1.0) * (w[1] * w[1] - 1.0)).sum::<f64>();
        // Each term has variance 2·2.
        assert!((squares / n).abs() < 10.0 / n.sqrt(), "neighbours' squares {squares}");
        let tail = |z: f64| 0.5 * libm::erfc(z / 2f64.sqrt());
        for z in [2.0, 3.0, 4.0, 4.5] {
            for side in [1.0, -1.0] {
                let beyond = x.iter().filter(|&&x| x * side > z).count() as f64;
                let expected = n * tail(z);
                assert!(
                    (beyond - expected).abs() < 5.0 * expected.sqrt() + 2.0,
                    "{z}: {beyond} {expected}"
                );
            }
        }
        x.sort_by(f64::total_cmp);
        let distance = x.iter().enumerate().map(|(i, &x)| {
            let below = 1.0 - tail(x);
            (below - i as f64 / n).abs().max((below - (i + 1) as f64 / n).abs())
        });
        // √(−½ ln(10⁻³/2)): Kolmogorov's distribution beyond its first term's 10⁻³.
        let most = (-0.5 * (0.0005f64).ln()).sqrt() / n.sqrt();
        let distance = distance.fold(0.0, f64::max);
        assert!(distance < most, "distance {distance:e}, expected below {most:e}");
    }

    #[test]
    fn numbers_are_normal() {
        is_normal(numbers(1_000_000, 3, Grid::Fine));
    }

    #[test]
    fn discrete_numbers_are_normal() {
        is_normal(numbers(300_000, 4, Grid::Hardened));
    }

    #[test]
    #[ignore = "long: ten million of each"]
    fn ten_million_numbers_are_normal() {
        is_normal(numbers(10_000_000, 5, Grid::Fine));
        is_normal(numbers(10_000_000, 6, Grid::Hardened));
    }

    /// U's exponent must be geometric without an end: a generator of words that are 0 for long.
    struct Zeros(u32);

    impl rand_chacha::rand_core::TryRng for Zeros {
        type Error = std::convert::Infallible;
        fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
            Ok(self.try_next_u64()? as u32)
        }
        fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
            self.0 = self.0.saturating_sub(1);
            Ok(if self.0 == 0 { 1 << 63 } else { 0 })
        }
        fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
            bytes.fill(0);
            Ok(())
        }
    }

    #[test]
    fn the_tail_is_not_cut() {
        // Three words of zeros: U = 2⁻¹⁹³·1.5, far below any 53-bit fraction; z = 16.3.
        let [z, _] = two_normals(&mut Zeros(4));
        let radius = (-2.0 * (1.5 * 2f64.powi(-193)).ln()).sqrt();
        assert!((z.abs() - radius).abs() < 1e-9 * radius, "{z} {radius}");
        let [z, _] = two_normals(&mut Zeros(u32::MAX));
        assert!(z.is_finite() && z.abs() > 36.0, "{z}");
    }

    #[test]
    fn an_element_depends_on_key_stream_and_place_alone() {
        let noise = Noise::new(&Key::insecure(1));
        let slots = [(3000, 1e9), (5, 1e9), (1025, 1e9)];
        for grid in [Grid::Fine, Grid::Hardened] {
            let run = |threads, stream| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| noise.draw(grid, stream, &slots).unwrap())
            };
            let one = run(1, 7);
            assert!(one == run(3, 7) && one != run(1, 8));
            // Other standard deviations, and none at all, in other slots move nothing.
            let other = noise.draw(grid, 7, &[(3000, 0.0), (5, 2e9), (1025, 1e9)]).unwrap();
            assert_eq!(other[2], one[2]);
            assert!(other[0].iter().all(|&x| x == 0));
            let all: std::collections::HashSet<i128> = one.concat().into_iter().collect();
            assert!(all.len() > 4000, "words were used twice");
        }
        let coins = words(&Key::insecure(1).derived("coins"), 7, 0).next_u64();
        assert_ne!(coins, words(&noise.key, 7, 0).next_u64());
    }

    #[test]
    fn noise_that_cannot_be_drawn_is_refused() {
        let noise = Noise::new(&Key::insecure(1));
        for bad in [-1.0, f64::NAN, f64::INFINITY, 1e40] {
            assert!(noise.draw(Grid::Fine, 0, &[(1, bad)]).is_err(), "{bad}");
        }
        assert!(noise.draw(Grid::Hardened, 0, &[(1, 100.0)]).is_err());
    }

    proptest! {
        /// All four splits are one mechanism of multiplier σ, to rounding, and never below it; no
        /// other split of these blocks has less noise than the one of least energy.
        #[test]
        fn every_split_has_the_same_effective_sigma(
            blocks in proptest::collection::vec((1e-3f64..10.0, 1usize..100_000, 0.01f64..1.0), 1..40),
            sigma in 0.2f64..100.0,
        ) {
            let bounds: Vec<f64> = blocks.iter().map(|b| b.0).collect();
            let dims: Vec<usize> = blocks.iter().map(|b| b.1).collect();
            let sum: f64 = blocks.iter().map(|b| b.2).sum();
            let weights = blocks.iter().map(|b| b.2 / sum).collect();
            let energy = |scales: &[f64]| -> f64 {
                scales.iter().zip(&dims).map(|(s, &d)| s * s * d as f64).sum()
            };
            let least = energy(&Split::LeastEnergy.scales(sigma, &bounds, &dims).unwrap());
            for split in [Split::Flat, Split::Equal, Split::Weights(weights), Split::LeastEnergy] {
                let scales = split.scales(sigma, &bounds, &dims).unwrap();
                let effective = effective_sigma(&bounds, &scales);
                prop_assert!((effective / sigma - 1.0).abs() < 1e-12, "{:?} {}", split, effective);
                prop_assert!(effective >= sigma);
                prop_assert!(energy(&scales) >= least * (1.0 - 1e-12), "{:?}", split);
            }
            // The tempting one fails by √G.
            let wrong: Vec<f64> = bounds.iter().map(|c| sigma * c).collect();
            let lost = effective_sigma(&bounds, &wrong) * (bounds.len() as f64).sqrt();
            prop_assert!((lost / sigma - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn splits_that_mean_nothing_are_refused() {
        let scales = |split: Split, sigma, bounds: &[f64]| split.scales(sigma, bounds, &[3, 4]);
        for sigma in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(scales(Split::Flat, sigma, &[1.0, 1.0]).is_err());
        }
        for bound in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(scales(Split::Equal, 1.0, &[1.0, bound]).is_err());
        }
        for weights in
            [vec![0.5], vec![0.5, 0.6], vec![1.0, 0.0], vec![2.0, -1.0], vec![f64::NAN, 0.5]]
        {
            assert!(scales(Split::Weights(weights), 1.0, &[1.0, 1.0]).is_err());
        }
        assert!(Split::Flat.scales(1.0, &[], &[]).is_err());
        assert!(Split::Flat.scales(1.0, &[1.0], &[0]).is_err());
        assert_eq!(effective_sigma(&[1.0, 1.0], &[0.0, 1.0]), 0.0);
    }

    #[test]
    fn hardened_noise_is_close_to_a_rounded_gaussian() {
        // A million elements at σ = 1, flat: 4000 steps move δ by less than 10⁻¹⁰.
        let tau = hardened_distance(&[1.0], &[1.0], &[1_000_000]);
        assert!(tau > 0.0 && 4000.0 * tau < 1e-14, "{tau:e}");
    }
}
