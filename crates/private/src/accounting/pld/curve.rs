//! δ(ε) of a composed mass function on its grid, read in either direction.

const EPS: f64 = f64::EPSILON;

/// Which side of the truth a curve lies on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bound {
    /// δ not below the truth.
    Upper,
    /// δ not above the truth.
    Lower,
}

/// Where a curve's numbers lie; see [`super::compose`].
pub(super) struct Frame {
    pub(super) h: f64,
    /// λh
    pub(super) tilt: f64,
    /// Grid index of the first mass.
    pub(super) lowest: i64,
    /// Loss at grid index 0.
    pub(super) offset: f64,
    /// How far total losses may be from the grid.
    pub(super) slop: f64,
    /// Σ T·K
    pub(super) scale: f64,
    /// Relative error of all masses alike.
    pub(super) relative: f64,
    /// Mass at +∞.
    pub(super) infinite: f64,
    /// Tilted masses above and below the window.
    pub(super) above: f64,
    pub(super) below: f64,
}

/// Bounds of one side on δ at every grid point of the window.
pub(super) struct Curve {
    bound: Bound,
    /// Tilted δ: `D_k = Σ_{j>k} w_j·e^{−λ(j−k)h}·(1 − e^{−(j−k)h})`
    scaled: Vec<f64>,
    frame: Frame,
}

impl Curve {
    /// From tilted masses, rounded to the bound's side already.
    ///
    /// With `E_k = Σ_{j≥k} w_j·e^{−(λ+1)(j−k)h}`, going down,
    /// `D_k = e^{−λh}(D_{k+1} + (1 − e^{−h})·E_{k+1})`: sums of positive numbers only. Each level
    /// multiplies the relative error by at most (1+ε)⁴.
    pub(super) fn new(bound: Bound, mut tilted: Vec<f64>, mut frame: Frame) -> Self {
        let keep = libm::exp(-frame.tilt);
        let keep_both = libm::exp(-(frame.tilt + frame.h));
        let rise = -libm::expm1(-frame.h);
        let (mut d, mut e) = (0.0, 0.0);
        for value in tilted.iter_mut().rev() {
            d = keep * (d + rise * e);
            e = *value + keep_both * e;
            *value = d;
        }
        frame.relative += 8.0 * EPS * tilted.len() as f64;
        Self { bound, scaled: tilted, frame }
    }

    /// The loss at point `i` of the window.
    fn loss(&self, i: usize) -> f64 {
        (self.frame.lowest + i as i64) as f64 * self.frame.h + self.frame.offset
    }

    /// The bound on δ at point `i`, without the slop of the losses.
    fn at(&self, i: usize) -> f64 {
        let f = &self.frame;
        let detilt = |index: i64| {
            let part = f.tilt * index as f64;
            (f.scale - part, f.relative + 4.0 * EPS * (f.scale.abs() + part.abs() + 4.0))
        };
        let (log, relative) = detilt(f.lowest + i as i64);
        match self.bound {
            Bound::Upper => {
                let inside = libm::exp(log + relative) * self.scaled[i];
                // Above the window e^{−λkh} is at most its value at the edge.
                let (edge, relative) = detilt(f.lowest + self.scaled.len() as i64);
                let outside = libm::exp(edge + relative) * f.above;
                let total = (inside + outside + f.infinite) * (1.0 + 4.0 * EPS);
                // Not a number means infinity times nothing: not known.
                if total.is_nan() { 1.0 } else { total.min(1.0) }
            }
            Bound::Lower => {
                // What was wrapped into the window from outside counts at most with its tilted mass.
                let outside = (f.above + f.below) * (1.0 + 4.0 * relative);
                let inside = self.scaled[i] - outside;
                let total = libm::exp(log - relative) * inside * (1.0 - 4.0 * EPS);
                if total > 0.0 { total } else { 0.0 }
            }
        }
    }

    /// The bound on ε at δ: upper curves give an ε not below the truth, lower curves one not above.
    pub(super) fn epsilon(&self, delta: f64) -> f64 {
        // First point at which the curve is at or below δ; it falls.
        let (mut low, mut high) = (0, self.scaled.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.at(middle) <= delta { high = middle } else { low = middle + 1 }
        }
        let upper = self.bound == Bound::Upper;
        let epsilon = if low == 0 {
            if upper { self.loss(0) } else { 0.0 }
        } else if low == self.scaled.len() {
            if upper { f64::INFINITY } else { self.loss(low - 1) }
        } else {
            // Between points the composed curve is linear in e^ε.
            let (before, after) = (self.at(low - 1), self.at(low));
            let share = ((before - delta) / (before - after)).clamp(0.0, 1.0);
            self.loss(low - 1) + libm::log1p(share * libm::expm1(self.frame.h))
        };
        let slop = self.total_slop(epsilon);
        (if upper { epsilon + slop } else { epsilon - slop }).max(0.0)
    }

    /// The bound on δ at ε.
    pub(super) fn delta(&self, epsilon: f64) -> f64 {
        let upper = self.bound == Bound::Upper;
        let slop = self.total_slop(epsilon);
        let epsilon = if upper { epsilon - slop } else { epsilon + slop };
        let place = libm::floor((epsilon - self.loss(0)) / self.frame.h);
        let last = self.scaled.len() - 1;
        // Outside the window the curve still falls.
        if !(place >= 0.0) {
            return if upper { 1.0 } else { self.at(0) };
        }
        if place >= last as f64 {
            return if upper { self.at(last) } else { 0.0 };
        }
        let i = place as usize;
        let along = libm::expm1(epsilon - self.loss(i)) / libm::expm1(self.frame.h);
        // 10⁻⁹ more than the rounding of where ε lies between the points.
        let along = if upper { along - 1e-9 } else { along + 1e-9 };
        let (before, after) = (self.at(i), self.at(i + 1));
        let delta = before + along.clamp(0.0, 1.0) * (after - before);
        if upper { delta * (1.0 + 4.0 * EPS) } else { delta * (1.0 - 4.0 * EPS) }
    }

    /// Slop of the losses, and the rounding of grid points and of the interpolation between them.
    fn total_slop(&self, epsilon: f64) -> f64 {
        let edge = self.loss(0).abs().max(self.frame.offset.abs());
        self.frame.slop
            + 16.0 * EPS * (edge + if epsilon.is_finite() { epsilon } else { 0.0 })
            + 1e-9 * self.frame.h
    }
}
