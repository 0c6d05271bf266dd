//! Persons' gradients, each cut to a bounded length, summed exactly.
//!
//! A block is what has one threshold: the tensors of one LoRA pair (A and its Bs; "pairwise"
//! clipping), or all of them (flat). Of person p, block g of gradient x is multiplied by
//! `c = min(1, C′/n)` with n its norm in that block, or by `C′/(n + γ)` (AUTO-S: Bu et al.,
//! arXiv 2206.07136), and then rounded to a grid and added as integers.
//!
//! # Why no contribution is longer than C
//!
//! C′ is C·(1 − 2⁻¹⁰). The f32 gradient as it is stored is what counts; its rounding is part of the
//! gradient.
//! * Squares of f32 are exact in f64 (48 bits) and neither over- nor underflow there. Runs of 2¹⁴
//!   are summed one by one, then the runs: with at most 2³⁶ elements a sum of squares is off by
//!   at most (2¹⁴ + 2²²)·2⁻⁵³ < 2⁻³⁰ relative, the norm by 2⁻³⁰.
//! * The quotient and the product with x add 2⁻⁵² at most.
//! * The grid's unit is at most 2⁻³⁹·C, so rounding d ≤ 2³⁶ elements to it adds a vector no
//!   longer than ½·2⁻³⁹·C·2¹⁸ = 2⁻²²·C.
//!
//! Together: C·((1 − 2⁻¹⁰)(1 + 2⁻²⁹) + 2⁻²²) < C. The cost of the safety factor is a tenth of a
//! per cent of the threshold.
//!
//! # Why the order does not matter
//!
//! The unit is `2^(e−80)`, or `2^(e−40)` where hardened, with 2ᵉ the first power of two from C on.
//! An element is at most 2⁸⁰ units and there are at most 2⁴⁰ persons, so that i128 never
//! overflows: the sum is exact, and its bits are the same in any order, in portions of any size
//! and on any number of threads.

use rayon::prelude::*;

use super::ledger::Spent;
use super::noise::{self, Noise};
use crate::{Error, Result};

/// Part of a threshold that is used.
const SAFE: f64 = 1.0 - 1.0 / 1024.0;
/// Elements of one run of a sum of squares.
const RUN: usize = 1 << 14;
/// Elements that are summed over persons by one thread at a time.
const PIECE: usize = 1 << 12;
/// The most elements of a gradient.
const MOST_ELEMENTS: usize = 1 << 36;
/// The most persons of a step.
const MOST_PEOPLE: u64 = 1 << 40;

/// The tensors of a gradient, and which of them share a threshold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    sizes: Vec<usize>,
    block_of: Vec<usize>,
    blocks: usize,
}

impl Blocks {
    /// One threshold for everything; `sizes` are the elements of each slot.
    ///
    /// # Errors
    /// [`Error::Step`] when there is no slot, an empty one, or more than 2³⁶ elements.
    pub fn flat(sizes: Vec<usize>) -> Result<Self> {
        let all = (0..sizes.len()).collect();
        Self::by_pair(sizes, &[all])
    }

    /// One threshold for the slots of each of `pairs`, such as those of a LoRA adapter.
    ///
    /// # Errors
    /// As [`Blocks::flat`]; and when a slot is in no pair, or in two.
    pub fn by_pair(sizes: Vec<usize>, pairs: &[Vec<usize>]) -> Result<Self> {
        let elements = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size));
        if sizes.is_empty() || sizes.contains(&0) || elements.is_none_or(|e| e > MOST_ELEMENTS) {
            return Err(Error::Step(
                "a gradient must have tensors, none of them empty, of at most 2^36 elements".into(),
            ));
        }
        let mut block_of = vec![usize::MAX; sizes.len()];
        for (block, slots) in pairs.iter().enumerate() {
            for &slot in slots {
                match block_of.get_mut(slot) {
                    Some(of) if *of == usize::MAX => *of = block,
                    Some(_) => return Err(Error::Step(format!("slot {slot} is in two pairs"))),
                    None => return Err(Error::Step(format!("there is no slot {slot}"))),
                }
            }
            if slots.is_empty() {
                return Err(Error::Step(format!("pair {block} is empty")));
            }
        }
        if let Some(slot) = block_of.iter().position(|&of| of == usize::MAX) {
            return Err(Error::Step(format!("slot {slot} is in no pair: it would not be clipped")));
        }
        Ok(Self { sizes, block_of, blocks: pairs.len() })
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Never: there is at least one block.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Elements of each slot.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The block of a slot.
    pub fn block_of(&self, slot: usize) -> usize {
        self.block_of[slot]
    }

    /// Elements of each block.
    pub fn dims(&self) -> Vec<usize> {
        let mut dims = vec![0; self.blocks];
        self.sizes.iter().zip(&self.block_of).for_each(|(size, &block)| dims[block] += size);
        dims
    }
}

/// How a gradient of norm n is shortened for a threshold C.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `min(1, C/n)`: what is short enough stays as it is.
    Clip,
    /// `C/(n + gamma)`: everybody comes close to C, whatever the norm; gamma is above 0, 0.01 in
    /// the paper.
    AutoS {
        /// What keeps the factor bounded at small norms.
        gamma: f64,
    },
}

/// How fine the grid of a sum is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// 2⁻⁸⁰ of the threshold; noise is drawn as doubles and rounded to it.
    Fine,
    /// 2⁻⁴⁰ of the threshold; noise is the discrete Gaussian of the same grid, so that no rounding
    /// of doubles is left to be exploited (Mironov 2012).
    Hardened,
}

impl Grid {
    fn bits(self) -> i32 {
        match self {
            Self::Fine => 80,
            Self::Hardened => 40,
        }
    }
}

/// What [`ClippedSum::add`] found of the persons it was given. Private, all of it: only noisy sums
/// of bounded functions of it may leave.
#[derive(Clone, Debug, PartialEq)]
pub struct Norms {
    /// Norms before clipping, `[persons, blocks]`; infinite where a person's gradient has a number
    /// that is not finite.
    pub norms: Vec<f64>,
}

/// The sum of clipped gradients of one step.
#[derive(Clone, Debug)]
pub struct ClippedSum {
    blocks: Blocks,
    bounds: Vec<f64>,
    rules: Vec<Rule>,
    grid: Grid,
    /// The unit of each block, a power of two.
    units: Vec<f64>,
    sums: Vec<Vec<i128>>,
    people: u64,
    not_finite: u64,
}

impl ClippedSum {
    /// An empty sum with a threshold for each block.
    ///
    /// # Errors
    /// [`Error::Step`] when there are not as many thresholds as blocks; [`Error::Parameter`] when
    /// one is not a number from 2⁻¹⁰⁰ to 2¹⁰⁰, or gamma not one from 10⁻⁶ to 10⁶.
    pub fn new(blocks: Blocks, bounds: Vec<f64>, rule: Rule, grid: Grid) -> Result<Self> {
        let rules = vec![rule; blocks.len()];
        Self::with_rules(blocks, bounds, rules, grid)
    }

    /// The same with a rule for each block, as where statistics are released beside the gradient.
    ///
    /// # Errors
    /// As [`ClippedSum::new`]; and when there are not as many rules as blocks.
    pub fn with_rules(
        blocks: Blocks,
        bounds: Vec<f64>,
        rules: Vec<Rule>,
        grid: Grid,
    ) -> Result<Self> {
        if rules.len() != blocks.len() {
            let (got, expected) = (rules.len(), blocks.len());
            return Err(Error::Step(format!("there are {got} rules for {expected} blocks")));
        }
        for rule in &rules {
            if let Rule::AutoS { gamma } = *rule
                && !(1e-6..=1e6).contains(&gamma)
            {
                return Err(Error::parameter("gamma", gamma, "expected a number from 1e-6 to 1e6"));
            }
        }
        let sums = blocks.sizes.iter().map(|&size| vec![0; size]).collect();
        let (units, people, not_finite) = (Vec::new(), 0, 0);
        let mut sum = Self { blocks, bounds: vec![], rules, grid, units, sums, people, not_finite };
        sum.set_bounds(bounds)?;
        Ok(sum)
    }

    /// Other thresholds, from the next person on.
    ///
    /// # Errors
    /// As [`ClippedSum::new`]; and when somebody was added already: the sum would mix two grids.
    pub fn set_bounds(&mut self, bounds: Vec<f64>) -> Result<()> {
        if self.people > 0 {
            return Err(Error::Step("thresholds cannot change within a step".into()));
        }
        if bounds.len() != self.blocks.len() {
            let (got, expected) = (bounds.len(), self.blocks.len());
            return Err(Error::Step(format!("there are {got} thresholds for {expected} blocks")));
        }
        let range = 2f64.powi(-100)..=2f64.powi(100);
        if let Some(&bound) = bounds.iter().find(|bound| !range.contains(bound)) {
            let expected = "a clipping threshold is a number above 0, from 2^-100 to 2^100";
            return Err(Error::parameter("bound", bound, expected));
        }
        let unit = |&bound: &f64| power_from(bound) * 2f64.powi(-self.grid.bits());
        self.units = bounds.iter().map(unit).collect();
        self.bounds = bounds;
        Ok(())
    }

    /// The blocks.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// The thresholds: the L2 sensitivity of each block.
    pub fn bounds(&self) -> &[f64] {
        &self.bounds
    }

    /// Adds the gradients of `people` persons: for each slot `[people, elements]`, `None` where no
    /// loss reached it. All of a person's rows must be in one call: the norm is of their sum.
    ///
    /// # Errors
    /// [`Error::Step`] when sizes do not fit; nothing is added then.
    pub fn add(&mut self, people: usize, gradients: &[Option<&[f32]>]) -> Result<Norms> {
        let Norms { norms } = self.measure(people, gradients)?;
        let norms: Vec<&[f64]> = norms.chunks_exact(self.blocks.len()).collect();
        let total = self.people.saturating_add(people as u64);
        if total > MOST_PEOPLE {
            return Err(Error::Step("there are more than 2^40 persons in a step".into()));
        }
        self.people = total;
        let factors: Vec<Vec<f64>> = norms.iter().map(|norms| self.factors(norms)).collect();
        self.not_finite += norms.iter().filter(|n| n.iter().any(|n| !n.is_finite())).count() as u64;

        for (slot, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let (block, size) = (self.blocks.block_of[slot], self.blocks.sizes[slot]);
            // A power of two: the product is exact.
            let scale = 1.0 / self.units[block];
            let pieces = self.sums[slot].par_chunks_mut(PIECE).enumerate();
            pieces.for_each(|(piece, sums)| {
                for (person, factors) in factors.iter().enumerate() {
                    let factor = factors[block];
                    // What is not finite must not be multiplied, not even by 0.
                    if factor > 0.0 {
                        let from = &gradient[person * size + piece * PIECE..][..sums.len()];
                        add_clipped(sums, from, factor, scale);
                    }
                }
            });
        }
        Ok(Norms { norms: norms.concat() })
    }

    /// The norms that [`ClippedSum::add`] would find, without adding anything: statistics of them
    /// are slots of the same sum.
    ///
    /// # Errors
    /// [`Error::Step`] when sizes do not fit.
    pub fn measure(&self, people: usize, gradients: &[Option<&[f32]>]) -> Result<Norms> {
        if gradients.len() != self.sums.len() {
            return Err(Error::Step(format!(
                "there are gradients of {} slots, expected {}",
                gradients.len(),
                self.sums.len()
            )));
        }
        for (slot, (gradient, &size)) in gradients.iter().zip(&self.blocks.sizes).enumerate() {
            if let Some(gradient) = gradient
                && Some(gradient.len()) != people.checked_mul(size)
            {
                return Err(Error::Step(format!(
                    "slot {slot} has {} gradient elements, expected {size} for each of {people} \
                     persons",
                    gradient.len()
                )));
            }
        }
        let norms: Vec<Vec<f64>> =
            (0..people).into_par_iter().map(|person| self.norms(person, gradients)).collect();
        Ok(Norms { norms: norms.concat() })
    }

    /// A person's norm in each block.
    fn norms(&self, person: usize, gradients: &[Option<&[f32]>]) -> Vec<f64> {
        let mut squares = vec![0f64; self.blocks.blocks];
        for (slot, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let size = self.blocks.sizes[slot];
            let own = &gradient[person * size..][..size];
            for run in own.chunks(RUN) {
                let square = |x: &f32| f64::from(*x) * f64::from(*x);
                squares[self.blocks.block_of[slot]] += run.iter().map(square).sum::<f64>();
            }
        }
        if squares.iter().any(|square| !square.is_finite()) {
            return vec![f64::INFINITY; squares.len()];
        }
        squares.into_iter().map(f64::sqrt).collect()
    }

    /// What each block of a person of such norms is multiplied by: 0 when a norm is not finite.
    fn factors(&self, norms: &[f64]) -> Vec<f64> {
        let factor = |((&norm, &bound), rule): ((&f64, &f64), &Rule)| match *rule {
            _ if !norm.is_finite() => 0.0,
            Rule::Clip if norm <= SAFE * bound => 1.0,
            Rule::Clip => SAFE * bound / norm,
            Rule::AutoS { gamma } => SAFE * bound / (norm + gamma),
        };
        norms.iter().zip(&self.bounds).zip(&self.rules).map(factor).collect()
    }

    /// Persons of this step whose gradient was not finite and counted as 0. Private: it may be used
    /// to stop a run only by whoever may see the data.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Ends the step: `(Σ clipped + noise) / batch` for each slot, and an empty sum. `scales` are
    /// the standard deviations by block ([`noise::Split`]), `batch` the expected, public one.
    ///
    /// # Errors
    /// [`Error::Step`] when the noise is less than the ledger says, or cannot be drawn on this
    /// grid; [`Error::Parameter`] when `batch` is not above 0. What the ledger holds stays spent.
    pub fn release(
        &mut self,
        spent: Spent,
        noise: &Noise,
        scales: &[f64],
        batch: f64,
    ) -> Result<Vec<Vec<f32>>> {
        if !(batch.is_finite() && batch > 0.0) {
            let expected = "the expected batch is a public number above 0: rate times persons";
            return Err(Error::parameter("batch", batch, expected));
        }
        if scales.len() != self.bounds.len() {
            let (got, expected) = (scales.len(), self.bounds.len());
            return Err(Error::Step(format!("there is noise for {got} blocks, not {expected}")));
        }
        let sigma = noise::effective_sigma(&self.bounds, scales);
        // Another order of the same sum may fall short by some roundings; NaN is not enough.
        let enough = sigma * (1.0 + 1e-12) >= spent.sigma();
        if !enough {
            return Err(Error::Step(format!(
                "the noise multiplier is {sigma}, but the ledger says {}",
                spent.sigma()
            )));
        }
        let in_units: Vec<f64> = scales.iter().zip(&self.units).map(|(s, unit)| s / unit).collect();
        let slots: Vec<(usize, f64)> = (self.blocks.sizes.iter().zip(&self.blocks.block_of))
            .map(|(&size, &block)| (size, in_units[block]))
            .collect();
        let noise = noise.draw(self.grid, spent.stream(), &slots)?;
        let released = noise.into_iter().enumerate().map(|(slot, noise)| {
            let factor = self.units[self.blocks.block_of[slot]] / batch;
            let sums = noise.into_iter().zip(&self.sums[slot]);
            sums.map(|(noise, sum)| ((sum + noise) as f64 * factor) as f32).collect()
        });
        let released = released.collect();
        self.clear();
        Ok(released)
    }

    /// Forgets what was added.
    pub fn clear(&mut self) {
        self.sums.iter_mut().for_each(|sums| sums.fill(0));
        (self.people, self.not_finite) = (0, 0);
    }
}

fn add_clipped(sums: &mut [i128], from: &[f32], factor: f64, scale: f64) {
    for (sum, &x) in sums.iter_mut().zip(from) {
        *sum += (f64::from(x) * factor * scale).round_ties_even() as i128;
    }
}

/// The first power of two from `x` on; x is normal and above 0.
fn power_from(x: f64) -> f64 {
    let below = f64::from_bits(x.to_bits() & !((1 << 52) - 1));
    if below < x { 2.0 * below } else { below }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::key::Key;
    use proptest::prelude::*;

    fn pairs() -> Blocks {
        Blocks::by_pair(vec![5, 3, 4], &[vec![0, 2], vec![1]]).unwrap()
    }

    fn sum(bounds: &[f64], rule: Rule, grid: Grid) -> ClippedSum {
        ClippedSum::new(pairs(), bounds.to_vec(), rule, grid).unwrap()
    }

    /// The sum alone, as real numbers.
    fn values(sum: &ClippedSum) -> Vec<Vec<f64>> {
        let unit = |slot: usize| sum.units[sum.blocks.block_of[slot]];
        let slots = sum.sums.iter().enumerate();
        slots.map(|(slot, s)| s.iter().map(|&x| x as f64 * unit(slot)).collect()).collect()
    }

    fn add(sum: &mut ClippedSum, person: &[Vec<f32>]) -> Norms {
        let slots: Vec<_> = person.iter().map(|x| Some(&x[..])).collect();
        sum.add(1, &slots).unwrap()
    }

    fn norm(values: &[&[f64]]) -> f64 {
        values.iter().flat_map(|v| v.iter()).map(|x| x * x).sum::<f64>().sqrt()
    }

    #[test]
    fn blocks_must_hold_every_slot_once() {
        let sizes = || vec![5, 3, 4];
        assert_eq!(pairs().dims(), [9, 3]);
        assert_eq!(Blocks::flat(sizes()).unwrap().dims(), [12]);
        for wrong in [
            vec![vec![0, 1]],
            vec![vec![0, 1], vec![1, 2]],
            vec![vec![0, 1, 2], vec![]],
            vec![vec![0, 1, 2, 3]],
        ] {
            assert!(Blocks::by_pair(sizes(), &wrong).is_err(), "{wrong:?}");
        }
        assert!(Blocks::flat(vec![]).is_err() && Blocks::flat(vec![3, 0]).is_err());
        assert!(Blocks::flat(vec![usize::MAX, 2]).is_err());
    }

    #[test]
    fn thresholds_that_mean_nothing_are_refused() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
            assert!(ClippedSum::new(pairs(), vec![1.0, bad], Rule::Clip, Grid::Fine).is_err());
            let rule = Rule::AutoS { gamma: bad };
            assert!(ClippedSum::new(pairs(), vec![1.0, 1.0], rule, Grid::Fine).is_err());
        }
        assert!(ClippedSum::new(pairs(), vec![1.0], Rule::Clip, Grid::Fine).is_err());
    }

    #[test]
    fn gradients_of_other_sizes_are_refused_and_change_nothing() {
        let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
        let (a, b, c) = ([1.0; 10], [1.0; 6], [1.0; 7]);
        assert!(sum.add(2, &[Some(&a), Some(&b), Some(&c)]).is_err());
        assert!(sum.add(2, &[Some(&a), Some(&b)]).is_err());
        assert!(sum.add(usize::MAX, &[Some(&a), None, None]).is_err());
        assert!(values(&sum).iter().flatten().all(|&x| x == 0.0) && sum.people == 0);
        // Nobody, and slots that no loss reached.
        sum.add(0, &[Some(&[]), None, None]).unwrap();
        let norms = sum.add(2, &[Some(&a), None, None]).unwrap();
        assert_eq!(norms.norms, [5f64.sqrt(), 0.0, 5f64.sqrt(), 0.0]);
    }

    #[test]
    fn a_gradient_that_is_not_finite_counts_as_nothing() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
            let norms = add(&mut sum, &[vec![0.1; 5], vec![0.1, bad, 0.1], vec![0.1; 4]]);
            assert!(norms.norms.iter().all(|n| n.is_infinite()));
            assert_eq!(sum.not_finite(), 1);
            assert!(sum.sums.iter().flatten().all(|&x| x == 0), "{bad}");
            // The largest f32 is finite.
            add(&mut sum, &[vec![f32::MAX; 5], vec![-f32::MAX; 3], vec![f32::MAX; 4]]);
            assert_eq!(sum.not_finite(), 1);
            assert!(norm(&[&values(&sum)[1]]) <= 1.0);
        }
    }

    proptest! {
        /// The promise, in numbers from 2⁻¹⁴⁹ to the largest, and at thresholds about a norm.
        #[test]
        fn nobody_says_more_than_the_threshold(
            x in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::SUBNORMAL, 12),
            near in prop_oneof![Just(None), (0.9f64..1.1).prop_map(Some)],
            bound in 1e-6f64..1e6,
            hardened: bool,
            auto: bool,
        ) {
            let person = [x[..5].to_vec(), x[5..8].to_vec(), x[8..].to_vec()];
            let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let own = norm(&[&wide(&person[0]), &wide(&person[2])]);
            let near = near.map(|f| f * own).filter(|b| (1e-30..1e30).contains(b));
            let bounds = [near.unwrap_or(bound), bound];
            let rule = if auto { Rule::AutoS { gamma: 0.01 } } else { Rule::Clip };
            let grid = if hardened { Grid::Hardened } else { Grid::Fine };
            let mut sum = sum(&bounds, rule, grid);
            add(&mut sum, &person);
            let values = values(&sum);
            prop_assert!(norm(&[&values[0], &values[2]]) <= bounds[0]);
            prop_assert!(norm(&[&values[1]]) <= bounds[1]);
            if !auto && own <= bounds[0] * SAFE {
                for (got, want) in values[0].iter().zip(&person[0]) {
                    prop_assert!((got - f64::from(*want)).abs() <= sum.units[0] / 2.0);
                }
            }
        }

        /// Any order, any portions, any number of threads: the same integers.
        #[test]
        fn sums_do_not_depend_on_order_or_portions(
            seed in 0u32..1000,
            people in 1usize..9,
            cut in 0usize..9,
        ) {
            let number = |i: usize| (((i as u32 + seed).wrapping_mul(2_654_435_761)) >> 8) as f32 / 1e7 - 0.8;
            let sizes = [5, 3, 4];
            let slot = |s: usize| -> Vec<f32> {
                (0..people * sizes[s]).map(|i| number(i * 3 + s)).collect()
            };
            let all: Vec<Vec<f32>> = (0..3).map(slot).collect();
            let run = |parts: &[std::ops::Range<usize>], threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut sum = sum(&[0.9, 0.4], Rule::Clip, Grid::Fine);
                    for part in parts {
                        let slots: Vec<_> = (0..3)
                            .map(|s| Some(&all[s][part.start * sizes[s]..part.end * sizes[s]]))
                            .collect();
                        sum.add(part.len(), &slots).unwrap();
                    }
                    sum.sums
                })
            };
            let cut = cut.min(people);
            let whole = run(std::slice::from_ref(&(0..people)), 1);
            prop_assert_eq!(&whole, &run(&[cut..people, 0..cut], 3));
            let ones: Vec<_> = (0..people).rev().map(|p| p..p + 1).collect();
            prop_assert_eq!(&whole, &run(&ones, 2));
        }
    }

    #[test]
    fn auto_s_is_its_formula() {
        let mut sum = sum(&[2.0, 1.0], Rule::AutoS { gamma: 0.5 }, Grid::Fine);
        add(&mut sum, &[vec![3.0, 0.0, 0.0, 0.0, 0.0], vec![0.0; 3], vec![0.0, 4.0, 0.0, 0.0]]);
        // C/(n + γ) = 2/(5 + ½).
        let values = values(&sum);
        assert!((values[0][0] - SAFE * 3.0 * 2.0 / 5.5).abs() < 1e-15);
        assert!((values[2][1] - SAFE * 4.0 * 2.0 / 5.5).abs() < 1e-15);
        assert!(values[1].iter().all(|&x| x == 0.0));
    }

    #[test]
    fn a_release_with_less_noise_than_was_written_is_refused() {
        let noise = Noise::new(&Key::insecure(1));
        let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
        // σ·C for each of two blocks is σ/√2 in truth.
        let error = sum.release(Spent::of(0, 1.0), &noise, &[1.0, 1.0], 8.0).unwrap_err();
        assert!(error.to_string().contains("0.7071"), "{error}");
        let equal = [2f64.sqrt(); 2];
        assert!(sum.release(Spent::of(0, 1.0), &noise, &equal, 8.0).is_ok());
        for batch in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(sum.release(Spent::of(0, 1.0), &noise, &equal, batch).is_err());
        }
        assert!(sum.release(Spent::of(0, 1.0), &noise, &[2.0], 8.0).is_err());
        assert!(sum.release(Spent::of(0, 1.0), &noise, &[f64::NAN, 2.0], 8.0).is_err());
    }

    #[test]
    fn a_release_empties_the_sum() {
        let noise = Noise::new(&Key::insecure(1));
        let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
        add(&mut sum, &[vec![0.1; 5], vec![0.1; 3], vec![0.1; 4]]);
        let first = sum.release(Spent::of(0, 0.0), &noise, &[0.0, 0.0], 2.0).unwrap();
        assert_eq!(first[0], [0.05; 5]);
        let second = sum.release(Spent::of(1, 0.0), &noise, &[0.0, 0.0], 2.0).unwrap();
        assert_eq!(second[0], [0.0; 5]);
    }
}
