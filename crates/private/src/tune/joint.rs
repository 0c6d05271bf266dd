//! Gradient and statistics of a step as one sum and one release: persons in, noisy numbers out.

use std::borrow::Cow;

use tercet_train::Result;

use crate::mechanism::clip::{Blocks, ClippedSum, Grid, Norms};
use crate::mechanism::ledger::Spent;
use crate::mechanism::noise::Noise;
use crate::method::Steering;

/// What came out of a step: means over the expected batch, with their noise.
#[derive(Debug, PartialEq)]
pub struct Release {
    /// By slot.
    pub gradient: Vec<Vec<f32>>,
    /// By statistic.
    pub statistics: Vec<Vec<f32>>,
}

/// Thresholds of the gradient's blocks, then of the statistics'.
pub fn all_bounds(steering: &Steering) -> Vec<f64> {
    [steering.bounds(), &steering.statistics().bounds()].concat()
}

/// An empty sum for the gradient's slots and the statistics'.
pub fn clipped_sum(steering: &Steering, hardened: bool) -> Result<ClippedSum> {
    let (blocks, statistics) = (steering.blocks(), steering.statistics());
    let mut sizes = blocks.sizes().to_vec();
    let mut pairs = vec![Vec::new(); blocks.len()];
    (0..sizes.len()).for_each(|slot| pairs[blocks.block_of(slot)].push(slot));
    for size in statistics.sizes() {
        pairs.push(vec![sizes.len()]);
        sizes.push(size);
    }
    let rules = [steering.rules(), statistics.rules()].concat();
    let grid = if hardened { Grid::Hardened } else { Grid::Fine };
    let blocks = Blocks::by_pair(sizes, &pairs)?;
    Ok(ClippedSum::with_rules(blocks, all_bounds(steering), rules, grid)?)
}

/// Adds persons' gradients (`[persons, elements]` by slot) and their statistics to a sum. Nothing of
/// them goes anywhere else.
pub fn add(
    sum: &mut ClippedSum,
    steering: &Steering,
    losses: &[f32],
    gradients: Vec<Option<Cow<[f32]>>>,
) -> crate::Result<()> {
    let (people, sizes) = (losses.len(), steering.blocks().sizes());
    let gradients: Vec<Option<Cow<[f32]>>> = if steering.changes_coordinates() {
        let own = |(gradient, size): (Option<Cow<[f32]>>, &usize)| {
            gradient.map_or_else(|| vec![0.0; people * size], Cow::into_owned)
        };
        let mut own: Vec<Vec<f32>> = gradients.into_iter().zip(sizes).map(own).collect();
        steering.forward(&mut own);
        own.into_iter().map(|values| Some(Cow::Owned(values))).collect()
    } else {
        gradients
    };
    let mut slices: Vec<Option<&[f32]>> = gradients.iter().map(|g| g.as_deref()).collect();
    let statistics = steering.statistics();
    let blocks = steering.blocks().len();
    let mut own = Vec::new();
    if !statistics.is_empty() {
        let none = statistics.sizes().len();
        let all = sum.measure(people, &[&slices[..], &vec![None; none]].concat())?;
        let norms = all.norms.chunks_exact(blocks + none).flat_map(|own| &own[..blocks]);
        let norms = Norms { norms: norms.copied().collect() };
        own = statistics.rows(losses, &norms, steering.bounds())?;
    }
    slices.extend(own.iter().map(|values| Some(&values[..])));
    sum.add(people, &slices)?;
    Ok(())
}

/// Ends a step: the mean gradient and the statistics, with their noise.
pub fn release(
    sum: &mut ClippedSum,
    steering: &Steering,
    spent: Spent,
    noise: &Noise,
    (scales, sigma): (&[f64], f64),
    batch: f64,
) -> crate::Result<Release> {
    let all = [scales, &steering.statistics().scales(sigma)].concat();
    let mut gradient = sum.release(spent, noise, &all, batch)?;
    let statistics = gradient.split_off(steering.blocks().sizes().len());
    Ok(Release { gradient, statistics })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::key::Key;
    use crate::mechanism::ledger::Identity;
    use crate::mechanism::ledger::Ledger;
    use crate::mechanism::noise::Split;
    use crate::mechanism::statistics::Statistics;
    use crate::method::{Cost, Layout, Method, Recipe};

    fn steering(method: Method, moves_sigma: bool) -> Steering {
        let layout = Layout {
            sizes: vec![40, 30, 20],
            pairs: vec![vec![0, 1], vec![2]],
            is_a: vec![true, false, true],
        };
        let by_adapter = method.is_controlled() || method == Method::PerLayer;
        let counts = match method {
            Method::Quantile => 1,
            _ if by_adapter => 2,
            _ => 0,
        };
        let recipe = Recipe {
            method,
            by_adapter,
            threshold: 0.5,
            split: Split::LeastEnergy,
            balance: method == Method::DpSgd,
            statistics: Statistics::new(0.1, true, counts).unwrap(),
            sigma: 1.0,
            moves_sigma,
            every: 2,
            steps: 9,
            batch: 4.0,
            seed: 3,
            eta: 0.1,
            quantile: Default::default(),
            schedule: Default::default(),
        };
        Steering::new(recipe, layout).unwrap()
    }

    /// Losses and gradients of persons, made of a seed; poisoned ones are a million times as
    /// large, some no numbers at all.
    fn raw(people: usize, seed: u64, poisoned: bool) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let scale = if poisoned { 1e6 } else { 1.0 };
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| scale * next()).collect() };
        let mut losses = numbers(people);
        let mut gradients: Vec<Vec<f32>> = [40, 30, 20].map(|size| numbers(people * size)).into();
        if poisoned {
            gradients[1][0] = f32::NAN;
            losses[1] = f32::NAN;
        }
        (losses, gradients)
    }

    /// A step up to its release; what came out.
    fn step(
        steering: &mut Steering,
        sum: &mut ClippedSum,
        ledger: &mut Ledger,
        at: u64,
        (losses, gradients): &(Vec<f32>, Vec<Vec<f32>>),
    ) -> Release {
        let key = Key::insecure(1);
        steering.prepare(at, &[3.0, 2.0, 1.0]);
        sum.set_bounds(all_bounds(steering)).unwrap();
        let own = gradients.iter().map(|g| Some(Cow::Borrowed(&g[..]))).collect();
        add(sum, steering, losses, own).unwrap();
        let (sigma, scales) = (steering.sigma(at), steering.scales(at).unwrap());
        let spent = ledger.spend(at, 0.1, sigma, &key).unwrap();
        release(sum, steering, spent, &Noise::new(&key), (&scales, sigma), 4.0).unwrap()
    }

    /// Raw losses, norms and numbers of persons are poisoned with what was released held fixed:
    /// thresholds, noise, coordinates, a controller's state and the update must not move by a bit.
    #[test]
    fn nothing_that_was_not_released_reaches_a_method() {
        for (method, moves_sigma) in [
            (Method::DpSgd, false),
            (Method::AutoS, false),
            (Method::Quantile, false),
            (Method::Adaclip, false),
            (Method::Geoclip, false),
            (Method::PerLayer, false),
            (Method::Schedule, false),
            (Method::RandomAction, false),
            (Method::RandomAction, true),
            (Method::Rldp, false),
            (Method::Rldp, true),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let run = |name: &str| {
                let steering = steering(method, moves_sigma);
                let sum = clipped_sum(&steering, false).unwrap();
                let identity = Identity { run: name.into(), data: "d".into(), config: "c".into() };
                (steering, sum, Ledger::create(&folder.path().join(name), &identity).unwrap())
            };
            let (mut honest, mut poisoned) = (run("honest"), run("poisoned"));
            let first = honest.0.state().unwrap();
            // A policy is asked from the sixth decision on, of one in two steps.
            let steps = if method == Method::Rldp { 17 } else { 5 };
            for at in 0..steps {
                let released =
                    step(&mut honest.0, &mut honest.1, &mut honest.2, at, &raw(4, at, false));
                let other =
                    step(&mut poisoned.0, &mut poisoned.1, &mut poisoned.2, at, &raw(7, 99, true));
                assert!(released != other, "{method:?}: the poison did nothing at all");
                let learn = |steering: &mut Steering| {
                    let noisy = steering.statistics().read(&released.statistics);
                    let scales = steering.scales(at).unwrap();
                    let cost = Cost { rho: 0.1, spent: 0.2 };
                    steering.learn(at, &scales, released.gradient.clone(), &noisy, cost).unwrap()
                };
                assert!(learn(&mut honest.0) == learn(&mut poisoned.0), "{method:?}: update");
                assert!(
                    honest.0.state().unwrap() == poisoned.0.state().unwrap(),
                    "{method:?}: state at {at}"
                );
                assert_eq!(honest.0.scales(at + 1).unwrap(), poisoned.0.scales(at + 1).unwrap());
                assert_eq!(honest.0.sigma(at + 1), poisoned.0.sigma(at + 1));
            }
            let learns = !matches!(
                method,
                Method::DpSgd | Method::AutoS | Method::PerLayer | Method::Schedule
            );
            assert_eq!(honest.0.state().unwrap() != first, learns, "{method:?}");
        }
    }

    /// The sensitivity of a whole step, statistics included, in every method's coordinates: a
    /// person more moves the sum, each block over its noise, by no more than 1/σ.
    #[test]
    fn a_person_moves_a_step_by_no_more_than_the_ledger_says() {
        for method in [
            Method::DpSgd,
            Method::AutoS,
            Method::Quantile,
            Method::Adaclip,
            Method::Geoclip,
            Method::PerLayer,
            Method::RandomAction,
            Method::Rldp,
        ] {
            let steering = steering(method, false);
            let mut sum = clipped_sum(&steering, false).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let identity = Identity { run: "r".into(), data: "d".into(), config: "c".into() };
            let mut ledger = Ledger::create(&folder.path().join("l"), &identity).unwrap();
            let key = Key::insecure(1);
            let scales = [steering.scales(0).unwrap(), steering.statistics().scales(1.0)].concat();
            for seed in 0..20 {
                let (losses, gradients) = raw(1, seed, false);
                let grown = |g: &Vec<f32>| g.iter().map(|x| x * (seed as f32 + 0.01)).collect();
                let gradients: Vec<Vec<f32>> = gradients.iter().map(grown).collect();
                let own = gradients.iter().map(|g| Some(Cow::Borrowed(&g[..]))).collect();
                add(&mut sum, &steering, &[10.0 * losses[0].abs()], own).unwrap();
                // Without noise: what is written says so, too.
                let spent = ledger.spend(seed, 0.1, 0.0, &key).unwrap();
                let none = vec![0.0; scales.len()];
                let blocks = sum.blocks().clone();
                let released = sum.release(spent, &Noise::new(&key), &none, 1.0).unwrap();
                let moved: f64 = released
                    .iter()
                    .enumerate()
                    .map(|(slot, values)| {
                        let noise = scales[blocks.block_of(slot)];
                        values.iter().map(|&x| (f64::from(x) / noise).powi(2)).sum::<f64>()
                    })
                    .sum();
                assert!(moved.sqrt() <= 1.0 && moved > 0.0, "{method:?}: {}", moved.sqrt());
            }
        }
    }
}
