//! Probabilities on a grid of privacy losses.

/// Mass `mass[i]` at the loss (first + i)·h + offset, and `infinite` at +∞.
///
/// The second distribution has `mass·e^−loss` there, so that
/// δ(ε) = infinite + Σ mass·(1 − e^{ε−loss})₊.
pub(super) struct Pmf {
    pub(super) h: f64,
    pub(super) offset: f64,
    pub(super) first: i64,
    pub(super) mass: Vec<f64>,
    pub(super) infinite: f64,
    /// How far each step's loss may be from what the grid says.
    pub(super) slop: f64,
}

impl Pmf {
    /// Index of the last mass.
    pub(super) fn last(&self) -> i64 {
        self.first + self.mass.len() as i64 - 1
    }

    /// log Σ mass·exp(θ·k·h) over grid indices k (the offset left out), and a bound on its error:
    /// each exponent errs by ε(3|θkh|) and its exponential by ε, the n additions by ε each.
    pub(super) fn log_moment(&self, theta: f64) -> (f64, f64) {
        let step = theta * self.h;
        let ends = (step * self.first as f64).max(step * self.last() as f64);
        let exponents = (self.first..).map(|k| step * k as f64 - ends);
        let sum: f64 = self.mass.iter().zip(exponents).map(|(m, x)| m * libm::exp(x)).sum();
        let size = (step * self.first as f64).abs().max(ends.abs());
        let error = f64::EPSILON * (self.mass.len() as f64 + 8.0 * (size + 1.0));
        (ends + libm::log(sum), error + f64::EPSILON * libm::log(sum).abs())
    }
}

#[cfg(test)]
mod tests {
    use super::super::cells::{Cells, Edges};
    use super::super::{lower::lower, upper::upper};
    use super::*;
    use crate::accounting::Phase;

    fn delta(pmf: &Pmf, epsilon: f64) -> f64 {
        let losses = (pmf.first..).map(|k| k as f64 * pmf.h + pmf.offset);
        let terms = pmf.mass.iter().zip(losses);
        pmf.infinite + terms.map(|(m, t)| m * (-libm::expm1(epsilon - t)).max(0.0)).sum::<f64>()
    }

    /// The hockey-stick divergence over a partition 500 times finer, from below: cells are joined
    /// outcomes and their masses are rounded inwards. Off by at most (h/500)²/8 and the cells'
    /// rounding, some 10⁻¹⁴ of each mass.
    fn fine(cells: &Cells, epsilon: f64) -> f64 {
        let pairs = cells.a.iter().zip(&cells.b);
        pairs.map(|(a, b)| (a.down() - libm::exp(epsilon) * b.up()).max(0.0)).sum()
    }

    #[test]
    fn one_step_lies_between_its_two_roundings_at_every_epsilon() {
        let cases = [
            (1.0, 0.01, 0.02),
            (0.5, 1e-3, 0.05),
            (0.4, 1e-4, 0.2),
            (2.0, 0.5, 0.01),
            (1.0, 1.0, 0.1),
            (10.0, 1.0, 0.5),
            (5.0, 0.9999, 0.01),
        ];
        for (sigma, rate, h) in cases {
            let phase = Phase::new(sigma, rate, 1).unwrap();
            let points = Cells::new(&phase, h, Edges::Points, 1e-16);
            let halves = Cells::new(&phase, h, Edges::Halves, 1e-16);
            let exact = Cells::new(&phase, h / 500.0, Edges::Points, 1e-16);
            let triples = [
                (points.mirrored(&phase), halves.mirrored(&phase), exact.mirrored(&phase)),
                (points, halves, exact),
            ];
            for (points, halves, exact) in triples {
                let (up, low) = (upper(&points), lower(&halves));
                for i in 0..60 {
                    let epsilon = 0.07 * f64::from(i);
                    let (u, l, e) =
                        (delta(&up, epsilon), delta(&low, epsilon), fine(&exact, epsilon));
                    let own = (h / 500.0) * (h / 500.0) / 8.0 + 1e-12;
                    assert!(u >= e, "{sigma} {rate}: upper {u:e} at {epsilon} below {e:e}");
                    assert!(l <= e + own, "{sigma} {rate}: lower {l:e} at {epsilon} above {e:e}");
                    assert!(u - l < h, "{sigma} {rate}: {l:e}..{u:e} at {epsilon}");
                }
            }
        }
    }

    #[test]
    fn mass_is_neither_lost_nor_made() {
        let phase = Phase::new(0.7, 1e-3, 1).unwrap();
        let up = upper(&Cells::new(&phase, 1e-3, Edges::Points, 1e-18));
        let low = lower(&Cells::new(&phase, 1e-3, Edges::Halves, 1e-18));
        let (up, low): (f64, f64) = (up.mass.iter().sum(), low.mass.iter().sum());
        // 2 000 masses of rounding 10⁻¹⁴ relative, and this sum's own.
        assert!((1.0 - 1e-12..1.0 + 1e-10).contains(&up), "{up}");
        assert!((1.0 - 1e-10..=1.0 + 1e-12).contains(&low), "{low}");
    }
}
