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
//!   are summed one by one, then the runs, then the slots: with at most 2³⁶ elements a sum of squares
//!   is off by at most (2¹⁴ + 2²²)·2⁻⁵³ < 2⁻³⁰ relative, the norm by 2⁻³⁰. On a device 256 threads
//!   sum every 256th element one by one: (2²⁸ + 8)·2⁻⁵³, the norm by 2⁻²⁶.
//! * The quotient, a factor that is put to the gradient and its norm alike, and the product with x
//!   add 2⁻⁵⁰ at most.
//! * The grid's unit is at most 2⁻³⁹·C, so rounding d ≤ 2³⁶ elements to it adds a vector no
//!   longer than ½·2⁻³⁹·C·2¹⁸ = 2⁻²²·C.
//!
//! Together: C·((1 − 2⁻¹⁰)(1 + 2⁻²⁵) + 2⁻²²) < C. The cost of the safety factor is a tenth of a
//! per cent of the threshold.
//!
//! # Why the order does not matter
//!
//! The unit is `2^(e−80)`, or `2^(e−40)` where hardened, with 2ᵉ the first power of two from C on.
//! An element is at most 2⁸⁰ units and there are at most 2⁴⁰ persons, so that i128 never
//! overflows: the sum is exact, and its bits are the same in any order, in portions of any size
//! and on any number of threads.

mod blocks;
mod release;

use rayon::prelude::*;

pub use self::blocks::Blocks;
pub use self::release::{Drawn, Wanted};
use crate::{Error, Result};

/// Part of a threshold that is used.
const SAFE: f64 = 1.0 - 1.0 / 1024.0;
/// Elements of one run of a sum of squares.
const RUN: usize = 1 << 14;
/// Elements that are summed over persons by one thread at a time.
const PIECE: usize = 1 << 12;
/// The most persons of a step.
const MOST_PEOPLE: u64 = 1 << 40;

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

impl Norms {
    /// Of one person, from the squares by block.
    fn of(squares: &[f64]) -> Self {
        let finite = squares.iter().all(|square| square.is_finite());
        let norm = |square: &f64| if finite { square.sqrt() } else { f64::INFINITY };
        Self { norms: squares.iter().map(norm).collect() }
    }
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
        if gradients.len() != self.sums.len() {
            return Err(self.other_slots(gradients.len()));
        }
        let squares = self.squares(people, gradients)?;
        let weights = self.weigh(&squares)?;
        for (slot, gradient) in gradients.iter().enumerate() {
            if let Some(gradient) = gradient {
                self.add_weighed(slot, gradient, &weights)?;
            }
        }
        Ok(self.norms(&squares))
    }

    /// The first of the three steps of [`ClippedSum::add`], for the first slots or all of them: the
    /// squared length of each person's gradient in each, `[people, slots]`. Private.
    ///
    /// # Errors
    /// [`Error::Step`] when sizes do not fit.
    pub fn squares(&self, people: usize, gradients: &[Option<&[f32]>]) -> Result<Vec<f64>> {
        if gradients.len() > self.sums.len() {
            return Err(self.other_slots(gradients.len()));
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
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        let each = |person: usize| {
            let slots = gradients.iter().zip(&self.blocks.sizes);
            slots.map(move |(gradient, &size)| match gradient {
                Some(gradient) => gradient[person * size..][..size]
                    .chunks(RUN)
                    .map(|run| run.iter().map(square).sum::<f64>())
                    .sum(),
                None => 0.0,
            })
        };
        let squares: Vec<Vec<f64>> =
            (0..people).into_par_iter().map(|person| each(person).collect()).collect();
        Ok(squares.concat())
    }

    /// Norms of persons whose squares in all slots these are, `[people, slots]`.
    pub fn norms(&self, squares: &[f64]) -> Norms {
        let mut norms = Vec::new();
        for own in squares.chunks_exact(self.sums.len()) {
            let mut blocks = vec![0f64; self.blocks.blocks];
            let slots = own.iter().zip(&self.blocks.block_of);
            slots.for_each(|(square, &block)| blocks[block] += square);
            norms.extend(Norms::of(&blocks).norms);
        }
        Norms { norms }
    }

    /// The second: counts persons of such squares in all slots, and gives back what each slot of
    /// each is multiplied by, `[people, slots]`, in units of the grid; 0 where it is to be left out,
    /// whatever it is.
    ///
    /// # Errors
    /// [`Error::Step`] for more persons than a sum has room for.
    pub fn weigh(&mut self, squares: &[f64]) -> Result<Vec<f64>> {
        let factors = self.count(&self.norms(squares))?;
        // A power of two: the product is exact.
        let weight = |factors: &[f64], block: usize| factors[block] * (1.0 / self.units[block]);
        let people = factors.chunks_exact(self.blocks.blocks);
        let each = people.flat_map(|own| self.blocks.block_of.iter().map(|&of| weight(own, of)));
        Ok(each.collect())
    }

    /// The third: adds a slot of persons who were weighed.
    ///
    /// # Errors
    /// [`Error::Step`] when sizes do not fit.
    pub fn add_weighed(&mut self, slot: usize, gradient: &[f32], weights: &[f64]) -> Result<()> {
        let slots = self.sums.len();
        let size = self.blocks.sizes.get(slot).copied().unwrap_or(0);
        if size == 0 || gradient.len() / size * slots != weights.len() {
            return Err(Error::Step(format!("slot {slot} is not of the persons who were weighed")));
        }
        let pieces = self.sums[slot].par_chunks_mut(PIECE).enumerate();
        pieces.for_each(|(piece, sums)| {
            for (person, weights) in weights.chunks_exact(slots).enumerate() {
                // What is not finite must not be multiplied, not even by 0.
                if weights[slot] > 0.0 {
                    let from = &gradient[person * size + piece * PIECE..][..sums.len()];
                    add_clipped(sums, from, weights[slot]);
                }
            }
        });
        Ok(())
    }

    /// The third where the gradients are elsewhere: adds what persons who were weighed come to in
    /// the first slots, `Σ round(weight·x)` for each, rounded as [`f64::round_ties_even`] does.
    ///
    /// # Errors
    /// [`Error::Step`] when sizes do not fit; nothing is added then.
    pub fn add_units(&mut self, units: &[Vec<i128>]) -> Result<()> {
        let fits = |(units, &size): (&Vec<i128>, &usize)| units.len() == size;
        let mut slots = units.iter().zip(&self.blocks.sizes);
        if units.len() > self.sums.len() || !slots.all(fits) {
            return Err(Error::Step("sums from elsewhere are not of these slots".into()));
        }
        self.sums.par_iter_mut().zip(units).for_each(|(sums, units)| {
            sums.iter_mut().zip(units).for_each(|(sum, unit)| *sum += unit);
        });
        Ok(())
    }

    fn other_slots(&self, got: usize) -> Error {
        Error::Step(format!("there are gradients of {got} slots, expected {}", self.sums.len()))
    }

    /// Counts persons of such norms; what each block of each of them is multiplied by.
    fn count(&mut self, norms: &Norms) -> Result<Vec<f64>> {
        let each = norms.norms.chunks_exact(self.blocks.blocks);
        let total = self.people.saturating_add(each.len() as u64);
        if total > MOST_PEOPLE {
            return Err(Error::Step("there are more than 2^40 persons in a step".into()));
        }
        self.people = total;
        let not_finite = |norms: &&[f64]| norms.iter().any(|norm| !norm.is_finite());
        self.not_finite += each.clone().filter(not_finite).count() as u64;
        Ok(each.flat_map(|norms| self.factors(norms)).collect())
    }

    /// Adds one person whose gradient is 0 but for a few elements: slot, place within it, value, no
    /// place twice. What [`ClippedSum::add`] would do with the whole of it.
    ///
    /// # Errors
    /// [`Error::Step`] for a place that does not exist; nothing is added then.
    pub fn add_sparse(&mut self, elements: &[(usize, usize, f32)]) -> Result<()> {
        let mut squares = vec![0f64; self.sums.len()];
        for &(slot, at, value) in elements {
            if self.blocks.sizes.get(slot).is_none_or(|&size| at >= size) {
                return Err(Error::Step(format!("there is no element {at} of a slot {slot}")));
            }
            squares[slot] += f64::from(value) * f64::from(value);
        }
        let weights = self.weigh(&squares)?;
        for &(slot, at, value) in elements {
            if weights[slot] > 0.0 {
                add_clipped(&mut self.sums[slot][at..=at], &[value], weights[slot]);
            }
        }
        Ok(())
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

    /// Forgets what was added.
    pub fn clear(&mut self) {
        // Whatever was added was counted before.
        if self.people == 0 {
            return;
        }
        self.sums.iter_mut().for_each(|sums| sums.fill(0));
        (self.people, self.not_finite) = (0, 0);
    }
}

fn add_clipped(sums: &mut [i128], from: &[f32], weight: f64) {
    for (sum, &x) in sums.iter_mut().zip(from) {
        *sum += (f64::from(x) * weight).round_ties_even() as i128;
    }
}

/// The first power of two from `x` on; x is normal and above 0.
fn power_from(x: f64) -> f64 {
    let below = f64::from_bits(x.to_bits() & !((1 << 52) - 1));
    if below < x { 2.0 * below } else { below }
}

#[cfg(test)]
mod tests;
