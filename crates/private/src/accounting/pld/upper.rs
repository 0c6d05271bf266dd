//! One step rounded to the grid so that its privacy loss is not below the truth.
//!
//! "Connect the dots" (Doroshenko, Ghazi, Kamath, Kumar & Manurangsi 2022): what has loss x between
//! the grid points g and g + h, with mass a under the first distribution and b = a·e^−x under the
//! second, is split between the two points so that both masses stay:
//! `p(g+h) = (a − e^g·b)/(1 − e^−h)`, `p(g) = a − p(g+h)`. As a function of e^ε the hockey-stick
//! curve becomes its own chord, which lies above it since the curve is convex; domination survives
//! composition. The cost is of second order in h: log E[e^{λ·loss}] grows by at most λ(λ+1)h²/8.
//!
//! # Why rounding cannot break it
//!
//! δ(ε) of a composition is the mean of a function that increases with the sum of the losses. So
//! any mass function whose upper tails are not below the exact one's gives a δ not below: mass may
//! be added, and moved up. Here a is rounded up, b down, p(g+h) up. An edge whose loss is off by up
//! to `slop` is covered by b·(1 − slop), as if those losses were moved into the cell, and by adding
//! slop once per step to the final ε.

use super::cells::Cells;
use super::pmf::Pmf;

const EPS: f64 = f64::EPSILON;

/// The upper mass function of `cells`, whose edges are the grid points.
pub(super) fn upper(cells: &Cells) -> Pmf {
    let h = cells.h;
    let mut mass = vec![0.0; cells.a.len() + 1];
    // What lies below the lowest point is moved up to it.
    mass[0] = cells.below;
    let less = -libm::expm1(-h);
    for (i, (a, b)) in cells.a.iter().zip(&cells.b).enumerate() {
        let g = (cells.first + i as i64) as f64 * h;
        let a = a.up();
        // e^g errs by ε(2 + |g|) of itself: g is rounded, and so is the exponential.
        let relative = EPS * (8.0 + 4.0 * g.abs()) + cells.slop;
        let b = b.down() * (1.0 - relative);
        // Past 700 e^g would overflow; all of it goes up, which is always allowed.
        let high = if g > 700.0 { a } else { (a - libm::exp(g) * b) / less };
        let high = (high * (1.0 + 4.0 * EPS)).clamp(0.0, a);
        mass[i] += a - high;
        mass[i + 1] += high;
    }
    // Two additions and a subtraction per point.
    mass.iter_mut().for_each(|m| *m *= 1.0 + 4.0 * EPS);
    Pmf { h, offset: 0.0, first: cells.first, mass, infinite: cells.above.up(), slop: cells.slop }
}
