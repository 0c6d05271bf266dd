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
//! The cells around grid points (edges half way) are joined each into one atom, whose loss log(p/q)
//! lies near the point. Rounding all of them down to the grid would cost some h/2 at each of T
//! steps; instead atoms are brought *onto* their points by joining parts of neighbours at random, at a
//! cost of second order in h as in the upper bound. From both ends towards the heaviest atom:
//! * an atom below its point is lifted by part of the neighbour above, one above its point is held
//!   down by part of the neighbour below;
//! * where the neighbour on the outer, lighter side has too little, the atom is joined whole to the
//!   inner one, which is heavier and goes on from there;
//! * the grid is moved by the offset at which the heaviest atom, after all that, lies on its point;
//! * what still is above its point is rounded down to it, what is below, to the next one it reaches.
//!
//! Rounding: p is taken down and q up before anything else. With s = p(1−8ε) − r(1+8ε) as computed,
//! p − r ≥ s + 6ε(p+r), and shares are chosen such that the sum of the s of what is joined is not
//! negative; the 6ε are more than the joining itself can err. What atoms hold is known by its masses
//! alone, so it does not matter how exactly the cells' edges lie.

use super::cells::Cells;
use super::pmf::Pmf;

const EPS: f64 = f64::EPSILON;
/// How often the offset is sought; each time the rest shrinks by the share of the light atoms.
const ROUNDS: usize = 8;

/// The lower mass function of `cells`, whose edges lie half way between grid points.
pub(super) fn lower(cells: &Cells) -> Pmf {
    let h = cells.h;
    // The cell with index i has its edges half a step below and above point first + 1 + i.
    let first = cells.first + 1;
    let atoms: Vec<Atom> = (cells.a.iter().zip(&cells.b).enumerate())
        .map(|(i, (a, b))| Atom { p: a.down(), r: scaled(b.up(), (first + i as i64) as f64 * h) })
        .collect();
    let heaviest = (0..atoms.len()).max_by(|&i, &j| atoms[i].p.total_cmp(&atoms[j].p));
    let heaviest = heaviest.unwrap_or(0);

    let mut offset = 0.0;
    let mut grid = Grid::new(&atoms, offset, h);
    for round in 0..ROUNDS {
        grid.settle(heaviest);
        let rest = grid.rest;
        if rest == 0.0 || round + 1 == ROUNDS {
            break;
        }
        // A little lower each time, since an atom just below its point would be rounded far down.
        let wanted = offset + rest - 64.0 * EPS * (1.0 + rest.abs());
        offset = wanted.clamp(-0.49 * h, 0.49 * h);
        grid = Grid::new(&atoms, offset, h);
    }
    let mut mass = grid.out;
    // What lies above the highest edge is rounded down to the highest point, below that edge.
    if let Some(highest) = mass.last_mut() {
        *highest += cells.above.down();
    }
    // At most a few roundings made each mass.
    mass.iter_mut().for_each(|m| *m *= 1.0 - 8.0 * EPS);
    Pmf { h, offset, first, mass, infinite: 0.0, slop: 0.0 }
}

/// What is joined at a grid point: mass under the first distribution, from below, and under the
/// second from above, in units of the point's ratio: p ≥ r says "the loss is at least the point's".
#[derive(Clone, Copy)]
struct Atom {
    p: f64,
    r: f64,
}

impl Atom {
    /// p − r, from below.
    fn surplus(self) -> f64 {
        self.p * (1.0 - 8.0 * EPS) - self.r * (1.0 + 8.0 * EPS)
    }

    /// In the units of another point, `ratio` = e^(that point's loss − this one's).
    fn seen(self, ratio: f64) -> Self {
        Self { p: self.p, r: self.r * ratio }
    }

    /// With part `share` of another added.
    fn with(self, share: f64, other: Self) -> Self {
        Self { p: self.p + share * other.p, r: self.r + share * other.r }
    }

    /// Without that part.
    fn without(self, share: f64) -> Self {
        Self { p: self.p * (1.0 - share), r: self.r * (1.0 - share) * (1.0 + 4.0 * EPS) }
    }
}

/// Atoms on their way to the grid.
struct Grid {
    atoms: Vec<Atom>,
    /// Masses on the points.
    out: Vec<f64>,
    /// e^h and e^−h, rounded up.
    up: f64,
    down: f64,
    /// log(p/r) of the heaviest atom where its neighbours could not bring it to its point.
    rest: f64,
}

impl Grid {
    fn new(atoms: &[Atom], offset: f64, h: f64) -> Self {
        let move_by = libm::exp(offset) * (1.0 + 4.0 * EPS);
        let atoms: Vec<Atom> = atoms.iter().map(|atom| atom.seen(move_by)).collect();
        let out = vec![0.0; atoms.len()];
        let up = libm::exp(h) * (1.0 + 2.0 * EPS);
        let down = libm::exp(-h) * (1.0 + 2.0 * EPS);
        Self { atoms, out, up, down, rest: 0.0 }
    }

    fn settle(&mut self, heaviest: usize) {
        for i in (heaviest + 1..self.atoms.len()).rev() {
            let settled = if self.atoms[i].surplus() < 0.0 {
                self.lift_by_settled(i)
            } else {
                self.hold_by_raw(i)
            };
            if !settled {
                let atom = self.atoms[i].seen(self.down);
                self.atoms[i - 1] = self.atoms[i - 1].with(1.0, atom);
            }
        }
        for i in 0..heaviest {
            let settled = if self.atoms[i].surplus() < 0.0 {
                self.lift_by_raw(i)
            } else {
                self.hold_by_settled(i)
            };
            if !settled {
                let atom = self.atoms[i].seen(self.up);
                self.atoms[i + 1] = self.atoms[i + 1].with(1.0, atom);
            }
        }
        let Some(&atom) = self.atoms.get(heaviest) else { return };
        let settled = if atom.surplus() < 0.0 {
            self.lift_by_settled(heaviest)
        } else {
            self.hold_by_settled(heaviest)
        };
        if !settled {
            self.rest = libm::log(atom.p / atom.r);
            self.round_down(heaviest, atom);
        }
    }

    /// Lifts an atom with part of the one above, which lies on its point.
    fn lift_by_settled(&mut self, i: usize) -> bool {
        let Some(&mass) = self.out.get(i + 1) else { return false };
        let above = Atom { p: mass, r: mass * self.down };
        let Some(share) = lifting(self.atoms[i], above) else { return false };
        self.out[i + 1] *= 1.0 - share;
        self.out[i] = self.atoms[i].p + share * mass;
        true
    }

    /// Lifts an atom with part of the one above, which is still to be settled.
    fn lift_by_raw(&mut self, i: usize) -> bool {
        let above = self.atoms[i + 1].seen(self.down);
        let Some(share) = lifting(self.atoms[i], above) else { return false };
        self.atoms[i + 1] = self.atoms[i + 1].without(share);
        self.out[i] = self.atoms[i].p + share * above.p;
        true
    }

    /// Brings an atom down to its point with part of the one below, which lies on its own.
    fn hold_by_settled(&mut self, i: usize) -> bool {
        let mass = if i == 0 { 0.0 } else { self.out[i - 1] };
        let below = Atom { p: mass, r: mass * self.up };
        let Some(share) = holding(self.atoms[i], below) else { return false };
        if i > 0 {
            self.out[i - 1] *= 1.0 - share;
        }
        self.out[i] = self.atoms[i].p + share * mass;
        true
    }

    /// Brings an atom down to its point with part of the one below, still to be settled.
    fn hold_by_raw(&mut self, i: usize) -> bool {
        let below = self.atoms[i - 1].seen(self.up);
        let Some(share) = holding(self.atoms[i], below) else { return false };
        self.atoms[i - 1] = self.atoms[i - 1].without(share);
        self.out[i] = self.atoms[i].p + share * below.p;
        true
    }

    /// Puts an atom on the highest point that its loss is not below; drops it when there is none.
    fn round_down(&mut self, from: usize, mut atom: Atom) {
        for i in (0..=from).rev() {
            if atom.surplus() >= 0.0 {
                self.out[i] += atom.p;
                return;
            }
            atom = atom.seen(self.down);
        }
    }
}

/// The part of `above` that lifts an atom to its point, when there is enough.
fn lifting(atom: Atom, above: Atom) -> Option<f64> {
    let share = -atom.surplus() / above.surplus() * (1.0 + 32.0 * EPS);
    (above.surplus() > 0.0 && share <= 1.0).then_some(share)
}

/// The part of `below` that brings an atom down to its point, when there is enough.
fn holding(atom: Atom, below: Atom) -> Option<f64> {
    let surplus = atom.surplus();
    if surplus == 0.0 {
        return Some(0.0);
    }
    let share = surplus / -below.surplus() * (1.0 - 32.0 * EPS);
    (below.surplus() < 0.0 && share <= 1.0).then_some(share)
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
