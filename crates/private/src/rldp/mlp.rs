//! Two hidden layers of 128 with ReLU, their gradients, and Adam; plain f32 on slices.

use serde::{Deserialize, Serialize};

use super::random::Random;

/// Width of a hidden layer.
pub(super) const HIDDEN: usize = 128;
/// Learning rate of everything.
const RATE: f32 = 3e-4;
const BETAS: (f32, f32) = (0.9, 0.999);
const TINY: f32 = 1e-8;

/// `inputs → 128 → 128 → outputs`. A layer's parameters are its weights `[in, out]`, then its
/// biases `[out]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Mlp {
    inputs: usize,
    outputs: usize,
    pub params: Vec<f32>,
}

impl Mlp {
    /// Uniform within ±1/√fan-in, biases too.
    pub fn new(inputs: usize, outputs: usize, random: &mut Random) -> Self {
        let mut net = Self { inputs, outputs, params: Vec::new() };
        for (inputs, outputs) in net.layers() {
            let bound = 1.0 / (inputs as f32).sqrt();
            net.params.extend((0..(inputs + 1) * outputs).map(|_| bound * random.centred()));
        }
        net
    }

    pub fn layers(&self) -> [(usize, usize); 3] {
        [(self.inputs, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, self.outputs)]
    }

    /// Whether it has this shape and finite parameters.
    pub fn is_like(&self, other: &Self) -> bool {
        self.layers() == other.layers() && are_numbers(&self.params, other.params.len())
    }

    /// What goes into each layer, and at last what comes out.
    pub fn forward(&self, x: &[f32]) -> Vec<Vec<f32>> {
        let (mut trace, mut at) = (vec![x.to_vec()], 0);
        for (layer, (inputs, outputs)) in self.layers().into_iter().enumerate() {
            let (weights, rest) = self.params[at..].split_at(inputs * outputs);
            let mut y = rest[..outputs].to_vec();
            for (&x, row) in trace[layer].iter().zip(weights.chunks_exact(outputs)) {
                y.iter_mut().zip(row).for_each(|(y, w)| *y += x * w);
            }
            if layer < 2 {
                y.iter_mut().for_each(|y| *y = y.max(0.0));
            }
            at += (inputs + 1) * outputs;
            trace.push(y);
        }
        trace
    }

    /// Adds the gradient of the parameters to `grads`, given that of the outputs; returns that of
    /// the inputs.
    pub fn backward(&self, trace: &[Vec<f32>], d_out: &[f32], grads: &mut [f32]) -> Vec<f32> {
        let (mut d, mut end) = (d_out.to_vec(), self.params.len());
        for (layer, (inputs, outputs)) in self.layers().into_iter().enumerate().rev() {
            let at = end - (inputs + 1) * outputs;
            let weights = self.params[at..].chunks_exact(outputs).take(inputs);
            let (d_weights, d_bias) = grads[at..end].split_at_mut(inputs * outputs);
            d_bias.iter_mut().zip(&d).for_each(|(g, d)| *g += d);
            let rows = weights.zip(d_weights.chunks_exact_mut(outputs)).zip(&trace[layer]);
            let below = rows.map(|((row, d_row), &x)| {
                d_row.iter_mut().zip(&d).for_each(|(g, d)| *g += x * d);
                // Behind a ReLU: what it let through is above 0.
                if layer > 0 && x <= 0.0 { 0.0 } else { dot(row, &d) }
            });
            d = below.collect();
            end = at;
        }
        d
    }
}

/// Whether there are so many, all finite.
pub(super) fn are_numbers(values: &[f32], count: usize) -> bool {
    values.len() == count && values.iter().all(|v| v.is_finite())
}

/// Eight sums side by side, always the same eight.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s += a * b);
    }
    sums.iter().sum()
}

/// What Adam (Kingma & Ba 2015) remembers of the gradients of some parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    steps: u64,
}

impl Adam {
    pub fn new(params: usize) -> Self {
        Self { first: vec![0.0; params], second: vec![0.0; params], steps: 0 }
    }

    /// One step against the gradient.
    pub fn step(&mut self, params: &mut [f32], grads: &[f32]) {
        self.steps += 1;
        let t = self.steps as f64;
        let bias = |beta: f32| (1.0 - libm::pow(beta.into(), t)) as f32;
        let (bias1, bias2) = (bias(BETAS.0), bias(BETAS.1));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((p, g), (m, v)) in params.iter_mut().zip(grads).zip(moments) {
            *m = BETAS.0 * *m + (1.0 - BETAS.0) * g;
            *v = BETAS.1 * *v + (1.0 - BETAS.1) * g * g;
            *p -= RATE * (*m / bias1) / ((*v / bias2).sqrt() + TINY);
        }
    }

    /// Whether it is of as many parameters as `other`, and sound.
    pub fn is_like(&self, other: &Self) -> bool {
        let sizes = other.first.len();
        let whole = are_numbers(&self.first, sizes) && are_numbers(&self.second, sizes);
        whole && self.steps < 1 << 42 && self.second.iter().all(|v| *v >= 0.0)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The network in f64, written from its definition.
    pub fn reference(net: &Mlp, params: &[f64], x: &[f64]) -> Vec<f64> {
        let (mut x, mut at) = (x.to_vec(), 0);
        for (layer, (inputs, outputs)) in net.layers().into_iter().enumerate() {
            let unit = |o: usize| {
                let bias = params[at + inputs * outputs + o];
                let sum = (0..inputs).map(|i| x[i] * params[at + i * outputs + o]).sum::<f64>();
                if layer < 2 { (sum + bias).max(0.0) } else { sum + bias }
            };
            x = (0..outputs).map(unit).collect();
            at += (inputs + 1) * outputs;
        }
        x
    }

    pub fn wide(narrow: &[f32]) -> Vec<f64> {
        narrow.iter().map(|&v| v.into()).collect()
    }

    /// Compares with central differences of an f64 loss, at a spread of parameters.
    ///
    /// With h = 1e-6 the differences are good to 1e-9 (f64 rounding over h), unless a ReLU bends
    /// within h of the point, which at these seeds none does. The gradient in f32 sums at most
    /// 128·128·rows products: relative to the largest entry 1e-5 is a hundred roundings.
    pub fn against_differences(point: &[f32], gradient: &[f32], loss: impl Fn(&[f64]) -> f64) {
        let (mut point, h) = (wide(point), 1e-6);
        let largest = gradient.iter().fold(0.0f32, |a, g| a.max(g.abs()));
        assert!(largest > 0.0);
        let stride = (point.len() / 499).max(1);
        for i in (0..point.len()).step_by(stride) {
            let at = point[i];
            let mut value = |v: f64| {
                point[i] = v;
                loss(&point)
            };
            let slope = (value(at + h) - value(at - h)) / (2.0 * h);
            point[i] = at;
            let error = (slope - f64::from(gradient[i])).abs();
            assert!(error < 1e-5 * f64::from(largest) + 1e-8, "{i}: {slope} {}", gradient[i]);
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_network() {
        let net = Mlp::new(7, 3, &mut Random::new(1, 0));
        let x: Vec<f32> = (0..7).map(|i| (i as f32 * 0.7).sin()).collect();
        let weigh = [0.3f32, -1.0, 0.5];
        let mut grads = vec![0.0; net.params.len()];
        let trace = net.forward(&x);
        let d_x = net.backward(&trace, &weigh, &mut grads);
        let loss = |params: &[f64], x: &[f64]| {
            reference(&net, params, x).iter().zip(weigh).map(|(y, w)| y * f64::from(w)).sum()
        };
        let out = reference(&net, &wide(&net.params), &wide(&x));
        for (ours, exact) in trace[3].iter().zip(out) {
            assert!((f64::from(*ours) - exact).abs() < 1e-6, "{ours} {exact}");
        }
        against_differences(&net.params, &grads, |params| loss(params, &wide(&x)));
        against_differences(&x, &d_x, |x| loss(&wide(&net.params), x));
    }

    #[test]
    fn gradients_of_rows_add_up() {
        let net = Mlp::new(2, 1, &mut Random::new(2, 0));
        let trace = net.forward(&[1.0, -1.0]);
        let mut once = vec![0.0; net.params.len()];
        net.backward(&trace, &[1.0], &mut once);
        let mut twice = once.clone();
        net.backward(&trace, &[1.0], &mut twice);
        assert!(once.iter().zip(&twice).all(|(a, b)| 2.0 * a == *b));
    }

    #[test]
    fn adam_takes_the_step_of_its_paper() {
        // By hand: after one gradient m/bias = g and v/bias = g², so the step is RATE·sign(g).
        let (mut params, mut adam) = (vec![1.0f32, -2.0, 5.0], Adam::new(3));
        adam.step(&mut params, &[0.5, -3.0, 0.0]);
        let expected = [1.0 - 3e-4, -2.0 + 3e-4, 5.0];
        for (p, expected) in params.iter().zip(expected) {
            assert!((p - expected).abs() < 1e-6, "{p}");
        }
    }
}
