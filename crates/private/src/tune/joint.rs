//! Gradient and statistics of a step as one sum and one release: persons in, noisy numbers out.

use std::borrow::Cow;

use rayon::prelude::*;
use tercet_tensor::{GroupSum, Tensor};
use tercet_train::{Error, Result};

use crate::mechanism::clip::{Blocks, ClippedSum, Drawn, Grid, Norms, Wanted};
use crate::mechanism::ledger::Spent;
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

/// What a portion of persons gave. Private, all of it.
pub struct Portion<'a> {
    /// Mean loss of each, in nats.
    pub losses: &'a [f32],
    /// What each one's gradient is to be multiplied by.
    pub shares: &'a [f64],
    /// `[persons or more, elements]` by slot.
    pub gradients: Gradients<'a>,
}

/// Where gradients are.
pub enum Gradients<'a> {
    /// In main memory; `None` where no loss reached the slot.
    Here(Vec<Option<Cow<'a, [f32]>>>),
    /// On a device, with the sum there.
    There(&'a mut GroupSum, Vec<&'a Tensor>),
}

/// Adds persons' gradients and their statistics to a sum. Nothing of them goes anywhere else.
/// What is on a device is weighed here and added there, until [`collect`].
///
/// # Errors
/// [`Error::Fault`] for gradients on a device in other coordinates than their own; as
/// [`ClippedSum::add`].
pub fn add(sum: &mut ClippedSum, steering: &Steering, portion: Portion) -> Result<()> {
    let Portion { losses, mut gradients, .. } = portion;
    let (people, sizes) = (losses.len(), steering.blocks().sizes());
    let mut shares = Cow::Borrowed(portion.shares);
    if steering.changes_coordinates() {
        let Gradients::Here(found) = gradients else {
            return Err(Error::Fault("gradients on a device change no coordinates".into()));
        };
        let own = |(gradient, &size): (Option<Cow<[f32]>>, &usize)| {
            let mut own = gradient.map_or_else(|| vec![0.0; people * size], Cow::into_owned);
            own.par_chunks_mut(size).zip(&shares[..]).for_each(|(own, &share)| {
                own.iter_mut().for_each(|x| *x = (f64::from(*x) * share) as f32);
            });
            own
        };
        let mut own: Vec<Vec<f32>> = found.into_iter().zip(sizes).map(own).collect();
        steering.forward(&mut own);
        gradients = Gradients::Here(own.into_iter().map(|own| Some(Cow::Owned(own))).collect());
        shares = Cow::Owned(vec![1.0; people]);
    }
    let here: Vec<Option<&[f32]>> = match &gradients {
        Gradients::Here(found) => found.iter().map(|own| own.as_deref()).collect(),
        Gradients::There(..) => Vec::new(),
    };
    let squares = match &gradients {
        Gradients::Here(_) => sum.squares(people, &here)?,
        Gradients::There(there, tensors) => there.squares(tensors, people)?,
    };
    // Squares of all slots, those of the statistics for now 0, and then what they are.
    let statistics = steering.statistics();
    let slots = sizes.len() + statistics.sizes().len();
    let mut all = vec![0f64; people * slots];
    let each = all.chunks_exact_mut(slots).zip(squares.chunks_exact(sizes.len())).zip(&shares[..]);
    each.for_each(|((all, own), &share)| {
        all.iter_mut().zip(own).for_each(|(all, own)| *all = own * share * share);
    });
    let mut rows = Vec::new();
    if !statistics.is_empty() {
        let (norms, blocks) = (sum.norms(&all).norms, steering.blocks().len());
        let per = norms.len() / people.max(1);
        let norms = norms.chunks_exact(per.max(1)).flat_map(|own| &own[..blocks]).copied();
        rows = statistics.rows(losses, &Norms { norms: norms.collect() }, steering.bounds())?;
        for (slot, (row, size)) in rows.iter().zip(statistics.sizes()).enumerate() {
            for (person, own) in row.chunks_exact(size).enumerate() {
                all[person * slots + sizes.len() + slot] =
                    own.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            }
        }
    }
    let mut weights = sum.weigh(&all)?;
    for (slot, row) in rows.iter().enumerate() {
        sum.add_weighed(sizes.len() + slot, row, &weights)?;
    }
    for (weights, share) in weights.chunks_exact_mut(slots).zip(&shares[..]) {
        weights[..sizes.len()].iter_mut().for_each(|weight| *weight *= share);
    }
    match gradients {
        Gradients::Here(_) => {
            for (slot, own) in here.iter().enumerate() {
                own.map_or(Ok(()), |own| sum.add_weighed(slot, own, &weights))?;
            }
        }
        Gradients::There(there, tensors) => {
            let own = weights.chunks_exact(slots).flat_map(|own| &own[..sizes.len()]);
            there.add(&tensors, &own.copied().collect::<Vec<f64>>())?;
        }
    }
    Ok(())
}

/// Takes what a device has summed up into the sum of a step.
///
/// # Errors
/// The device's; as [`ClippedSum::add_units`].
pub fn collect(sum: &mut ClippedSum, there: &mut GroupSum) -> Result<()> {
    Ok(sum.add_units(&there.take()?)?)
}

/// The noise of a step: on the gradient as `scales` say, on the statistics by `sigma`.
pub fn wanted(
    sum: &ClippedSum,
    steering: &Steering,
    (scales, sigma): (&[f64], f64),
) -> crate::Result<Wanted> {
    sum.wanted(&[scales, &steering.statistics().scales(sigma)].concat())
}

/// Ends a step: the mean gradient and the statistics, with their noise.
pub fn release(
    sum: &mut ClippedSum,
    steering: &Steering,
    spent: Spent,
    drawn: Drawn,
    batch: f64,
) -> crate::Result<Release> {
    let mut gradient = sum.release_drawn(spent, drawn, batch)?;
    let statistics = gradient.split_off(steering.blocks().sizes().len());
    Ok(Release { gradient, statistics })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mechanism::key::Key;
    use crate::mechanism::ledger::Identity;
    use crate::mechanism::ledger::Ledger;
    use crate::mechanism::noise::{Noise, Split};
    use crate::mechanism::statistics::Statistics;
    use crate::method::{Cost, Layout, Method, Recipe};

    fn steering(method: Method, moves_sigma: bool, moves_shares: bool) -> Steering {
        let layout = Layout {
            sizes: vec![40, 30, 20],
            pairs: vec![vec![0, 1], vec![2]],
            is_a: vec![true, false, true],
            rank: 10,
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
            split: (!moves_shares).then_some(Split::LeastEnergy),
            balance: method == Method::DpSgd,
            tangent: method == Method::PerLayer,
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

    /// Released ones: what coordinates may follow.
    fn weights() -> Vec<Vec<f32>> {
        [40, 30, 20].map(|size| (0..size).map(|i| (i as f32 * 0.7).sin()).collect()).into()
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
        steering.prepare(at, &weights());
        sum.set_bounds(all_bounds(steering)).unwrap();
        let own = gradients.iter().map(|g| Some(Cow::Borrowed(&g[..]))).collect();
        let shares = vec![1.0; losses.len()];
        let gradients = Gradients::Here(own);
        add(sum, steering, Portion { losses, shares: &shares, gradients }).unwrap();
        let (sigma, scales) = (steering.sigma(at), steering.scales(at).unwrap());
        let wanted = wanted(sum, steering, (&scales, sigma)).unwrap();
        let drawn = wanted.draw(&Noise::new(&key), ledger.next_stream()).unwrap();
        let spent = ledger.spend(at, 0.1, sigma, &key).unwrap();
        release(sum, steering, spent, drawn, 4.0).unwrap()
    }

    /// Raw losses, norms and numbers of persons are poisoned with what was released held fixed:
    /// thresholds, noise, coordinates, a controller's state and the update must not move by a bit.
    #[test]
    fn nothing_that_was_not_released_reaches_a_method() {
        for (method, moves_sigma, moves_shares) in [
            (Method::DpSgd, false, false),
            (Method::AutoS, false, false),
            (Method::Quantile, false, false),
            (Method::Adaclip, false, false),
            (Method::Geoclip, false, false),
            (Method::PerLayer, false, false),
            (Method::Schedule, false, false),
            (Method::RandomAction, false, false),
            (Method::RandomAction, true, true),
            (Method::Rldp, false, true),
            (Method::Rldp, true, false),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let run = |name: &str| {
                let steering = steering(method, moves_sigma, moves_shares);
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
            let mut steering = steering(method, false, method.is_controlled());
            steering.prepare(0, &weights());
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
                let losses = [10.0 * losses[0].abs()];
                let gradients = Gradients::Here(own);
                let portion = Portion { losses: &losses, shares: &[0.7], gradients };
                add(&mut sum, &steering, portion).unwrap();
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
