//! One step rounded to the grid so that its privacy loss is not above the truth.
//!
//! # What is allowed
//!
//! Looking at a release through coarser glasses cannot reveal more: joining outcomes, also at
//! random, gives a pair of distributions that the true pair dominates, and so does every product of
//! them (data processing). Further, with H(u) = sup_S P(S) − u·Q(S), any P' ≤ P and Q' ≥ Q as measures
//! give a smaller H, products included. So every atom of an allowed result is made of parts of
//! joined outcomes, its loss is at most log(p/q) of what it holds, and mass may be dropped.
//!
//! # What is done
//!
//! The cells around grid points (edges half way) are joined each into one atom, whose loss log(a/b)
//! lies near the point kh. To bring the losses onto *one* grid without rounding them all down, which
//! would cost h/2 at each of T steps, three things are done:
//! * the grid is moved by the offset at which the heaviest atom lies on it;
//! * an atom above its grid point takes as much of its lower neighbour as brings it down to the point
//!   exactly; one below takes as much of its upper neighbour as lifts it (joining at random). The
//!   cost is of second order in h, as in the upper bound;
//! * an atom that its neighbour cannot lift is rounded down to the next point, with its true mass.
//!
//! Rounding: a is taken down and b up before anything else, and an atom counts as being on its point
//! only when it is so with (1 ∓ 8ε) on both sides, more than its sums can err. Edges off by up to
//! `slop` matter only where a loss is known by its cell alone; slop once per step is taken from the
//! final ε.

use super::cells::Cells;
use super::pmf::Pmf;

const EPS: f64 = f64::EPSILON;

/// The lower mass function of `cells`, whose edges lie half way between grid points.
pub(super) fn lower(cells: &Cells) -> Pmf {
    let h = cells.h;
    // The cell with index i has its edges half a step below and above point first + 1 + i.
    let first = cells.first + 1;
    let offset = heaviest_offset(cells, first);
    let point = |i: usize| (first + i as i64) as f64 * h + offset;

    // (p, r): mass under the first distribution, and under the second in units of the point's
    // ratio, so that p ≥ r says "the loss is at least the point's".
    let mut atoms: Vec<(f64, f64)> = (cells.a.iter().zip(&cells.b).enumerate())
        .map(|(i, (a, b))| (a.down(), scaled(b.up(), point(i))))
        .collect();
    let (up, down) = (libm::exp(h), libm::exp(-h));
    // One point more at the bottom, for what is rounded down from the lowest cell.
    let mut out = vec![0.0; atoms.len() + 1];
    for i in 0..atoms.len() {
        let (p, r) = atoms[i];
        let surplus = p * (1.0 - 8.0 * EPS) - r * (1.0 + 8.0 * EPS);
        if surplus >= 0.0 {
            // The neighbour below lies on its point: (o, o·e^h) in this point's units. Part
            // α = surplus/(o·(e^h − 1)) of it would bring the atom down to the point.
            let share = surplus / (out[i] * (up - 1.0)) * (1.0 - 16.0 * EPS);
            let share = if share.is_finite() { share.min(1.0) } else { 0.0 };
            out[i + 1] = p + share * out[i];
            out[i] *= 1.0 - share;
            continue;
        }
        // The neighbour above, in this point's units.
        let (above_p, above_r) = atoms.get(i + 1).map_or((0.0, 0.0), |&(p, r)| (p, r * down));
        let lift = above_p * (1.0 - 8.0 * EPS) - above_r * (1.0 + 8.0 * EPS);
        let share = -surplus / lift * (1.0 + 16.0 * EPS);
        if lift > 0.0 && share <= 1.0 {
            out[i + 1] = p + share * above_p;
            let (p, r) = atoms[i + 1];
            atoms[i + 1] = (p * (1.0 - share), r * (1.0 - share) * (1.0 + 4.0 * EPS));
        } else {
            // The point below is not above the cell's lower edge, since |offset| ≤ h/2.
            out[i] += p;
        }
    }
    // What lies above the highest edge is rounded down to the highest point.
    if let Some(highest) = out.last_mut() {
        *highest += cells.above.down();
    }
    // At most four roundings made each mass.
    out.iter_mut().for_each(|m| *m *= 1.0 - 8.0 * EPS);
    Pmf { h, offset, first: first - 1, mass: out, infinite: 0.0, slop: cells.slop }
}

/// Where the heaviest atom lies beside its grid point, within half a step and rounded down.
fn heaviest_offset(cells: &Cells, first: i64) -> f64 {
    let heaviest = (0..cells.a.len()).max_by(|&i, &j| cells.a[i].up().total_cmp(&cells.a[j].up()));
    let Some(i) = heaviest else { return 0.0 };
    let (a, b) = (cells.a[i].down(), cells.b[i].up());
    let point = (first + i as i64) as f64 * cells.h;
    let offset = libm::log(a / b) - point - EPS * (16.0 + 8.0 * point.abs());
    if offset.is_nan() { 0.0 } else { offset.clamp(-0.5 * cells.h, 0.5 * cells.h) }
}

/// e^g·b rounded up.
fn scaled(b: f64, g: f64) -> f64 {
    let relative = EPS * (16.0 + 8.0 * g.abs());
    if g < 600.0 {
        return b * libm::exp(g) * (1.0 + relative) + f64::MIN_POSITIVE;
    }
    // e^g alone might overflow where the product does not.
    let log = libm::log(b);
    libm::exp(g + log) * (1.0 + relative + 4.0 * EPS * log.abs()) + f64::MIN_POSITIVE
}
