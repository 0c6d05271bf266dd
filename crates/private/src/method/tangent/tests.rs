use super::*;

const RANK: usize = 3;
const IN: usize = 11;
/// Two Bs, as GPT-2's fused attention has three.
const OUT: [usize; 2] = [7, 5];

fn layout() -> Layout {
    Layout {
        sizes: vec![RANK * IN, OUT[0] * RANK, OUT[1] * RANK],
        pairs: vec![vec![0, 1, 2]],
        is_a: vec![true, false, false],
        rank: RANK,
    }
}

fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1u64 << 24) as f64 - 0.5
        })
        .collect()
}

/// x `[m, k]` times y `[k, n]`.
fn product(x: &[f64], y: &[f64], k: usize) -> Vec<f64> {
    let n = y.len() / k;
    let row = |row: &[f64]| {
        (0..n).map(|j| (0..k).map(|i| row[i] * y[i * n + j]).sum()).collect::<Vec<f64>>()
    };
    x.chunks_exact(k).flat_map(row).collect()
}

fn transposed(x: &[f64], width: usize) -> Vec<f64> {
    (0..width).flat_map(|j| x.iter().skip(j).step_by(width).copied()).collect()
}

/// Factors A, B and the gradient G of their product; `k` `[r, r]` with its inverse is another gauge.
struct Point {
    a: Vec<f64>,
    b: Vec<f64>,
    g: Vec<f64>,
}

impl Point {
    fn new(seed: u64) -> Self {
        let out = OUT[0] + OUT[1];
        let [a, b] = [numbers(RANK * IN, seed), numbers(out * RANK, seed + 1)];
        Self { a, b, g: numbers(out * IN, seed + 2) }
    }

    fn slots(&self, a: &[f64], b: &[f64]) -> Vec<Vec<f32>> {
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let (first, second) = b.split_at(OUT[0] * RANK);
        vec![narrow(a), narrow(first), narrow(second)]
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        self.slots(&self.a, &self.b)
    }

    /// `Bᵀ·G` and `G·Aᵀ`.
    fn gradient(&self) -> Vec<Vec<f32>> {
        let out = OUT[0] + OUT[1];
        let a = product(&transposed(&self.b, RANK), &self.g, out);
        self.slots(&a, &product(&self.g, &transposed(&self.a, IN), IN))
    }

    fn tangent(&self) -> Tangent {
        Tangent::at(&layout(), &self.weights())
    }
}

fn forward(tangent: &Tangent, mut gradient: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    tangent.forward(&mut gradient.iter_mut().map(|x| &mut x[..]).collect::<Vec<_>>());
    gradient
}

fn square(values: &[Vec<f32>]) -> f64 {
    values.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum()
}

fn close(one: &[Vec<f32>], other: &[Vec<f32>], most: f32) {
    let all = |x: &[Vec<f32>]| x.concat();
    for (a, b) in all(one).iter().zip(&all(other)) {
        assert!((a - b).abs() < most, "{a} {b}");
    }
}

/// The norm in these coordinates is that of the projection of G to the tangent space, P_B·G + G·P_A −
/// P_B·G·P_A, made here from the projectors themselves.
#[test]
fn lengths_are_those_of_the_change_of_the_product() {
    for seed in 0..20 {
        let point = Point::new(10 * seed);
        let Factors { of_a, of_b, .. } = &point.tangent().adapters[0];
        let projector = |qr: &Qr| product(&qr.q, &transposed(&qr.q, RANK), RANK);
        let (pa, pb) = (projector(of_a), projector(of_b.as_ref().unwrap()));
        let out = OUT[0] + OUT[1];
        let left = product(&pb, &point.g, out);
        let (right, both) = (product(&point.g, &pa, IN), product(&left, &pa, IN));
        let change = left.iter().zip(&right).zip(&both).map(|((l, r), b)| l + r - b);
        let want: f64 = change.map(|x| x * x).sum();
        let got = square(&forward(&point.tangent(), point.gradient()));
        // Factors' gradients are f32; the least singular values here are above a hundredth.
        assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
    }
}

#[test]
fn the_way_back_undoes_the_way_in() {
    for seed in 0..20 {
        let point = Point::new(10 * seed);
        let mut values = forward(&point.tangent(), point.gradient());
        point.tangent().back(&mut values);
        close(&values, &point.gradient(), 2e-5);
    }
}

/// (KA, BK⁻¹) is the same product: the norm is the same, and so is what noise-free coordinates give
/// the product, B·g̃A + g̃B·A in the one gauge and in the other.
#[test]
fn the_gauge_changes_nothing() {
    for seed in 0..20 {
        let point = Point::new(10 * seed);
        let (c, d) = (4.0, 0.25);
        // Unit lower triangular times a diagonal: its inverse by hand.
        let k = [c, 0.0, 0.0, 0.5 * c, 1.0, 0.0, 0.0, 0.3, d];
        let inverse = [1.0 / c, 0.0, 0.0, -0.5, 1.0, 0.0, 0.15 / d, -0.3 / d, 1.0 / d];
        let (a, b) = (product(&k, &point.a, RANK), product(&point.b, &inverse, RANK));
        let other = Point { a, b, g: point.g.clone() };
        let [one, two] =
            [&point, &other].map(|point| square(&forward(&point.tangent(), point.gradient())));
        assert!((one / two - 1.0).abs() < 1e-3, "{one} {two}");
        // Where plain gradients are another thing altogether.
        let plain = square(&point.gradient()) / square(&other.gradient());
        assert!((plain - 1.0).abs() > 0.1, "{plain}");
    }
}

/// Noise on M₂ along Q_B is no change of the product that M₁ does not have already: it is left out.
#[test]
fn noise_beyond_the_tangent_space_is_projected_away() {
    let point = Point::new(3);
    let tangent = point.tangent();
    let of_b = tangent.adapters[0].of_b.as_ref().unwrap();
    let along: Vec<f64> = product(&of_b.q, &numbers(RANK * RANK, 8), RANK);
    let mut values = point.slots(&vec![0.0; RANK * IN], &along);
    tangent.back(&mut values);
    assert!(square(&values) < 1e-12, "{}", square(&values));
}

#[test]
fn at_the_start_only_the_bs_learn_and_get_noise() {
    let mut point = Point::new(5);
    point.b.fill(0.0);
    let mut values = forward(&point.tangent(), point.gradient());
    assert!(values[0].iter().all(|&x| x == 0.0) && square(&values) > 0.0);
    values[0].fill(7.0);
    point.tangent().back(&mut values);
    assert!(values[0].iter().all(|&x| x == 0.0), "noise in A at the start");
    close(&values[1..], &point.gradient()[1..], 1e-5);
    // Weights that are no numbers, and an A without rank, leave everything as it is.
    for spoilt in [f64::NAN, 0.0] {
        point.a.fill(spoilt);
        let gradient = Point::new(5).gradient();
        assert_eq!(forward(&point.tangent(), gradient.clone()), gradient);
    }
}
