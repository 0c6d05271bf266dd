use super::*;
use crate::mechanism::key::Key;
use crate::mechanism::ledger::Spent;
use crate::mechanism::noise::Noise;
use proptest::prelude::*;

fn pairs() -> Blocks {
    Blocks::by_pair(vec![5, 3, 4], &[vec![0, 2], vec![1]]).unwrap()
}

fn sum(bounds: &[f64], rule: Rule, grid: Grid) -> ClippedSum {
    ClippedSum::new(pairs(), bounds.to_vec(), rule, grid).unwrap()
}

/// The sum alone, as real numbers.
fn values(sum: &ClippedSum) -> Vec<Vec<f64>> {
    let unit = |slot: usize| sum.units[sum.blocks.block_of[slot]];
    let slots = sum.sums.iter().enumerate();
    slots.map(|(slot, s)| s.iter().map(|&x| x as f64 * unit(slot)).collect()).collect()
}

fn add(sum: &mut ClippedSum, person: &[Vec<f32>]) -> Norms {
    let slots: Vec<_> = person.iter().map(|x| Some(&x[..])).collect();
    sum.add(1, &slots).unwrap()
}

fn norm(values: &[&[f64]]) -> f64 {
    values.iter().flat_map(|v| v.iter()).map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn blocks_must_hold_every_slot_once() {
    let sizes = || vec![5, 3, 4];
    assert_eq!(pairs().dims(), [9, 3]);
    assert_eq!(Blocks::flat(sizes()).unwrap().dims(), [12]);
    for wrong in [
        vec![vec![0, 1]],
        vec![vec![0, 1], vec![1, 2]],
        vec![vec![0, 1, 2], vec![]],
        vec![vec![0, 1, 2, 3]],
    ] {
        assert!(Blocks::by_pair(sizes(), &wrong).is_err(), "{wrong:?}");
    }
    assert!(Blocks::flat(vec![]).is_err() && Blocks::flat(vec![3, 0]).is_err());
    assert!(Blocks::flat(vec![usize::MAX, 2]).is_err());
}

#[test]
fn thresholds_that_mean_nothing_are_refused() {
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
        assert!(ClippedSum::new(pairs(), vec![1.0, bad], Rule::Clip, Grid::Fine).is_err());
        let rule = Rule::AutoS { gamma: bad };
        assert!(ClippedSum::new(pairs(), vec![1.0, 1.0], rule, Grid::Fine).is_err());
    }
    assert!(ClippedSum::new(pairs(), vec![1.0], Rule::Clip, Grid::Fine).is_err());
}

#[test]
fn gradients_of_other_sizes_are_refused_and_change_nothing() {
    let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
    let (a, b, c) = ([1.0; 10], [1.0; 6], [1.0; 7]);
    assert!(sum.add(2, &[Some(&a), Some(&b), Some(&c)]).is_err());
    assert!(sum.add(2, &[Some(&a), Some(&b)]).is_err());
    assert!(sum.add(usize::MAX, &[Some(&a), None, None]).is_err());
    assert!(values(&sum).iter().flatten().all(|&x| x == 0.0) && sum.people == 0);
    // Nobody, and slots that no loss reached.
    sum.add(0, &[Some(&[]), None, None]).unwrap();
    let norms = sum.add(2, &[Some(&a), None, None]).unwrap();
    assert_eq!(norms.norms, [5f64.sqrt(), 0.0, 5f64.sqrt(), 0.0]);
}

#[test]
fn a_gradient_that_is_not_finite_counts_as_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
        let norms = add(&mut sum, &[vec![0.1; 5], vec![0.1, bad, 0.1], vec![0.1; 4]]);
        assert!(norms.norms.iter().all(|n| n.is_infinite()));
        assert_eq!(sum.not_finite(), 1);
        assert!(sum.sums.iter().flatten().all(|&x| x == 0), "{bad}");
        // The largest f32 is finite.
        add(&mut sum, &[vec![f32::MAX; 5], vec![-f32::MAX; 3], vec![f32::MAX; 4]]);
        assert_eq!(sum.not_finite(), 1);
        assert!(norm(&[&values(&sum)[1]]) <= 1.0);
    }
}

proptest! {
    /// The promise, in numbers from 2⁻¹⁴⁹ to the largest, and at thresholds about a norm.
    #[test]
    fn nobody_says_more_than_the_threshold(
        x in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::SUBNORMAL, 12),
        near in prop_oneof![Just(None), (0.9f64..1.1).prop_map(Some)],
        bound in 1e-6f64..1e6,
        hardened: bool,
        auto: bool,
    ) {
        let person = [x[..5].to_vec(), x[5..8].to_vec(), x[8..].to_vec()];
        let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let own = norm(&[&wide(&person[0]), &wide(&person[2])]);
        let near = near.map(|f| f * own).filter(|b| (1e-30..1e30).contains(b));
        let bounds = [near.unwrap_or(bound), bound];
        let rule = if auto { Rule::AutoS { gamma: 0.01 } } else { Rule::Clip };
        let grid = if hardened { Grid::Hardened } else { Grid::Fine };
        let mut sum = sum(&bounds, rule, grid);
        add(&mut sum, &person);
        let values = values(&sum);
        prop_assert!(norm(&[&values[0], &values[2]]) <= bounds[0]);
        prop_assert!(norm(&[&values[1]]) <= bounds[1]);
        if !auto && own <= bounds[0] * SAFE {
            for (got, want) in values[0].iter().zip(&person[0]) {
                prop_assert!((got - f64::from(*want)).abs() <= sum.units[0] / 2.0);
            }
        }
    }

    /// Any order, any portions, any number of threads: the same integers.
    #[test]
    fn sums_do_not_depend_on_order_or_portions(
        seed in 0u32..1000,
        people in 1usize..9,
        cut in 0usize..9,
    ) {
        let number = |i: usize| (((i as u32 + seed).wrapping_mul(2_654_435_761)) >> 8) as f32 / 1e7 - 0.8;
        let sizes = [5, 3, 4];
        let slot = |s: usize| -> Vec<f32> {
            (0..people * sizes[s]).map(|i| number(i * 3 + s)).collect()
        };
        let all: Vec<Vec<f32>> = (0..3).map(slot).collect();
        let run = |parts: &[std::ops::Range<usize>], threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut sum = sum(&[0.9, 0.4], Rule::Clip, Grid::Fine);
                for part in parts {
                    let slots: Vec<_> = (0..3)
                        .map(|s| Some(&all[s][part.start * sizes[s]..part.end * sizes[s]]))
                        .collect();
                    sum.add(part.len(), &slots).unwrap();
                }
                sum.sums
            })
        };
        let cut = cut.min(people);
        let whole = run(std::slice::from_ref(&(0..people)), 1);
        prop_assert_eq!(&whole, &run(&[cut..people, 0..cut], 3));
        let ones: Vec<_> = (0..people).rev().map(|p| p..p + 1).collect();
        prop_assert_eq!(&whole, &run(&ones, 2));
    }
}

/// A person of a few elements is the same person written out, at the same bits, whatever the rule.
#[test]
fn a_sparse_person_is_the_dense_one() {
    for rule in [Rule::Clip, Rule::AutoS { gamma: 0.01 }] {
        for values in [[3.0, 0.1, -1e3, 0.4], [0.1, 0.1, 0.1, 0.1], [f32::NAN, 1.0, 1.0, 1.0]] {
            let (mut sparse, mut dense) =
                (sum(&[1.0, 0.3], rule, Grid::Fine), sum(&[1.0, 0.3], rule, Grid::Fine));
            let places = [(0, 4), (0, 1), (2, 3), (1, 2)];
            let mut person = vec![vec![0.0; 5], vec![0.0; 3], vec![0.0; 4]];
            let elements = places.iter().zip(values).map(|(&(slot, at), value)| {
                person[slot][at] = value;
                (slot, at, value)
            });
            sparse.add_sparse(&elements.collect::<Vec<_>>()).unwrap();
            add(&mut dense, &person);
            assert_eq!(sparse.sums, dense.sums);
            assert_eq!((sparse.people, sparse.not_finite), (dense.people, dense.not_finite));
        }
    }
    let mut sum = sum(&[1.0, 0.3], Rule::Clip, Grid::Fine);
    for wrong in [(0, 5, 1.0), (3, 0, 1.0)] {
        assert!(sum.add_sparse(&[(0, 0, 1.0), wrong]).is_err());
    }
    assert!(sum.people == 0 && sum.sums.iter().flatten().all(|&x| x == 0));
    let places: Vec<_> = (0..10).map(|element| pairs().place(0, element)).collect();
    assert_eq!(places[..2], [Some((0, 0)), Some((0, 1))]);
    assert_eq!(
        places[4..],
        [Some((0, 4)), Some((2, 0)), Some((2, 1)), Some((2, 2)), Some((2, 3)), None]
    );
}

#[test]
fn auto_s_is_its_formula() {
    let mut sum = sum(&[2.0, 1.0], Rule::AutoS { gamma: 0.5 }, Grid::Fine);
    add(&mut sum, &[vec![3.0, 0.0, 0.0, 0.0, 0.0], vec![0.0; 3], vec![0.0, 4.0, 0.0, 0.0]]);
    // C/(n + γ) = 2/(5 + ½).
    let values = values(&sum);
    assert!((values[0][0] - SAFE * 3.0 * 2.0 / 5.5).abs() < 1e-15);
    assert!((values[2][1] - SAFE * 4.0 * 2.0 / 5.5).abs() < 1e-15);
    assert!(values[1].iter().all(|&x| x == 0.0));
}

#[test]
fn a_release_with_less_noise_than_was_written_is_refused() {
    let noise = Noise::new(&Key::insecure(1));
    let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
    // σ·C for each of two blocks is σ/√2 in truth.
    let error = sum.release(Spent::of(0, 1.0), &noise, &[1.0, 1.0], 8.0).unwrap_err();
    assert!(error.to_string().contains("0.7071"), "{error}");
    let equal = [2f64.sqrt(); 2];
    assert!(sum.release(Spent::of(0, 1.0), &noise, &equal, 8.0).is_ok());
    for batch in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(sum.release(Spent::of(0, 1.0), &noise, &equal, batch).is_err());
    }
    assert!(sum.release(Spent::of(0, 1.0), &noise, &[2.0], 8.0).is_err());
    assert!(sum.release(Spent::of(0, 1.0), &noise, &[f64::NAN, 2.0], 8.0).is_err());
}

/// Noise that was drawn ahead is the noise that would have been drawn, and serves no other line.
#[test]
fn noise_drawn_ahead_opens_one_release_alone() {
    let noise = Noise::new(&Key::insecure(1));
    let (scales, person) = ([2.0; 2], [vec![0.1; 5], vec![0.1; 3], vec![0.1; 4]]);
    let filled = || {
        let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
        add(&mut sum, &person);
        sum
    };
    let ahead = filled().wanted(&scales).unwrap().draw(&noise, 7).unwrap();
    let one = filled().release_drawn(Spent::of(7, 1.0), ahead, 8.0).unwrap();
    assert_eq!(one, filled().release(Spent::of(7, 1.0), &noise, &scales, 8.0).unwrap());
    let ahead = |bound: f64, stream| {
        let other = sum(&[bound, 1.0], Rule::Clip, Grid::Fine);
        other.wanted(&scales).unwrap().draw(&noise, stream).unwrap()
    };
    for (bound, stream, sigma) in [(1.0, 8, 1.0), (3.0, 7, 1.0), (1.0, 7, 1.5)] {
        let drawn = ahead(bound, stream);
        let refused = filled().release_drawn(Spent::of(7, sigma), drawn, 8.0);
        assert!(refused.is_err(), "{bound} {stream} {sigma}");
    }
    // Within one power of two the grid is the same; the thresholds of the sum are what counts.
    let drawn = ahead(0.6, 7);
    assert!(filled().release_drawn(Spent::of(7, 1.0), drawn, 8.0).is_ok());
}

#[test]
fn sums_from_elsewhere_are_added_whole_or_not_at_all() {
    let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
    sum.weigh(&[0.01; 3]).unwrap();
    sum.add_units(&[vec![3; 5], vec![4; 3]]).unwrap();
    assert_eq!(sum.sums, [vec![3; 5], vec![4; 3], vec![0; 4]]);
    for wrong in [vec![vec![1; 5], vec![1; 4]], vec![vec![]; 4]] {
        assert!(sum.add_units(&wrong).is_err());
    }
    assert_eq!(sum.sums, [vec![3; 5], vec![4; 3], vec![0; 4]]);
    sum.clear();
    assert!(sum.sums.iter().flatten().all(|&x| x == 0));
}

#[test]
fn a_release_empties_the_sum() {
    let noise = Noise::new(&Key::insecure(1));
    let mut sum = sum(&[1.0, 1.0], Rule::Clip, Grid::Fine);
    add(&mut sum, &[vec![0.1; 5], vec![0.1; 3], vec![0.1; 4]]);
    let first = sum.release(Spent::of(0, 0.0), &noise, &[0.0, 0.0], 2.0).unwrap();
    assert_eq!(first[0], [0.05; 5]);
    let second = sum.release(Spent::of(1, 0.0), &noise, &[0.0, 0.0], 2.0).unwrap();
    assert_eq!(second[0], [0.0; 5]);
}
