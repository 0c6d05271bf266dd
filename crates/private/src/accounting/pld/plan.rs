//! Where to look and how finely: grid step, tilt and window of a composition.
//!
//! Nothing here has to be right for the bounds to hold; it decides how close they are. All is found
//! from K(θ) = log E[e^{θ·loss}] of one step, by a sum over about a thousand places.

use super::Direction;
use super::cells::{self, range};
use crate::accounting::Phase;

/// What is asked.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// The ε at this δ.
    Delta(f64),
    /// The δ at this ε.
    Epsilon(f64),
}

/// Half the distance wanted between the two bounds on ε, over ε.
const CLOSENESS: f64 = 1e-4;
/// Fewest grid points across the window: cheap, and fine enough for one step.
const LEAST_POINTS: f64 = 16384.0;
/// Most grid points across the window, which bounds memory (some 100 MB) and time (some seconds);
/// bounds get wider instead.
const MOST_POINTS: f64 = 1_048_576.0;
/// Largest exponent of the tilt over one step's losses.
const MOST_TILT: f64 = 600.0;
/// −log of the tilted mass left outside the window, on each side.
const OUTSIDE: f64 = 23.0;
/// Share of δ that all steps' cut tails may take.
const CUT: f64 = 1e-6;

/// Common to both directions.
pub(super) struct Plan {
    /// Grid step.
    pub(super) h: f64,
    /// Mass beyond the resolved losses of one step, on each side.
    pub(super) tail: f64,
    /// For [`Direction::Remove`] and [`Direction::Add`].
    pub(super) windows: [Window; 2],
}

/// One direction's tilt and window.
#[derive(Clone, Copy)]
pub(super) struct Window {
    /// The tilt: masses are multiplied by e^{λ·loss} before the transform.
    pub(super) lambda: f64,
    /// Tilts beyond λ whose moments bound the mass outside: λ + above, λ − below.
    pub(super) above: f64,
    pub(super) below: f64,
    /// Lowest and highest total loss looked at.
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Plan {
    /// For phases that are not empty.
    pub(super) fn new(phases: &[Phase], target: Target) -> Self {
        let steps: f64 = phases.iter().map(|p| p.steps() as f64).sum();
        // The δ that cut tails are measured by is not known yet when ε is asked for.
        let rough = match target {
            Target::Delta(delta) => delta,
            Target::Epsilon(_) => 1e-30,
        };
        let moments = Moments::new(phases, cut(rough, steps));
        let windows = [Direction::Remove, Direction::Add].map(|d| moments.window(d, target));
        let delta = match target {
            Target::Delta(delta) => delta,
            // Chernoff's bound, and a bit less.
            Target::Epsilon(epsilon) => {
                let best = [Direction::Remove, Direction::Add].into_iter().zip(&windows);
                let best = best.map(|(d, w)| moments.total(d, w.lambda) - w.lambda * epsilon);
                libm::exp(best.fold(f64::NEG_INFINITY, f64::max).clamp(-230.0, 0.0)) / 30.0
            }
        };
        let tail = cut(delta, steps);
        let h = windows.iter().map(|w| wanted_step(w, steps)).fold(f64::INFINITY, f64::min);
        let mut widest = windows.iter().map(|w| w.high - w.low).fold(0.0, f64::max);
        for phase in phases {
            let (low, high) = range(phase, tail);
            widest = widest.max(high - low);
        }
        let points = (widest / h).clamp(LEAST_POINTS, MOST_POINTS);
        Self { h: widest / points, tail, windows }
    }
}

fn cut(delta: f64, steps: f64) -> f64 {
    (CUT * delta / steps).clamp(1e-290, 1e-9)
}

/// Rounding moves log E[e^{λ·loss}] of each step by about λ(λ+1)h²/12, hence ε by T(λ+1)h²/12.
fn wanted_step(window: &Window, steps: f64) -> f64 {
    let width = window.high - window.low;
    // At a small tilt ε is smaller than what the losses spread over, and not the measure.
    let closeness = CLOSENESS * (window.low + 0.5 * width).max(width / 40.0);
    libm::sqrt(12.0 * closeness / (steps * (window.lambda + 1.0)))
}

/// Places along the line with both distributions' weights, for each phase.
struct Moments {
    phases: Vec<Places>,
    /// Largest |θ| that may be asked for.
    most: f64,
}

struct Places {
    steps: f64,
    loss: Vec<f64>,
    mixture: Vec<f64>,
    plain: Vec<f64>,
}

impl Moments {
    fn new(phases: &[Phase], tail: f64) -> Self {
        let places: Vec<Places> = phases.iter().map(|phase| Places::new(phase, tail)).collect();
        let losses = places.iter().flat_map(|p| &p.loss);
        let largest = losses.fold(0.0_f64, |most, t| most.max(t.abs()));
        Self { phases: places, most: MOST_TILT / largest.max(1e-300) }
    }

    /// Σ T·K(θ) of a direction.
    fn total(&self, direction: Direction, theta: f64) -> f64 {
        let of = |p: &Places| {
            let (weights, sign) = match direction {
                Direction::Remove => (&p.mixture, theta),
                Direction::Add => (&p.plain, -theta),
            };
            let terms = weights.iter().zip(&p.loss).map(|(w, t)| w * libm::exp(sign * t));
            p.steps * libm::log(terms.sum())
        };
        self.phases.iter().map(of).sum()
    }

    fn window(&self, direction: Direction, target: Target) -> Window {
        let total = |theta| self.total(direction, theta);
        let usable = 0.9 * self.most;
        let lambda = match target {
            // Chernoff: Pr[loss > ε] ≤ exp(K − λε), solved for the smallest ε.
            Target::Delta(delta) => {
                let least = (-libm::log(delta)).max(1.0);
                smallest(usable, |lambda| (total(lambda) + least) / lambda)
            }
            Target::Epsilon(epsilon) => smallest(usable, |lambda| total(lambda) - lambda * epsilon),
        };
        let here = total(lambda);
        let room = self.most - lambda;
        let above = smallest(room, |nu| (total(lambda + nu) - here + OUTSIDE) / nu);
        let high = (total(lambda + above) - here + OUTSIDE) / above;
        let room = self.most + lambda;
        let below = smallest(room, |nu| (total(lambda - nu) - here + OUTSIDE) / nu);
        let low = (here - total(lambda - below) - OUTSIDE) / below;
        // δ lies below Chernoff's bound by a factor of some tens: ε is lower by a few 1/λ.
        let low = match target {
            Target::Delta(delta) => {
                low.min((here + (-libm::log(delta)).max(1.0)) / lambda - 8.0 / lambda)
            }
            Target::Epsilon(_) => low,
        };
        Window { lambda, above, below, low, high }
    }
}

impl Places {
    fn new(phase: &Phase, tail: f64) -> Self {
        const PLACES: u32 = 1024;
        let (low, high) = cells::ends(phase, tail);
        let step = (high - low) / f64::from(PLACES);
        let norm = step / libm::sqrt(2.0 * std::f64::consts::PI);
        let density = |y: f64| norm * libm::exp(-0.5 * y * y);
        let mut places =
            Self { steps: phase.steps() as f64, loss: vec![], mixture: vec![], plain: vec![] };
        for i in 0..=PLACES {
            let y = low + f64::from(i) * step;
            let (plain, moved) = (density(y), density(y - 1.0 / phase.sigma()));
            places.loss.push(cells::loss(phase, y));
            places.plain.push(plain);
            places.mixture.push((1.0 - phase.rate()) * plain + phase.rate() * moved);
        }
        places
    }
}

/// Where a function with one valley is smallest within (10⁻⁹·most, most), by golden sections of the
/// logarithm; 40 of them leave a relative width of 10⁻⁷.
fn smallest(most: f64, f: impl Fn(f64) -> f64) -> f64 {
    const SECTION: f64 = 0.618_033_988_749_894_9;
    let (mut low, mut high) = (libm::log(1e-9 * most), libm::log(most));
    let at = |x: f64| {
        let value = f(libm::exp(x));
        if value.is_nan() { f64::INFINITY } else { value }
    };
    let (mut left, mut right) = (high - SECTION * (high - low), low + SECTION * (high - low));
    let (mut at_left, mut at_right) = (at(left), at(right));
    for _ in 0..40 {
        if at_left <= at_right {
            (high, right, at_right) = (right, left, at_left);
            left = high - SECTION * (high - low);
            at_left = at(left);
        } else {
            (low, left, at_left) = (left, right, at_right);
            right = low + SECTION * (high - low);
            at_right = at(right);
        }
    }
    libm::exp(0.5 * (low + high))
}
