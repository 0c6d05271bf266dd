//! One step's probabilities between neighbouring edges of a grid of privacy losses.
//!
//! With y = x/σ the loss of the remove direction is t(y) = log(1 − q + q·exp((y − 1/(2σ))/σ)), which
//! grows with y. The line is cut at the y whose losses are the grid's edges; each cell gets its mass
//! under both distributions, N(0,1) and the mixture (1−q)·N(0,1) + q·N(1/σ,1), each with a bound on
//! its rounding. The add direction is the same cells, mirrored.
//!
//! # What is exact
//!
//! An edge is the *rounded* y: the masses on its two sides belong to one partition of the line,
//! whatever the rounding. What is off is the loss at the edge, by at most [`Cells::slop`]:
//! * z = log((e^g − (1−q))/q) has dt = π·dz with π = q·e^z/e^g ≤ 1, and either form used below errs
//!   by dt ≤ 4ε + 2ε·π|z| (ε = 2⁻⁵²);
//! * y = σz + 1/(2σ) is rounded thrice, dy ≤ ε(σ|z| + 1/(2σ))·2, and dt = π·dy/σ.
//!
//! Together at most ε(4 + π(4|z| + 1/σ²)).

use crate::accounting::Phase;
use crate::accounting::normal::upper_tail;

const EPS: f64 = f64::EPSILON;

/// Masses of the cells between edges (k + shift)·h, k = first, first + 1, ….
#[derive(Clone)]
pub(super) struct Cells {
    /// Grid step.
    pub(super) h: f64,
    /// Index of the lowest edge.
    pub(super) first: i64,
    /// Mass under the first distribution (the one whose loss it is), cell by cell.
    pub(super) a: Vec<Mass>,
    /// Mass under the second.
    pub(super) b: Vec<Mass>,
    /// Mass of the first distribution below the lowest edge, rounded up.
    pub(super) below: f64,
    /// Mass of the first distribution above the highest edge.
    pub(super) above: Mass,
    /// How far the loss at an edge may be from the grid.
    pub(super) slop: f64,
    shift: i64,
}

/// A probability and a bound on its absolute error.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mass {
    value: f64,
    error: f64,
}

impl Mass {
    /// Not below the true mass. (1 + 2ε covers this addition's own rounding.)
    pub(super) fn up(self) -> f64 {
        (self.value + self.error) * (1.0 + 2.0 * EPS)
    }

    /// Not above the true mass.
    pub(super) fn down(self) -> f64 {
        ((self.value - self.error) * (1.0 - 2.0 * EPS)).max(0.0)
    }
}

/// Where edges lie: on the grid points, or half way between them.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Edges {
    /// (k)·h
    Points,
    /// (k + ½)·h
    Halves,
}

/// The range of losses of one step that is resolved: all but `tail` of both distributions' mass.
pub(super) fn range(phase: &Phase, tail: f64) -> (f64, f64) {
    let (low, high) = ends(phase, tail);
    (loss(phase, low), loss(phase, high))
}

/// The range of y: Pr[|N| > y] ≤ exp(−y²/2).
pub(super) fn ends(phase: &Phase, tail: f64) -> (f64, f64) {
    let y = libm::sqrt(-2.0 * libm::log(tail));
    (-y, 1.0 / phase.sigma() + y)
}

/// The loss at y.
pub(super) fn loss(phase: &Phase, y: f64) -> f64 {
    let u = (y - 0.5 / phase.sigma()) / phase.sigma();
    let rate = phase.rate();
    if rate == 1.0 {
        u
    } else if u > 600.0 {
        libm::log(rate) + u
    } else {
        libm::log1p(rate * libm::expm1(u))
    }
}

impl Cells {
    /// The cells of one step in the remove direction (first distribution: the mixture).
    pub(super) fn new(phase: &Phase, h: f64, edges: Edges, tail: f64) -> Self {
        let (low, high) = range(phase, tail);
        let (offset, shift) = if edges == Edges::Points { (0.0, 0) } else { (0.5, 1) };
        let first = libm::floor(low / h - offset) as i64;
        let last = (libm::ceil(high / h - offset) as i64).max(first + 1);
        let mut slop: f64 = 0.0;
        let mut edge = |k: i64| {
            let edge = Edge::at(phase, (k as f64 + offset) * h);
            slop = slop.max(edge.slop);
            edge
        };
        let start = edge(first);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut before = start;
        for k in first + 1..=last {
            let after = edge(k);
            let plain = between(before.plain, after.plain);
            a.push(mixed(phase.rate(), plain, between(before.moved, after.moved)));
            b.push(plain);
            before = after;
        }
        let below = mixed(phase.rate(), start.plain.below(), start.moved.below()).up();
        let above = mixed(phase.rate(), before.plain.above(), before.moved.above());
        // (k + ½)·h is rounded once more.
        let slop = slop + EPS * (first.abs().max(last.abs()) as f64 + 1.0) * h;
        Self { h, first, a, b, below, above, slop, shift }
    }

    /// The same step in the other direction: losses negated, the distributions exchanged.
    /// `tail_below` and `tail_above` of the plain distribution are what becomes above and below.
    pub(super) fn mirrored(&self, phase: &Phase) -> Self {
        let offset = 0.5 * self.shift as f64;
        let last = self.first + self.a.len() as i64;
        let lowest = Edge::at(phase, (self.first as f64 + offset) * self.h);
        let highest = Edge::at(phase, (last as f64 + offset) * self.h);
        let reversed = |masses: &[Mass]| masses.iter().rev().copied().collect();
        Self {
            first: -last - self.shift,
            a: reversed(&self.b),
            b: reversed(&self.a),
            below: highest.plain.above().up(),
            above: lowest.plain.below(),
            ..*self
        }
    }
}

/// A place on the line with the normal's mass on its far side from 0.
#[derive(Clone, Copy)]
struct Place {
    y: f64,
    /// Pr[N > |y|]
    tail: Mass,
}

impl Place {
    /// The place `y`, itself known to within `displaced`.
    fn new(y: f64, displaced: f64) -> Self {
        let size = y.abs();
        if size > 40.0 {
            // Pr[N > 40] < 10⁻³⁴⁹ is less than the smallest number.
            return Self { y, tail: Mass { value: 0.0, error: f64::MIN_POSITIVE } };
        }
        let value = upper_tail(size);
        // See `upper_tail`; a displacement d of y adds φ(y)·d ≤ (|y|+1)·tail·d. Twice that covers
        // the change of φ over the displacement.
        let error =
            value * (EPS * (2.0 + 2.0 * size * (size + 1.0)) + 2.0 * (size + 1.0) * displaced);
        Self { y, tail: Mass { value, error: error + f64::MIN_POSITIVE } }
    }

    fn below(self) -> Mass {
        if self.y < 0.0 { self.tail } else { self.complement() }
    }

    fn above(self) -> Mass {
        if self.y < 0.0 { self.complement() } else { self.tail }
    }

    fn complement(self) -> Mass {
        Mass { value: 1.0 - self.tail.value, error: self.tail.error + EPS }
    }
}

/// An edge of the grid, as a place for N(0,1) and, moved by 1/σ, for N(1/σ,1).
#[derive(Clone, Copy)]
struct Edge {
    plain: Place,
    moved: Place,
    slop: f64,
}

impl Edge {
    /// The edge at loss `g`.
    fn at(phase: &Phase, g: f64) -> Self {
        let (sigma, rate) = (phase.sigma(), phase.rate());
        let z = if rate == 1.0 {
            g
        } else if g > 600.0 {
            // (1−q)·e^−g < 10⁻²⁶⁰ is lost in the rounding.
            g - libm::log(rate)
        } else if g > -0.5 {
            // No cancellation near 0: dt = π·|w|/(1+w)·3ε = |1 − e^−g|·3ε ≤ 3ε.
            libm::log1p((libm::expm1(g) / rate).max(-1.0))
        } else {
            // dt = d(e^g − (1−q))/e^g ≤ 3ε, because e^g ≥ 1 − q.
            libm::log(((libm::exp(g) - (1.0 - rate)) / rate).max(0.0))
        };
        if z == f64::NEG_INFINITY {
            // Below every loss that occurs.
            let nowhere = Place { y: f64::NEG_INFINITY, tail: Mass::default() };
            return Self { plain: nowhere, moved: nowhere, slop: 4.0 * EPS };
        }
        let shift = 1.0 / sigma;
        let y = sigma * z + 0.5 * shift;
        let posterior = (rate * libm::exp((z - g).min(600.0))).min(1.0);
        let slop = EPS * (4.0 + posterior * (4.0 * z.abs() + shift * shift));
        let moved = y - shift;
        let displaced = EPS * (shift + moved.abs());
        Self { plain: Place::new(y, 0.0), moved: Place::new(moved, displaced), slop }
    }
}

/// The mass between two places, from the tails of the side that loses fewest digits.
fn between(low: Place, high: Place) -> Mass {
    let error = low.tail.error + high.tail.error;
    let value = if low.y >= 0.0 {
        low.tail.value - high.tail.value
    } else if high.y <= 0.0 {
        high.tail.value - low.tail.value
    } else {
        return Mass { value: 1.0 - low.tail.value - high.tail.value, error: error + 2.0 * EPS };
    };
    let value = value.max(0.0);
    Mass { value, error: error + EPS * value }
}

/// (1−q)·plain + q·moved, with three roundings.
fn mixed(rate: f64, plain: Mass, moved: Mass) -> Mass {
    let value = (1.0 - rate) * plain.value + rate * moved.value;
    let error = (1.0 - rate) * plain.error + rate * moved.error;
    Mass { value, error: error * (1.0 + 4.0 * EPS) + 3.0 * EPS * value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cells_hold_all_mass_in_both_directions() {
        for (sigma, rate, h) in [(1.0, 0.01, 1e-3), (0.4, 1e-4, 1e-2), (20.0, 1.0, 1e-4)] {
            let phase = Phase::new(sigma, rate, 1).unwrap();
            for edges in [Edges::Points, Edges::Halves] {
                let remove = Cells::new(&phase, h, edges, 1e-18);
                for cells in [remove.mirrored(&phase), remove] {
                    let up: f64 = cells.a.iter().map(|m| m.up()).sum::<f64>() + cells.above.up();
                    let down: f64 = cells.a.iter().map(|m| m.down()).sum();
                    assert!(up + cells.below >= 1.0 - 1e-12 && up < 1.0 + 1e-9, "{up}");
                    assert!(down <= 1.0 + 1e-12 && down > 1.0 - 1e-9, "{down}");
                }
            }
        }
    }

    #[test]
    fn a_cells_ratio_of_masses_lies_between_its_edges() {
        let phase = Phase::new(0.8, 0.02, 1).unwrap();
        let cells = Cells::new(&phase, 1e-3, Edges::Halves, 1e-15);
        for cells in [cells.mirrored(&phase), cells] {
            for (i, (a, b)) in cells.a.iter().zip(&cells.b).enumerate() {
                let low = (cells.first + i as i64) as f64 * 1e-3 + 0.5e-3;
                assert!(a.up() >= b.down() * libm::exp(low) * (1.0 - 1e-14), "{i}");
                assert!(a.down() <= b.up() * libm::exp(low + 1e-3) * (1.0 + 1e-14), "{i}");
            }
        }
    }
}
