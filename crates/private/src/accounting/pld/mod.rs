//! Privacy-loss distributions: ε(δ) and δ(ε) between two bounds.
//!
//! The loss of a release is log(P/Q) at what came out. Losses of independent steps add up, so their
//! distribution is a T-fold convolution, done here by one Fourier transform (Koskela, Jälkö &
//! Honkela 2020). Unlike the estimates known from elsewhere, every approximation is rounded outwards:
//!
//! | approximation | where | how it is bounded |
//! |---|---|---|
//! | tails of one step cut off | `cells` | to +∞ or up (upper), down or dropped (lower) |
//! | rounding of Φ, exp, log | `cells` | an error bound beside each mass; `slop` for each edge |
//! | losses rounded to a grid | `upper`, `lower` | a dominating pair, a dominated pair |
//! | the transform and the power | `fft`, `compose` | an a-priori bound in the 2-norm |
//! | the convolution's wrap-around | `compose` | Chernoff on the masses themselves |
//! | sums and the undoing of the tilt | `curve` | a relative error on all |
//!
//! How close the bounds are: some 10⁻⁴ of ε in the usual regimes. They are wider, and still bounds, when
//! the grid is at its largest (losses that range over far more than ε, or T past 10⁶), and for δ
//! below some 10⁻⁹ when ε comes from rare large losses (tiny rates at small noise): the tilt then
//! gains little, and the transform's error bound of about T·10⁻¹⁴ is not small beside δ.
//!
//! What is relied on: IEEE double arithmetic, and `libm`'s `exp`, `expm1`, `log`, `log1p`, `erfc`,
//! `sin`, `cos` to within one unit in the last place (its stated accuracy).

mod cells;
mod compose;
mod curve;
mod fft;
mod lower;
mod plan;
mod pmf;
mod upper;

use cells::{Cells, Edges};
use compose::Composition;
use curve::{Bound, Curve};
use plan::{Plan, Target};
use pmf::Pmf;

use super::{Phase, check_delta, check_epsilon, merged};
use crate::{Error, Result};

/// The most different (sigma, rate) pairs of one composition: each costs a transform.
pub const MOST_PHASES: usize = 256;

/// A quantity between two bounds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Bounds {
    /// Not above the truth.
    pub lower: f64,
    /// Not below the truth; infinite when it could not be bounded.
    pub upper: f64,
}

/// Bounds for each adjacency direction. What a user is told is the larger of the two.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Directions {
    /// The first data set has one person more.
    pub remove: Bounds,
    /// The first data set has one person less.
    pub add: Bounds,
}

impl Directions {
    /// Bounds that hold for both directions.
    pub fn both(&self) -> Bounds {
        Bounds {
            lower: self.remove.lower.max(self.add.lower),
            upper: self.remove.upper.max(self.add.upper),
        }
    }
}

/// One of the two directions.
#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Remove,
    Add,
}

/// Bounds on ε at `delta`.
///
/// # Errors
/// [`Error::Parameter`] for a δ out of range, [`Error::TooManySteps`], [`Error::TooManyPhases`].
pub fn epsilon(phases: &[Phase], delta: f64) -> Result<Directions> {
    let phases = checked(phases)?;
    check_delta(delta)?;
    if phases.is_empty() {
        return Ok(directions([0.0; 2], [0.0; 2]));
    }
    let (upper, plan) = uppers(&phases, delta);
    let lower = read(&phases, &plan, Bound::Lower, |curve| curve.epsilon(delta));
    Ok(directions(lower, upper))
}

/// The upper bound on ε at `delta`, for both directions; half the work of [`epsilon`].
///
/// # Errors
/// As [`epsilon`].
pub fn epsilon_upper(phases: &[Phase], delta: f64) -> Result<f64> {
    let phases = checked(phases)?;
    check_delta(delta)?;
    if phases.is_empty() {
        return Ok(0.0);
    }
    let ([remove, add], _) = uppers(&phases, delta);
    Ok(remove.max(add))
}

/// The upper bounds on ε and the plan that gave them.
///
/// Rare and large losses make Chernoff's ε several times the true one. Then all is done again with a
/// tilt for the ε that was found; both are bounds, and the smaller counts.
fn uppers(phases: &[Phase], delta: f64) -> ([f64; 2], Plan) {
    let plan = Plan::new(phases, Target::Delta(delta));
    let number = |curve: &Curve| curve.epsilon(delta);
    let first = read(phases, &plan, Bound::Upper, number);
    if !plan.is_far_from(first) {
        return (first, plan);
    }
    let plan = Plan::around(phases, delta, first);
    let again = read(phases, &plan, Bound::Upper, number);
    ([first[0].min(again[0]), first[1].min(again[1])], plan)
}

/// Bounds on δ at `epsilon`.
///
/// # Errors
/// [`Error::Parameter`] for an ε out of range, [`Error::TooManySteps`], [`Error::TooManyPhases`].
pub fn delta(phases: &[Phase], epsilon: f64) -> Result<Directions> {
    check_epsilon(epsilon)?;
    let phases = checked(phases)?;
    if phases.is_empty() {
        return Ok(directions([0.0; 2], [0.0; 2]));
    }
    let plan = Plan::new(&phases, Target::Epsilon(epsilon));
    let [upper, lower] = [Bound::Upper, Bound::Lower]
        .map(|bound| read(&phases, &plan, bound, |curve| curve.delta(epsilon)));
    Ok(directions(lower, upper))
}

/// The phases joined, unless they are too many.
fn checked(phases: &[Phase]) -> Result<Vec<Phase>> {
    let phases = merged(phases)?;
    if phases.len() > MOST_PHASES {
        return Err(Error::TooManyPhases { phases: phases.len(), most: MOST_PHASES });
    }
    Ok(phases)
}

fn directions(lower: [f64; 2], upper: [f64; 2]) -> Directions {
    let both = |i: usize| Bounds { lower: lower[i], upper: upper[i] };
    Directions { remove: both(0), add: both(1) }
}

/// Composes both directions' curves of one side and reads a number from each.
fn read(phases: &[Phase], plan: &Plan, bound: Bound, number: impl Fn(&Curve) -> f64) -> [f64; 2] {
    // The widest step decides the length of the transform.
    let masses = phases.iter().map(|p| {
        let (low, high) = cells::range(p, plan.tail);
        ((high - low) / plan.h) as usize + 4
    });
    let masses = masses.max().unwrap_or(0);
    let mut compositions = plan.windows.map(|w| Composition::new(w, plan.h, masses));
    for phase in phases {
        for (composition, pmf) in compositions.iter_mut().zip(rounded(phase, plan, bound)) {
            composition.add(&pmf, phase.steps());
        }
    }
    compositions.map(|composition| number(&composition.finish(bound)))
}

/// One step, rounded to the grid: remove, add.
fn rounded(phase: &Phase, plan: &Plan, bound: Bound) -> [Pmf; 2] {
    let edges = if bound == Bound::Upper { Edges::Points } else { Edges::Halves };
    let cells = Cells::new(phase, plan.h, edges, plan.tail);
    let mirrored = cells.mirrored(phase);
    [cells, mirrored].map(|cells| match bound {
        Bound::Upper => upper::upper(&cells),
        Bound::Lower => lower::lower(&cells),
    })
}
